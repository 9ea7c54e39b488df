"""Runs as one web page: results beside their controls, figures, settings, and what memories hold and are read for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from memlm.analysis.chart import Chart, Series
from memlm.analysis.memory_page import MOST_SLOTS, memory_parts
from memlm.analysis.page import (
    ALL,
    Chapter,
    Charts,
    Figures,
    Listings,
    Part,
    Table,
    fewer_colors,
    png,
    refuse_other_than_png,
    render,
)
from memlm.checkpoint import Trust, load, load_run
from memlm.config import ConfigError
from memlm.evaluation.compare import figure, groups, printing
from memlm.evaluation.compare.differences import Group
from memlm.evaluation.compare.groups import Comparison
from memlm.evaluation.runs import Run
from memlm.files import atomic_file, open_regular

MOST_BYTES = 5_000_000


"""Bytes of a page for which there may be figures: those that find no room are named instead."""


class _Image(NamedTuple):
    """A figure: what it shows, where it is, its PNG, and the key of the group that it is of."""

    what: str
    file: Path
    png: bytes
    run: str


def write(
    runs: Sequence[Run],
    left_out: Sequence[str],
    path: Path,
    contexts: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    trust: Trust = None,
) -> None:
    """Write a page about runs, whole or not at all.

    Args:
        runs: What `memlm.evaluation.runs.find_runs` found.
        left_out: Directories to name as such.
        path: Where to.
        contexts: Text whose reads are shown, in one context or several; None for a held-out passage of each run's data.
        progress: Called with what comes next.
        trust: Packages of which checkpoints may name classes, as for `memlm.checkpoint.load`.

    Raises:
        ConfigError: If two runs have the same settings and seed, or a text has no token.
    """
    comparison = groups.compare(runs, left_out)
    tell = progress or (lambda _: None)
    chapters = [_results(comparison), *_against_bytes(comparison), _settings(comparison)]
    for key, group in zip(_keys(comparison), comparison.groups, strict=True):
        tell(f"memory of {group.label}")
        chapters.append(_memory(group, contexts, MOST_SLOTS // len(comparison.groups), trust)._replace(run=key))
    tell("figures")
    labels = [group.label for group in comparison.groups]
    title = f"Report of {', '.join(labels)}"
    room = MOST_BYTES - len(_encoded(render(title, chapters, labels))) - 100_000
    chapters.insert(-1 - len(labels), _figures(comparison, room * 3 // 4))  # a figure as text takes a third more
    with atomic_file(path) as file:
        file.write(_encoded(render(title, chapters, labels)))


def _keys(comparison: Comparison) -> list[str]:
    """Keys of the groups, by which a reader chooses one; a single one is not chosen."""
    several = len(comparison.groups) > 1
    return [str(i) if several else "" for i in range(len(comparison.groups))]


def _encoded(page: str) -> bytes:
    return page.encode("utf-8", errors="replace")


def _results(comparison: Comparison) -> Chapter:
    """The table of all numbers, and the runs behind it."""
    heads, rows = printing.tabulate(comparison)
    controls = frozenset(i for i, line in enumerate(comparison.lines) if line.control)
    rows = [[cell.strip() for cell in row] for row in rows]
    keys = _keys(comparison)
    remarks = printing.remarks(comparison)
    table = Table("Numbers and their controls", heads, rows, remarks, controls, column_runs=["", "", *keys])
    listed = [
        [group.label, str(run.trained.config.get("seed")), str(run.trained.step), str(run.path), run.trained.checkpoint]
        for group in comparison.groups
        for run in group.runs
    ]
    heads = ["group", "seed", "step", "directory", "checkpoint"]
    return Chapter("Results", [], [table, Table("Runs", heads, listed, row_runs=_of_runs(comparison))])


def _of_runs(comparison: Comparison) -> list[str]:
    """The key of the group of each run."""
    return [key for key, group in zip(_keys(comparison), comparison.groups, strict=True) for _ in group.runs]


def _against_bytes(comparison: Comparison) -> list[Chapter]:
    """Main numbers beside their controls, by the bytes of memory that they took; nothing of a single group."""
    sizes = next(line.cells for line in comparison.lines if line.metric == "state_bytes")
    charts: list[Chart] = []
    seen: set[tuple[str, bool]] = set()
    for i, line in enumerate(comparison.lines):
        kind = line.experiment, line.percent
        if not line.experiment or line.control or kind in seen or sum(cell is not None for cell in line.cells) < 2:
            continue
        seen.add(kind)  # the first number of an experiment is its main one
        controls = list(itertools.takewhile(lambda other: other.control, comparison.lines[i + 1 :]))
        controls = [other for other in controls if (other.experiment, other.percent) == kind]
        series: list[Series] = []
        for k, (group, cell, size) in enumerate(zip(comparison.groups, line.cells, sizes, strict=True)):
            if cell is None or size is None:
                continue
            beside = [other.cells[k] for other in controls]
            points = [(size.mean, found.mean) for found in beside if found is not None]
            series.append(Series("controls", points, control=True, faint=True, run=str(k)))
            ends = [(cell.low, cell.high)]
            series.append(Series(group.label, [(size.mean, cell.mean)], ends, run=str(k), mark=str(k + 1)))
        better = f"; {line.better} is better" if line.better else ""
        values = [y for part in series for _, y in part.points]
        span = (-0.03, 1.03) if line.percent and all(0 <= value <= 1 for value in values) else None
        notes = [f"Small: {'; '.join(other.label for other in controls)}."] if controls else []
        title, y = f"{line.experiment}: {line.label}", f"with its 95 % interval{better}"
        charts.append(Chart(title, "bytes of memory of a row", y, series, False, line.percent, True, span, notes=notes))
    if len(comparison.groups) < 2 or not charts:
        return []
    notes = ["What the table of results says of how these runs were trained and measured holds here too."]
    return [Chapter("Against the bytes of memory", [], [Charts("What the bytes are worth", charts, notes)])]


def _settings(comparison: Comparison) -> Chapter:
    """What differs, and every configuration."""
    parts: list[Part] = []
    if len(comparison.groups) > 1:
        heads = ["setting", *(group.label for group in comparison.groups)]
        rows = [[key, *values] for key, values in comparison.differences]
        parts.append(Table("What differs", heads, rows, column_runs=["", *_keys(comparison)]))
    items = [
        (f"{group.label}, seed {run.trained.config.get('seed')}", yaml.safe_dump(run.trained.config, sort_keys=False))
        for group in comparison.groups
        for run in group.runs
    ]
    return Chapter("Settings", [], [*parts, Listings("Whole configurations", items, _of_runs(comparison))])


def _figures(comparison: Comparison, n_byte: int) -> Chapter:
    """All figures of all runs, in at most so many bytes."""
    parts: list[Part] = []
    if sum(len(group.runs) for group in comparison.groups) > 1:
        image = png(figure.plot(comparison))
        notes = ["It shows all groups of runs, and goes where one is chosen."] if len(comparison.groups) > 1 else []
        parts.append(Figures("All runs", [("Every main number beside its controls", image)], notes, runs=[ALL]))
        n_byte -= len(image)
    found: list[_Image] = []
    missing: list[str] = []
    for key, group in zip(_keys(comparison), comparison.groups, strict=True):
        for run in group.runs:
            for name, files in run.figures.items():
                for file in files:
                    try:
                        what = f"{name}: {file.stem}, {group.label}, seed {run.trained.config.get('seed')}"
                        found.append(_Image(what, file, _picture(file, run.path), key))
                    except (ConfigError, OSError) as error:
                        missing.append(f"Not shown: {error}")
    images, without = _fitting(found, n_byte)
    missing += [f"Not shown, as the page would be too large: {image.file}" for image in without]
    if found or missing:
        shown = [(image.what, image.png) for image in images]
        parts.append(Figures("Of each run", shown, missing, [image.run for image in images]))
    lead = [] if parts else ["There are none beside what was measured."]
    return Chapter("Figures", lead, parts)


def _picture(file: Path, run: Path) -> bytes:
    """A PNG of a run.

    Raises:
        ConfigError: If it lies elsewhere, so that a page which is handed on would hand on the file of somebody, or is
            none.
    """
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(run)):
        raise ConfigError(f"{file} is a link that leads out of the run")
    with open_regular(file) as opened:
        content = opened.read()
    refuse_other_than_png(content, file)
    return content


def _fitting(images: Sequence[_Image], n_byte: int) -> tuple[list[_Image], list[_Image]]:
    """Images that fit into so many bytes, with fewer colours if need be, and those that do not."""
    if sum(len(image.png) for image in images) > n_byte:
        images = [image._replace(png=fewer_colors(image.png)) for image in images]
    shown: list[_Image] = []
    without: list[_Image] = []
    for entry in images:
        n_byte -= len(entry.png)
        (shown if n_byte >= 0 else without).append(entry)
    return shown, without


def _memory(group: Group, contexts: Sequence[str] | None, n_slot: int, trust: Trust) -> Chapter:
    """The memory of the first run of a group."""
    run = group.runs[0]
    title = f"Memory of {group.label}, seed {run.trained.config.get('seed')}"
    checkpoint = Path(run.trained.checkpoint)
    if not os.path.exists(checkpoint):  # unlike that of Path, it takes any text
        return Chapter(title, [f"The checkpoint is no longer there: {checkpoint}"], [])
    without: list[str] = []
    try:
        model, data = load_run(checkpoint, trust=trust)
    except ConfigError as error:
        try:
            model, data = load(checkpoint, trust=trust), None
        except ConfigError:
            return Chapter(title, [f"The model cannot be loaded: {error}"], [])
        without = [f"The data it was trained on is left out: {error}"]
    try:
        lead, parts = memory_parts(model, data, contexts, n_slot)
    except ValueError as error:
        raise ConfigError(f"the prompt cannot be shown: {error}") from error
    return Chapter(title, [*without, *lead], parts)
