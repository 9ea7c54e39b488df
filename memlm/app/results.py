"""Keep what runs found in results/, and make the tables of pages of it: `memlm results`."""

from __future__ import annotations

import argparse
import html
import io
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from memlm import threads
from memlm.app.errors import mistakes_told
from memlm.config import ConfigError
from memlm.files import atomic_file
from memlm.saved import TRUST

FIGURES = Path("docs/figures")
"""Where the figures of pages are, below the directory of the project."""

_DESCRIPTION = (
    "Puts runs into results/NAME.json, the tables of all records into the pages that have marks for them "
    "(README.md and docs/), and what some of them say into figures in docs/figures/. "
    "To be called in the directory of the project."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write record and pages; or only look whether pages say what records say.

    Raises:
        ConfigError: Also if a page differs, with --check.
    """
    parser = argparse.ArgumentParser(prog="memlm results", description=_DESCRIPTION)
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="of the record that the runs go into; none: pages alone"
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", help="directory of a run, of an evaluation, or of a sweep")
    parser.add_argument(
        "--experiment", metavar="NAME", help="whose results are kept; by default that of the record, or NAME"
    )
    parser.add_argument(
        "--commit",
        help="what the runs were made with; by default the commit of this checkout (benchmarks tell it themselves)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page and its record differ")
    parser.add_argument("--trust", metavar="PACKAGE", action="append", help=TRUST)
    chosen = parser.parse_args(arguments)
    from memlm.evaluation import bytes_figure, pairs_figure, records, worth_table

    folder = Path(records.FOLDER)
    if chosen.check and chosen.name is not None:
        raise ConfigError("--check looks at all pages: give it alone")
    if chosen.name is not None:
        if not re.fullmatch(r"[\w-]+", chosen.name):
            raise ConfigError(f"{chosen.name!r} is no name of a record: it has letters, digits, _ and - only")
        if not chosen.runs:
            raise ConfigError(f"no run is named that goes into the record {chosen.name}: give one or more directories")
        _put(folder / f"{chosen.name}.json", chosen)
    pages = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
    if not folder.is_dir() or not pages[0].exists():
        raise ConfigError(f"there is no {folder}/ with a README.md beside it in {Path.cwd()}: call it where they are")
    differ = []
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = records.filled_in(before, folder)
        if after != before:
            differ.append(str(page))
            if not chosen.check:
                _write(page, after)
    for of in (worth_table, pairs_figure, bytes_figure):
        differ += _figures(of, folder / f"{of.NAME}.json", chosen.check)
    if chosen.check and differ:
        raise ConfigError(
            f"{', '.join(differ)} does not say what {folder}/ says: run memlm results and commit the pages"
        )


def _figures(of: ModuleType, path: Path, check: bool) -> list[str]:
    """Draw what a record says; or name the figures that do not say it. They have its numbers in them as text."""
    from memlm.evaluation import records

    record = records.read_record(path) if path.exists() else []
    if not check:
        for name, image in of.figures(record).items():
            _write(FIGURES / name, image)
        return []
    told = html.escape(of.told(record), quote=False)
    files = [FIGURES / name for name in of.FILES] if told else []
    return [str(file) for file in files if not file.exists() or told not in file.read_text(encoding="utf-8")]


def _put(path: Path, chosen: argparse.Namespace) -> None:
    """Put runs into a record."""
    from memlm.evaluation import memory_table, records, timings
    from memlm.evaluation.runs import find_runs

    record = records.read_record(path) if path.exists() else []
    of_benchmarks = [timings.is_benchmark(Path(run)) for run in chosen.runs]
    if any(of_benchmarks):
        given = [timings.entry(Path(run)) for run in chosen.runs] if all(of_benchmarks) else []
        if not given or {part["experiment"] for part in [*record, *given]} != {path.stem}:
            raise ConfigError(
                f"a record is of one benchmark, and {path.stem!r} is not its name: give it as {timings.PREFIX}NAME"
            )
        _write(path, records.written(timings.merged(record, given)))
        return
    experiment = chosen.experiment or (record[0]["experiment"] if record else path.stem)
    around = import_module("benchmarks.base").surroundings("cpu")
    commit = chosen.commit or str(around["commit"])[:7]
    runs, _ = find_runs(chosen.runs, chosen.trust)
    new = records.entries(runs, experiment, commit, around["processor"], around["torch"])
    merged = records.merged(record, new)
    _write(path, records.written(merged))
    if experiment == memory_table.NAME:
        for name, figure in memory_table.figures(merged).items():
            figure.savefig(image := io.BytesIO(), format="png", dpi=150)
            _write(FIGURES / f"{name}.png", image.getvalue())


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    print(path)


def start() -> None:
    """What the command line runs."""
    with mistakes_told():
        threads.wait_passively()
        main()


if __name__ == "__main__":
    start()
