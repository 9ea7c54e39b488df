"""Runs as one web page: results beside their controls, figures, settings, and what memories hold and are read for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from memlm.analysis.memory_page import MOST_SLOTS, memory_parts
from memlm.analysis.page import (
    Chapter,
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


_Image = tuple[str, Path, bytes]  # what it shows, where it is, PNG


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
    chapters = [_results(comparison), _settings(comparison)]
    for group in comparison.groups:
        tell(f"memory of {group.label}")
        chapters.append(_memory(group, contexts, MOST_SLOTS // len(comparison.groups), trust))
    tell("figures")
    title = f"Report of {', '.join(group.label for group in comparison.groups)}"
    room = MOST_BYTES - len(_encoded(render(title, chapters))) - 100_000
    chapters.insert(1, _figures(comparison, room * 3 // 4))  # a figure as text takes a third more
    with atomic_file(path) as file:
        file.write(_encoded(render(title, chapters)))


def _encoded(page: str) -> bytes:
    return page.encode("utf-8", errors="replace")


def _results(comparison: Comparison) -> Chapter:
    """The table of all numbers, and the runs behind it."""
    heads, rows = printing.tabulate(comparison)
    controls = frozenset(i for i, line in enumerate(comparison.lines) if line.control)
    rows = [[cell.strip() for cell in row] for row in rows]
    table = Table("Numbers and their controls", heads, rows, printing.remarks(comparison), controls)
    listed = [
        [group.label, str(run.trained.config.get("seed")), str(run.trained.step), str(run.path), run.trained.checkpoint]
        for group in comparison.groups
        for run in group.runs
    ]
    return Chapter("Results", [], [table, Table("Runs", ["group", "seed", "step", "directory", "checkpoint"], listed)])


def _settings(comparison: Comparison) -> Chapter:
    """What differs, and every configuration."""
    parts: list[Part] = []
    if len(comparison.groups) > 1:
        heads = ["setting", *(group.label for group in comparison.groups)]
        parts.append(Table("What differs", heads, [[key, *values] for key, values in comparison.differences]))
    items = [
        (f"{group.label}, seed {run.trained.config.get('seed')}", yaml.safe_dump(run.trained.config, sort_keys=False))
        for group in comparison.groups
        for run in group.runs
    ]
    return Chapter("Settings", [], [*parts, Listings("Whole configurations", items)])


def _figures(comparison: Comparison, n_byte: int) -> Chapter:
    """All figures of all runs, in at most so many bytes."""
    parts: list[Part] = []
    if sum(len(group.runs) for group in comparison.groups) > 1:
        image = png(figure.plot(comparison))
        parts.append(Figures("All runs", [("Every main number beside its controls", image)]))
        n_byte -= len(image)
    found: list[_Image] = []
    notes: list[str] = []
    for group in comparison.groups:
        for run in group.runs:
            for name, files in run.figures.items():
                for file in files:
                    try:
                        what = f"{name}: {file.stem}, {group.label}, seed {run.trained.config.get('seed')}"
                        found.append((what, file, _picture(file, run.path)))
                    except (ConfigError, OSError) as error:
                        notes.append(f"Not shown: {error}")
    images, without = _fitting(found, n_byte)
    notes += [f"Not shown, as the page would be too large: {file}" for _, file, _ in without]
    if found or notes:
        parts.append(Figures("Of each run", [(name, image) for name, _, image in images], notes))
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
    if sum(len(image) for *_, image in images) > n_byte:
        images = [(name, file, fewer_colors(image)) for name, file, image in images]
    shown: list[_Image] = []
    without: list[_Image] = []
    for entry in images:
        n_byte -= len(entry[2])
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
