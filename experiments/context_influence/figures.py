"""Figures of `context_influence`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.context_influence.experiment import COLORS, EDGES, LEAST, OTHERS, over_documents
from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.evaluation.result import Result, Row


def plot(result: Result) -> dict[str, Figure]:
    """Influence over the place in the document, its distribution over tokens, and its means."""
    if not any(row["kind"] == "text" for row in result.rows):
        return {}
    with style():
        figure = Figure(figsize=(11.5, 8.2))
        (left, right), (spread, means) = figure.subplots(2, 2)
        for axes, name, title in (
            (left, "delta_nll", "Change of the loss by memory"),
            (right, "kl", "How far the prediction moves"),
        ):
            _over_positions(axes, result.rows, name)
            axes.set(title=title, xlabel="tokens since the document began")
            if name == "kl":
                axes.set_ylim(bottom=0)
            texts = {"delta_nll": "NLL(on) − NLL(other), nats\n(below 0: memory helps)", "kl": "KL(on || other), nats"}  # noqa: RUF001
            axes.set_ylabel(texts[name])
        _distribution(spread, result.rows)
        _means(means, result.metrics)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, title="memory on, compared with")
    return {"context_influence": figure}


def _over_positions(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """One line per condition over the place in the document, with its band, as far as several documents go."""
    text = [row for row in rows if row["kind"] == "text"]
    for model, condition in [("trained", name) for name in OTHERS] + [("untrained", "off")]:
        mine = [row for row in text if row["model"] == model and row["condition"] == condition]
        x, mean, half = [], [], []
        for position in sorted({row["position"] for row in mine}):
            part = [row for row in mine if row["position"] == position]
            if len(part) >= LEAST:
                middle, width, _ = over_documents(part, name)
                x.append(position)
                mean.append(middle)
                half.append(width)
        y, h = np.array(mean), np.array(half)
        trained = model == "trained"
        color = PALETTE[COLORS[condition]] if trained else "#777777"
        axes.fill_between(x, y - h, y + h, color=color, alpha=0.12, linewidth=0)
        axes.plot(
            x, y, color=color, linestyle="-" if trained else "--", linewidth=3.2 if condition == "off" else 1.8,
            marker="o", markersize=3, label=CONTROLS[condition] + ("" if trained else ", untrained model"),
        )  # fmt: skip
    axes.axhline(0, color=PALETTE["black"], linewidth=1, linestyle=":")


def _distribution(axes: Axes, rows: Sequence[Row]) -> None:
    """Share of the tokens of text by the change of their loss."""
    between = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(EDGES)]
    labels = [f"< {EDGES[0]:g}", *between, f"> {EDGES[-1]:g}"]
    mine = [row for row in rows if row["kind"] == "distribution" and row["model"] == "trained"]
    for i, condition in enumerate(("off", "swapped")):
        counts = np.array([row["n_token"] for row in mine if row["condition"] == condition])
        axes.barh(
            np.arange(len(labels)) + 0.4 * i - 0.2, counts / counts.sum(), height=0.38,
            color=PALETTE[COLORS[condition]], alpha=0.85,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set(title="Tokens of text by change of the loss", ylabel="NLL(on) − NLL(other), nats")  # noqa: RUF001
    axes.set_xlabel("share of tokens")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _means(axes: Axes, metrics: Mapping[str, float]) -> None:
    """Mean change of the loss with its interval, of answers and of text."""
    ticks: list[str] = []
    for kind, label in (("answer", "answers"), ("text", "text")):
        for condition in OTHERS:
            key = f"delta_nll/{kind}/{condition}"
            if key not in metrics:
                continue
            for suffix, shift in (("", -0.14), ("/untrained", 0.14)):
                mean, low = metrics[key + suffix], metrics[f"low/{key}{suffix}"]
                axes.errorbar(
                    mean, len(ticks) + shift, xerr=None if math.isnan(low) else mean - low, capsize=4,
                    marker="s" if suffix else "o", color="#777777" if suffix else PALETTE[COLORS[condition]],
                )  # fmt: skip
            n = int(metrics[f"n_document/{kind}"])
            ticks.append(f"{label} ({n} documents)\n{CONTROLS[condition]}")
    axes.set_yticks(range(len(ticks)), ticks, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color=PALETTE["black"], linewidth=1, linestyle=":")
    axes.set_title("Means (squares: untrained model)")
    axes.set_xlabel("NLL(on) − NLL(other), nats (95 % interval)")  # noqa: RUF001
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
