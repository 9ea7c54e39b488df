"""A run while it trains, as a web page that refreshes itself: `memlm watch RUN`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from memlm.app.errors import mistakes_told
from memlm.config import ConfigError
from memlm.files import atomic_file
from memlm.printed import printable

PAGE = "watch.html"
"""The page, in the directory of the run."""

_DESCRIPTION = (
    "Writes a web page about a run again and again while it trains: where it stands, loss, recall beside its controls, "
    "what memory does, speed. The page looks for the new one by itself, without a server. Ends when the run does."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page until the run is over.

    Returns:
        The exit code: 0 if the run is finished, 1 if it ended before.

    Raises:
        KeyboardInterrupt: After the page was told that nobody writes it any more.
    """
    parser = argparse.ArgumentParser(prog="memlm watch", description=_DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="directory of a run, which training prints first")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=5.0, help="between two looks, 1 to 3600; by default 5"
    )
    parser.add_argument("--out", metavar="FILE", help=f"where the page goes; by default RUN/{PAGE}")
    chosen = parser.parse_args(arguments)
    if not 1 <= chosen.every <= 3600:
        raise ConfigError(f"--every must be 1 to 3600 seconds, got {chosen.every:g}")
    run = Path(chosen.run)
    out = Path(chosen.out) if chosen.out is not None else run / PAGE
    if chosen.out is not None and (not chosen.out or out.is_dir()):
        raise ConfigError(f"--out {chosen.out!r} is a directory: give the name of a file, such as {PAGE}")
    from memlm.analysis.page import Live
    from memlm.evaluation.live import LiveRun

    watched = LiveRun(run)
    told = ""
    standing = watched.look()
    try:
        while True:
            live = None if standing.over else Live(time.time(), chosen.every)
            _write(out, watched.page(standing, live))
            if not told:
                print(printable(f"{out.resolve().as_uri()}"), flush=True)
            if standing.name != told:
                told = standing.name
                print(printable(standing.told), flush=True)
            if standing.over:
                return int(standing.name != "finished")
            time.sleep(chosen.every)
            standing = watched.look()
    except KeyboardInterrupt:
        _write(out, watched.page(standing, None))
        print("\nNo longer watched; the run goes on.")
        raise


def _write(out: Path, page: str) -> None:
    with atomic_file(out) as file:
        file.write(page.encode("utf-8", errors="replace"))


def start() -> None:
    """What the command line runs."""
    with mistakes_told():
        try:
            code = main()
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    raise SystemExit(code)


if __name__ == "__main__":
    start()
