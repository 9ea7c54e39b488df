"""Runs side by side: what they cost, and every experiment's headline with its controls, over settings and seeds.

Runs that differ only in seed are one group, shown as mean and 95 % t interval over seeds. Numbers are ranked only where
that says something: between groups trained on the same text for the same number of steps, and measured alike.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import ScaledTranslation

from experiments.base import PALETTE, mean_interval, style, table, wilson
from experiments.headline import Number, headline, shown
from experiments.runs import Run, Trained
from memlm.config import ConfigError
from memlm.files import atomic_file
from memlm.printed import in_csv, in_markdown, one_line, printable

_ABSENT = object()
_MAINS = [
    ("blue", "o"),
    ("black", "s"),
    ("green", "^"),
    ("orange", "v"),
    ("purple", "D"),
    ("sky", "P"),
    ("vermillion", "X"),
]
_CONTROLS = [("vermillion", "s", 10), ("purple", "o", 8), ("orange", "^", 6), ("green", "x", 5), ("sky", "D", 7)]


@dataclass
class Group:
    """Runs that differ only in seed.

    Attributes:
        runs: One per seed.
        label: What tells it from the other groups.
    """

    runs: list[Run]
    label: str = ""

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """Settings of all experiments of its runs, which agree in them."""
        return {name: settings for run in self.runs for name, settings in run.measured.items()}


class Cell(NamedTuple):
    """A number of a group.

    Attributes:
        values: One per seed.
        mean: Their mean.
        low: Lower end of the 95 % interval: over seeds by Student's t; of a single seed, the one its experiment tells
            (NaN if none); of a rate that is the same in all seeds, Wilson's for all items.
        high: Upper end.
        n: Items behind the number of each seed, at least; None if that is not told.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    n: int | None


@dataclass
class Line:
    """A number of every group.

    Attributes:
        experiment: Where it is from; empty for what the run itself costs.
        label: What it is called.
        metric: Name of the metric.
        cells: One per group; None where it was not measured.
        percent: Whether it is a rate.
        better: ``higher`` or ``lower``; None if neither is.
        control: Whether it is a control or a baseline.
        best: Groups that are best or not to be told from the best.
    """

    experiment: str
    label: str
    metric: str
    cells: list[Cell | None]
    percent: bool = False
    better: str | None = None
    control: bool = False
    best: set[int] = field(default_factory=set)

    def text(self, i: int) -> str:
        """The number of a group, with its interval and the mark of the best."""
        cell = self.cells[i]
        if cell is None:
            return "-"
        if not self.experiment:
            return f"{cell.mean:,.0f}"
        text = shown(cell.mean, self.percent)
        half = mean_interval(cell.values)[1]
        if half > 0:
            text += f" ± {shown(half, self.percent).removesuffix(' %')}"
        elif not math.isnan(cell.low):
            ends = (shown(end, self.percent).removesuffix(" %") for end in (cell.low, cell.high))
            text += f" ({' to '.join(ends)})"
        return f"{text} *" if i in self.best else text

    @property
    def name(self) -> str:
        """The label, with the number of items behind it."""
        counts = sorted({cell.n for cell in self.cells if cell is not None and cell.n is not None})
        n = "" if not counts else f", n = {counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
        return f"{self.label}{n}"


@dataclass(frozen=True)
class Comparison:
    """Groups side by side.

    Attributes:
        groups: In the order in which they were given.
        lines: Their numbers.
        differences: Settings in which groups differ: full name, and what it is in each group.
        notes: Sentences that belong to the table: what is not ranked, and why.
    """

    groups: list[Group]
    lines: list[Line]
    differences: list[tuple[str, list[str]]]
    notes: list[str]


# ---------------------------------------------------------------------------------------------------------- comparing


def compare(runs: Sequence[Run], left_out: Sequence[str] = ()) -> Comparison:
    """Put runs side by side.

    Args:
        runs: At least one.
        left_out: Directories to name as such.

    Raises:
        ConfigError: If two runs have the same settings and the same seed.
    """
    groups = _groups(runs)
    training = _differences([group.runs[0].training for group in groups])
    differences = [*training, *_measuring_differences(groups)]
    _name(groups, differences)
    lines = [*_costs(groups), *_headlines(groups)]
    notes = [f"Left out, as nothing was measured there: {folder}." for folder in left_out]
    reasons = _unlike(groups)
    notes += [f"Not ranked, as training was not the same: {reason}." for reason in reasons]
    for name in dict.fromkeys(line.experiment for line in lines if line.experiment):
        keys = [key for key, _ in differences if key.startswith(f"{name}.")]
        if keys:
            notes.append(f"{name} was measured with different settings ({', '.join(keys)}): not ranked.")
        elif not reasons:
            for line in lines:
                if line.experiment == name:
                    line.best = _best(line)
    texts = [(key, [_brief(value) for value in values]) for key, values in differences]
    return Comparison(groups, lines, texts, notes)


def _groups(runs: Sequence[Run]) -> list[Group]:
    groups: list[Group] = []
    for run in runs:
        for group in groups:
            known = group.measured
            if run.training == group.runs[0].training and all(
                known.get(name, settings) == settings for name, settings in run.measured.items()
            ):
                group.runs.append(run)
                break
        else:
            groups.append(Group([run]))
    for group in groups:
        seeds: dict[Any, Run] = {}
        for run in group.runs:
            seed = run.trained.config.get("seed")
            if (first := seeds.setdefault(seed, run)) is not run:
                raise ConfigError(
                    f"{first.path} and {run.path} have the same settings and the same seed {seed}, so they are no two "
                    "seeds: leave one out"
                )
    return groups


def _measuring_differences(groups: Sequence[Group]) -> Iterator[tuple[str, list[Any]]]:
    """Settings of experiments that were measured in several groups."""
    measured = [group.measured for group in groups]
    for name in dict.fromkeys(name for settings in measured for name in settings):
        yield from _among_present([settings.get(name, _ABSENT) for settings in measured], name)


def _differences(values: Sequence[Any], key: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Parts of plain values that differ, by full name; what one of them lacks as a whole is not taken apart."""
    if all(isinstance(value, list) and len(value) == len(values[0]) for value in values) and any(
        isinstance(item, Mapping) for item in values[0]
    ):
        values = [{str(i): item for i, item in enumerate(value)} for value in values]
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            parts = [value.get(name, _ABSENT) for value in values]
            if any(part is _ABSENT for part in parts):
                yield _dotted(key, name), parts
            yield from _among_present(parts, _dotted(key, name))
    elif any(value != values[0] for value in values):
        yield key, list(values)


def _among_present(values: Sequence[Any], key: str) -> Iterator[tuple[str, list[Any]]]:
    """Differences between the values that are there; the others stay absent."""
    there = [i for i, value in enumerate(values) if value is not _ABSENT]
    for name, parts in _differences([values[i] for i in there], key):
        whole = [_ABSENT] * len(values)
        for i, part in zip(there, parts, strict=True):
            whole[i] = part
        yield name, whole


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _brief(value: Any) -> str:
    """A value of a setting on a few characters."""
    if value is _ABSENT:
        return "absent"
    if isinstance(value, Mapping):
        return "given"
    text = value if isinstance(value, str) else json.dumps(value)
    return textwrap.shorten(one_line(text), 60, placeholder="...")


def _name(groups: Sequence[Group], differences: Sequence[tuple[str, list[Any]]]) -> None:
    """Label groups by name or memories, and by the fewest settings that tell apart those which are alike in that.

    Where models of several kinds are compared, their kind stands before the memories.
    """
    configs = [group.runs[0].trained.config for group in groups]
    kinds = [str(config["model"]["_target_"]).rpartition(".")[2].lower() for config in configs]
    for group, config, kind in zip(groups, configs, kinds, strict=True):
        memories = "+".join(config.get("memory") or ()) or "none"
        group.label = one_line(config.get("name") or (f"{kind}-{memories}" if len(set(kinds)) > 1 else memories))
    settings = [(key, [_brief(value) for value in values]) for key, values in differences]
    for label in {group.label for group in groups}:
        alike = [i for i, group in enumerate(groups) if group.label == label]
        while (n := len({groups[i].label for i in alike})) < len(alike):
            # What tells most of them apart; of several a setting of a memory, and the shortest.
            told = [
                (len({groups[i].label + texts[i] for i in alike}), key.startswith("memory."), -len("".join(texts)), key)
                for key, texts in settings
            ]
            most, *_, key = max(told, default=(n, ""))
            if most == n:  # they differ in what is too long to be shown
                for number, i in enumerate(alike, 1):
                    groups[i].label += f" ({number})"
                break
            for i in alike:
                groups[i].label += f" {_short(key)}={dict(settings)[key][i]}"


def _short(key: str) -> str:
    """The name of a setting without where it is, but for a part of a list, such as a phase of a curriculum."""
    *_, above, name = ["", *key.split(".")]
    return key if above.isdigit() else name


def _costs(groups: Sequence[Group]) -> list[Line]:
    kinds = {
        "parameters": "n_parameter",
        "state bytes per row": "state_bytes",
        "training tokens/s": "tokens_per_second",
    }
    lines = []
    for label, name in kinds.items():
        found = [[getattr(run.trained, name) for run in group.runs] for group in groups]
        cells = [_mean([float(value) for value in values if value is not None]) for values in found]
        lines.append(Line("", label, name, cells))
    return lines


def _mean(values: Sequence[float], low: float = math.nan, high: float = math.nan, n: int | None = None) -> Cell | None:
    """A cell; the given interval is that of a single value."""
    if not values:
        return None
    mean, half = mean_interval(values)
    if len(values) > 1:
        low, high = mean - half, mean + half
    return Cell(tuple(values), mean, low, high, n)


def _headlines(groups: Sequence[Group]) -> list[Line]:
    found: dict[tuple[str, str, str], list[list[Number]]] = {}
    for i, group in enumerate(groups):
        for run in group.runs:
            for name, result in run.results.items():
                for number in headline(result):
                    key = (name, number.metric, number.label)
                    found.setdefault(key, [[] for _ in groups])[i].append(number)
    lines = []
    for (name, metric, label), parts in sorted(found.items(), key=lambda item: item[0][0]):
        first = next(number for numbers in parts for number in numbers)
        cells = [_over_seeds(numbers) for numbers in parts]
        lines.append(Line(name, label, metric, cells, first.percent, first.better, first.control))
    return lines


def _over_seeds(numbers: Sequence[Number]) -> Cell | None:
    numbers = [number for number in numbers if not math.isnan(number.value)]
    if not numbers:
        return None
    first = numbers[0]
    counts = [number.n for number in numbers if number.n is not None]
    cell = _mean([number.value for number in numbers], first.low, first.high, min(counts, default=None))
    if cell is None or not first.percent or len(numbers) == 1:
        return cell
    if cell.low == cell.high and len(counts) == len(numbers):  # no spread says nothing: rather that of all items
        low, high = wilson(sum(number.value * (number.n or 0) for number in numbers), sum(counts))
        return cell._replace(low=low, high=high)
    return cell._replace(low=max(cell.low, 0.0), high=min(cell.high, 1.0))  # which Student's t does not know


def _unlike(groups: Sequence[Group]) -> list[str]:
    """Why the groups cannot be ranked: they were trained on different things."""
    questions = {
        "texts": lambda trained: trained.text and trained.text[:10],
        "tokenizers": lambda trained: trained.tokenizer[:10],
        "numbers of steps": lambda trained: trained.step,
        "numbers of tokens": _n_token,
        "curricula": lambda trained: _planted(trained.config),
    }
    reasons = []
    for what, ask in questions.items():
        answers = [ask(group.runs[0].trained) for group in groups]
        if any(answer is None for answer in answers) and len(groups) > 1:
            reasons.append(f"the {what} of {groups[answers.index(None)].label} are not known")
        elif any(answer != answers[0] for answer in answers):
            told = [f"{answer:,}" if isinstance(answer, int) else answer for answer in answers]
            each = "" if isinstance(told[0], dict) else f": {_by_value(groups, told)}"
            reasons.append(f"different {what}{each}")
    return reasons


def _n_token(trained: Trained) -> int | None:
    """Tokens of all training batches."""
    if trained.step is None:
        return None
    left = trained.step * trained.config["trainer"]["accumulate_grad_batches"]
    phases = trained.config["curriculum"]["phases"]
    n_segment = 0
    for i, phase in enumerate(phases):
        steps = left if i == len(phases) - 1 else min(left, phase["steps"])
        n_segment += steps * phase["n_row"] * phase["n_segment"]
        left -= steps
    return n_segment * trained.config["model"]["segment_len"]


def _planted(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides of which documents the batches are made."""
    curriculum = config["curriculum"]
    phases = [{key: value for key, value in phase.items() if key != "memory"} for phase in curriculum["phases"]]
    return {"task": curriculum["task"], "phases": phases}


def _by_value(groups: Sequence[Group], values: Sequence[str]) -> str:
    """Which groups have which value."""
    having: dict[str, list[str]] = {}
    for group, value in zip(groups, values, strict=True):
        having.setdefault(value, []).append(group.label)
    return "; ".join(f"{value} ({', '.join(labels)})" for value, labels in having.items())


def _best(line: Line) -> set[int]:
    """The best group, and those whose interval overlaps with its own; none if that is all of them."""
    cells = {i: cell for i, cell in enumerate(line.cells) if cell is not None}
    if line.control or line.better is None or len(cells) < 2:
        return set()
    sign = 1 if line.better == "higher" else -1
    best = max(cells.values(), key=lambda cell: sign * cell.mean)
    if not math.isfinite(best.mean):  # such as a half-life beyond what was measured, of which no interval is known
        return set()
    found = {i for i, c in cells.items() if c.mean == best.mean or (c.low <= best.high and c.high >= best.low)}
    return found if len(found) < len(cells) else set()


# ---------------------------------------------------------------------------------------------------------- reporting

_LEGEND = (
    "Mean ± half the 95 % t interval over seeds, which says nothing of the n items behind each.",
    "In brackets the 95 % interval of a single seed, as its experiment tells it, or of a rate that is equal in all",
    "seeds, of all items (Wilson). Indented: controls.",
)
_RANKED = "* best, or not told from the best by the 95 % intervals; no mark where that is all of them."


def report(comparison: Comparison) -> str:
    """The comparison as text for a terminal."""
    heads, cells = tabulate(comparison)
    parts = ["\n".join([table(heads, cells), *remarks(comparison)])]
    if comparison.differences:
        parts.append("\n".join(["What differs:", *(f"  {line}" for line in _different(comparison))]))
    return printable("\n\n".join(parts))


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown, with the runs behind it."""
    heads, cells = tabulate(comparison)

    def row(texts: Sequence[str]) -> str:
        return "| " + " | ".join(in_markdown(text) for text in texts) + " |"

    table_lines = [row(heads), "|" + "---|" * len(heads), *(row([text.strip() for text in line]) for line in cells)]
    parts = ["# Comparison", "\n".join(table_lines), "\n".join(map(in_markdown, remarks(comparison)))]
    parts.append("![Comparison](compare.png)")
    if comparison.differences:
        parts.append("\n".join(["## What differs", "", *(f"- {in_markdown(line)}" for line in _different(comparison))]))
    runs = [
        f"- {in_markdown(group.label)}, seed {run.trained.config.get('seed')}, step {run.trained.step}: "
        f"{in_markdown(run.path)} ({in_markdown(run.trained.checkpoint)})"
        for group in comparison.groups
        for run in group.runs
    ]
    return "\n\n".join([*parts, "\n".join(["## Runs", "", *runs])]) + "\n"


def tabulate(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table: names of its columns, and a row of texts for each of the comparison's lines."""
    heads = ["experiment", "number", *(f"{group.label} ({_seeds(group)})" for group in comparison.groups)]
    rows, last = [], ""
    for line in comparison.lines:
        texts = []
        for i, cell in enumerate(line.cells):
            n, of = 0 if cell is None else len(cell.values), len(comparison.groups[i].runs)
            texts.append(line.text(i) + (f" ({n} of {of} seeds)" if 0 < n < of else ""))
        name = f"  {line.name}" if line.control else line.name
        rows.append([line.experiment if line.experiment != last else "", name, *texts])
        last = line.experiment
    return heads, rows


def _seeds(group: Group) -> str:
    return f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"


def remarks(comparison: Comparison) -> list[str]:
    """Lines that belong below the table."""
    ranked = any(line.best for line in comparison.lines)
    return [*_LEGEND, *([_RANKED] if ranked else []), *comparison.notes]


def _different(comparison: Comparison) -> list[str]:
    return [f"{key}: {_by_value(comparison.groups, values)}" for key, values in comparison.differences]


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row per group and number, for a CSV file."""
    return [
        {
            "group": group.label,
            "experiment": line.experiment,
            "number": line.label,
            "metric": line.metric,
            "control": line.control,
            "better": line.better,
            "mean": cell.mean,
            "low": "" if math.isnan(cell.low) else cell.low,
            "high": "" if math.isnan(cell.high) else cell.high,
            "n_seed": len(cell.values),
            "n": cell.n,
            "best": i in line.best,
        }
        for i, group in enumerate(comparison.groups)
        for line in comparison.lines
        if (cell := line.cells[i]) is not None
    ]


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """Write ``compare.csv``, ``compare.md`` and ``compare.png`` into a directory.

    Returns:
        Their paths.
    """
    found, text, image = rows(comparison), io.StringIO(), io.BytesIO()
    writer = csv.DictWriter(text, list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: in_csv(value) for name, value in row.items()} for row in found)
    plot(comparison).savefig(image, format="png", dpi=150)
    contents = {"csv": text.getvalue().encode(), "md": markdown(comparison).encode(), "png": image.getvalue()}
    written = [directory / f"compare.{ending}" for ending in contents]
    with ExitStack() as files:  # all of them or none
        for path, content in zip(written, contents.values(), strict=True):
            file = files.enter_context(atomic_file(path))
            file.write(content)
            file.flush()
    return written


def plot(comparison: Comparison) -> Figure:
    """A panel for each cost and for each main number with its controls; one row per group."""
    panels: list[list[Line]] = []
    for line in comparison.lines:
        last = panels[-1][-1] if panels else None
        # A main number that follows a control begins a panel of its own; those before any control share one, but for
        # rates and plain values, which have no axis in common.
        if (
            last is None
            or not line.experiment
            or line.experiment != last.experiment
            or (last.control and not line.control)
            or last.percent != line.percent
        ):
            panels.append([])
        panels[-1].append(line)
    labels = [textwrap.fill(f"{group.label} ({_seeds(group)})", 26) for group in comparison.groups]
    rows = [panels[i : i + 3] for i in range(0, len(panels), 3)]
    # In inches, placed by hand: long legends would make an automatic layout squeeze the panels.
    inner = [max(0.55, 0.25 * max(map(_n_main, row))) * len(labels) for row in rows]
    outer = [high + 0.9 + 0.2 * max(map(_n_legend, row)) for high, row in zip(inner, rows, strict=True)]
    left, width, gap = 2.5, 3.4, 0.5
    size = left + 3 * width + 3 * gap, sum(outer) + 0.4
    with style():
        figure = Figure(figsize=size)
        figure.set_layout_engine("none")
        top = size[1] - 0.4
        for row, high, whole in zip(rows, inner, outer, strict=True):
            for column, panel in enumerate(row):
                x, y = left + column * (width + gap), top - 0.4 - high
                axes = figure.add_axes((x / size[0], y / size[1], width / size[0], high / size[1]))
                (_draw if panel[0].experiment else _draw_cost)(axes, panel)
                axes.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
                axes.set_ylim(len(labels) - 0.5, -0.6)
                axes.grid(axis="x")
                axes.grid(visible=False, axis="y")
            top -= whole
        note = "Bars: 95 % intervals as in the table, over seeds (ticks) or as a single seed tells it."
        figure.text(1 - gap / size[0], 1 - 0.2 / size[1], note, fontsize=10, ha="right", va="center")
    return figure


def _n_main(panel: Sequence[Line]) -> int:
    return sum(not line.control for line in panel)


def _n_legend(panel: Sequence[Line]) -> int:
    """Lines of the legend."""
    return sum(len(_wrapped(line).splitlines()) for line in panel) if panel[0].experiment else 0


def _wrapped(line: Line) -> str:
    return textwrap.fill(line.label, 44)


def _draw_cost(axes: Axes, panel: Sequence[Line]) -> None:
    (line,) = panel
    for y, cell in enumerate(line.cells):
        if cell is not None:
            axes.barh(y, cell.mean, height=0.5, color=PALETTE["blue"], alpha=0.85)
        axes.annotate(
            line.text(y), (0 if cell is None else cell.mean, y), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set(title=line.label, xlim=(0, 1.35 * max([cell.mean for cell in line.cells if cell is not None] + [1e-9])))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.set_xticks([])


def _draw(axes: Axes, panel: Sequence[Line]) -> None:
    mains = itertools.cycle((color, marker, 8) for color, marker in _MAINS)
    controls = itertools.cycle(_CONTROLS)
    n_main, shift = _n_main(panel), 0.0
    for line in panel:
        color, marker, size = next(controls if line.control else mains)
        look: dict[str, Any] = {"color": PALETTE[color], "marker": marker, "markersize": size, "linestyle": "none"}
        look["markerfacecolor"] = "none" if line.control else PALETTE[color]
        axes.plot([], [], label=_wrapped(line), **look)
        if not line.control:  # several main numbers stand one below the other
            shift += 0.7 / n_main if shift else 0.35 / n_main
        for y, cell in enumerate(line.cells):
            if cell is None:
                continue
            if math.isinf(cell.mean):  # more than was measured: no place on the axis
                across = axes.get_yaxis_transform()
                axes.annotate(shown(cell.mean, line.percent), (1, y), xycoords=across, ha="right", va="center")
                continue
            error = None if math.isnan(cell.low) else [[max(cell.mean - cell.low, 0)], [max(cell.high - cell.mean, 0)]]
            if line.control:
                axes.errorbar(cell.mean, y, xerr=error, elinewidth=1, zorder=3, clip_on=False, **look)
                continue
            y_main = y - 0.35 + shift
            axes.errorbar(cell.mean, y_main, xerr=error, elinewidth=2, capsize=4, zorder=5, clip_on=False, **look)
            axes.plot(cell.values, [y_main] * len(cell.values), "|", color=PALETTE["black"], markersize=10, zorder=6)
            axes.annotate(
                shown(cell.mean, line.percent), (cell.mean, y_main), xytext=(0, 9) if n_main == 1 else (9, 5),
                textcoords="offset points", ha="center" if n_main == 1 else "left", fontsize=10 if n_main == 1 else 8,
                fontweight="bold" if y in line.best else "normal",
            )  # fmt: skip
    axes.set_title(panel[0].experiment)
    if panel[0].percent:
        axes.set_xlim(-0.1, 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    else:
        axes.margins(x=0.15)
    below = axes.transAxes + ScaledTranslation(0, -0.35, axes.figure.dpi_scale_trans)  # inches
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0, borderpad=0, fontsize=9,
        labelspacing=0.3, handlelength=1.2,
    )  # fmt: skip
