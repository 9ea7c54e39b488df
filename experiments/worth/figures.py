"""Figure of `worth`."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.worth.settings import CONDITIONS, KINDS
from memlm.analysis.style import PALETTE, style
from memlm.evaluation.headline import in_percent
from memlm.evaluation.result import Result

_LOOK = {
    "on": ("blue", "o", "-"),
    "off": ("vermillion", "s", "--"),
    "wiped": ("purple", "D", ":"),
    "swapped": ("green", "^", "-."),
}


def plot(result: Result) -> dict[str, Figure]:
    """Loss and what memory saves by the place in the document, and by kind of token."""
    places = sorted({row["place"] for row in result.rows})
    if not places:
        return {}
    with style():
        figure = Figure(figsize=(14.0, 5.0))
        figure.suptitle(textwrap.fill(result.metadata["says"], 130), x=0.01, ha="left", fontsize=12)
        by_loss, by_place, by_kind = figure.subplots(1, 3)
        _losses(by_loss, result, places)
        _saved(by_place, result, places)
        _kinds(by_kind, result)
        handles, labels = by_loss.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))  # below: no curve is there
    return {"worth": figure}


def _ends(result: Result, name: str, of: str) -> tuple[float, float, float]:
    """A number and the ends of its interval."""
    return tuple(result.metrics[f"{name}{end}/{of}"] for end in ("", "_low", "_high"))  # type: ignore[return-value]


def _places(axes: Axes, places: list[int]) -> None:
    """Name the parts of a document on the x axis."""
    short = [f"{place // 1024}k" if place >= 1024 else f"{place}" for place in places]
    axes.set_xticks(range(len(places)), short)
    axes.set_xlabel("place in the document: tokens from ... to the next")


def _losses(axes: Axes, result: Result, places: list[int]) -> None:
    for name, label in CONDITIONS.items():
        color, marker, line = _LOOK[name]
        values = [result.metrics[f"nll/{name}/from{place}"] for place in places]
        axes.plot(values, color=PALETTE[color], marker=marker, linestyle=line, label=label)
    _places(axes, places)
    n_token, n_document = result.metadata["n_token"], result.metadata["n_document"]
    axes.set(title=f"Loss of {n_token:,} tokens, {n_document} documents", ylabel="nats per token")


def _saved(axes: Axes, result: Result, places: list[int]) -> None:
    for shift, name in ((-0.06, "on"), (0.06, "swapped")):
        color, marker, line = _LOOK[name]
        values, lows, highs = zip(*(_ends(result, "worth", f"{name}/from{place}") for place in places), strict=True)
        error = np.abs(np.array([lows, highs]) - values)
        axes.errorbar(
            np.arange(len(places)) + shift, values, yerr=error, color=PALETTE[color], marker=marker, linestyle=line,
            capsize=3,
        )  # fmt: skip
    axes.axhline(0, color=PALETTE["black"], linewidth=1.0, linestyle=":")
    _places(axes, places)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.set(title="Perplexity saved, by place")


def _kinds(axes: Axes, result: Result) -> None:
    distance = result.metadata["settings"]["distance"]
    labels = {
        "far": f"names last seen\n> {distance:,} tokens ago",
        "new": "names new to\nthe document",
        "rest": "all else",
    }
    there = [kind for kind in KINDS if result.metrics[f"n_token/{kind}"]]
    for shift, name in ((-0.15, "on"), (0.15, "swapped")):
        color, marker, _ = _LOOK[name]
        for y, kind in enumerate(there):
            value, low, high = _ends(result, "worth", f"{name}/{kind}")
            error = None if math.isnan(low) else [[value - low], [high - value]]
            axes.errorbar(value, y + shift, xerr=error, color=PALETTE[color], marker=marker, markersize=8, capsize=4)
    told = []
    for kind in there:
        share, gain = result.metrics[f"share/{kind}"], result.metrics[f"gain/{kind}"]
        of_gain = "" if math.isnan(gain) else f"\n{in_percent(gain):.0f} % of the gain"
        told.append(f"{labels[kind]}\n{in_percent(share):.0f} % of tokens{of_gain}")
    axes.set_yticks(range(len(there)), told)
    axes.set_ylim(len(there) - 0.5, -0.5)
    axes.axvline(0, color=PALETTE["black"], linewidth=1.0, linestyle=":")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.set(title="Perplexity saved, by kind of token")
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
