"""Write a trained model as safetensors and JSON: `memlm export checkpoint=RUN output=DIR`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlm.app.cli import cli


@cli("export")
def main(config: Mapping[str, Any]) -> None:
    """Write the files, name them, and upload them if that is asked for."""
    from memlm.checkpoint import export, load
    from memlm.evaluation.card import card_of
    from memlm.hf import hub

    output, repo = config["output"], config["push"]
    model = load(config["checkpoint"], trust=config["trust"])
    card = card_of(model, config["checkpoint"], repo or Path(output).name, config["trust"])
    files = export(model, output)
    (Path(output) / hub.CARD).write_text(card, encoding="utf-8")
    print("Written:", *(f"  {path}" for path in sorted([*files, Path(output) / hub.CARD])), sep="\n")
    print(f"\nIn Python: memlm.load({str(output)!r})")
    print(f"or, after import memlm: transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})")
    if repo is not None:
        print(f"\nUploaded: {hub.push(output, repo, private=config['private'])}")


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
