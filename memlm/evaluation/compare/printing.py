"""A comparison as text: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memlm.evaluation.compare.differences import seeds_of
from memlm.evaluation.compare.figure import plot
from memlm.evaluation.compare.groups import Comparison, by_value
from memlm.evaluation.table import table
from memlm.files import atomic_file
from memlm.printed import in_csv, in_markdown, printable

_LEGEND = (
    "Mean ± half the 95 % t interval over seeds, which says nothing of the n items behind each.",
    "In brackets the ends of that interval where it is cut at 0 or 100 %; the 95 % interval of a single seed, as its "
    "experiment tells it (none where documents are too few); or of a rate that is equal in all seeds, of all items "
    "(Wilson). Indented: controls.",
)


_RANKED = "* best, or not told from the best by the 95 % intervals; no mark where that is all of them."


def report(comparison: Comparison) -> str:
    """The comparison as text for a terminal."""
    heads, cells = tabulate(comparison)
    notes = [textwrap.fill(line, 120) if line in _LEGEND else line for line in remarks(comparison)]
    parts = ["\n".join([table(heads, cells), *notes])]
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
    heads = ["experiment", "number", *(f"{group.label} ({seeds_of(group)})" for group in comparison.groups)]
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


def remarks(comparison: Comparison) -> list[str]:
    """Lines that belong below the table."""
    ranked = any(line.best for line in comparison.lines)
    return [*_LEGEND, *([_RANKED] if ranked else []), *comparison.notes]


def _different(comparison: Comparison) -> list[str]:
    return [f"{key}: {by_value(comparison.groups, values)}" for key, values in comparison.differences]


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
