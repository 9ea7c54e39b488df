"""Text in files of the user's own."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from memlm.config import ConfigError, did_you_mean
from memlm.data.corpora.base import (
    HELD_OUT,
    Corpus,
    Document,
    as_documents,
    check_document,
    first_line,
    shown_path,
    split_documents,
    unescaped,
    unix,
    wide_encoding,
)
from memlm.files import from_home, parse_json


class TextFiles(Corpus):
    r"""Text files on disk.

    With 20 or more different documents, 5 % of them are val and 5 % test, chosen by a hash of their text; with fewer,
    each document is cut by position into 90 % train, 5 % val and 5 % test.

    Args:
        path: A file or a glob pattern (`**` matches folders): `.txt` (UTF-8, a document per file), `.jsonl` (a
            row per line) or `.parquet`. Line ends of `.txt` become `\n`.
        column: Where jsonl and parquet keep the text; rows without text (null) are left out and counted.
        document_separator: Splits a `.txt` file into documents, e.g. `"\n\n\n"`; `\n`, `\t`, `\r` and `\\` may be
            written with a backslash.
        document: How rows of jsonl and parquet, or lines of `.txt`, become documents; see `as_documents`. With `auto`
            a `.txt` file is one document, but for `document_separator`.
        val: A file or pattern with the text of val; None to hold it out of `path`.
        test: The same for test.
        held_out: Share of `path` that is held out for each of val and test, in place of 5 %.

    Raises:
        ConfigError: Also if the separator is nowhere in the text, or a file is in two splits.
    """

    def __init__(
        self,
        path: str,
        column: str = "text",
        document_separator: str | None = None,
        document: Document = "auto",
        val: str | None = None,
        test: str | None = None,
        held_out: float = HELD_OUT,
    ):
        check_document(document)
        if not 0 < held_out <= 0.4:
            raise ConfigError(f"held_out must be above 0 and at most 0.4, got {held_out}: val and test take it each.")
        if document_separator == "":
            raise ConfigError("document_separator is empty: give the text between two documents, or null for none.")
        if document_separator is not None and document != "auto":
            raise ConfigError(
                f"document_separator and document={document} both say where a document ends: leave one of them alone "
                "(document_separator=null, document=auto)."
            )
        self.name = str(path)
        self._column = column
        self._separator = None if document_separator is None else unescaped(document_separator)
        self._separated = False  # whether any file was split
        self._document = document
        self._rows = document  # of jsonl and parquet
        self._own = {name: given for name, given in (("val", val), ("test", test)) if given is not None}
        self._held_out = held_out

    def _load(self) -> dict[str, list[str]]:
        paths = {split: _find(pattern) for split, pattern in {"train": self.name, **self._own}.items()}
        homes: dict[Path, str] = {}
        for split, files in paths.items():
            for path in files:
                if (home := homes.setdefault(path.resolve(), split)) != split:
                    raise ConfigError(
                        f"{shown_path(path)} is named for {home} and for {split}: give each its own files."
                    )
        texts = {split: [text for path in files for text in self._read(path)] for split, files in paths.items()}
        if self._separator is not None and not self._separated:
            raise ConfigError(
                f"document_separator {self._separator!r} occurs nowhere in {shown_path(self.name)}: write it as it "
                "stands in the .txt files, or give null for a document per file."
            )
        missing = [split for split in ("val", "test") if split not in texts]
        return {**texts, **split_documents(texts["train"], missing, self._held_out)}

    def _read(self, path: Path) -> list[str]:
        """Return the documents of one file."""
        readers: dict[str, Callable[[Path], list[str]]] = {
            ".txt": self._read_txt,
            ".jsonl": self._read_jsonl,
            ".parquet": self._read_parquet,
        }
        if path.suffix.lower() not in readers:
            raise ConfigError(
                f"cannot read {str(path)!r}: its name must end in {', '.join(readers)}."
                f"{did_you_mean(path.suffix, readers)}"
            )
        documents = [document for document in readers[path.suffix.lower()](path) if document.strip()]
        if not documents:
            raise ConfigError(f"{str(path)!r} holds no text; remove it from data.path or fill it.")
        return documents

    def _read_txt(self, path: Path) -> list[str]:
        text = unix(_decode(path))
        if self._separator is not None:
            documents = text.split(self._separator)
            self._separated = self._separated or len(documents) > 1
            return documents
        if self._document in ("row", "heading"):
            return as_documents(text.splitlines(keepends=True), self._document, str(path))
        return [text]

    def _read_jsonl(self, path: Path) -> list[str]:
        rows: list[str | None] = []
        # Not splitlines: a JSON string may contain other line separators, such as U+2028.
        for number, line in enumerate(_decode(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); expected one object per line.") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: expected a JSON object, not {type(row).__name__}.")
            if self._column not in row:
                raise ConfigError(no_column(f"{path}, line {number}", self._column, row))
            rows.append(checked(row[self._column], f"{path}, line {number}", self._column))
        return as_documents(rows, self._rows, str(path))

    def _read_parquet(self, path: Path) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            if self._column not in file.schema_arrow.names:
                raise ConfigError(no_column(str(path), self._column, file.schema_arrow.names))
            values = file.read(columns=[self._column])[self._column].to_pylist()
        except ConfigError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:  # also text that is not UTF-8
            raise ConfigError(
                f"{str(path)!r} cannot be read as parquet ({first_line(error)}); write it again."
            ) from None
        rows = [checked(value, f"{path}, row {i}", self._column) for i, value in enumerate(values)]
        return as_documents(rows, self._rows, str(path))


class Books(TextFiles):
    """Whole books of the user's own, a book a document; see `TextFiles`.

    Raises:
        ConfigError: If no file is named; it says where there are books.
    """

    def __init__(
        self,
        path: str | None,
        column: str = "text",
        val: str | None = None,
        test: str | None = None,
        held_out: float = 0.2,
    ):
        if path is None:
            raise ConfigError(
                "data=books reads files of your own: give data.path=FILE or data.path='FOLDER/*.txt', with a book in "
                "each row (.parquet, .jsonl) or in each file (.txt). Project Gutenberg (https://www.gutenberg.org) has "
                "books as plain text; for a data set of the Hugging Face hub use data=hub data.name=NAME."
            )
        super().__init__(path, column, val=val, test=test, held_out=held_out)
        self._rows = "row"


def _find(pattern: str) -> list[Path]:
    """Return the file, or the files that match the pattern, sorted."""
    path, shown = from_home(pattern), shown_path(pattern)
    if os.path.isfile(path):  # not of Path, which raises where a name is too long
        return [path]
    if os.path.isdir(path):
        raise ConfigError(f"{shown} is a folder; give a file, or a pattern such as {shown_path(path / '*.txt')}.")
    if os.path.exists(path):
        raise ConfigError(f"{shown} is no file that can be read twice, such as a pipe or device; write a file.")
    if not glob.has_magic(pattern):
        raise ConfigError(f"text file {shown} does not exist; check data.path (now in {os.getcwd()}).")
    paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if not paths:
        raise ConfigError(f"no file matches the pattern {shown}; check data.path (now in {os.getcwd()}).")
    return paths


def _decode(path: Path) -> str:
    """Read a UTF-8 file, without its byte order mark if it has one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror or error}; check data.path.") from None
    if (encoding := wide_encoding(data)) is not None:
        raise ConfigError(f"{str(path)!r} looks like {encoding}, not UTF-8; convert the file to UTF-8.")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert the file to UTF-8."
        ) from None
    if "\0" in text:
        raise ConfigError(
            f"{str(path)!r} is no text, or damaged: it has {text.count(chr(0))} NUL characters, the first at byte "
            f"{data.index(0)}; take them out, or convert the file to UTF-8."
        )
    return text


def checked(value: Any, where: str, column: str) -> str | None:
    """Return `value` if it is text that can be encoded, or null."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: column {column!r} must be text, not {type(value).__name__}; choose another column."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: character {error.start} of column {column!r} is half of a surrogate pair; repair the text."
        ) from None
    if value.count("\0") * 100 > len(value):
        raise ConfigError(
            f"{where}: column {column!r} is full of NUL characters, as UTF-16 is that was read as UTF-8; convert it."
        )
    return value


def no_column(where: str, column: str, columns: Iterable[str]) -> str:
    """The sentence for a column that a table lacks."""
    columns = list(columns)
    return f"{where}: no column {column!r}; there are: {', '.join(columns) or 'none'}.{did_you_mean(column, columns)}"
