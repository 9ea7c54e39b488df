"""Put runs side by side: `memlm compare RUN...`, with directories of runs, evaluations or sweeps."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from memlm import threads
from memlm.app.errors import mistakes_told
from memlm.config import ConfigError
from memlm.saved import TRUST

_DESCRIPTION = (
    "One table and one figure over runs and seeds: parameters, bytes of memory, speed, and the headline of every "
    "experiment beside its controls. Runs that differ only in seed are one group."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(prog="memlm compare", description=_DESCRIPTION)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="directory of a run, of an evaluation, or of several (a sweep)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where compare.csv, .md and .png go; by default outputs/compare/TIME"
    )
    parser.add_argument("--trust", metavar="PACKAGE", action="append", help=TRUST)
    chosen = parser.parse_args(arguments)
    if chosen.out is not None and (not chosen.out or (os.path.exists(chosen.out) and not os.path.isdir(chosen.out))):
        raise ConfigError(f"--out {chosen.out!r} is no directory: give the name of one, which may be new")
    from memlm.evaluation.compare import groups, printing
    from memlm.evaluation.runs import find_runs

    runs, left_out = find_runs(chosen.runs, chosen.trust)
    comparison = groups.compare(runs, left_out)
    print(printing.report(comparison))
    out = Path(chosen.out) if chosen.out else Path("outputs/compare") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    written = printing.write(comparison, out)
    print("\nWritten:", *(f"  {path}" for path in written), sep="\n")


def start() -> None:
    """What the command line runs."""
    with mistakes_told():
        threads.wait_passively()
        main()


if __name__ == "__main__":
    start()
