"""The numbers that a run has logged, read back."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

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
