"""The figure of a comparison."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import ScaledTranslation

from memlm.analysis.style import PALETTE, style
from memlm.evaluation.compare.differences import seeds_of
from memlm.evaluation.compare.groups import Comparison, Line
from memlm.evaluation.headline import shown

_MAINS = [
    ("blue", "o"),
    ("black", "s"),
    ("green", "^"),
    ("orange", "v"),
    ("purple", "D"),
    ("sky", "P"),
    ("vermillion", "X"),
]


_CONTROLS = [("vermillion", "s", 10), ("purple", "o", 8), ("orange", "^", 6), ("green", "x", 5), ("sky", "D", 7)]


def plot(comparison: Comparison) -> Figure:
    """A panel for each cost and for each main number with its controls; one row per group."""
    panels: list[list[Line]] = []
    for line in comparison.lines:
        last = panels[-1][-1] if panels else None
        # A main number that follows a control begins a panel of its own; those before any control share one, but for
        # rates and plain values, which have no axis in common.
        if (
            last is None
            or not line.experiment
            or line.experiment != last.experiment
            or (last.control and not line.control)
            or last.percent != line.percent
        ):
            panels.append([])
        panels[-1].append(line)
    labels = [textwrap.fill(f"{group.label} ({seeds_of(group)})", 26) for group in comparison.groups]
    rows = [panels[i : i + 3] for i in range(0, len(panels), 3)]
    # In inches, placed by hand: long legends would make an automatic layout squeeze the panels.
    inner = [max(0.55, 0.25 * max(map(_n_main, row))) * len(labels) for row in rows]
    outer = [high + 0.9 + 0.2 * max(map(_n_legend, row)) for high, row in zip(inner, rows, strict=True)]
    left, width, gap = 2.5, 3.4, 0.5
    size = left + 3 * width + 3 * gap, sum(outer) + 0.4
    with style():
        figure = Figure(figsize=size)
        figure.set_layout_engine("none")
        top = size[1] - 0.4
        for row, high, whole in zip(rows, inner, outer, strict=True):
            for column, panel in enumerate(row):
                x, y = left + column * (width + gap), top - 0.4 - high
                axes = figure.add_axes((x / size[0], y / size[1], width / size[0], high / size[1]))
                (_draw if panel[0].experiment else _draw_cost)(axes, panel)
                axes.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
                axes.set_ylim(len(labels) - 0.5, -0.6)
                axes.grid(axis="x")
                axes.grid(visible=False, axis="y")
            top -= whole
        note = "Bars: 95 % intervals as in the table, over seeds (ticks) or as a single seed tells it."
        figure.text(1 - gap / size[0], 1 - 0.2 / size[1], note, fontsize=10, ha="right", va="center")
    return figure


def _n_main(panel: Sequence[Line]) -> int:
    return sum(not line.control for line in panel)


def _n_legend(panel: Sequence[Line]) -> int:
    """Lines of the legend."""
    return sum(len(_wrapped(line).splitlines()) for line in panel) if panel[0].experiment else 0


def _wrapped(line: Line) -> str:
    return textwrap.fill(line.label, 44)


def _draw_cost(axes: Axes, panel: Sequence[Line]) -> None:
    (line,) = panel
    for y, cell in enumerate(line.cells):
        if cell is not None:
            axes.barh(y, cell.mean, height=0.5, color=PALETTE["blue"], alpha=0.85)
        axes.annotate(
            line.text(y), (0 if cell is None else cell.mean, y), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set(title=line.label, xlim=(0, 1.35 * max([cell.mean for cell in line.cells if cell is not None] + [1e-9])))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.set_xticks([])


def _draw(axes: Axes, panel: Sequence[Line]) -> None:
    mains = itertools.cycle((color, marker, 8) for color, marker in _MAINS)
    controls = itertools.cycle(_CONTROLS)
    n_main, shift = _n_main(panel), 0.0
    for line in panel:
        color, marker, size = next(controls if line.control else mains)
        look: dict[str, Any] = {"color": PALETTE[color], "marker": marker, "markersize": size, "linestyle": "none"}
        look["markerfacecolor"] = "none" if line.control else PALETTE[color]
        axes.plot([], [], label=_wrapped(line), **look)
        if not line.control:  # several main numbers stand one below the other
            shift += 0.7 / n_main if shift else 0.35 / n_main
        for y, cell in enumerate(line.cells):
            if cell is None:
                continue
            if math.isinf(cell.mean):  # more than was measured: no place on the axis
                across = axes.get_yaxis_transform()
                axes.annotate(shown(cell.mean, line.percent), (1, y), xycoords=across, ha="right", va="center")
                continue
            error = None if math.isnan(cell.low) else [[max(cell.mean - cell.low, 0)], [max(cell.high - cell.mean, 0)]]
            if line.control:
                axes.errorbar(cell.mean, y, xerr=error, elinewidth=1, zorder=3, clip_on=False, **look)
                continue
            y_main = y - 0.35 + shift
            axes.errorbar(cell.mean, y_main, xerr=error, elinewidth=2, capsize=4, zorder=5, clip_on=False, **look)
            axes.plot(cell.values, [y_main] * len(cell.values), "|", color=PALETTE["black"], markersize=10, zorder=6)
            axes.annotate(
                shown(cell.mean, line.percent), (cell.mean, y_main), xytext=(0, 9) if n_main == 1 else (9, 5),
                textcoords="offset points", ha="center" if n_main == 1 else "left", fontsize=10 if n_main == 1 else 8,
                fontweight="bold" if y in line.best else "normal",
            )  # fmt: skip
    axes.set_title(panel[0].experiment)
    if all(line.rate for line in panel):
        axes.set_xlim(-0.1, 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    else:
        axes.margins(x=0.15)
    if panel[0].percent:
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    below = axes.transAxes + ScaledTranslation(0, -0.35, axes.figure.dpi_scale_trans)  # inches
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0, borderpad=0, fontsize=9,
        labelspacing=0.3, handlelength=1.2,
    )  # fmt: skip
