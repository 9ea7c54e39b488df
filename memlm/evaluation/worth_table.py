"""What memory is worth, in short: a small table and a figure of the record of `worth`.

Entries are named TEXT-MEMORY or TEXT-none-BASELINE: `code-ltm`, `code-none-equal-cpu`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memlm.analysis.style import SURFACES, Theme
from memlm.evaluation import themed
from memlm.evaluation.headline import shown
from memlm.statistics import mean_interval

NAME = "worth"
"""Of the record."""

FILES = themed.files(NAME)
"""Of the figure, for light and dark pages."""

Entry = Mapping[str, Any]

_TEXTS = {"code": "Python's source", "books": "novels"}
_CONTROLS = {"off": "reads off", "wiped": "memory wiped", "swapped": "another document's memory"}
_LABELS = {
    "none": "no memory, equal steps",
    "none-equal-cpu": "no memory, about equal CPU time",
    "none-context-512": "no memory, context of 512 tokens",
    "cache": "attention to a cache, equal bytes",
}


class _Bar(NamedTuple):
    """A condition of a model in the figure.

    Attributes:
        label: What it is called.
        color: Its name among those of a theme.
        seeds: Perplexity and the ends of its interval over documents, one for each seed.
    """

    label: str
    color: str
    seeds: list[tuple[float, float, float]]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean_interval(value for value, _, _ in self.seeds)[0]


def _models(record: Sequence[Entry], text: str) -> dict[str, list[Entry]]:
    """Entries of a text by what stands behind it in their names, one for each seed."""
    found: dict[str, list[Entry]] = {}
    for entry in record:
        of, _, model = entry["name"].partition("-")
        if of == text and "perplexity/on" in entry["metrics"]:
            found.setdefault(model, []).append(entry)
    return found


def _perplexity(entries: Sequence[Entry], condition: str = "on") -> list[tuple[float, float, float]]:
    """Perplexity and the ends of its interval, one for each entry."""
    names = [f"perplexity{end}/{condition}" for end in ("", "_low", "_high")]
    numbers = ([float(entry["metrics"][name]) for name in names] for entry in entries)  # NaN is a word in JSON
    return [(value, low, high) for value, low, high in numbers]


def _mean(entries: Sequence[Entry], condition: str = "on") -> float:
    return mean_interval(value for value, _, _ in _perplexity(entries, condition))[0]


def _is_baseline(model: str) -> bool:
    return model.partition("-")[0] == "none"


def table(record: Sequence[Entry]) -> list[list[str]]:
    """A line for each text and memory: with it, its best control, and the best of the models without memory."""
    lines = [["held-out text", "memory", "perplexity", "best control", "best model without memory", "seeds"]]
    lines.append(["---"] * len(lines[0]))
    texts = dict.fromkeys(entry["name"].partition("-")[0] for entry in record)
    for text in sorted(texts, key=lambda text: [*_TEXTS, text].index(text)):
        models = _models(record, text)
        without = [model for model in models if _is_baseline(model)]
        best = min(without, key=lambda model: _mean(models[model]), default=None)
        for model in sorted((m for m in models if not _is_baseline(m)), key=lambda m: _mean(models[m])):
            control = min(_CONTROLS, key=lambda name: _mean(models[model], name))
            n_seed, n_other = len(models[model]), len(models[model if best is None else best])
            lines.append(
                [
                    *(_TEXTS.get(text, text), f"`{model}`", _cell(models[model])),
                    f"{_value(_mean(models[model], control))}, {_CONTROLS[control]}",
                    "-" if best is None else f"{_cell(models[best])}, {_label(best).removeprefix('no memory, ')}",
                    str(n_seed) if n_seed == n_other else f"{n_seed}; {n_other} without",
                ]
            )
    return lines


def _value(perplexity: float) -> str:
    return shown(perplexity) if perplexity >= 1000 else f"{perplexity:.1f}"


def _cell(entries: Sequence[Entry]) -> str:
    """Of one seed the interval over documents, of several the interval over seeds."""
    seeds = _perplexity(entries)
    mean, half = mean_interval(value for value, _, _ in seeds)
    if math.isnan(half):
        _, low, high = seeds[0]
        return _value(mean) + _ends(_value(low), _value(high))
    return f"{_value(mean)} ± {half:.1f}"


def _ends(low: str, high: str) -> str:
    """The ends of an interval; nothing if documents were too few for one."""
    return "" if low == "nan" else f" ({low} to {high})"


def _label(model: str) -> str:
    return _LABELS.get(model, model)


def _bars(record: Sequence[Entry]) -> list[_Bar]:
    """The best memory on code, its controls, and all other models of code, the best first."""
    models = _models(record, "code")
    memories = [model for model in models if not _is_baseline(model)]
    if not memories:
        return []
    best = min(memories, key=lambda model: _mean(models[model]))
    bars = [_Bar(f"{best}, memory on", "first", _perplexity(models[best]))]
    bars += [_Bar(f"{best}, {said}", "soft", _perplexity(models[best], name)) for name, said in _CONTROLS.items()]
    others = sorted((m for m in models if m != best), key=lambda m: _mean(models[m]))
    return bars + [_Bar(_label(model), "second", _perplexity(models[model])) for model in others]


def told(record: Sequence[Entry]) -> str:
    """The numbers of the figure as text, which stands in its files; empty if there is nothing to draw."""
    parts = [
        f"{bar.label}: "
        + ", ".join(f"{value:.2f}{_ends(f'{low:.2f}', f'{high:.2f}')}" for value, low, high in bar.seeds)
        for bar in _bars(record)
    ]
    return "; ".join(parts)


def figures(record: Sequence[Entry]) -> dict[str, bytes]:
    """The figure by the name of its file, for light and dark pages; empty if there is nothing to draw."""
    bars = _bars(record)
    return themed.drawn(NAME, told(record), lambda theme: _drawn(bars, theme)) if bars else {}


def _drawn(bars: Sequence[_Bar], theme: Theme) -> Figure:
    """Bars from zero; a point and an interval over documents for each seed."""
    colors = SURFACES[theme]
    figure = Figure(figsize=(8.6, 0.42 * len(bars) + 1.5))
    axes: Axes = figure.subplots()
    high = np.nanmax([seed for bar in bars for seed in bar.seeds])
    for y, bar in enumerate(bars):
        color = colors[bar.color]
        axes.barh(y, bar.mean, height=0.66, color=color, alpha=0.35)
        for i, (value, low, end) in enumerate(bar.seeds):
            at = y + 0.18 * (i - (len(bar.seeds) - 1) / 2)
            error = None if math.isnan(low) else [[value - low], [end - value]]
            axes.errorbar(value, at, xerr=error, color=color, marker="o", markersize=4, linewidth=1.4, capsize=2)
        axes.text(1.12 * high, y, _value(bar.mean), va="center", ha="right", fontweight="bold")
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_xticks(range(0, int(high) + 1, 10 if high < 100 else int(high / 5)))
    axes.set(ylim=(len(bars) - 0.45, -0.55), xlim=(0, 1.13 * high), xlabel="perplexity (lower is better)")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    without = [bar.mean for bar in bars if bar.label.startswith("no memory")]
    beside = f", at best {_value(min(without))} without" if without else ""
    head = f"Perplexity of held-out code: {_value(bars[0].mean)} with memory{beside}"
    figure.suptitle(head, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
