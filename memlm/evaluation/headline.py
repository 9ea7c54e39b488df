"""What a result says of itself in a few numbers: the main ones, and the controls beside which they count.

An experiment names them in ``Result.metadata["headline"]``, a list with one entry per number, main numbers first:

    {"label": "memory on", "metric": "exact_match/on", "low": "low/on", "high": "high/on", "n": "n/on",
     "percent": True, "better": "higher", "control": False}

``metric``, ``low``, ``high`` and ``n`` are names of metrics; the last three are None where there is nothing to name.
An entry may say beside in which ``cell`` of a table of records it stands: the name of a line, and of a column. One in
percent that is no rate, as it may be below 0, says ``"rate": False``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memlm.evaluation.recall.rates import LABELS
from memlm.evaluation.result import Result
from memlm.printed import one_line
from memlm.statistics import mean_interval

_KEYS = ("label", "metric", "low", "high", "n", "percent", "better", "control")
_MORE = {"cell", "rate"}


@dataclass(frozen=True)
class Number:
    """One number of a headline.

    Attributes:
        label: What it is called.
        metric: Name of the metric.
        value: Its value; NaN if there is none.
        low: Lower end of its 95 % interval; NaN if it has none, as of too few documents.
        high: Upper end.
        n: Items behind it; None if that is not told.
        percent: Whether it is shown in percent.
        better: ``higher`` or ``lower``; None if neither is.
        control: Whether it is a control or a baseline.
        rate: Whether it is a rate, which is in [0, 1].
        cell: Line and column in a table of records, where a run has several lines; None for one line.
        too_few: Whether too little was measured for its interval.
    """

    label: str
    metric: str
    value: float
    low: float
    high: float
    n: int | None
    percent: bool
    better: str | None
    control: bool
    rate: bool = False
    cell: tuple[str, str] | None = None
    too_few: bool = False


def headline(result: Result) -> list[Number]:
    """The numbers that a result puts forward, in its order; none if it puts forward nothing.

    Raises:
        ValueError: If an entry is malformed or names a metric that the result lacks, or a rate is claimed without a
            control.
    """
    entries = result.metadata.get("headline", [])
    if not isinstance(entries, list):
        raise ValueError(f"the headline of {result.name!r} is a {type(entries).__name__}; expected a list of entries")
    numbers = [_number(result, entry) for entry in entries]
    claims = [number.label for number in numbers if number.percent and not number.control]
    controls = [number for number in numbers if number.control and number.n != 0 and not math.isnan(number.value)]
    if claims and not controls:
        raise ValueError(
            f"{result.name!r} claims a rate ({claims[0]}) without any control: it counts only beside one, so nothing "
            "is reported; add what was measured as a control to the headline"
        )
    return numbers


def recall_entries(label: str, suffix: str = "", stranger: bool = False) -> list[dict[str, Any]]:
    """Entries about a rate of recall and its controls.

    Args:
        label: What the rate with the memory on is called.
        suffix: End of the names of the metrics, which are those of `memlm.evaluation.recall.rates.tabulate`.
        stranger: Whether the same was asked of subjects that nobody was told of.
    """
    return [
        {
            "label": name,
            "metric": f"exact_match/{condition}{suffix}",
            "low": f"low/{condition}{suffix}",
            "high": f"high/{condition}{suffix}",
            "n": f"n/{condition}{suffix}",
            "percent": True,
            "better": "higher",
            "control": condition != "on",
        }
        for condition, name in {**LABELS, "on": label}.items()
        if condition != "stranger" or stranger
    ]


def repetition_entries(repetition: float) -> list[dict[str, Any]]:
    """An entry that says how often a document goes through its text, if it does more than once.

    Args:
        repetition: What the metric ``repetition`` has.
    """
    entry = {"label": "times a document goes through all the text there is", "metric": "repetition", "low": None}
    more = {"high": None, "n": None, "percent": False, "better": None, "control": False}
    return [entry | more] if repetition > 1 else []


def shown(value: float, percent: bool = False) -> str:
    """A number as text: a rate in percent, else with four significant digits; "-" for NaN."""
    if math.isnan(value):
        return "-"
    if percent:
        return f"{in_percent(value):.1f} %"
    return f"{float(f'{value:.4g}'):,g}"


def in_brackets(low: float, high: float, percent: bool = False) -> str:
    """The ends of an interval, to be put behind a number; nothing if there is none."""
    if math.isnan(low):
        return ""
    return f" ({shown(low, percent).removesuffix(' %')} to {shown(high, percent).removesuffix(' %')})"


def over_seeds(values: Sequence[float], low: float, high: float, percent: bool = False) -> str:
    """Mean over seeds as text, and behind ± half of its interval.

    Args:
        values: One per seed.
        low: Lower end of the interval of the mean. If it ends before half of it is over, as that of a rate near 0 or 1
            does, or belongs to a single seed, its ends stand in brackets instead.
        high: Upper end.
        percent: Whether to show all in percent.
    """
    mean, half = mean_interval(values)
    text = shown(mean, percent)
    if (low, high) == (mean - half, mean + half):
        return f"{text} ± {shown(half, percent).removesuffix(' %')}"
    return text + in_brackets(low, high, percent)


def in_percent(rate: float) -> float:
    """A rate in percent with one decimal, never rounded up to 100 or down to 0."""
    percent = round(100 * rate, 1)
    if percent == 100 and rate < 1:
        return 99.9
    return 0.1 if percent == 0 and rate > 0 else percent


def _number(result: Result, entry: Any) -> Number:
    if not isinstance(entry, Mapping) or set(entry) - _MORE != set(_KEYS):
        raise ValueError(f"the headline of {result.name!r} has the entry {entry!r}; expected keys {', '.join(_KEYS)}")
    cell = entry.get("cell")
    if cell is not None and not (isinstance(cell, list | tuple) and len(cell) == 2):
        raise ValueError(f"the headline of {result.name!r} has the cell {cell!r}; expected a line and a column")
    texts = [
        entry["label"],
        entry["metric"],
        *(cell or ()),
        *("" if entry[key] is None else entry[key] for key in ("low", "high", "n")),
    ]
    flags = entry["percent"], entry["control"], entry.get("rate", True)
    if not (all(isinstance(text, str) for text in texts) and all(isinstance(flag, bool) for flag in flags)):
        raise ValueError(f"the headline of {result.name!r} has the entry {entry!r}; expected names, and true or false")
    if entry["better"] not in ("higher", "lower", None):
        raise ValueError(
            f"the headline of {result.name!r} calls {entry['better']!r} better; expected 'higher', 'lower' or None"
        )
    for key in ("metric", "low", "high", "n"):
        if entry[key] not in result.metrics and (key == "metric" or entry[key] is not None):
            raise ValueError(f"the headline of {result.name!r} names the metric {entry[key]!r}, which it lacks")
    value, low, high, n = (result.metrics.get(entry[key], math.nan) for key in ("metric", "low", "high", "n"))
    return Number(
        label=one_line(entry["label"]),
        metric=entry["metric"],
        value=value,
        low=low,
        high=high,
        n=int(n) if math.isfinite(n) else None,
        percent=entry["percent"],
        better=entry["better"],
        control=entry["control"],
        rate=entry["percent"] and entry.get("rate", True),
        cell=None if cell is None else (one_line(cell[0]), one_line(cell[1])),
        too_few=entry["low"] is not None and math.isfinite(value) and math.isnan(low),
    )
