"""Runs side by side: what they cost, and every experiment's headline with its controls, over settings and seeds.

Runs that differ only in seed are one group, shown as mean and 95 % t interval over seeds. Numbers are ranked only where
that says something: between groups trained on the same text for the same number of steps, and measured alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memlm.config import ConfigError
from memlm.evaluation.compare.differences import Group, brief, differences_of, measuring_differences, name_of
from memlm.evaluation.headline import Number, headline, over_seeds
from memlm.evaluation.runs import Run, Trained
from memlm.statistics import interval, wilson
from memlm.training import amount


class Cell(NamedTuple):
    """A number of a group.

    Attributes:
        values: One per seed.
        mean: Their mean.
        low: Lower end of the 95 % interval: over seeds by Student's t, of a rate within 0 and 1; of a single seed, the
            one its experiment tells (NaN if none); of a rate that is the same in all seeds, Wilson's for all items.
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
        percent: Whether it is shown in percent.
        better: ``higher`` or ``lower``; None if neither is.
        control: Whether it is a control or a baseline.
        rate: Whether it is a rate, which is in [0, 1].
        best: Groups that are best or not to be told from the best.
    """

    experiment: str
    label: str
    metric: str
    cells: list[Cell | None]
    percent: bool = False
    better: str | None = None
    control: bool = False
    rate: bool = False
    best: set[int] = field(default_factory=set)

    def text(self, i: int) -> str:
        """The number of a group, with its interval and the mark of the best."""
        cell = self.cells[i]
        if cell is None:
            return "-"
        if not self.experiment:
            return f"{cell.mean:,.0f}"
        text = over_seeds(cell.values, cell.low, cell.high, self.percent)
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


def compare(runs: Sequence[Run], left_out: Sequence[str] = ()) -> Comparison:
    """Put runs side by side.

    Args:
        runs: At least one.
        left_out: Directories to name as such.

    Raises:
        ConfigError: If two runs have the same settings and the same seed.
    """
    groups = _groups(runs)
    training = differences_of([group.runs[0].training for group in groups])
    differences = [*training, *measuring_differences(groups)]
    name_of(groups, differences)
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
    texts = [(key, [brief(value) for value in values]) for key, values in differences]
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


def _costs(groups: Sequence[Group]) -> list[Line]:
    kinds = {
        "parameters": "n_parameter",
        "state bytes per row": "state_bytes",
        "training tokens/s": "tokens_per_second",
        "training CPU seconds": "cpu_seconds",
    }
    lines = []
    for label, name in kinds.items():
        found = [[getattr(run.trained, name) for run in group.runs] for group in groups]
        numbers = [[float(value) for value in values if value is not None] for values in found]
        cells = [Cell(tuple(values), *interval(values), None) if values else None for values in numbers]
        lines.append(Line("", label, name, cells))
    return lines


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
        lines.append(Line(name, label, metric, cells, first.percent, first.better, first.control, first.rate))
    return lines


def _over_seeds(numbers: Sequence[Number]) -> Cell | None:
    numbers = [number for number in numbers if not math.isnan(number.value)]
    if not numbers:
        return None
    first = numbers[0]
    values = tuple(number.value for number in numbers)
    counts = [number.n for number in numbers if number.n is not None]
    mean, low, high = interval(values, *((0.0, 1.0) if first.rate else ()))
    if len(numbers) == 1:
        low, high = first.low, first.high
    elif first.rate and low == high and len(counts) == len(numbers):  # no spread says nothing: rather that of all items
        low, high = wilson(sum(number.value * (number.n or 0) for number in numbers), sum(counts))
    return Cell(values, mean, low, high, min(counts, default=None))


def _unlike(groups: Sequence[Group]) -> list[str]:
    """Why the groups cannot be ranked: they were trained on different things."""
    questions = {
        "texts": lambda trained: trained.text and trained.text[:10],
        "tokenizers": lambda trained: trained.tokenizer[:10],
        "numbers of steps": lambda trained: trained.step,
        "numbers of tokens": n_token,
        "curricula": lambda trained: _planted(trained.config),
    }
    reasons = []
    for what, ask in questions.items():
        answers = [ask(group.runs[0].trained) for group in groups]
        if any(answer is None for answer in answers) and len(groups) > 1:
            reasons.append(f"the {what} of {groups[answers.index(None)].label} are not known")
        elif any(answer != answers[0] for answer in answers):
            told = [f"{answer:,}" if isinstance(answer, int) else answer for answer in answers]
            each = "" if isinstance(told[0], dict) else f": {by_value(groups, told)}"
            reasons.append(f"different {what}{each}")
    return reasons


def n_token(trained: Trained) -> int | None:
    """Tokens of all training batches."""
    return None if trained.step is None else amount.n_token(trained.config, trained.step)


def _planted(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides of which documents the batches are made."""
    curriculum = config["curriculum"]
    phases = [{key: value for key, value in phase.items() if key != "memory"} for phase in curriculum["phases"]]
    mixed = {key: curriculum[key] for key in ("n_epoch", "scale") if key in curriculum}
    return {"task": curriculum["task"], "phases": phases} | mixed


def by_value(groups: Sequence[Group], values: Sequence[str]) -> str:
    """Which groups have which value."""
    having: dict[str, list[str]] = {}
    for group, value in zip(groups, values, strict=True):
        having.setdefault(value, []).append(group.label)
    return "; ".join(f"{value} ({', '.join(labels)})" for value, labels in having.items())


def _best(line: Line) -> set[int]:
    """The best group, and those that are not told from it; none if that is all of them.

    Intervals that overlap tell nothing apart. Nor does one that is missing where other groups have one: too little was
    measured for it.
    """
    cells = {i: cell for i, cell in enumerate(line.cells) if cell is not None}
    if line.control or line.better is None or len(cells) < 2:
        return set()
    sign = 1 if line.better == "higher" else -1
    best = max(cells.values(), key=lambda cell: sign * cell.mean)
    if not math.isfinite(best.mean):  # such as a half-life beyond what was measured, of which no interval is known
        return set()
    known = any(not math.isnan(c.low) for c in cells.values())
    found = {
        i
        for i, c in cells.items()
        if c.mean == best.mean
        or (c.low <= best.high and c.high >= best.low)
        or (known and math.isnan(c.low + best.low))
    }
    return found if len(found) < len(cells) else set()
