"""Figures of `continual`: matrices of tasks, scores, what replay saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.continual.experiment import SCORES, matrix
from experiments.continual.settings import Continual
from memlm.analysis.style import PALETTE, style
from memlm.evaluation.result import Result

_COLORS = {"none": "green", "reservoir": "blue", "surprise": "orange", "retrieved": "vermillion"}


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy matrices; scores by condition; and the loss of the first task by steps and by rows."""
    settings = result.metadata["settings"]
    cfg = Continual(**settings)
    figures = {"efficiency": _efficiency_figure(result, cfg)}
    if len(cfg.tasks) > 1:
        figures = {"matrices": _matrices(result, cfg), "scores": _scores_figure(result, cfg)} | figures
    return figures


def _matrices(result: Result, cfg: Continual) -> Figure:
    """Heat map of R, the mean over seeds, for each condition."""
    n_column, n_line = len(cfg.replay), len(cfg.consolidate)
    with style():
        figure = Figure(figsize=(3.6 * n_column + 1, 3.4 * n_line + 0.6))
        panels = figure.subplots(n_line, n_column, squeeze=False, sharex=True, sharey=True)
        for panel, condition in zip(panels.flat, cfg.conditions, strict=True):
            r = np.mean([matrix(result.rows, condition, seed) for seed in cfg.seeds], axis=0)
            image = panel.imshow(r, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (i, j), value in np.ndenumerate(r):
                panel.text(
                    j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black"
                )
            panel.set(title=condition)
            panel.set_xticks(range(len(cfg.tasks)), cfg.tasks)
            panel.set_yticks(range(len(cfg.tasks) + 1), ["before any", *(f"after {name}" for name in cfg.tasks)])
            panel.grid(False)
        bar = figure.colorbar(image, ax=panels.ravel().tolist(), label="accuracy, mean over seeds")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        panels[-1, n_column // 2].set_xlabel("task that is asked")
    return figure


def _scores_figure(result: Result, cfg: Continual) -> Figure:
    """Final accuracy, forgetting and backward transfer of each condition; lines: 95 % intervals over seeds."""
    names = list(cfg.conditions)
    with style():
        figure = Figure(figsize=(11, 0.42 * len(names) + 1.8))
        panels = figure.subplots(1, 3, sharey=True)
        for panel, name in zip(panels, ("final", "forgetting", "backward"), strict=True):
            value, low, high = (
                np.array([result.metrics[f"{end}{name}/{condition}"] for condition in names])
                for end in ("", "low_", "high_")
            )
            bars = panel.barh(
                range(len(names)), value, xerr=np.nan_to_num([value - low, high - value]), capsize=3,
                color=[PALETTE[_COLORS[policy]] for policy, _ in cfg.conditions.values()],
            )  # fmt: skip
            for bar, (_, merge) in zip(bars, cfg.conditions.values(), strict=True):
                bar.set_alpha(0.5 if merge else 1.0)
            panel.axvline(0, color=PALETTE["black"], linewidth=0.8)
            panel.set(title=SCORES[name], xlabel=f"mean over tasks, {len(cfg.seeds)} seeds")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
    return figure


def _efficiency_figure(result: Result, cfg: Continual) -> Figure:
    """Loss of the first task, while it is trained, by steps and by rows, each seed a line."""
    with style():
        figure = Figure(figsize=(9, 3.8))
        panels = figure.subplots(1, 2, sharey=True)
        for policy, merge in cfg.conditions.values():
            if merge and False in cfg.consolidate:
                continue
            condition = next(name for name, of in cfg.conditions.items() if of == (policy, merge))
            for i, curves in enumerate(_curves_of(result, condition, cfg.tasks[0])):
                for axis, panel in enumerate(panels):
                    panel.plot(
                        [point[axis] for point in curves], [point[2] for point in curves], linewidth=1.2,
                        color=PALETTE[_COLORS[policy]], label=condition if i == 0 and axis == 0 else None,
                    )  # fmt: skip
        panels[0].set(ylabel=f"nats per token of held-out {cfg.tasks[0]}", xlabel="steps")
        panels[1].set(xlabel="rows trained on, replayed ones counted")
        figure.legend(loc="outside lower center", ncols=len(cfg.replay), title="each line: one seed")
    return figure


def _curves_of(result: Result, condition: str, task: str) -> Iterator[Sequence[Sequence[float]]]:
    return (curves[task] for curves in result.metadata["curves"][condition].values())
