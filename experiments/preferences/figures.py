"""Figures of `preferences`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.preferences.experiment import CONTROLLERS, LABELS
from memlm.analysis.style import PALETTE, style
from memlm.evaluation.result import Result
from memlm.statistics import wilson

_COLORS = {"on": "blue", "perfect": "green", "everything": "orange", "recency": "vermillion"}


def plot(result: Result) -> dict[str, Figure]:
    """Right answers beside controls and baselines; and how they change by session, after a change, and unused."""
    metrics, curves = result.metrics, result.metadata["curves"]
    main = result.metadata["memory"]["controller"]
    labels = {
        "on": f"memory on, {CONTROLLERS[main]}",
        **{name: LABELS[name] for name in ("wiped", "swapped")},
        "unsignalled": LABELS["unsignalled"],
        **{name: f"controller: {label}" for name, label in CONTROLLERS.items() if name != main},
        **{name: LABELS[name] for name in ("perfect", "everything", "recency")},
    }
    shown = [name for name in labels if not math.isnan(metrics.get(f"right/{name}", math.nan))]
    if not shown:
        return {}
    percent = PercentFormatter(xmax=1, symbol=" %")
    with style():
        bars = Figure(figsize=(10.5, 5.0))
        panels = bars.subplots(1, 2, sharey=True)
        titles = {"right": ("prompts with the right preference", "of questions about preferences in use"),
                  "false": ("prompts with a preference never told", "of questions about other aspects")}  # fmt: skip
        for panel, (rate_of, (title, label)) in zip(panels, titles.items(), strict=True):
            part = [name for name in shown if f"{rate_of}/{name}" in metrics]
            places = [shown.index(name) for name in part]
            rate, low, high = (
                np.array([metrics[f"{end}{rate_of}/{name}"] for name in part]) for end in ("", "low_", "high_")
            )
            panel.barh(
                places, rate, xerr=[(rate - low).clip(min=0), (high - rate).clip(min=0)], capsize=3,
                color=[PALETTE[_COLORS.get(name, "sky")] for name in part],
            )  # fmt: skip
            panel.set(title=title, xlim=(0, 1), xlabel=f"{label}, n = {int(metrics[f'n_{rate_of}/on']):,}")
            panel.xaxis.set_major_formatter(percent)
        panels[0].axvline(
            metrics["chance"], color=PALETTE["black"], linestyle=":", linewidth=1.2, label="guess among the values"
        )
        panels[0].set_yticks(range(len(shown)), [labels[name] for name in shown])
        panels[0].invert_yaxis()
        bars.legend(loc="outside lower center", title="bars: 95 % Wilson interval")
        time = Figure(figsize=(10.5, 4.2))
        panels = time.subplots(1, 3, sharey=True)
        titles = {
            "session": ("preferences in use", "sessions so far"),
            "change": ("a preference that changes", "sessions since the new value was told"),
            "age": ("a preference not told any more", "sessions since it was told last"),
        }
        lines = {"on": "memory on"} | {name: LABELS[name] for name in ("perfect", "everything", "recency")}
        for panel, (key, (title, label)) in zip(panels, titles.items(), strict=True):
            for name, said in lines.items():
                _curve(
                    panel, curves[name][key], _COLORS[name], said if key == "session" else None, first=key == "session"
                )
            panel.set(title=title, xlabel=label, ylim=(0, 1))
            panel.yaxis.set_major_formatter(percent)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _curve(panels[1], curves["on"]["outdated"], "purple", "memory on: the old value", first=False)
        if math.isfinite(fades := result.metadata["fades_after"]):
            panels[2].axvline(
                fades, color=PALETTE["black"], linestyle=":", linewidth=1.2, label="full strength fades by decay"
            )
        panels[0].set_ylabel("right preference in the prompt")
        time.legend(loc="outside lower center", ncols=3, title="bands: 95 % Wilson interval")
    return {"preferences": bars, "over_time": time}


def _curve(axes: Axes, points: Sequence[Sequence[int]], color: str, label: str | None, first: bool) -> None:
    """Rates with their intervals, from 1 if ``first``, else from 0."""
    points = [(i + first, k, n) for i, (k, n) in enumerate(points) if n]
    if not points:
        return
    x, rate = [i for i, _, _ in points], [k / n for _, k, n in points]
    low, high = zip(*(wilson(k, n) for _, k, n in points), strict=True)
    axes.fill_between(x, low, high, color=PALETTE[color], alpha=0.15, linewidth=0)
    axes.plot(x, rate, color=PALETTE[color], marker="o", markersize=3, label=label)
