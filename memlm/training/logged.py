"""Files of what a run has logged, and those of the runs that it went on from."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from memlm.config import ConfigError
from memlm.files import atomic_file, open_regular

_EARLIER = "earlier-{}.csv"  # what was logged before a run was resumed, oldest first
_STEP = re.compile(r"[0-9]{1,18}")
_IS_EARLIER = re.compile(r"earlier-(\d{1,9})")


def keep_earlier_history(run: Path, origin: Path, step: int) -> None:
    """Copy what was logged before a checkpoint into the run that goes on.

    Args:
        run: The run directory.
        origin: Directory of the run that it goes on from; may be the same.
        step: Steps that the checkpoint has made.
    """
    sources = history_files(origin)
    if sources and run.resolve() == origin.resolve():  # at once: a run killed in between would have it twice
        sources.append(sources.pop().replace(run / "csv" / _EARLIER.format(len(sources))))
    for i, source in enumerate(sources):
        columns, rows = _logged(source)
        with atomic_file(run / "csv" / _EARLIER.format(i)) as target:
            lines = [columns, *([row[c] for c in columns] for row in rows if int(row["step"]) < step)]
            target.write("".join(",".join(_quoted(cell) for cell in line) + "\n" for line in lines).encode())


def history_files(run: Path) -> list[Path]:
    """What a run and those it went on from have logged, oldest first."""
    folder = run / "csv"
    earlier = {int(found[1]): file for file in folder.glob("*.csv") if (found := _IS_EARLIER.fullmatch(file.stem))}
    return [*(earlier[i] for i in sorted(earlier)), *folder.glob("metrics.csv")]


def _logged(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and whole lines of a file of what was logged."""
    with open_regular(path) as binary, io.TextIOWrapper(binary, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            columns = list(reader.fieldnames or [])
            # A process that was killed may have left half a line.
            rows = [
                row for row in reader if None not in (*row, *row.values()) and _STEP.fullmatch(row.get("step") or "")
            ]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(
                f"{path} cannot be read: it is damaged ({error}); remove it to go on without it"
            ) from error
    return columns, rows


def _quoted(cell: str | None) -> str:
    """A cell of a CSV file."""
    cell = cell or ""
    return '"' + cell.replace('"', '""') + '"' if any(c in cell for c in ',"\n\r') else cell
