"""Rates of recall beside their controls."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memlm.analysis.style import CONTROLS
from memlm.data.tasks.sentences import LEVELS
from memlm.evaluation.result import Row
from memlm.statistics import wilson

CONDITIONS = ("on", *CONTROLS)


"""The memory as it is, then its controls: see `memlm.analysis.style.CONTROLS`."""


LABELS = {"on": "memory on", **CONTROLS, "stranger": "same question, subject never told"}


"""What each condition is called, and a control of sentences alone: the told answer to a question about another subject,
which a memory gives that goes by what is asked and not by whom."""


def rates(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of rows that belong together.

    Returns:
        For each condition ``exact_match/<condition>`` with ``low`` and ``high`` (95 % Wilson interval) and ``n``, and
        ``nll``; the same of facts across a segment boundary, ``exact_match_straddling/...``, of the others,
        ``exact_match_inside/...``, and of paraphrases by level, ``exact_match_<level>/...``; ``stored``, the share of
        facts whose answers memory still holds; and ``chance``, the rate of one who knows what the document told and
        guesses which of the facts that could be an answer is meant.
    """
    metrics: dict[str, float] = {}
    kinds: dict[str, Callable[[Row], bool]] = {
        "": lambda row: True,
        "_straddling": lambda row: row["straddles"] is True,
        "_inside": lambda row: row["straddles"] is False,
    }
    kinds |= {f"_{level}": lambda row, level=level: row.get("level") == level for level in LEVELS}  # type: ignore[misc]
    for kind, belongs in kinds.items():
        for condition in LABELS:
            part = [row for row in rows if row["condition"] == condition and belongs(row)]
            if not part:
                continue
            metrics |= rate(f"{kind}/{condition}", part)
    told = [row for row in rows if row["condition"] == "on"]
    stored = [row["stored"] for row in told if row.get("stored") is not None]
    if stored:
        metrics["stored"] = sum(stored) / len(stored)
    if told:
        of_document = Counter(row["document"] for row in told)
        metrics["chance"] = math.fsum(1 / row.get("alike", of_document[row["document"]]) for row in told) / len(told)
    return metrics


def rate(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of at least one answer under one condition.

    Returns:
        ``exact_match<name>`` with ``low`` and ``high`` (95 % Wilson interval), ``n`` and ``nll``.
    """
    k, n = sum(row["correct"] for row in rows), len(rows)
    low, high = wilson(k, n)
    nll = math.fsum(row["nll"] for row in rows) / n
    return {f"exact_match{name}": k / n, f"low{name}": low, f"high{name}": high, f"n{name}": n, f"nll{name}": nll}


def tabulate(rows: Sequence[Row], axes: Mapping[str, Callable[[list[Any]], Any]]) -> dict[str, float]:
    """Metrics of rows that differ in some columns.

    Args:
        rows: The rows.
        axes: By column what picks one of its values, from a list of them.

    Returns:
        Those of `rates` for the picked values. For what has several values, those of each combination too:
        ``.../<value>``, in the order of ``axes``.
    """
    values = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in axes}
    varying = [axis for axis in axes if len(values[axis]) > 1]
    metrics: dict[str, float] = {}
    for combination in itertools.product(*values.values()):
        given = dict(zip(axes, combination, strict=True))
        part = rates([row for row in rows if all(row[axis] == value for axis, value in given.items())])
        if all(value == axes[axis](values[axis]) for axis, value in given.items()):
            metrics = part | metrics
        if varying:
            suffix = "".join(f"/{given[axis]}" for axis in varying)
            metrics |= {f"{name}{suffix}": value for name, value in part.items()}
    return metrics


def above_controls(metrics: Mapping[str, float], suffix: str = "") -> bool:
    """Whether recall with the memory on lies above all of its controls, with 95 % intervals that are apart.

    Args:
        metrics: What `tabulate` returns.
        suffix: End of the names of the metrics.
    """
    return metrics[f"low/on{suffix}"] > max(metrics.get(f"high/{control}{suffix}", 0.0) for control in CONTROLS)
