"""Figures of `slot_usage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from experiments.slot_usage.settings import PROBES, SHARES
from memlm.analysis.style import PALETTE, style
from memlm.evaluation.result import Result


def plot(result: Result) -> dict[str, Figure]:
    """Heat maps of reads and writes; how evenly slots are used, and what is lost without them."""
    figures = {}
    if any(row["kind"] == "bin" for row in result.rows):
        figures["slot_usage_heatmap"] = _heatmaps(result)
    if any(row["kind"] == "ablation" for row in result.rows):
        figures["slot_usage"] = _panels(result)
    return figures


def _heatmaps(result: Result) -> Figure:
    """Reads and writes over time and slots, a row per bank; white where slots are empty and nothing can be read."""
    rows = [row for row in result.rows if row["kind"] == "bin"]
    labels = list(dict.fromkeys(row["bank"] for row in rows))
    with style():
        figure = Figure(figsize=(10.5, 1.0 + 3.2 * len(labels)))
        grid = figure.subplots(len(labels), 2, squeeze=False)
        for line, label in zip(grid, labels, strict=True):
            mine = [row for row in rows if row["bank"] == label]
            n_used, n_slot = mine[0]["n_slot"], result.metadata["n_slot"][label]
            x = sorted({row["token"] for row in mine})
            y = sorted({row["slot"] for row in mine})
            read, even, write = (np.array([row[key] for row in mine]).reshape(len(x), len(y)) for key in SHARES)
            relative = np.divide(read, even, out=np.full_like(read, np.nan), where=even > 0)
            panels = {"read": (relative, "times the even share"), "write": (write, "share of the segment's writes")}
            for axes, (key, (values, name)) in zip(line, panels.items(), strict=True):
                top = np.nanquantile(values, 0.99) if np.isfinite(values).any() else 1.0
                edges = np.array([*y, n_used]) - 0.5  # so that the number of a slot stands at its middle
                mesh = axes.pcolormesh(
                    [*x, x[-1] + result.metadata["segment_len"]], edges, values.T, vmin=0, vmax=max(top, 1e-9),
                    cmap="cividis",
                )  # fmt: skip
                form = PercentFormatter(xmax=1, symbol=" %") if key == "write" else "{x:g}\N{MULTIPLICATION SIGN}"
                bar = figure.colorbar(mesh, ax=axes, pad=0.02, extend="max", format=form)
                bar.set_label(name)
                bar.outline.set_visible(False)
                axes.set(title=f"{key.capitalize()}s of {label}", xlabel="tokens so far", ylabel="slot")
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                axes.grid(visible=False)
            if n_used < n_slot:
                line[0].set_ylabel(f"slot (above {n_used:,} all of\n{n_slot:,} are empty)")
    return figure


def _panels(result: Result) -> Figure:
    """Effective slots beside the even expectation, and the loss when slots are forgotten."""
    metrics, labels = result.metrics, list(result.metadata["n_slot"])
    lines = [(label, use) for label in labels for use in ("reads", "writes")]
    with style():
        figure = Figure(figsize=(12.0, 3.6 + 0.25 * len(lines)))
        if lines:
            evenness, *others = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
            _evenness(evenness, metrics, lines)
        else:
            others = figure.subplots(1, 2)
        shares = result.metadata["settings"]["shares"]
        for axes, (probe, title) in zip(others, PROBES.items(), strict=True):
            for suffix, color, who in (("", PALETTE["blue"], "trained"), ("/untrained", "#777777", "untrained")):
                for slots, what, line in (("top", "most read", "-"), ("random", "random", "--")):
                    names = [f"ablation/{probe}/{slots}/{share:g}{suffix}" for share in shares]
                    low, high = ([metrics[f"{end}/{name}"] for name in names] for end in ("low", "high"))
                    axes.fill_between(shares, low, high, color=color, alpha=0.12, linewidth=0)
                    axes.plot(
                        shares, [metrics[name] for name in names], color=color, linestyle=line, marker="o",
                        markerfacecolor=color if slots == "top" else "white", label=f"{what} slots, {who} model",
                    )  # fmt: skip
            axes.axhline(0, color=PALETTE["black"], linewidth=1, linestyle=":")
            axes.set(title=f"Loss of {title}", xlabel="share of filled slots forgotten, at least one")
            axes.set_ylabel("rise of the NLL, nats per token")
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(shares)
            axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        handles, names = others[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, title="band: 95 % interval over documents")
    return figure


def _evenness(axes: Axes, metrics: Mapping[str, float], lines: Sequence[tuple[str, str]]) -> None:
    """Effective slots as a share of those that even use would give."""
    for y, (label, use) in enumerate(lines):
        for suffix, shift, color in (("", -0.18, PALETTE["blue"]), ("/untrained", 0.18, "#777777")):
            found, even = (metrics[f"{key}_{use}/{label}{suffix}"] for key in ("effective", "even"))
            axes.barh(y + shift, found / even if even else 0.0, height=0.34, color=color, alpha=0.85)
            axes.annotate(
                f"{found:,.0f} of {even:,.0f}", (0, y + shift), xytext=(5, 0), textcoords="offset points", va="center",
                fontsize=9, color="white" if even and found / even > 0.35 else PALETTE["black"],
            )  # fmt: skip
    axes.axvline(1, color=PALETTE["black"], linewidth=1.2, linestyle=":")
    axes.set_yticks(range(len(lines)), [f"{use}\n{label}" for label, use in lines])
    axes.invert_yaxis()
    axes.set(title="Effective slots", xlabel="against even use (dotted)", xlim=(0, 1.1))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
