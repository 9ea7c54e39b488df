"""Figures of `pattern_storage`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from experiments.pattern_storage.experiment import rates_of
from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.evaluation.recall.figures import draw_interval
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result, Row
from memlm.statistics import interval

_COLORS = dict(zip(CONDITIONS, ("blue", "vermillion", "purple", "orange", "green"), strict=True))


_LAG_BINS = 5


def plot(result: Result) -> dict[str, Figure]:
    """Finding patterns against their number and their age; pattern similarity over time."""
    figures = {}
    if any(row["kind"] == "probe" for row in result.rows):
        figures["pattern_storage"] = _finding(result)
    if any(row["kind"] == "similarity" for row in result.rows):
        figures["pattern_similarity"] = _similarities(result)
    return figures


def _finding(result: Result) -> Figure:
    """Top-1 above, MRR below; against the number stored on the left, against lag on the right."""
    probes = [row for row in result.rows if row["kind"] == "probe"]
    numbers = sorted({row["n_stored"] for row in probes})
    last = [row for row in probes if row["n_stored"] == numbers[-1]]
    with style():
        figure = Figure(figsize=(11.0, 7.6))
        grid = figure.subplots(2, 2, sharey="row", sharex="col")
        titles = {"top1": "Found first (top-1)", "mrr": "Mean reciprocal rank"}
        for line, (name, title) in zip(grid, titles.items(), strict=True):
            for condition, suffix in [*((c, "") for c in CONDITIONS), ("on", "/untrained")]:
                keys = [f"{name}/{condition}/{number}{suffix}" for number in numbers]
                if keys[0] not in result.metrics:
                    continue
                low, high = ([result.metrics[f"{end}/{key}"] for key in keys] for end in ("low", "high"))
                label = {"on": "memory on", **CONTROLS}[condition] + (", untrained model" if suffix else "")
                _curve(line[0], numbers, [result.metrics[key] for key in keys], low, high, condition, suffix, label)
                mine = [row for row in last if row["condition"] == condition and row["lag"] is not None]
                if condition == "unseen":  # which has no age
                    line[1].axhline(
                        result.metrics[keys[-1]], color=PALETTE[_COLORS["unseen"]], linestyle="--", linewidth=1.2
                    )
                _over_lag(
                    line[1], [r for r in mine if (r["model"] == "trained") != bool(suffix)], name, condition, suffix
                )
            for axes in line:
                chance = result.metrics[f"chance/{name}"]
                axes.axhline(chance, color=PALETTE["black"], linewidth=1.2, linestyle=":", label="chance")
                axes.set_ylim(0, 1.02)
            line[0].set_ylabel(title)
            if name == "top1":
                line[0].yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        grid[0, 0].set_title("Against the number of patterns stored")
        grid[0, 1].set_title(f"Against lag, {numbers[-1]} patterns stored")
        grid[1, 0].set_xlabel("patterns stored in the document")
        grid[1, 0].set_xscale("log")
        grid[1, 0].minorticks_off()
        grid[1, 0].set_xticks(numbers, [f"{number:,}" for number in numbers])
        grid[1, 1].set_xlabel("tokens since the pattern was told")
        grid[1, 1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        n = int(result.metrics[f"n/on/{numbers[-1]}"])
        n_candidate = probes[0]["n_candidate"]
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4,
            title=f"which of {n_candidate} rests fits a cue; {n:,} cues per number stored; band, bars: 95 % intervals",
        )  # fmt: skip
    return figure


def _curve(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    condition: str,
    suffix: str,
    label: str,
) -> None:
    on = condition == "on" and not suffix
    color = "#777777" if suffix else PALETTE[_COLORS[condition]]
    marker = dict(zip(CONDITIONS, ("o", "s", "o", "^", "x"), strict=True))[condition]
    size = dict(zip(CONDITIONS, (6, 10, 7, 5, 4), strict=True))[condition]  # nested: controls often coincide
    draw_interval(axes, x, low, high, color, band=on)
    axes.plot(
        x, y, color=color, linestyle="-" if on else "--", linewidth=2.5 if on else 1.2, marker=marker, markersize=size,
        markerfacecolor=color if on else "none", zorder=5 if on else 3, label=label, clip_on=False,
    )  # fmt: skip


def _over_lag(axes: Axes, rows: Sequence[Row], name: str, condition: str, suffix: str) -> None:
    """A curve over bins of equally many rows."""
    if not rows:
        return
    parts = np.array_split(np.array(sorted(rows, key=lambda row: row["lag"]), dtype=object), min(_LAG_BINS, len(rows)))
    x = [float(np.mean([row["lag"] for row in part])) for part in parts]
    values = [rates_of(part.tolist(), "") for part in parts]
    y, low, high = ([value[f"{key}{name}/"] for value in values] for key in ("", "low/", "high/"))
    _curve(axes, x, y, low, high, condition, suffix, "")


def _similarities(result: Result) -> Figure:
    """Cosine of slots and the segment just read, over time: mean and maximum over slots."""
    rows = [row for row in result.rows if row["kind"] == "similarity"]
    labels = list(dict.fromkeys(row["bank"] for row in rows))
    with style():
        figure = Figure(figsize=(11.0, 1.6 + 3.0 * len(labels)))
        grid = figure.subplots(len(labels), 2, squeeze=False, sharex=True)
        for line, label in zip(grid, labels, strict=True):
            for axes, kind in zip(line, ("mean", "max"), strict=True):
                for model, color in (("trained", PALETTE["blue"]), ("untrained", "#777777")):
                    mine = [row for row in rows if row["bank"] == label and row["model"] == model]
                    if not mine:
                        continue
                    for column, what, dash in (("", "its own text", "-"), ("_other", "another document's text", ":")):
                        x = sorted({row["token"] for row in mine})
                        found = [interval((r[kind + column] for r in mine if r["token"] == t), -1.0, 1.0) for t in x]
                        y, low, high = np.array(found).T
                        axes.plot(x, y, color=color, linestyle=dash, label=f"{model} model, {what}")
                        if not column:
                            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                axes.axhline(0, color=PALETTE["black"], linewidth=1)
                axes.set_title(f"{label}: {'mean' if kind == 'mean' else 'maximum'} over slots")
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            line[0].set_ylabel("cosine of slot and segment")
        for axes in grid[-1]:
            axes.set_xlabel("tokens read")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, title="band: 95 % interval over documents")
    return figure
