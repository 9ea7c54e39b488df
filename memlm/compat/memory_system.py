"""``python -m memlm.compat.memory_system``: the simulation of Adaptive Neural Memory's ``memory_system.py``.

Runs ``experiment=preferences`` with the settings of ``recipe=preferences``: users tell preferences and noise over many
sessions; a learned controller decides what is stored; repeats reinforce, strengths decay, and questions are answered by
cosine x strength. Settings follow as in ``train.py``: ``preferences.n_user=100``. Works in a checkout, as the
scripts do.

The source shows its four claims by a few utterances. Here they are rates over users, on phrasings that were not trained
on, beside a wiped memory, another user's, and simple baselines. No prompt is sent to a language model: what counts is
what goes into it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlm.app.cli import cli

SETTINGS = ("recipe=preferences", "experiment=[preferences]")
"""The source's simulation, in memlm's settings."""


@cli("train")
def main(config: Mapping[str, Any]) -> None:
    """Simulate, and print what was learned, ignored, forgotten and retrieved."""
    from memlm.assemble import build_model, build_tokenizer
    from memlm.evaluation import runner
    from memlm.evaluation.summary import summary

    model = build_model(config, build_tokenizer(config))
    results, written, _ = runner.run_all(model, None, runner.chosen(config), Path(config["paths"]["run_dir"]))
    metrics, example = results[0].metrics, results[0].metadata["example"]
    print("One user", *example, "", sep="\n")
    print(f"learns preferences:  {metrics['recall/on']:.0%} of those in use are stored")
    print(f"ignores noise:       {metrics['noise/on']:.0%} of what is stored tells none "
          f"(a store of everything: {metrics['noise/everything']:.0%})")  # fmt: skip
    print(f"forgets the unused:  {metrics['dropped/on']:.0%} of preferences not told any more are still answered "
          f"(a store of everything: {metrics['dropped/everything']:.0%})")  # fmt: skip
    print(f"retrieves:           {metrics['right/on']:.0%} of prompts hold the right preference "
          f"(memory wiped: {metrics['right/wiped']:.0%}, another user's: {metrics['right/swapped']:.0%})")  # fmt: skip
    print("\n" + summary(results))
    print("\nWritten:", *(f"  {path}" for path in written), sep="\n")


if __name__ == "__main__":
    sys.argv[1:1] = SETTINGS
    main()
