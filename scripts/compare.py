"""Put runs side by side: `python scripts/compare.py RUN...`, with directories of runs, evaluations or sweeps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from memlm.cli import mistakes_told
from memlm.saved import TRUST

_DESCRIPTION = (
    "One table and one figure over runs and seeds: parameters, bytes of memory, speed, and the headline of every "
    "experiment beside its controls. Runs that differ only in seed are one group."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(prog="compare.py", description=_DESCRIPTION)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="directory of a run, of an evaluation, or of several (a sweep)"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where compare.csv, .md and .png go; by default outputs/compare/TIME"
    )
    parser.add_argument("--trust", metavar="PACKAGE", action="append", help=TRUST)
    chosen = parser.parse_args(arguments)
    from experiments import compare
    from experiments.runs import find_runs

    runs, left_out = find_runs(chosen.runs, chosen.trust)
    comparison = compare.compare(runs, left_out)
    print(compare.report(comparison))
    out = chosen.out or Path("outputs/compare") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    print("\nWritten:", *(f"  {path}" for path in compare.write(comparison, out)), sep="\n")


if __name__ == "__main__":
    with mistakes_told():
        main()
