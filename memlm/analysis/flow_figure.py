"""`memory_flow` drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from memlm.analysis.flow import FAINT, BankFlow, Flow, Text, memory_flow
from memlm.analysis.style import PALETTE, style
from memlm.models.base import LanguageModel


def visualize_memory_flow(model: LanguageModel, text: Text, state: Any = None) -> Figure:
    """Draw what each layer with memory reads, from where, how strongly, and what is written and evicted.

    Args:
        model: A language model; it is left as it was.
        text: The text, or its token ids.
        state: State of one row before the text; None for the beginning.
    """
    return draw_flow(memory_flow(model, [text], state))


def draw_flow(flow: Flow) -> Figure:
    """The figure of a flow: for each layer a map of its reads, and below it gate, writes and evictions.

    In the map a dot says that a token (across) read what comes from an earlier token (up), or a slot where a memory
    does not tell where its slots come from; the darker and larger, the stronger. Dotted lines are segments, solid ones
    the beginnings of contexts.
    """
    n_row = max(2 * len(flow.reads), 1)
    with style():
        figure = Figure(figsize=(11.0, max(2.2, 4.4 * len(flow.reads))))
        grid = figure.subplots(n_row, 1, sharex=True, squeeze=False, height_ratios=([2.6, 1] * len(flow.reads)) or [1])
        axes: list[Axes] = list(grid[:, 0])
        for (key, read), upper, lower in zip(flow.reads.items(), axes[::2], axes[1::2], strict=False):
            _draw_reads(upper, flow, key, read, figure)
            _draw_strips(lower, flow, key, read)
        if not flow.reads:
            axes[0].text(
                0.5, 0.5, "no memory tells what it reads", ha="center", va="center", transform=axes[0].transAxes
            )
            axes[0].set_yticks([])
        axes[-1].set_xlabel("token of the text")
        axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes[-1].set_xlim(-0.5, len(flow.ids) - 0.5)
    return figure


def _draw_reads(axes: Axes, flow: Flow, key: str, read: BankFlow, figure: Figure) -> None:
    x, y, strength, told = [], [], [], True
    for token, (slots, weights) in enumerate(zip(read.slots, read.weights, strict=True)):
        for slot, weight in zip(slots, weights, strict=True):
            if slot >= 0 and weight * read.gate[token] > FAINT:
                origin = read.origins[flow.segment[token]][int(slot)]
                told = told and origin.place is not None
                x.append(token)
                y.append((origin.place, int(slot)))
                strength.append(float(weight * read.gate[token]))
    heights = [place if told else slot for place, slot in y]
    order = np.argsort(strength)
    dots = axes.scatter(
        np.array(x)[order] if x else [], np.array(heights)[order] if x else [],
        c=np.array(strength)[order] if x else [], s=4 + 40 * np.array(strength)[order] if x else [],
        cmap="viridis_r", vmin=0, vmax=max([*strength, 1e-3]), linewidths=0,
    )  # fmt: skip
    axes.set_title(f"Reads of {key}")
    axes.set_ylabel("made from token" if told else "slot")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _boundaries(axes, flow)
    if not x:
        axes.text(0.5, 0.5, "nothing was read", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
    else:
        figure.colorbar(dots, ax=axes, pad=0.01, label="weight x gate").outline.set_visible(False)


def _draw_strips(axes: Axes, flow: Flow, key: str, read: BankFlow) -> None:
    """Gate and strength as lines; tokens whose slots were written, and where tokens were evicted, as marks."""
    n = np.arange(len(flow.ids))
    axes.plot(n, read.gate, color=PALETTE["sky"], linewidth=1, label="gate")
    axes.plot(n, read.strength, color=PALETTE["blue"], linewidth=1.2, label="gate x weight on slots")
    writes = flow.writes.get(key) or flow.writes[key.partition("/")[0]]
    written = [origin.place for part in writes.written for origin in part if origin.place is not None]
    evicted = [origin.place for part in writes.evicted for origin in part if origin.place is not None]
    axes.plot(written, np.full(len(written), -0.12), "|", color=PALETTE["green"], markersize=6, label="written")
    axes.plot(
        evicted, np.full(len(evicted), -0.28), "x", color=PALETTE["vermillion"], markersize=5, label="evicted later"
    )
    axes.set(ylabel="share", ylim=(-0.42, 1.05), yticks=[0, 0.5, 1])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, fontsize=9, borderaxespad=0.2)
    _boundaries(axes, flow)


def _boundaries(axes: Axes, flow: Flow) -> None:
    for parts, line in ((flow.segment, ":"), (flow.context, "-")):
        for x in np.flatnonzero(np.diff(parts)):
            axes.axvline(x + 0.5, color="#999999", linewidth=0.8, linestyle=line, zorder=0)
