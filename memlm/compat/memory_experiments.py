"""``python -m memlm.compat.memory_experiments``: what IMM's ``memory_experiments.py`` measures, with controls.

Trains the model of ``recipe=imm`` (8 slots, blocks of 64, update rate 0.04, layer norm, temperature 0.8) and measures
it as ``python train.py recipe=imm`` does, modern facts and needle too. Settings follow as they do there. Plots also go
into the current directory, under the names of the source. Works in a checkout, as the scripts do.

What the source concludes from its numbers does not follow: a pattern similarity near 0.5, slots that are all used alike
and the similarity at recall also come out of an untrained model and for facts never shown. So here each stands beside
the untrained model, other documents and facts never told, and recall is exact match of what the model answers.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlm.app.cli import cli

SETTINGS = (
    "recipe=imm",
    "experiment=[pattern_storage,slot_usage,context_influence,modern_facts,needle]",
)
"""What the source's script runs, in memlm's settings."""

PLOTS = {
    "pattern_similarity.png": "pattern_storage/pattern_similarity.png",
    "context_influence.png": "context_influence/context_influence.png",
    "slot_usage_heatmap.png": "slot_usage/slot_usage_heatmap.png",
}
"""The source's plots, and where a run has them."""


@cli("train")
def main(config: Mapping[str, Any]) -> None:
    """Train, measure, and put the plots into the current directory."""
    from memlm.app.train import main as train

    train(config)
    run = Path(config["paths"]["run_dir"])
    drawn = [name for name, path in PLOTS.items() if (run / path).exists()]  # an experiment may not apply
    for name in drawn:
        shutil.copyfile(run / PLOTS[name], name)
    print("\nPlots:", *(f"  {name}" for name in drawn), sep="\n")


if __name__ == "__main__":
    sys.argv[1:1] = SETTINGS
    main()
