"""Figures of `modern_facts`."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from experiments.modern_facts.experiment import CONDITIONS
from experiments.modern_facts.facts import CUES
from memlm.analysis.style import PALETTE, style
from memlm.evaluation.result import Result


def plot(result: Result) -> dict[str, Figure]:
    """Figures by file name.

    Returns:
        ``recall``: exact match of every condition for each cue; ``similarity``: how sharply a question finds something
        in memory over time. Those without data are left out.
    """
    figures: dict[str, Figure] = {}
    if "exact_match/on" in result.metrics:
        figures["recall"] = _bars(result)
    if result.metadata.get("similarity"):
        figures["similarity"] = _similarity(result)
    return figures


def _bars(result: Result) -> Figure:
    metrics = result.metrics
    colors = dict(zip(CUES, ("blue", "sky", "green"), strict=True))
    n = int(metrics["n/on"])
    with style():
        figure = Figure(figsize=(8.4, 5.8))
        axes = figure.subplots()
        for y, condition in enumerate(CONDITIONS):
            for i, (kind, label) in enumerate(CUES.items()):
                name = f"{kind}/{condition}"
                rate, low, high = (metrics[f"{part}{name}"] for part in ("exact_match", "low", "high"))
                place = y + 0.26 * (i - 1)
                color = PALETTE[colors[kind]]
                axes.barh(place, rate, height=0.22, color=color, label=label if y == 0 else None)
                bounds = [[max(rate - low, 0)], [max(high - rate, 0)]]
                axes.errorbar(rate, place, xerr=bounds, color=PALETTE["black"], capsize=2, linewidth=1.0, clip_on=False)
        axes.axvline(metrics["chance"], color=PALETTE["black"], linewidth=1.2, linestyle=":",
                     label=f"guess among the document's facts, {100 * metrics['chance']:.2g} %")  # fmt: skip
        axes.axhline(4.5, color=PALETTE["black"], linewidth=0.8)  # above: true values and controls; below: false twins
        axes.set_yticks(range(len(CONDITIONS)), [text.replace(", ", ",\n") for text in CONDITIONS.values()])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), title=f"Modern facts told {result.metadata['distances'][0]:,} or more tokens before")
        axes.set_xlabel(f"answered exactly, with 95 % Wilson interval, n = {n} facts")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        figure.legend(loc="outside lower center", ncols=2, title="asked in")
    return figure


def _similarity(result: Result) -> Figure:
    points, until = result.metadata["similarity"], result.metadata["told_until"]
    looks = {
        ("trained", True): ("facts told already", "blue", "-", "o"),
        ("trained", False): ("facts not told yet", "vermillion", "-", "s"),
        ("untrained", True): ("untrained model, told", "sky", "--", "o"),
        ("untrained", False): ("untrained model, not told yet", "orange", "--", "s"),
    }
    titles = {"top": "largest read weight", "mass": "read weight in all"}
    with style():
        figure = Figure(figsize=(8.4, 4.6))
        for axes, (name, title) in zip(figure.subplots(1, 2, sharex=True), titles.items(), strict=True):
            for (model, told), (label, color, line, marker) in looks.items():
                mine = [point for point in points if (point["model"], point["told"]) == (model, told)]
                axes.plot(
                    [point["place"] for point in mine], [point[name] for point in mine], color=PALETTE[color],
                    linestyle=line, marker=marker, markersize=4, label=label if name == "top" else None,
                )  # fmt: skip
            axes.axvspan(0, until, color=PALETTE["black"], alpha=0.07, linewidth=0,
                         label="facts are told" if name == "top" else None)  # fmt: skip
            axes.set(title=title.capitalize(), ylim=(0, 1.02), xlim=(0, None), xlabel="tokens read before the question")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        figure.axes[0].set_ylabel("at the end of the cue, mean over facts")
        figure.legend(loc="outside lower center", ncols=3)
    return figure
