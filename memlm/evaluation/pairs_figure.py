"""How many pairs each memory holds, at a glance: a figure of the record of `recall_by_memory`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from memlm.analysis.style import SURFACES, Theme
from memlm.evaluation import themed
from memlm.statistics import mean_interval

NAME = "recall_by_memory"
"""Of the record."""

FILES = themed.files(NAME)
"""Of the figure, for light and dark pages."""

_RATE = re.compile(r"accuracy/on/(\d+)")


class _Row(NamedTuple):
    """A memory in the figure.

    Attributes:
        name: Of the memory.
        kilobytes: Of the state of a row, 1,000 bytes each.
        rates: Share of the questions answered by number of pairs, each a mean over seeds.
    """

    name: str
    kilobytes: float
    rates: dict[int, float]


def _rows(record: Sequence[Mapping[str, Any]]) -> list[_Row]:
    """The memory that answers most first; of equal ones that with the smaller state."""
    rows = []
    for name in dict.fromkeys(entry["name"] for entry in record):
        entries = [entry for entry in record if entry["name"] == name]
        sizes = {
            int(found[1]) for entry in entries for metric in entry["metrics"] if (found := _RATE.fullmatch(metric))
        }
        rates = {
            size: mean_interval(entry["metrics"][f"accuracy/on/{size}"] for entry in entries)[0]
            for size in sorted(sizes)
        }
        rows.append(_Row(name, entries[0]["state_bytes"] / 1000, rates))
    return sorted(rows, key=lambda row: (-sum(round(rate, 3) for rate in row.rates.values()), row.kilobytes))


def told(record: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of the figure as text, which stands in its files; empty if there is nothing to draw."""
    return "; ".join(
        f"{row.name}: " + ", ".join(f"{size} pairs {rate:.1%}" for size, rate in row.rates.items())
        for row in _rows(record)
    )


def figures(record: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The figure by the name of its file, for light and dark pages; empty if there is nothing to draw."""
    rows = _rows(record)
    return themed.drawn(NAME, told(record), lambda theme: _drawn(rows, theme)) if rows else {}


def _drawn(rows: Sequence[_Row], theme: Theme) -> Figure:
    """A field for each memory and number of pairs: the more is answered, the stronger its colour."""
    colors = SURFACES[theme]
    sizes = sorted({size for row in rows for size in row.rates})
    figure = Figure(figsize=(7.2, 0.3 * len(rows) + 1.5))
    axes: Axes = figure.subplots()
    shades = LinearSegmentedColormap.from_list(NAME, [colors["paper"], colors["first"]])
    rates = [[row.rates.get(size, float("nan")) for size in sizes] for row in rows]
    axes.imshow(rates, cmap=shades, vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rates):
        for x, rate in enumerate(row):
            shown = "" if rate != rate else f"{100 * rate:.0f}"
            axes.text(x, y, shown, ha="center", va="center", color=colors["paper" if rate > 0.6 else "ink"], fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{row.name}, {row.kilobytes:.0f} KB" for row in rows])
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("pairs told")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.suptitle("Percent of questions answered", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
