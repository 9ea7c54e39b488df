"""A training run at a glance."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence, Sized
from os import PathLike
from typing import Any

from matplotlib.figure import Figure

from memlm.analysis.figures import gates, loss_curve, recall_curve
from memlm.analysis.run_log import History, read_history
from memlm.analysis.style import style
from memlm.config import ConfigError
from memlm.files import from_home


def plot_training_history(history: History | Mapping[str, Sequence[Any]] | str | PathLike[str]) -> Figure | None:
    """Loss, recall beside its controls and gates of a run, one below the other; None if there is nothing to draw.

    Args:
        history: Rows as `memlm.analysis.run_log.read_history` gives them; columns, as lists of one value per step; or
            the path of a run, or of its ``metrics.csv``.

    Raises:
        ConfigError: If there is no such file, or nothing in it can be drawn.
        ValueError: If it is none of these, columns differ in length, or a value is no number.
    """
    rows = _rows(history)
    parts = [(draw, height) for draw, height in ((loss_curve, 4.2), (recall_curve, 4.8), (gates, 4.6)) if draw(rows)]
    if not parts and isinstance(history, str | PathLike):
        raise ConfigError(
            f"{history} has nothing to draw: expected the metrics.csv of a run, with a column step and such as "
            "train/loss, recall/on or memory/ltm/write_gate, and at least one row"
        )
    if not parts:
        return None
    with style():
        figure = Figure(figsize=(7.5, sum(height for _, height in parts)))
        panels = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=[height for _, height in parts])
        for (draw, _), panel in zip(parts, panels[:, 0], strict=True):
            draw(rows, into=panel)
    return figure


def _rows(history: Any) -> History:
    if isinstance(history, str | PathLike):
        path = from_home(history)
        path = path / "csv" / "metrics.csv" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"there is no history at {path}: give a run directory, or its csv/metrics.csv")
        return read_history(path)
    if isinstance(history, Mapping):
        if wrong := [name for name, values in history.items() if not isinstance(values, Sized)]:
            raise ValueError(f"a column of a history is a list of values, got {history[wrong[0]]!r} as {wrong[0]!r}")
        lengths = {name: len(values) for name, values in history.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a history must be of one length, got {lengths}")
        n = next(iter(lengths.values()), 0)
        return [{"step": i} | {name: values[i] for name, values in history.items()} for i in range(n)]
    if not isinstance(history, Sequence) or not all(isinstance(row, Mapping) for row in history):
        raise ValueError(f"a history is a list of rows, columns by name, or a path, got {reprlib.repr(history)}")
    return history
