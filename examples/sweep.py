"""Two memories, two seeds: one sweep on a small recall task, then all runs side by side.

Given again, it skips the jobs that are finished and goes on with the rest.

python examples/sweep.py [SETTING ...]
"""

import subprocess
import sys

SWEEP = "multirun/example"
MEMLM = [sys.executable, "-m", "memlm"]


def main() -> None:
    """Train the jobs of the sweep, then compare them: means over seeds, controls, costs."""
    jobs = ["recipe=pairs", "memory=stm,delta", "seed=0,1", "trainer=cpu"]
    for command in (["train", "-m", *jobs, f"hydra.sweep.dir={SWEEP}", *sys.argv[1:]], ["compare", SWEEP]):
        if code := subprocess.run([*MEMLM, *command]).returncode:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
