"""Text of a file of any length, piece by piece, so that it need not be held as a whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memlm.config import ConfigError, did_you_mean
from memlm.data.corpora.base import first_line, shown_path, wide_encoding
from memlm.data.corpora.files import checked, no_column
from memlm.files import from_home, open_regular, parse_json

PIECE = 1_000_000  # characters
_LAST_CUT = re.compile(r"(?s).*(?<=\S)(?=\s)")


def content(path: str | Path) -> str:
    """The sha256, in hex, of a file.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with open_regular(from_home(path)) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except FileNotFoundError:
        raise ConfigError(
            f"text file {shown_path(path)} does not exist: give the path of a .txt, .jsonl or .parquet file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{shown_path(path)} cannot be read: {error.strerror or error}") from None


def rows(path: str | Path, texts: Sequence[str], others: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a `.jsonl` or `.parquet` file, one after the other.

    Args:
        path: The file.
        texts: Columns of text, or null.
        others: Columns of anything.

    Raises:
        ConfigError: If it cannot be read, or lacks a column.
    """
    path = from_home(path)
    readers: dict[str, Callable[..., Iterator[tuple[str, dict[str, Any]]]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ConfigError(
            f"cannot read {shown_path(path)}: its name must end in {', '.join(readers)}.{did_you_mean(suffix, readers)}"
        )
    for where, row in readers[suffix](path, [*texts, *others]):
        for column in (*texts, *others):
            if column not in row:
                raise ConfigError(no_column(where, column, row))
        for column in texts:
            checked(row[column], where, column)
        yield row


def pieces(path: str | Path, column: str = "text") -> Iterator[str]:
    """The text of a file in pieces of about a million characters, which end between words where there is a space.

    Args:
        path: `.txt` (UTF-8), or `.jsonl` or `.parquet` with the text in ``column``, whose rows stand one after the
            other with a blank line between them.
        column: See above; rows without text (null) are left out.

    Raises:
        ConfigError: If the file cannot be read.
    """
    path = from_home(path)
    rest = ""
    if path.suffix.lower() == ".txt":
        parts = _txt(path)
    else:
        kinds = (".txt", ".jsonl", ".parquet")
        if path.suffix.lower() not in kinds:
            raise ConfigError(
                f"cannot read {shown_path(path)}: its name must end in {', '.join(kinds)}."
                f"{did_you_mean(path.suffix, kinds)}"
            )
        parts = (f"{row[column]}\n\n" for row in rows(path, [column]) if row[column] is not None)
    for part in parts:
        rest += part
        while len(rest) > PIECE:
            found = _LAST_CUT.match(rest, 0, PIECE)
            cut = found.end() if found and found.end() else PIECE
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _txt(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # line ends become line feeds
            while text := file.read(PIECE):
                if "\0" in text:
                    raise ConfigError(
                        f"{shown_path(path)} is no text, or damaged: it has NUL characters; take them out."
                    )
                yield text
    except UnicodeDecodeError:
        with open(path, "rb") as binary:
            encoding = wide_encoding(binary.read(4096))
        looks = f"looks like {encoding}, not UTF-8" if encoding else "is not UTF-8"
        raise ConfigError(f"{shown_path(path)} {looks}; convert the file to UTF-8.") from None


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{shown_path(path)}, line {number}"
            if not line.strip():
                continue
            try:
                row = parse_json(str(line, "utf-8-sig"))
            except ValueError as error:
                raise ConfigError(f"{where}: not JSON ({error}); expected one object per line.") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: expected a JSON object, not {type(row).__name__}.")
            yield where, row


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ConfigError(no_column(shown_path(path), missing[0], file.schema_arrow.names))
        for batch in file.iter_batches(batch_size=8, columns=list(columns)):
            for row in batch.to_pylist():
                yield f"{shown_path(path)}, row {number}", row
                number += 1
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{shown_path(path)} cannot be read as parquet ({first_line(error)}); write it again."
        ) from None
