import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from memlm.config import ConfigError
from memlm.data import tokenizer as tokenizer_module
from memlm.data.corpora.base import Corpus
from memlm.data.tokenizer import KINDS, Tokenizer, get_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "The cat sat on the mat, didn't it?\nThe cat's hat - and the rat's - is on  the mat.\n\nWho sat there?\n" * 20
HARD = "naïve café 🦉👩‍🚀\t\r\n  two  spaces <pad> <unk> 中文 don't \x00\x85\u2028 \x1c a\x1cb \ufeff \n\n x "


class OneText(Corpus):
    """A corpus whose train split is one text."""

    def __init__(self, text: str = TEXT):
        self.name = "one text"
        self._text = text

    def _load(self):
        return {"train": [self._text], "val": ["not for training: ξ"], "test": ["nor this: ζ"]}


def trained(kind: str, vocab_size: int = 300, text: str = TEXT) -> Tokenizer:
    return train_tokenizer(kind, [text], vocab_size)


# --- the four kinds -----------------------------------------------------------------------------------------------


def test_char_ids_by_hand():
    tokenizer = train_tokenizer("char", ["ba\n", "ab c"], 99)
    # <pad> <unk> "\n" " " a b c
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("cab \n") == [6, 4, 5, 3, 2]
    assert tokenizer.encode("aXé") == [4, 1, 1]
    assert tokenizer.decode([6, 4, 0, 5, 1]) == "cab<unk>"


def test_byte_ids_are_the_bytes_plus_one():
    tokenizer = train_tokenizer("byte", [], 0)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode(HARD) == [byte + 1 for byte in HARD.encode()]


def test_word_ids_by_hand():
    tokenizer = train_tokenizer("word", ["a cat, a cat, a dog"], 6)
    # counts: " cat" 2, "," 2, " a" 2, then "a" and " dog" 1; ties in alphabetical order
    vocab = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert vocab == {"<pad>": 0, "<unk>": 1, " a": 2, " cat": 3, ",": 4, " dog": 5}
    assert tokenizer.encode(" a cat, a bird, dog") == [2, 3, 4, 2, 1, 4, 5]
    assert tokenizer.decode([2, 3, 4, 2, 1, 4, 5]) == " a cat, a <unk>, dog"


def test_word_decodes_known_words_exactly_and_keeps_contractions_whole():
    tokenizer = trained("word")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert "didn't" in tokenizer.decode([tokenizer.encode("it didn't")[1]])
    assert len(tokenizer.encode(" didn't")) == 1
    assert train_tokenizer("word", ["it didn\u2019t"], 9).encode(" didn\u2019t") == [2]
    assert tokenizer.decode(tokenizer.encode("Nobody sat,\nnobody fled.")) == "<unk> sat,\n<unk> <unk>."


def test_bpe_merges_by_hand():
    # The pair (a, b) is the most frequent, then (ab, ab): two merges fill 257 + 2 places.
    tokenizer = train_tokenizer("bpe", ["abab abab abab ab"], 259)
    a, b = (tokenizer.encode(letter) for letter in "ab")
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([257]) == "ab"
    assert len(a) == len(b) == 1
    assert tokenizer.encode("ab") == [257]
    assert tokenizer.encode("ba") == b + a


def test_bpe_has_no_prefix_space_and_shortens_text():
    tokenizer = trained("bpe", 280)
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(TEXT)) < 0.8 * len(TEXT)
    assert tokenizer.encode("cat") != tokenizer.encode(" cat")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_byte_level_kinds_are_lossless(kind):
    tokenizer = trained(kind)
    assert tokenizer.decode(tokenizer.encode(HARD)) == HARD
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000, 7)]))
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


@pytest.mark.parametrize("kind", KINDS)
def test_pad_is_id_zero_and_no_text_reaches_it(kind):
    tokenizer = trained(kind, text=TEXT + "<pad> <unk>" * 50)
    assert tokenizer.pad_id == 0
    ids = tokenizer.encode("<pad><unk> <pad>x")
    assert 0 not in ids
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode([0, *tokenizer.encode("The cat"), 0, 0]) == "The cat"


@pytest.mark.parametrize("kind", KINDS)
def test_json_round_trip_and_determinism(kind):
    first, second = trained(kind), trained(kind)
    copy = Tokenizer.from_json(first.to_json())
    assert first.fingerprint() == second.fingerprint() == copy.fingerprint()
    assert copy.encode(HARD) == first.encode(HARD)
    assert (copy.vocab_size, copy.pad_id) == (first.vocab_size, first.pad_id)
    assert (
        trained(kind, text=TEXT + "Ω quite different words words").fingerprint() != first.fingerprint()
        or kind == "byte"
    )


def test_encode_batch_equals_one_by_one_with_empty_texts_between():
    tokenizer = trained("bpe")
    texts = ["", TEXT, "", HARD, "cat"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts)[0] == []
    assert tokenizer.encode_batch([]) == []


# --- long documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [7, 50])
def test_pieces_give_the_tokens_of_the_whole(kind, piece, monkeypatch):
    tokenizer = trained(kind, 400, TEXT + HARD)
    long = (TEXT[:150] + HARD + "\n\n   \n word" + "x" * 90 + " ") * 5
    # the library itself on the uncut text
    whole = tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(long, add_special_tokens=False).ids
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", piece)
    pattern = tokenizer_module._LAST_CUT.pattern.replace("10000", str(piece))
    monkeypatch.setattr(tokenizer_module, "_LAST_CUT", re.compile(pattern))
    pieces = list(tokenizer_module._pieces(long))
    assert "".join(pieces) == long
    assert len(pieces) > 10
    assert tokenizer.encode(long) == whole


def test_pieces_have_the_promised_length():
    text = "word " * 30_000
    lengths = [len(piece) for piece in tokenizer_module._pieces(text)]
    assert len(lengths) == 16
    assert max(lengths) <= 10_000
    assert min(lengths[:-1]) > 9_990
    assert list(tokenizer_module._pieces("x" * 30_000)) == ["x" * 30_000]
    assert list(tokenizer_module._pieces("")) == [""]


def test_a_long_document_reaches_the_library_in_pieces():
    tokenizer = trained("bpe")
    seen = []

    class Spy:
        def encode_batch_fast(self, texts, add_special_tokens):
            seen.extend(texts)
            return [tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(text) for text in texts]

    expected = tokenizer.encode(TEXT * 20)
    tokenizer._backend = Spy()
    assert tokenizer.encode(TEXT * 20) == expected
    assert "".join(seen) == TEXT * 20
    assert max(map(len, seen)) <= 10_000


# --- tokenizers from elsewhere ------------------------------------------------------------------------------------


def foreign(**added) -> tokenizers.Tokenizer:
    """A word-level tokenizer as others make them: with [CLS] in front, truncation and padding."""
    words = ["[UNK]", "[CLS]", "a", "b", *added]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    return backend


def test_a_given_file_encodes_documents_whole_and_bare(tmp_path):
    foreign().save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "t.json")
    assert tokenizer.encode("a b a b x") == [2, 3, 2, 3, 0]
    assert tokenizer.vocab_size == 4
    assert tokenizer.pad_id == 0
    assert tokenizer.decode([0, 2]) == "[UNK] a"  # 0 is no padding token here
    long = "a b " * 10_000
    assert tokenizer.encode(long) == [2, 3] * 10_000


def test_the_pad_token_of_a_given_file_is_found_and_gaps_in_ids_counted():
    backend = foreign(**{"[PAD]": 0})
    assert Tokenizer(backend).pad_id == 4
    assert Tokenizer(backend).decode([2, 4, 3]) == "a b"
    gap = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert Tokenizer(gap).vocab_size == 10


@pytest.mark.parametrize("case", ["metaspace", "prefix space", "no regex", "normalizer", "gpt2"])
def test_a_given_tokenizer_is_cut_only_where_that_changes_nothing(case):
    text = "abab abab\n" * 3_000
    backend = tokenizers.Tokenizer.from_str(train_tokenizer("bpe", [text], 262).to_json())
    before = tokenizers.pre_tokenizers
    if case == "metaspace":
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁abab": 0, "▁": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = before.Metaspace(prepend_scheme="always")
    elif case == "prefix space":
        backend.pre_tokenizer = before.ByteLevel(add_prefix_space=True)
    elif case == "no regex":  # words may join across spaces
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = before.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.train_from_iterator(
            [text[:100]] * 2, tokenizers.trainers.BpeTrainer(vocab_size=40, show_progress=False)
        )
    elif case == "normalizer":
        backend.normalizer = tokenizers.normalizers.Prepend("b")
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer._cuttable == (case == "gpt2")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"{}", "cannot be read"), (b"\xff", "cannot be read")]
)
def test_bad_tokenizer_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"t\.json' {message}"):
        Tokenizer.from_file(tmp_path / "t.json")
    with pytest.raises(ConfigError, match=r"t\.json"):
        get_tokenizer("bpe", 300, str(tmp_path / "t.json"), OneText(), tmp_path)


# --- get_tokenizer ------------------------------------------------------------------------------------------------


def test_get_tokenizer_trains_once_on_the_train_split_only(tmp_path, monkeypatch):
    first = get_tokenizer("char", 0, None, OneText(), tmp_path)
    assert first.fingerprint() == train_tokenizer("char", [TEXT], 0).fingerprint()
    assert first.encode("ξζ") == [1, 1]
    monkeypatch.setattr(tokenizer_module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert get_tokenizer("char", 0, None, OneText(), tmp_path).fingerprint() == first.fingerprint()


def test_get_tokenizer_keeps_kinds_sizes_and_corpora_apart(tmp_path):
    asked = [("bpe", 270, TEXT), ("bpe", 280, TEXT), ("word", 10, TEXT), ("bpe", 270, "Other words, other words. " * 9)]
    made = [get_tokenizer(kind, size, None, OneText(text), tmp_path) for kind, size, text in asked]
    for (kind, size, text), tokenizer in zip(asked, made, strict=True):
        assert tokenizer.fingerprint() == train_tokenizer(kind, [text], size).fingerprint()
        assert get_tokenizer(kind, size, None, OneText(text), tmp_path).fingerprint() == tokenizer.fingerprint()
    assert len({tokenizer.fingerprint() for tokenizer in made}) == 4


def test_get_tokenizer_learns_from_more_text_and_keeps_it_apart(tmp_path):
    plain = get_tokenizer("bpe", 280, None, OneText(), tmp_path)
    both = get_tokenizer("bpe", 280, None, OneText(), tmp_path, ["zyx zyx"] * 99)
    assert both.fingerprint() == train_tokenizer("bpe", [TEXT, *["zyx zyx"] * 99], 280).fingerprint()
    assert len(both.encode(" zyx")) == 1 < len(plain.encode(" zyx"))
    assert get_tokenizer("bpe", 280, None, OneText(), tmp_path).fingerprint() == plain.fingerprint()


def test_get_tokenizer_reads_a_given_file_whatever_the_kind(tmp_path):
    foreign().save(str(tmp_path / "t.json"))
    assert get_tokenizer("none of these", 0, str(tmp_path / "t.json"), OneText(), tmp_path).encode("a b") == [2, 3]


@pytest.mark.parametrize("damage", [b"", b'{"version": "1.0", "trunc', b"\xff\xff"])
def test_a_damaged_cached_tokenizer_is_trained_again(tmp_path, damage):
    first = get_tokenizer("word", 20, None, OneText(), tmp_path)
    (file,) = (tmp_path / "tokenizers").iterdir()
    file.write_bytes(damage)
    assert get_tokenizer("word", 20, None, OneText(), tmp_path).fingerprint() == first.fingerprint()
    assert json.loads(file.read_bytes().partition(b"\ncrc32")[0]) == json.loads(first.to_json())


def test_two_processes_at_once_get_the_same_tokenizer(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from memlm.data.corpora.files import TextFiles
from memlm.data.tokenizer import get_tokenizer
print(get_tokenizer("bpe", 400, None, TextFiles({str(tmp_path / "a.txt")!r}), Path({str(tmp_path)!r})).fingerprint())
"""
    (tmp_path / "a.txt").write_text(TEXT * 20)
    environment = {**os.environ, "MEMLM_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    answers = {process.communicate()[0].strip() for process in processes}
    (file,) = (tmp_path / "tokenizers").iterdir()  # and no temporary file is left
    text = file.read_text().partition("\ncrc32")[0]
    assert answers == {Tokenizer.from_json(text).fingerprint()}


# --- errors -------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_told(tmp_path):
    with pytest.raises(
        ConfigError, match=r"unknown tokenizer kind 'bep': expected one of char, byte, word, bpe\..*'bpe'"
    ):
        train_tokenizer("bep", [TEXT], 300)
    with pytest.raises(ConfigError, match=r"unknown tokenizer kind 'words'.*Did you mean 'word'"):
        get_tokenizer("words", 300, None, OneText(), tmp_path)
    with pytest.raises(ConfigError, match="must be 257 to 16777216 for tokenizer kind 'bpe', not 256"):
        train_tokenizer("bpe", [TEXT], 256)
    with pytest.raises(ConfigError, match="must be 3 to 16777216 for tokenizer kind 'word'"):
        train_tokenizer("word", [TEXT], 2)
    for kind in ("char", "word"):
        with pytest.raises(ConfigError, match="needs some text"):
            train_tokenizer(kind, [], 300)


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_halves_of_surrogate_pairs_are_no_text(kind: str) -> None:
    tokenizer = train_tokenizer(kind, ["some text \ufffd"], 400)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")


def test_texts_of_tokens_keep_characters_whole():
    """By hand: the emoji is four bytes, the é two; a lone byte is no character, and the end may be cut."""
    tokenizer = train_tokenizer("byte", [], 0)
    ids = tokenizer.encode("a😀é!")
    assert tokenizer.decode_each(ids) == ["a", "", "", "", "😀", "", "é", "!"]
    (lone,) = set(tokenizer.encode("é")[:1])
    assert "".join(tokenizer.decode_each([lone, lone, *ids])).endswith("😀é!")
    assert tokenizer.decode_each(ids[:3]) == ["a", "", "\ufffd"]
    assert tokenizer.decode_each([]) == []


# --- what is lost --------------------------------------------------------------------------------------------------


def naive(text: str, other: str) -> int:
    """Longest common subsequence, by the table of a textbook."""
    row = [0] * (len(other) + 1)
    for a in text:
        before = row[:]
        for j, b in enumerate(other):
            row[j + 1] = before[j] + 1 if a == b else max(before[j + 1], row[j])
    return row[-1]


def test_common_characters_agree_with_the_textbook():
    rng = random.Random(0)
    for _ in range(200):
        text, other = ("".join(rng.choices("abc \U0001f642", k=rng.randint(0, 12))) for _ in range(2))
        assert tokenizer_module._n_common(text, other) == naive(text, other)


@pytest.mark.parametrize("kind", ["byte", "bpe", "char"])
def test_tokenizers_trained_here_keep_all_of_their_text(kind):
    texts = [TEXT, HARD * 50, "x" * 5000, "", "short"]
    tokenizer = train_tokenizer(kind, texts, 300)
    assert tokenizer.share_kept(texts) == 1.0
    assert tokenizer.share_kept([]) == 0.0


def test_unknown_words_and_letters_are_lost():
    tokenizer = train_tokenizer("word", ["fox river " * 50], 10)
    assert tokenizer.share_kept(["fox river"]) == 1.0
    assert tokenizer.share_kept(["fox unknown"]) == 3 / 11
    assert train_tokenizer("char", ["abc"], 0).share_kept(["abcd" * 100]) == 0.75
    # a byte-pair tokenizer without a token for the unknown drops what it has no letter for
    vocab = {letter: i for i, letter in enumerate("fox")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    assert Tokenizer(backend).share_kept(["the fox"] * 4000) == 3 / 7


def test_the_sample_is_bounded_and_spread_and_cuts_no_word():
    documents = [" ".join(f"w{i}x{j}" for j in range(2000)) for i in range(20)]
    parts = tokenizer_module._sample(documents)
    assert sum(map(len, parts)) <= tokenizer_module.SAMPLE_CHARS + tokenizer_module._PART_CHARS
    assert sum(map(len, parts)) > 0.9 * tokenizer_module.SAMPLE_CHARS
    words = {word for document in documents for word in document.split()}
    assert {word for part in parts for word in part.split()} <= words
    assert len({part.split()[0].partition("x")[0] for part in parts}) > 10
    short = ["one", "two three", ""]
    assert tokenizer_module._sample(short) == short


def test_a_tokenizer_that_cannot_say_unknown_is_told_in_a_sentence():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"fox": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("fox fox") == [0, 0]
    with pytest.raises(
        ConfigError, match=r"cannot encode the text .*use one that has a token for what it does not know"
    ):
        tokenizer.encode("fox river")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 2**31, "<unk>": 0}, "unk_token": "<unk>"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": None},
    ],
)
def test_tokenizer_files_that_panic_or_need_gigabytes_are_refused(change):
    config = json.loads(trained("word").to_json()) | change
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json") as error:
        Tokenizer.from_json(json.dumps(config))
    assert "\n" not in str(error.value)


def test_a_word_of_a_million_letters_is_trained_on_in_short_pieces():
    genome = "".join(random.Random(0).choices("ACGT", k=1_000_000))
    pieces = list(tokenizer_module._training_pieces([genome]))
    assert max(map(len, pieces)) <= 1_000  # the time that a word takes grows with the square of its length
    assert "".join(pieces) == genome
    tokenizer = train_tokenizer("bpe", [genome], 270)
    assert tokenizer.decode(tokenizer.encode(genome[:50_000])) == genome[:50_000]
    assert tokenizer.vocab_size == 270


def _changed(**parts: Any) -> str:
    """A tokenizer.json of words, with other parts."""
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", "added_tokens": [], **empty, "model": words | parts.pop("model", {}), **parts})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (_changed(model={"vocab": {"<unk>": 0, "a": 2**31}}), "the id of 'a' is 2147483648, not in 0..4194303"),
        (_changed(model={"vocab": {"<unk>": 0, "a": -1}}), "the id of 'a' is -1"),
        (_changed(model={"unk_token": "zz"}), "its unk_token 'zz' is not in the vocabulary"),
        (_changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////wA="}), "normalizer is cut short"),
        (
            _changed(normalizer={"type": "Sequence", "normalizers": [{"type": "Precompiled"}]}),
            "normalizer is cut short",
        ),
        (_changed(model={"type": "Evil"}), "not a tokenizer.json"),
        ("[]", "it has no model"),
        ("5", "it has no model"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_file_on_which_the_library_would_choke_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        Tokenizer.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_regex_that_takes_for_ever_is_told() -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.from_json(_changed(pre_tokenizer=split))
    assert tokenizer.encode("a") == [1]
    with pytest.raises(ConfigError, match="cannot encode the text"):  # the library panics
        tokenizer.encode("a" * 40 + "!")
