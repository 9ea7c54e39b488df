"""The numbers that a run has logged, read back."""

from __future__ import annotations

import csv
import io
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from memlm.config import ConfigError
from memlm.files import open_regular

History = Sequence[Mapping[str, Any]]


def read_history(metrics_csv: str | PathLike[str]) -> list[dict[str, Any]]:
    """Reads the `metrics.csv` that Lightning's `CSVLogger` writes.

    Args:
        metrics_csv: Path of the file.

    Returns:
        One dict per line: `step` and `epoch` as int, other numbers as float, empty fields as None, other text as is.
        Empty list for an empty file.

    Raises:
        ConfigError: If it is no text, a line has more fields than the header names, or a step is not a number.
    """
    history = []
    with open_regular(Path(metrics_csv)) as binary, io.TextIOWrapper(binary, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in _lines(reader, metrics_csv):
            if None in row:
                raise ConfigError(
                    f"{metrics_csv}, line {reader.line_num}: {len(row[None])} more field(s) than the header names; "
                    "expected a metrics.csv written by one CSVLogger"
                )
            try:
                history.append({column: _number(column, text) for column, text in row.items()})
            except ValueError as error:
                raise ConfigError(f"{metrics_csv}, line {reader.line_num}: {error}") from None
    return history


def _lines(reader: Iterable[dict[Any, Any]], path: str | PathLike[str]) -> Iterator[dict[Any, Any]]:
    try:
        yield from reader
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no CSV file: {error}; expected a metrics.csv written by one CSVLogger") from error


def _number(column: str, text: str | None) -> Any:
    """The value of one CSV field: None, int, float, or the text itself when it is no number."""
    if text is None or text.strip() == "":
        return None
    if column in ("step", "epoch"):
        try:
            return int(float(text))
        except (ValueError, OverflowError):
            raise ValueError(f"{column} is {text!r}; expected a number") from None
    try:
        return float(text)
    except ValueError:
        return text


def series_of(history: History, column: str) -> dict[int, float]:
    """Measured values of a column by ascending step; where a resumed run repeats a step the later row counts."""
    series = {}
    for i, row in enumerate(history):
        value = row.get(column)
        if value is None:
            continue
        try:
            if math.isnan(value):
                continue
        except TypeError:
            raise ValueError(f"row {i} of the history holds {value!r} as {column!r}; expected a number") from None
        step = row.get("step")
        if step is None or math.isnan(step):
            raise ValueError(f"row {i} of the history holds {column!r} but no 'step'; expected both in one row")
        series[int(step)] = float(value)
    return dict(sorted(series.items()))


class Column(NamedTuple):
    """What was logged under one name, in the order of the log.

    Attributes:
        steps: When.
        values: What; NaN and infinite ones too.
    """

    steps: array[int]
    values: array[float]


class Log:
    """Numbers of a run that may still be logging: of its files only what was added is read.

    A line counts when it is whole. What is no number is left out, and so is a line without a step.

    Args:
        files: Names the files, the oldest first.

    Attributes:
        columns: What was logged so far, by name.
        files: See above.
    """

    def __init__(self, files: Callable[[], Sequence[Path]]) -> None:
        self.files = files
        self.columns: dict[str, Column] = {}
        self._read: dict[Path, _Part] = {}

    def read(self) -> None:
        """Read on; all from the beginning, if a file is not the one that was read, such as one with more columns.

        Raises:
            ConfigError: If a file is a pipe, a device or a directory.
            OSError: If one cannot be read.
        """
        files = self.files()
        if files[: len(self._read)] != list(self._read) or not all(self._goes_on(path) for path in files):
            self.columns, self._read = {}, {}
        for path in files:
            self._read_on(path)

    def _goes_on(self, path: Path) -> bool:
        """Whether a file is the one that was read, or was not read yet."""
        part = self._read.get(path)
        try:
            return part is None or part.goes_on(os.stat(path))
        except FileNotFoundError:
            return False

    def _read_on(self, path: Path) -> None:
        try:
            file = open_regular(path)
        except FileNotFoundError:  # which will be told by the next look
            return
        with file:
            part = self._read.get(path)
            if part is None:
                part = self._read[path] = _Part(os.fstat(file.fileno()).st_ino, 0, [])
            elif not part.goes_on(os.fstat(file.fileno())):
                return
            file.seek(part.n_byte)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        part.n_byte += len(whole)
        lines = csv.reader(whole.decode("utf-8", errors="replace").replace("\0", "").splitlines())
        try:
            for line in lines:
                if not part.heads:
                    part.heads = line
                elif len(line) == len(part.heads):
                    self._add(part.heads, line)
        except csv.Error:  # a field of enormous size: what follows cannot be told apart
            return

    def _add(self, heads: Sequence[str], line: Sequence[str]) -> None:
        try:
            step = int(float(line[heads.index("step")]))
        except (ValueError, OverflowError):
            return
        if not abs(step) < 2**62:
            return
        for name, text in zip(heads, line, strict=True):
            if text and name not in ("step", "epoch"):
                try:
                    value = float(text)
                except ValueError:
                    continue
                column = self.columns.get(name)
                if column is None:
                    column = self.columns[name] = Column(array("q"), array("d"))
                column.steps.append(step)
                column.values.append(value)


@dataclass
class _Part:
    """How far a file was read.

    Attributes:
        inode: Which file it was.
        n_byte: Bytes of whole lines.
        heads: Names of its columns.
    """

    inode: int
    n_byte: int
    heads: list[str]

    def goes_on(self, found: os.stat_result) -> bool:
        """Whether a file can be the same one, with more in it."""
        return found.st_ino == self.inode and found.st_size >= self.n_byte
