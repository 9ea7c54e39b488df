"""Runs as one web page: `memlm report RUN...`, with directories of runs, evaluations or sweeps."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from memlm import threads
from memlm.app.errors import mistakes_told
from memlm.config import ConfigError
from memlm.printed import printable
from memlm.saved import TRUST

_DESCRIPTION = (
    "One web page that needs nothing but itself: results beside their controls, figures, settings, what memories hold, "
    "and which memories each token of a text reads."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(prog="memlm report", description=_DESCRIPTION)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="directory of a run, of an evaluation, or of several (a sweep)"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append",
        help="text whose reads are shown; given again, it begins a new context, to which only memory leads; by default "
        "held-out text with a planted fact, and then the question for it",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="where the page goes; by default outputs/report/TIME.html")
    parser.add_argument("--trust", metavar="PACKAGE", action="append", help=TRUST)
    chosen = parser.parse_args(arguments)
    if chosen.out is not None and (not chosen.out or os.path.isdir(chosen.out)):
        place = chosen.out or "."
        raise ConfigError(f"--out {place} is a directory: give the name of a file, such as {place}/report.html")
    from memlm.evaluation import webpage
    from memlm.evaluation.runs import find_runs

    runs, left_out = find_runs(chosen.runs, chosen.trust)
    out = Path(chosen.out) if chosen.out else Path("outputs/report") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}.html"

    def say(what: str) -> None:
        print(printable(f"{what} ..."), file=sys.stderr)

    webpage.write(runs, left_out, out, chosen.prompt, say, chosen.trust)
    print(f"Written:\n  {out}")


def start() -> None:
    """What the command line runs."""
    with mistakes_told():
        threads.wait_passively()
        main()


if __name__ == "__main__":
    start()
