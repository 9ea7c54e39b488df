"""Recall against bytes of state, beside what others have published: a figure of the record of `mqar_zoology`.

What is published was read from the figure of accuracy and state in the README of the project zoology (2312.04927) at
its commit d88d6f5, by pixels, so to about .005: after 32 epochs, at the best of four rates. Its bytes count both
layers, the convolution included (12 for each channel); those of the record are of the memory alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from memlm.analysis.style import SURFACES, Theme
from memlm.evaluation import themed

NAME = "mqar_zoology"
"""Of the record."""

FILES = themed.files("mqar_bytes")
"""Of the figure, for light and dark pages."""

PUBLISHED: Mapping[str, Sequence[tuple[float, float]]] = {
    "DeltaNet": [(8_960, 0.793), (34_304, 0.963), (134_144, 0.995)],
    "Gated DeltaNet": [(17_152, 0.890), (67_072, 0.988), (265_000, 0.994)],
    "RWKV-7": [(17_152, 0.816), (34_304, 0.915), (68_608, 0.981)],
    "GLA": [(4_864, 0.532), (17_920, 0.771), (68_000, 0.950)],
    "Mamba-2": [(8_000, 0.520), (16_000, 0.690), (33_000, 0.784), (66_000, 0.832), (98_000, 0.844)],
    "sliding window": [(9_700, 0.081), (34_000, 0.310), (132_000, 0.658), (263_000, 0.797)],
}
"""Bytes and accuracy by mixer."""


def told(record: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of the figure as text, which stands in its files; empty if there is nothing to draw."""
    return "; ".join(
        f"{run['name']}, seed {run['seed']}: {run['metrics']['accuracy/on']:.1%} in {run['state_bytes']:,} bytes"
        for run in record
    )


def figures(record: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The figure by the name of its file, for light and dark pages; empty if there is nothing to draw."""
    return themed.drawn("mqar_bytes", told(record), lambda theme: _drawn(record, theme)) if record else {}


def _drawn(record: Sequence[Mapping[str, Any]], theme: Theme) -> Figure:
    """Published curves in grey, their names at their ends; runs of the record in colour with their intervals."""
    colors = SURFACES[theme]
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    for name, points in PUBLISHED.items():
        axes.plot(*zip(*points, strict=True), color=colors["soft"], linewidth=1, marker="o", markersize=3)
        axes.annotate(
            name, points[0], (-4, -11), textcoords="offset points", color=colors["soft"], fontsize=8, ha="right"
        )
    for entry in record:
        rate, low, high = (entry["metrics"][f"{key}/on"] for key in ("accuracy", "low", "high"))
        color = colors["second" if entry["name"].startswith("delta") else "first"]
        bar = [[rate - low], [high - rate]]
        axes.errorbar([entry["state_bytes"]], [rate], yerr=bar, color=color, marker="o", capsize=3, zorder=3)
        memory = re.split(r"[,-]", entry["name"])[0]  # its size is where it stands
        at = (entry["state_bytes"], rate)
        label = axes.annotate(memory, at, (-6, 4), textcoords="offset points", color=color, fontsize=9, ha="right")
        label.set_path_effects([Stroke(linewidth=3, foreground=colors["paper"]), Normal()])
    axes.set(xscale="log", xlabel="bytes of state of a row", ylabel="answered right", ylim=(0, 1.05), xlim=(2_500, 5e5))
    sizes = [4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000]
    axes.set_xticks(sizes, [f"{size // 1000}k" for size in sizes])
    axes.minorticks_off()
    figure.suptitle(
        "Grey: published, 32 epochs. Colour: runs of memlm, a share of one epoch", x=0.01, ha="left", fontsize=11
    )
    return figure
