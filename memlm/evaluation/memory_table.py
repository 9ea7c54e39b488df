"""The table of all memories: one line per memory and size, of what several trainings of it found, and two figures.

`table=worth`, `table=pairs` and `table=facts` each train one model of a memory and answer some of the columns. A
record has an entry per training; lines are put together here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.evaluation.headline import in_brackets, over_seeds, shown
from memlm.evaluation.runs import Run
from memlm.statistics import interval

NAME = "table"
"""Of the record."""

Entry = Mapping[str, Any]

# What is kept of each experiment: numbers of all that was measured, without its parts.
_KEPT = {
    "worth": r"(perplexity|worth)(_low|_high)?/(on|off|wiped|swapped)|n_token|n_document",
    "associative_recall": r"accuracy/(on|off|wiped|swapped|unseen)(/\d+)?|held/on",
    "needle": r"exact_match/\w+(/\d+)?|(low|high|n|stored)/on(/\d+)?",
    "overwrite": r"exact_match/\w+(/\d+)?|(low|high|n|stale)/on(/\d+)?|chance",
    "retention": r"half_life\w*|exact_match/\w+/\d+",
    "training": r"flops_per_token",
}
_CONTROLS = ("off", "wiped", "swapped", "unseen")
# The least and the most that a number can be.
_RATE = (0.0, 1.0)
_SHARE = (-math.inf, 1.0)  # of what is saved, or lost
_AMOUNT = (0.0, math.inf)


class _Column(NamedTuple):
    """A column that is one number of an experiment.

    Attributes:
        label: Its head.
        metric: ``EXPERIMENT/METRIC``.
        ends: Names of the ends of its interval; None for none.
        percent: Whether it is shown in percent.
        text: Of which text, for `worth`; None for any.
        bounds: The least and the most that it can be.
    """

    label: str
    metric: str
    ends: tuple[str, str] | None = None
    percent: bool = True
    text: str | None = None
    bounds: tuple[float, float] = _AMOUNT


def _recall(label: str, experiment: str, end: str = "") -> list[_Column]:
    """A rate with its interval."""
    ends = (f"{experiment}/low/on{end}", f"{experiment}/high/on{end}")
    return [_Column(label, f"{experiment}/exact_match/on{end}", ends, bounds=_RATE)]


def _worth(text: str) -> list[_Column]:
    """Perplexity of one text, and what another document's memory saves of it."""
    ends = ("worth/perplexity_low/on", "worth/perplexity_high/on")
    return [
        _Column(f"perplexity of {text}", "worth/perplexity/on", ends, False, text),
        _Column(f"{text}: saved beside reads off", "worth/worth/on", None, True, text, _SHARE),
        _Column(f"{text}: saved by another document's", "worth/worth/swapped", None, True, text, _SHARE),
    ]


_COLUMNS = [
    *_worth("code"),
    *_worth("books"),
    _Column("pairs held at 90 %", "associative_recall/held/on", None, False),
    *_recall("needle, 10,000 tokens", "needle", "/10000"),
    *_recall("needle, 100,000 tokens", "needle", "/100000"),
    *_recall("needle, 1,000,000 tokens", "needle", "/1000000"),
    *_recall("latest value after 10 updates", "overwrite", "/10"),
    _Column("half-life, writes", "retention/half_life", ("retention/half_life_low", "retention/half_life_high"), False),
]


def measured(run: Run) -> dict[str, Any]:
    """What an entry of the record has beside what every record has.

    Raises:
        ConfigError: If nothing that the table shows was measured of the run.
    """
    metrics = {
        f"{name}/{metric}": value
        for name, pattern in _KEPT.items()
        if name in run.results
        for metric, value in run.results[name].to_dict()["metrics"].items()
        if re.fullmatch(pattern, metric)
    }
    parts = sorted({name.partition("/")[0] for name in metrics} - {"training"})
    if not parts:
        raise ConfigError(
            f"{run.path} has nothing that the table shows: give runs of table=worth, table=pairs or table=facts"
        )
    config = run.trained.config
    text = str(config["data"]["corpus"]["_target_"]).rpartition(".")[2].lower() if parts == ["worth"] else None
    asked, lr = config.get("state_bytes"), config["training"]["lr"]
    variant = f"{'+'.join(parts)} {text or ''} {asked or 'default'} {lr:g}"
    return {"metrics": metrics, "asked": asked, "lr": lr, "text": text, "part": "+".join(parts), "variant": variant}


class _Line(NamedTuple):
    """A memory of one size.

    Attributes:
        name: The memory.
        asked: Bytes that were asked for; None for its own size.
        entries: One per part of the table and seed, at the rate that was best for the part.
    """

    name: str
    asked: int | None
    entries: list[Entry]

    def values(self, metric: str, text: str | None = None) -> list[float]:
        """A number, one for each seed."""
        return [
            found
            for entry in self.entries
            if (text is None or entry["text"] == text) and not math.isnan(found := _number(entry, metric))
        ]

    def costs(self, name: str, pairs: bool = False) -> float:
        """What the trainings of pairs, or else those of text, have cost on average; NaN if there is none."""
        parts = [e[name] for e in self.entries if (e["part"] == "associative_recall") == pairs and e[name] is not None]
        return math.fsum(parts) / len(parts) if parts else math.nan

    @property
    def state_bytes(self) -> float:
        """Bytes of the state of a row in the models of text; NaN if there is none."""
        return self.costs("state_bytes")

    @property
    def speed(self) -> float:
        """Tokens of training per second of CPU time, on code."""
        found = [e for e in self.entries if e["text"] == "code" and e["cpu_seconds"] and e["tokens"]]
        return math.fsum(e["tokens"] / e["cpu_seconds"] for e in found) / len(found) if found else math.nan

    @property
    def accuracy(self) -> list[float]:
        """Share of pairs that are answered, mean of all numbers of pairs, one for each seed."""
        found = []
        for entry in self.entries:
            names = [name for name in entry["metrics"] if re.fullmatch(r"associative_recall/accuracy/on/\d+", name)]
            if names:
                found.append(math.fsum(_number(entry, name) for name in names) / len(names))
        return found


def _number(entry: Entry, metric: str) -> float:
    """A number of an entry, NaN if it has none; infinities are words in JSON."""
    return float(entry["metrics"].get(metric, math.nan))


def _lines(record: Iterable[Entry]) -> list[_Line]:
    """Entries by memory and size; of several learning rates the best on the least seed, of each part."""
    found: dict[tuple[str, int], dict[tuple[str, str], list[Entry]]] = {}
    for entry in record:
        parts = found.setdefault((entry["name"], entry["asked"] or 0), {})
        parts.setdefault((entry["part"], entry["text"] or ""), []).append(entry)
    lines = []
    for (name, asked), parts in sorted(found.items(), key=lambda item: (item[0][0] != "none", item[0])):
        chosen = []
        for entries in parts.values():
            seed = min(entry["seed"] for entry in entries)
            best = max((entry for entry in entries if entry["seed"] == seed), key=_score)
            chosen += [entry for entry in entries if entry["lr"] == best["lr"]]
        lines.append(_Line(name, asked or None, chosen))
    return lines


def _score(entry: Entry) -> float:
    """How good a training is, for the choice of a learning rate: more is better."""
    of_part = {
        "associative_recall": "associative_recall/accuracy/on",
        "worth": "worth/perplexity/on",
    }
    value = _number(entry, of_part.get(entry["part"], "overwrite/exact_match/on"))
    return -math.inf if math.isnan(value) else -value if entry["part"] == "worth" else value


def _saved(line: _Line, none: _Line | None, text: str) -> list[float]:
    """Share of perplexity that a memory saves beside a model without one of as many parameters and tokens, by seed."""
    perplexity = {
        of: {e["seed"]: _number(e, "worth/perplexity/on") for e in here.entries if e["text"] == text}
        for of, here in ((0, line), (1, none))
        if here is not None
    }
    return [1 - value / perplexity[1][seed] for seed, value in perplexity[0].items() if seed in perplexity.get(1, {})]


def table(record: Sequence[Entry]) -> list[list[str]]:
    """The lines of the table, its head first. Columns of which nothing was measured are left out."""
    lines = _lines(record)
    none = next((line for line in lines if line.name == "none"), None)
    columns: list[list[str]] = [
        ["memory", *(f"`{line.name}`" for line in lines)],
        ["size", *("default" if line.asked is None else f"{line.asked / 1000:.0f} KB" for line in lines)],
        ["state of a row, bytes", *(_count(line.state_bytes) for line in lines)],
        ["of the model of pairs", *(_count(line.costs("state_bytes", pairs=True)) for line in lines)],
    ]
    for column in _COLUMNS:
        columns.append([column.label, *(_cell(line, column) for line in lines)])
        if column.metric == "worth/perplexity/on":
            cells = [_mean(_saved(line, none, str(column.text)), _SHARE) for line in lines]
            columns.append([f"{column.text}: saved beside `none`", *cells])
        if column.metric == "associative_recall/held/on":
            columns.append(["pairs answered, mean", *(_mean(line.accuracy, _RATE) for line in lines)])
    controls = [f"{name}/exact_match/{of}" for name in ("needle", "overwrite") for of in _CONTROLS]
    greatest = [max((value for name in controls for value in line.values(name)), default=math.nan) for line in lines]
    columns += [
        ["controls at most", *(shown(value, True) for value in greatest)],
        ["FLOPs a token", *(_count(_average(line, "training/flops_per_token")) for line in lines)],
        ["tokens per CPU second", *(_count(line.speed) for line in lines)],
        ["parameters", *(_count(line.costs("parameters")) for line in lines)],
        ["seeds", *(str(len({entry["seed"] for entry in line.entries})) for line in lines)],
        ["commit", *(", ".join(sorted({entry["commit"] for entry in line.entries})) for line in lines)],
    ]
    told = [column for column in columns if set(column[1:]) != {"-"}]
    head, *rows = zip(*told, strict=True)
    return [list(head), ["---"] * len(head), *map(list, rows)]


def _average(line: _Line, metric: str) -> float:
    """Mean of a number over the trainings of text."""
    found = [_number(e, metric) for e in line.entries if e["part"] != "associative_recall" and metric in e["metrics"]]
    return math.fsum(found) / len(found) if found else math.nan


def _count(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}"


def _cell(line: _Line, column: _Column) -> str:
    """A number over seeds; of one seed with the interval that its experiment tells."""
    values = line.values(column.metric, column.text)
    if len(values) != 1 or column.ends is None:
        return _mean(values, column.bounds, column.percent)
    low, high = (line.values(end, column.text) for end in column.ends)
    return shown(values[0], column.percent) + (in_brackets(low[0], high[0], column.percent) if low and high else "")


def _mean(values: Sequence[float], bounds: tuple[float, float], percent: bool = True) -> str:
    """Mean over seeds with its 95 % t interval; "-" without seeds."""
    if not values:
        return "-"
    _, low, high = interval(values, *bounds)
    return over_seeds(values, low, high, percent)


def figures(record: Sequence[Entry]) -> dict[str, Figure]:
    """Accuracy against bytes, and worth against speed; by file name, without those of which nothing was measured."""
    lines = _lines(record)
    none = next((line for line in lines if line.name == "none"), None)
    accuracy = [(line, line.costs("state_bytes", pairs=True), line.accuracy) for line in lines]
    worth = [(line, line.speed, _saved(line, none, "code")) for line in lines if line.asked is None]
    drawn = {}
    for name, points, bounds, head, x, y in (
        ("table_bytes", accuracy, _RATE, "Accuracy against bytes", "bytes of state of a row", "pairs answered, mean"),
        (
            "table_worth",
            worth,
            _SHARE,
            "Worth against speed",
            "tokens per CPU second of training",
            "perplexity saved, code",
        ),
    ):
        there = [(line, at, interval(values, *bounds)) for line, at, values in points if at > 0 and values]
        if there:
            drawn[name] = _drawn(there, [line.name for line in lines], head, x, y)
    return drawn


def _drawn(
    points: Sequence[tuple[_Line, float, tuple[float, float, float]]], names: Sequence[str], head: str, x: str, y: str
) -> Figure:
    """A line for each memory through its sizes; the one that it has by itself is filled. Names decide looks."""
    colors = [PALETTE[name] for name in ("blue", "vermillion", "green", "purple", "orange", "sky", "black")]
    with style():
        figure = Figure(figsize=(10.0, 6.5))
        axes: Axes = figure.subplots()
        for i, name in enumerate(dict.fromkeys(names)):
            own = sorted(
                (at, *(100 * end for end in ends), line.asked is None) for line, at, ends in points if line.name == name
            )
            if not own:
                continue
            color, marker = colors[i % len(colors)], "osD^vPX"[i // len(colors) % 7]
            ats, means, lows, highs, _ = map(np.array, zip(*own, strict=True))
            error = np.nan_to_num([means - lows, highs - means])
            look: dict[str, Any] = {"color": color, "linewidth": 1.0, "elinewidth": 0.6, "capsize": 2, "label": name}
            axes.errorbar(ats, means, yerr=error, marker=marker, markerfacecolor="white", markersize=6, **look)
            for at, mean, *_, default in own:
                if default:
                    axes.plot([at], [mean], color=color, marker=marker, markersize=8, zorder=5)
        axes.set(title=head, xlabel=x, ylabel=f"{y}, %")
        if max(at for _, at, _ in points) > 10 * min(at for _, at, _ in points):
            axes.set_xscale("log")
        figure.legend(loc="outside right upper", fontsize=9, title="filled: its own size", title_fontsize=9)
    return figure
