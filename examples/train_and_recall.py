"""Train a model with a memory for three minutes, and count the facts that it recalls beside every control.

python examples/train_and_recall.py [SETTING ...]
"""

import json
import subprocess
import sys
from pathlib import Path

RUN = Path("outputs/example")

# The default run takes 500 steps; the first phase of its curriculum is enough to see recall begin.
SHORT = ["curriculum.phases=[{steps: 150, n_row: 8, n_segment: 4, task: {items: 12}}]", "needle.distance=1000"]
CONTROLS = {
    "on": "with its memory",
    "off": "reads off",
    "wiped": "memory wiped",
    "swapped": "another document's memory",
    "unseen": "asked for what was never told",
}


def main() -> None:
    """Train, then read what `experiment=needle` wrote."""
    command = [sys.executable, "-m", "memlm", "train", "memory=ltm", *SHORT, f"hydra.run.dir={RUN}", *sys.argv[1:]]
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)
    found = json.loads((RUN / "needle" / "result.json").read_text())["metrics"]
    for name, words in CONTROLS.items():
        print(f"{words:<30} {found[f'exact_match/{name}']:.0%} of {found[f'n/{name}']:.0f} facts")


if __name__ == "__main__":
    main()
