"""Text of long files, piece by piece."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memlm.config import ConfigError
from memlm.data import tokens
from memlm.data.corpora import streamed
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import tokenize_file

BOOKS = ["It was a dark night. " * 30, "Call me Ishmael. " * 40, "The end."]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"books.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(BOOKS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": book, "n": 1}) for book in [*BOOKS, None]))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3, 4], "text": [*BOOKS, None]}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_pieces_are_the_text_and_never_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(streamed, "PIECE", 100)
    found = list(streamed.pieces(write(tmp_path, kind)))
    assert "".join(found).strip() == "\n\n".join(BOOKS)
    assert max(map(len, found)) <= 100
    assert all(piece[:1].isspace() for piece in found[1:])


def test_tokens_of_a_file_are_those_of_its_text_and_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "txt")
    tokenizer = train_tokenizer("bpe", BOOKS, 300)
    monkeypatch.setattr(streamed, "PIECE", 64)
    found = tokenize_file(path, tokenizer, tmp_path)
    assert found.tokens.tolist() == tokenizer.encode("\n\n".join(BOOKS))
    monkeypatch.setattr(tokens, "_encode", None)  # nobody encodes it again
    assert np.array_equal(tokenize_file(path, tokenizer, tmp_path).tokens, found.tokens)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.txt", None, "does not exist: give the path of a .txt, .jsonl or .parquet file"),
        ("empty.txt", b"", "holds no token"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("wide.txt", "\ufeffwide".encode("utf-16-le"), "UTF-16-LE"),
        ("zero.txt", b"a\0b", "NUL characters"),
        ("book.pdf", b"text", "its name must end in .txt, .jsonl, .parquet"),
        ("broken.jsonl", b"{", "line 1: not JSON"),
        ("other.jsonl", b'{"txt": "a"}', "no column 'text'; there are: txt"),
        ("number.jsonl", b'{"text": 3}', "column 'text' must be text, not int"),
        ("broken.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_a_file_that_is_no_text_gets_a_sentence(tmp_path: Path, name: str, text: bytes | None, said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        tokenize_file(path, train_tokenizer("byte", [], 300), tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
