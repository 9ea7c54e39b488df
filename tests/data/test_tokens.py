import os

import numpy as np
import pytest

from memlm import files
from memlm.config import ConfigError
from memlm.data import tokens as tokens_module
from memlm.data.corpora.base import Corpus
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus, tokenize

BYTES = train_tokenizer("byte", [], 0)
CHARS = train_tokenizer("char", ["abcdefgh é"], 0)


class Fixed(Corpus):
    """A corpus of given documents."""

    def __init__(self, *train: str):
        self.name = "fixed"
        self._train = list(train)

    def _load(self):
        return {"train": self._train, "val": ["héh"], "test": []}


def test_tokens_and_offsets_by_hand(tmp_path):
    found = tokenize(Fixed("ab", "", "é", "abc"), BYTES, "train", tmp_path)
    assert found.tokens.tolist() == [98, 99, 0xC3 + 1, 0xA9 + 1, 98, 99, 100]
    assert found.offsets.tolist() == [0, 2, 2, 4, 7]
    assert (found.tokens.dtype, found.offsets.dtype) == (np.int32, np.int64)
    assert (found.n_token, found.n_document) == (7, 4)
    assert [found.document(i).tolist() for i in range(4)] == [[98, 99], [], [196, 170], [98, 99, 100]]
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=f"document {wrong} does not exist: there are 4"):
            found.document(wrong)


@pytest.mark.parametrize("most", [0, 2**30])  # mapped, read
def test_the_cache_is_used_and_read_only(tmp_path, monkeypatch, most):
    monkeypatch.setattr(files, "MOST_IN_MEMORY", most)
    corpus = Fixed("abc", "def")
    first = tokenize(corpus, BYTES, "train", tmp_path)
    monkeypatch.setattr(tokens_module, "_encode", lambda *_: pytest.fail("encoded again"))
    again = tokenize(Fixed("abc", "def"), BYTES, "train", tmp_path)
    for found in (first, again):
        assert not found.tokens.flags.writeable
        assert not found.tokens.flags.owndata
        assert found.document(1).tolist() == [101, 102, 103]
    assert first.tokens.tolist() == again.tokens.tolist()


def test_a_file_that_is_cut_short_while_it_is_used_changes_nothing(tmp_path):
    found = tokenize(Fixed("abcd" * 5000), BYTES, "train", tmp_path)
    (file,) = (tmp_path / "tokens").glob("*-tokens.npy")
    os.truncate(file, 0)
    assert found.tokens.tolist() == [98, 99, 100, 101] * 5000


@pytest.mark.parametrize("which", ["tokens", "offsets"])
def test_every_flipped_bit_is_noticed(tmp_path, which):
    expected = tokenize(Fixed("abcd", "ef"), BYTES, "train", tmp_path).tokens.tolist()
    (file,) = (tmp_path / "tokens").glob(f"*-{which}.npy")
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert tokens_module._load(*sorted((tmp_path / "tokens").iterdir(), reverse=True)) is None, place
    found = tokenize(Fixed("abcd", "ef"), BYTES, "train", tmp_path)
    assert (found.tokens.tolist(), file.read_bytes()) == (expected, whole)


def test_corpora_tokenizers_and_splits_are_kept_apart(tmp_path):
    asked = [
        (Fixed("abc"), BYTES, "train", [98, 99, 100]),
        (Fixed("abd"), BYTES, "train", [98, 99, 101]),
        (Fixed("abc"), CHARS, "train", [3, 4, 5]),
        (Fixed("abc"), BYTES, "val", [105, 196, 170, 105]),
    ]
    for _ in range(2):  # fresh, then from the cache
        for corpus, tokenizer, split, expected in asked:
            assert tokenize(corpus, tokenizer, split, tmp_path).tokens.tolist() == expected


@pytest.mark.parametrize("which", ["tokens", "offsets"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "header", "missing", "other"])
def test_a_damaged_cache_is_built_again(tmp_path, which, damage):
    documents = ["abcd" * 50, "ef" * 30, "gh"]
    first = tokenize(Fixed(*documents), BYTES, "train", tmp_path)
    expected = (first.tokens.tolist(), first.offsets.tolist())
    (file,) = (tmp_path / "tokens").glob(f"*-{which}.npy")
    whole = file.read_bytes()
    file.unlink()
    if damage == "other":
        np.save(file, np.arange(5, dtype=np.int32 if which == "tokens" else np.int64))
    elif damage != "missing":
        header = whole.replace(b"'descr'", b"'de(cr'")
        contents = {"empty": b"", "truncated": whole[:-9], "garbage": b"\x00\xff" * 500, "header": header}
        file.write_bytes(contents[damage])
    for _ in range(2):
        again = tokenize(Fixed(*documents), BYTES, "train", tmp_path)
        assert (again.tokens.tolist(), again.offsets.tolist()) == expected
    assert file.read_bytes() == whole
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_batches_of_any_size_give_the_same_tokens(tmp_path, monkeypatch):
    documents = [f"{'abc' * (i % 7)}d" for i in range(50)]
    expected = [byte + 1 for document in documents for byte in document.encode()]
    sizes = []
    encode_batch = type(BYTES).encode_batch
    monkeypatch.setattr(type(BYTES), "encode_batch", lambda self, t: sizes.append(len(t)) or encode_batch(self, t))
    for limit in (1, 30, 10_000):
        monkeypatch.setattr(tokens_module, "BATCH_CHARS", limit)
        found = tokenize(Fixed(*documents), BYTES, "train", tmp_path / str(limit))
        assert found.tokens.tolist() == expected
        assert found.offsets.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
        assert sum(sizes) == 50
        assert len(sizes) == {1: 50, 10_000: 1}.get(limit, len(sizes))
        sizes.clear()


def test_progress_is_shown_for_large_corpora_only(tmp_path, monkeypatch, capsys):
    tokenize(Fixed("abc"), BYTES, "train", tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tokens_module, "PROGRESS_CHARS", 3)
    tokenize(Fixed("abd"), BYTES, "train", tmp_path)
    assert "tokenizing train: 100%" in capsys.readouterr().err


def test_splits_without_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="too short to have a test split"):
        tokenize(Fixed("abc"), BYTES, "test", tmp_path)
    with pytest.raises(ConfigError, match="unknown split 'valid'"):
        tokenize(Fixed("abc"), BYTES, "valid", tmp_path)
    with pytest.raises(ConfigError, match="split 'train' of corpus 'fixed' holds no token"):
        tokenize(Fixed("", ""), BYTES, "train", tmp_path)
    assert not (tmp_path / "tokens").exists()


def test_a_tokenized_corpus_is_a_plain_pair():
    tokens, offsets = TokenizedCorpus(np.array([1, 2], np.int32), np.array([0, 2]))
    assert tokens.tolist() == [1, 2]
    assert offsets.tolist() == [0, 2]
