"""Give a pretrained model a memory: tell it something, clear its context, and see what it says next.

The memory here needs no training: it keeps keys and values of what was told.

python examples/pretrained.py PATH-OR-HUB-NAME
"""

import sys

import torch

import memlm
from memlm.config import ConfigError

TOLD = "The name of the captain is Hilda Vinter, and her ship is the Blue Heron."
ASKED = "The name of the captain is Hilda"


def main(path: str, *settings: str) -> tuple[float, float]:
    """Returns the mean negative log-likelihood of the text in nats per token, with the memory and with reads off.

    Args:
        path: A folder, or the name of a model in the hub's cache.
        *settings: Further Hydra overrides.
    """
    model = memlm.build("model=pretrained", f"model.path={path}", "memory=cache", "model.memory_layers=all", *settings)
    model.eval()
    told, asked = (torch.tensor([model.encode_text(text)]) for text in (TOLD, ASKED))
    with torch.no_grad():
        state = model.new_context(model.absorb(told))  # what was told is now in memory alone
        logits = [model(asked, state=state, read=read).logits for read in (True, False)]
    on, off = (torch.nn.functional.cross_entropy(row[0, :-1], asked[0, 1:]).item() for row in logits)
    print(f"{ASKED!r}: {on:.2f} nats per token with the memory, {off:.2f} with reads off")
    return on, off


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    try:
        main(*sys.argv[1:])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
