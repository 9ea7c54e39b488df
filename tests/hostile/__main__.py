"""Try wrong, odd and hostile input and count what came of it: ``python -m tests.hostile [KIND] [PART OF A NAME]``.

KIND is ``settings``, ``files``, ``faults`` or ``all``. Ends with 1 if anything was not answered as it should be.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
os.environ.update(MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")

import argparse
import resource
import sys
import time
from collections import Counter

KINDS = ("settings", "files", "faults")
_TELL_EVERY = 30  # seconds


def main() -> int:
    """Try the cases; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", nargs="?", default="all", choices=("all", *KINDS))
    parser.add_argument("part", nargs="?", default="", help="of 'SUBJECT: NAME'; only these are tried")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time (default: all cores)")
    parser.add_argument("--sample", type=int, help="try at most so many of each kind and subject")
    parser.add_argument("--slow", type=int, default=0, help="name so many of the slowest")
    given = parser.parse_args()

    from tests.hostile.base import attempts, collect, preload

    preload()
    start = time.monotonic()
    kinds = KINDS if given.kind == "all" else (given.kind,)
    found = {case: (kind, subject) for kind, subject, case in collect(kinds, given.part, given.sample)}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    n_bad: Counter[str] = Counter()
    slowest: list[tuple[float, str]] = []
    told = time.monotonic()
    try:
        for n_done, outcome in enumerate(attempts(found, given.jobs), 1):
            kind, subject = found[outcome.case]
            counts[kind][outcome.answer] += 1
            slowest.append((outcome.seconds, f"{kind}, {subject}: {outcome.case.name}"))
            if not outcome.good:
                n_bad[kind] += 1
                wanted = " or ".join(outcome.case.wanted)
                print(f"--- {kind}, {subject}: {outcome.case.name}: {outcome.answer}, wanted {wanted}")
                print(outcome.text, flush=True)
            if time.monotonic() > told + _TELL_EVERY:
                told = time.monotonic()
                all_counts = dict(sum(counts.values(), Counter()))
                print(f"{n_done} of {len(found)}, {sum(n_bad.values())} not wanted: {all_counts}", file=sys.stderr)
    finally:
        for seconds, name in sorted(slowest, reverse=True)[: given.slow]:
            print(f"{seconds:6.1f} s  {name}")
        _print_table(counts, n_bad, time.monotonic() - start)
    return int(n_bad.total() > 0)


def _print_table(counts: dict[str, Counter[str]], n_bad: Counter[str], seconds: float) -> None:
    import lightning
    import torch

    import memlm

    answers = ("right", "sentence", "traceback", "silent", "hang", "crash", "executed")
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\nmemlm {memlm.__version__}, torch {torch.__version__}, lightning {lightning.__version__}")
    print(f"{seconds:,.0f} s, {used:,.0f} s of processor time")
    print("".join(f"{head:>11}" for head in ("kind", "tried", *answers, "not wanted")))
    for kind, count in counts.items():
        cells = (kind, count.total(), *(count[answer] for answer in answers), n_bad[kind])
        print("".join(f"{cell:>11}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
