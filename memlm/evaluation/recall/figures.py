"""What figures of recall have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from memlm.analysis.style import PALETTE
from memlm.evaluation.recall.rates import LABELS

Points = list[tuple[float, float, float, float]]  # x, rate, and its interval
_MARKERS = {"on": "o", "off": "s", "wiped": "o", "swapped": "^", "unseen": "x"}
_SIZES = {"on": 6, "off": 10, "wiped": 7, "swapped": 5, "unseen": 4}  # nested, so that equal rates stay visible
COLORS = dict(zip(LABELS, ("blue", "vermillion", "purple", "orange", "green", "sky"), strict=True))
"""What of `PALETTE` draws each condition."""


def draw_rates(axes: Axes, metrics: Mapping[str, float], values: Sequence[int]) -> str:
    """Draw recall and its controls against what was varied, on axes whose scale is set.

    Args:
        axes: Where to draw.
        metrics: What `tabulate` returns.
        values: What was varied, ascending: ends of the names of the metrics.

    Returns:
        What the legend says of the intervals.
    """
    markers = dict(zip(LABELS, ("o", "s", "o", "^", "x", "D"), strict=True))
    sizes = dict(zip(LABELS, (6, 10, 7, 5, 4, 6), strict=True))  # nested, so that controls at 0 % stay visible
    counts = set()
    for condition in LABELS:
        x = [value for value in values if f"exact_match/{condition}/{value}" in metrics]
        if not x:
            continue
        rate, low, high, n = (
            [metrics[f"{name}/{condition}/{value}"] for value in x] for name in ("exact_match", "low", "high", "n")
        )
        counts |= set(map(int, n))
        color, on = PALETTE[COLORS[condition]], condition == "on"
        draw_interval(axes, x, low, high, color, band=on)
        axes.plot(
            x, rate, color=color, linestyle="-" if on else "--", linewidth=2.5 if on else 1.2,
            marker=markers[condition], markersize=sizes[condition], markerfacecolor=color if on else "none",
            clip_on=False, zorder=5 if on else 3, label=LABELS[condition],
        )  # fmt: skip
    chance = [metrics[f"chance/{value}"] for value in values if f"chance/{value}" in metrics]
    if len(chance) == len(values):
        share = f", {100 * chance[0]:.2g} %" if len(set(chance)) == 1 else ""
        label = f"guess among told facts of the kind{share}"
        if len(values) == 1:
            axes.axhline(chance[0], color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
        else:
            axes.plot(values, chance, color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
    axes.set(ylabel="recalled exactly", ylim=(0, 1))
    axes.set_xticks(values)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    n_each = " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
    return f"band, bars: 95 % Wilson intervals, n = {n_each}"


def draw_interval(
    axes: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, band: bool
) -> None:
    """Draw the intervals of a curve: a band, or thin bars where bands of many curves would blend, or at a single x."""
    if band and len(x) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    else:
        axes.vlines(x, low, high, color=color, alpha=0.6, linewidth=1.2)


def draw_curves(axes: Axes, points: Mapping[str, Points], labels: Mapping[str, str]) -> None:
    """Rates of conditions with their intervals, in percent; the memory as it is stands out, its controls are nested."""
    for name, found in points.items():
        if not found:
            continue
        x, rate, low, high = (np.array(part) for part in zip(*found, strict=True))
        color, on = PALETTE[COLORS[name]], name == "on"
        axes.errorbar(
            x, rate, yerr=[(rate - low).clip(min=0), (high - rate).clip(min=0)], color=color, capsize=3,
            linestyle="-" if on else "--", linewidth=2.5 if on else 1.2, elinewidth=1.2, marker=_MARKERS[name],
            markersize=_SIZES[name], markerfacecolor=color if on else "none", clip_on=False, zorder=5 if on else 3,
            label=labels[name],
        )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
