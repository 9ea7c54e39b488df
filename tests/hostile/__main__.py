"""Try wrong, odd and hostile input and count what came of it: ``python -m tests.hostile [KIND] [PART OF A NAME]``.

KIND is ``settings``, ``files``, ``faults`` or ``all``. Ends with 1 if anything was not answered as it should be.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
os.environ.update(MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")

import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

KINDS = ("settings", "files", "faults")
_SUBJECTS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem not in ("base",))


def main(kind: str = "all", part: str = "") -> int:
    """Try the cases; returns the exit code."""
    # Loaded once, so that each forked process has them.
    import lightning
    import torch

    import memlm
    import memlm.training.fit
    import memlm.training.module
    from tests.hostile.base import attempt

    os.environ["MEMLM_CACHE"] = tempfile.mkdtemp(prefix="memlm-hostile-cache-")
    torch.set_num_threads(1)
    counts = {one: Counter() for one in KINDS}
    bad = []
    subjects = [importlib.import_module(f"tests.hostile.{name}") for name in _SUBJECTS]
    cases = [
        (one, subject.__name__.rpartition(".")[2], case)
        for one in (KINDS if kind == "all" else (kind,))
        for subject in subjects
        if hasattr(subject, one)
        for case in getattr(subject, one)()
    ]
    chosen = [(one, subject, case) for one, subject, case in cases if part in f"{subject}: {case.name}"]
    for one, subject, case in tqdm(chosen, file=sys.stderr):
        outcome = attempt(case)
        counts[one][outcome.answer] += 1
        if not outcome.good:
            bad.append(f"--- {one}, {subject}: {case.name}: {outcome.answer}, wanted {case.wanted}\n{outcome.text}")
    print("\n".join(bad))
    answers = ("right", "sentence", "traceback", "silent", "hang", "crash", "executed")
    print(f"\nmemlm {memlm.__version__}, torch {torch.__version__}, lightning {lightning.__version__}")
    print("".join(f"{head:>11}" for head in ("kind", "tried", *answers, "not wanted")))
    for one, count in counts.items():
        n_bad = sum(line.startswith(f"--- {one},") for line in bad)
        print("".join(f"{cell:>11}" for cell in (one, count.total(), *(count[a] for a in answers), n_bad)))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
