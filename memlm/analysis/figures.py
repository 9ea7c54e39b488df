"""Figures of a training run and of a memory, drawn from plain data.

Nothing here writes or shows anything: every function returns a `matplotlib.figure.Figure` that belongs to no window
and no global registry, or None when there is nothing to draw. `read_history` is the one function that reads a file.

A *history* is a list of rows, each a dict from column to value, as Lightning's `CSVLogger` keeps them in
`metrics.csv`: `step` plus any of `train/loss`, `val/nll`, `recall/on`, `recall/off`, `memory/write_gate`,
`memory/read_gate` and more. A row seldom holds every column: absent, None and NaN all mean "not measured here".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from memlm.analysis.run_log import History, series_of
from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.statistics import effective, wilson

_UNITS = {
    "write_gate": "mean gate",
    "read_gate": "mean gate",
    "read_mass": "weight on slots",
    "read_entropy": "nats",
    "filled": "share of slots",
    "state_bytes": "bytes",
}


"""Units of numbers that any memory has, by the last part of the column's name."""


def loss_curve(history: History, into: SubFigure | None = None) -> Figure | None:
    """Training loss and validation negative log-likelihood over steps.

    Args:
        history: Rows with `step` and any of `train/loss` (or `train/loss_step`) and `val/nll`, nats per token.
        into: Part of a figure to draw in; None for a figure of its own.

    Returns:
        The figure, or None when neither column holds a value.

    Raises:
        ValueError: If a row holds a value but no step.
    """
    train = series_of(history, "train/loss") or series_of(history, "train/loss_step")
    val = series_of(history, "val/nll")
    if not train and not val:
        return None
    with style():
        figure: Any = into or Figure()
        axes = figure.subplots()
        if train:
            step, loss = list(train), list(train.values())
            if len(loss) >= 50:  # the raw loss is noise around the trend: show both
                axes.plot(step, loss, color=PALETTE["sky"], linewidth=0.8, alpha=0.6)
                loss = _running_mean(loss, width=max(5, len(loss) // 40))
            _line(axes, step, loss, color=PALETTE["blue"], label="train/loss, answers weigh more")
        if val:
            _line(axes, list(val), list(val.values()), color=PALETTE["vermillion"], marker="o", label="val/nll")
        axes.set(title="Loss", ylabel="nats per token")
        _step_axis(axes)
        axes.legend(loc="upper right")
    return figure


def recall_curve(
    history: History, n: int | None = None, chance: float | None = None, into: SubFigure | None = None
) -> Figure | None:
    """Recall over steps, always beside its controls.

    A recall rate without a control claims nothing, so none is drawn then.

    Args:
        history: Rows with `step`, `recall/on` and at least one control `recall/<name>` (names: `CONTROLS`), rates in
            [0, 1]. `recall/n` (items behind each rate) and `recall/chance` are used when present.
        n: Items behind each rate, for rows without `recall/n`. With neither, no interval is drawn and the legend
            says so.
        chance: Rate of a blind guess; overrides `recall/chance`. With neither, no line is drawn.
        into: Part of a figure to draw in; None for a figure of its own.

    Returns:
        The figure, or None when `recall/on` or every control is missing.

    Raises:
        ValueError: If a rate lies outside [0, 1], n is below 1, or a row holds a value but no step.
    """
    on = _rates(history, "recall/on")
    controls = {name: _rates(history, f"recall/{name}") for name in CONTROLS}
    controls = {name: series for name, series in controls.items() if series}
    if not on or not controls:
        return None
    if chance is None:
        chance = next(iter(_rates(history, "recall/chance").values()), None)
    if n is not None and n < 1:
        raise ValueError(f"recall_curve: n={n} items behind each rate; expected at least 1")
    n_at = {step: int(count) for step, count in series_of(history, "recall/n").items()}
    with style():
        figure: Any = into or Figure(figsize=(7.0, 4.6))
        axes = figure.subplots()
        colors = [PALETTE[name] for name in ("vermillion", "purple", "orange", "green")]
        markers, sizes = ["s", "o", "^", "x"], [10, 7, 5, 4]  # nested, so that four controls at 0 % all stay visible
        for (name, label), color, marker, size in zip(CONTROLS.items(), colors, markers, sizes, strict=True):
            if name not in controls:
                continue
            series = controls[name]
            _band(axes, series, n_at, n, color, alpha=0.08)
            axes.plot(
                list(series),
                list(series.values()),
                color=color,
                linewidth=1.2,
                linestyle="--",
                marker=marker,
                markersize=size,
                markerfacecolor="none",
                clip_on=False,
                label=f"{label}, last {_percent(series)}",
            )
        counted = _band(axes, on, n_at, n, PALETTE["blue"], alpha=0.18)
        axes.plot(
            list(on),
            list(on.values()),
            color=PALETTE["blue"],
            linewidth=2.5,
            marker="o",
            clip_on=False,
            zorder=5,
            label=f"memory on, last {_percent(on)}",
        )
        if chance is not None:
            label = f"chance, {100 * chance:.3g} %"
            axes.axhline(chance, color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
        band = f"band: 95 % Wilson interval, n = {counted}" if counted else "n not logged: no interval"
        axes.set(title="Recall and its controls", ylabel="recalled exactly", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        axes.set_yticks(np.linspace(0, 1, 6))
        _step_axis(axes)
        handles, labels = axes.get_legend_handles_labels()
        order = [len(controls), *range(len(controls)), *range(len(controls) + 1, len(handles))]
        figure.legend(
            [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=2, title=band
        )
    return figure


def slot_use(usage: Mapping[str, Mapping[str, Any]], n_bin: int = 64) -> Figure | None:
    """Heat map of slot use: one row per layer (or memory), slots in order, pooled into bins.

    Args:
        usage: Row label -> {"filled": (n_slot,) 0/1 or bool, "read": (n_slot,) read weight summed over reads, >= 0}.
            Either key may be missing; rows may differ in n_slot.
        n_bin: Most bins per row; a row with fewer slots shows each slot.

    Returns:
        One panel per key: the share of filled slots in each bin, and the reads of a bin relative to even reading of
        all slots (1 = its share). Beside each row stand the share filled, and the effective number of slots read,
        exp(entropy of the read weight). None when there is nothing to draw.

    Raises:
        ValueError: If an entry is empty, not one-dimensional, negative, not finite, or `filled` exceeds 1.
    """
    if n_bin < 1:
        raise ValueError(f"slot_use: n_bin={n_bin}; expected at least 1")
    panels = {}
    for key in ("filled", "read"):
        found = {label: _slots(entry[key], label, key) for label, entry in usage.items() if entry.get(key) is not None}
        if found:
            panels[key] = found
    if not panels:
        return None
    ratios = [1.3 + 0.42 * len(rows) for rows in panels.values()]
    with style():
        figure = Figure(figsize=(8.5, max(2.4, sum(ratios))))
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (key, rows) in zip(grid, panels.items(), strict=True):
            pooled = [_pool(slots, n_bin, relative=key == "read") for slots in rows.values()]
            top = 1.0 if key == "filled" else max(1.0, *(float(bins.max()) for bins in pooled))
            for i, bins in enumerate(pooled):
                edges = np.linspace(0, 100, len(bins) + 1)
                # 0.06 of white between rows tells neighbours apart
                mesh = axes.pcolormesh(edges, [i - 0.47, i + 0.47], bins[None], vmin=0, vmax=top, cmap="cividis")
            notes = [_slot_note(slots, key) for slots in rows.values()]
            axes.set_yticks(range(len(rows)), list(rows))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xlim(0, 100)
            axes.xaxis.set_major_formatter(PercentFormatter(symbol=" %"))
            axes.grid(visible=False)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            twin = axes.secondary_yaxis("right")
            twin.set_yticks(range(len(rows)), notes)
            twin.tick_params(length=0)
            twin.spines[:].set_visible(False)
            if key == "filled":
                axes.set_title("Filled slots")
                bar = figure.colorbar(
                    mesh, ax=axes, pad=0.02, ticks=[0, 0.5, 1], format=PercentFormatter(xmax=1, symbol=" %")
                )
                bar.set_label("share filled")
            else:
                axes.set_title("Reads per slot")
                bar = figure.colorbar(mesh, ax=axes, pad=0.02, format="{x:g}\N{MULTIPLICATION SIGN}")
                bar.locator = MaxNLocator(4)
                bar.set_label("against even use")
            bar.outline.set_visible(False)
        grid[-1].set_xlabel("place in the bank (share of its slots)")
    return figure


def gates(history: History, into: SubFigure | None = None) -> Figure | None:
    """Mean write gate and mean read gate over steps, each on its own scale.

    Args:
        history: Rows with `step` and any of `memory/write_gate`, `memory/read_gate`, or with several memories
            `memory/<name>/write_gate`, `memory/<name>/read_gate`; values in [0, 1].
        into: Part of a figure to draw in; None for a figure of its own.

    Returns:
        One panel per kind of gate, one line per memory, or None when no gate was logged.

    Raises:
        ValueError: If a gate lies outside [0, 1], or a row holds a value but no step.
    """
    columns = dict.fromkeys(column for row in history for column in row if isinstance(column, str))
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for gate in ("write_gate", "read_gate"):
        for column in columns:
            parts = column.split("/")
            if parts[0] == "memory" and parts[-1] == gate and (series := _rates(history, column)):
                panels.setdefault(gate, {})["/".join(parts[1:-1])] = series
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    palette = [color for name, color in PALETTE.items() if name != "yellow"]
    color_of = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    with style():
        figure: Any = into or Figure(figsize=(7.0, 1.2 + 2.2 * len(panels)))
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        titles = {"write_gate": "Write gate: how much is stored", "read_gate": "Read gate: how much is used"}
        for axes, (gate, lines) in zip(grid, panels.items(), strict=True):
            for name, series in lines.items():
                _line(axes, list(series), list(series.values()), color=color_of[name], label=name or gate)
            axes.set(title=titles[gate], ylabel="mean gate")
            highest = max(value for series in lines.values() for value in series.values())
            axes.set_ylim(0, min(1.0, 1.15 * highest) or 1.0)
            if names != [""]:
                axes.legend(loc="best", ncols=min(len(lines), 3))
        _step_axis(grid[-1])
    return figure


def memory_curves(history: History) -> Figure | None:
    """Every number of the memories over steps: one panel for each kind, one line for each memory or layer.

    Args:
        history: Rows with `step` and columns `memory/<name>/<kind>`, where the name may be missing or have parts.

    Returns:
        The figure, or None when there is no such column.

    Raises:
        ValueError: If a row holds a value but no step.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for column in dict.fromkeys(column for row in history for column in row if column.startswith("memory/")):
        parts = column.split("/")
        if series := series_of(history, column):
            panels.setdefault(parts[-1], {})["/".join(parts[1:-1])] = series
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    palette = [color for name, color in PALETTE.items() if name != "yellow"]
    n_column = min(2, len(panels))
    n_row = -(-len(panels) // n_column)
    with style():
        figure = Figure(figsize=(5.5 * n_column, 0.8 + 2.4 * n_row))
        grid = figure.subplots(n_row, n_column, squeeze=False).flatten()
        for axes, (kind, lines) in zip(grid, panels.items(), strict=False):
            for name, series in lines.items():
                _line(
                    axes,
                    list(series),
                    list(series.values()),
                    color=palette[names.index(name) % len(palette)],
                    label=name,
                )
            axes.set_title(kind.replace("_", " "))
            axes.set_ylabel(_UNITS.get(kind, "value"))
            _step_axis(axes)
            if any(lines):
                axes.legend(loc="best")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
    return figure


def _rates(history: History, column: str) -> dict[int, float]:
    """Like `_series`, for values in [0, 1]; forgives rounding at the ends."""
    series = series_of(history, column)
    for step, value in series.items():
        if not -1e-6 <= value <= 1 + 1e-6:
            raise ValueError(f"{column!r} is {value} at step {step}; expected a rate between 0 and 1")
    return {step: min(1.0, max(0.0, value)) for step, value in series.items()}


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over up to `width` neighbours on either side; the window shrinks symmetrically at the ends."""
    result = []
    for i in range(len(values)):
        reach = min(width // 2, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        result.append(math.fsum(window) / len(window) if all(map(math.isfinite, window)) else values[i])
    return result


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """A line, with markers where points are few: a single point is no visible line."""
    if len(x) <= 20:
        options.setdefault("marker", "o")
    axes.plot(x, y, **options)


def _band(
    axes: Axes, series: Mapping[int, float], n_at: Mapping[int, int], n: int | None, color: str, alpha: float
) -> str:
    """Shades the Wilson interval wherever the number of items is known; returns that number as text, or ""."""
    counted = {step: count for step in series if (count := n_at.get(step, n))}
    if not counted:
        return ""
    bounds = [wilson(series[step] * count, count) for step, count in counted.items()]
    low, high = zip(*bounds, strict=True)
    axes.fill_between(list(counted), low, high, color=color, alpha=alpha, linewidth=0)
    counts = sorted(set(counted.values()))
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _percent(series: Mapping[int, float]) -> str:
    """The last rate of a series as a percentage, never rounded up to a full 100."""
    value = 100 * list(series.values())[-1]
    text = f"{value:.1f}"
    return f"{'>99.9' if text == '100.0' and value < 100 else text} %"


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _slots(values: Any, label: str, key: str) -> np.ndarray:
    """(n_slot,) float array of one row, checked."""
    slots = np.asarray(values, dtype=float)  # (n_slot,)
    where = f"slot_use: {key!r} of {label!r}"
    if slots.ndim != 1 or slots.size == 0:
        raise ValueError(f"{where} has shape {slots.shape}; expected one value per slot, shape (n_slot,)")
    if not np.isfinite(slots).all() or slots.min() < 0:
        raise ValueError(f"{where} holds negative or non-finite values; expected finite values >= 0")
    if key == "filled" and slots.max() > 1:
        raise ValueError(f"{where} goes up to {slots.max():g}; expected 0 (empty) to 1 (filled)")
    return slots


def _pool(slots: np.ndarray, n_bin: int, relative: bool) -> np.ndarray:
    """Mean per bin (n_bin,); `relative` divides by the mean over all slots."""
    edges = np.linspace(0, len(slots), min(n_bin, len(slots)) + 1).astype(int)
    bins = np.add.reduceat(slots, edges[:-1]) / np.diff(edges)  # (n_bin,)
    mean = slots.mean()
    return bins / mean if relative and mean > 0 else bins


def _slot_note(slots: np.ndarray, key: str) -> str:
    """What the figure says beside a row."""
    if key == "filled":
        return f"{100 * slots.mean():.3g} % of {len(slots):,}"
    return f"{effective(slots):,.0f} of {len(slots):,} effective" if slots.sum() else "never read"
