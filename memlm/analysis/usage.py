"""How the slots of a memory are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memlm.data.stream import ValidationBatches


@torch.no_grad()
def slot_usage(model: Any, data: Any, n_window: int = 4) -> dict[str, dict[str, Tensor]]:
    """Which slots are filled and read when held-out text streams through a model.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens("val")`` and a ``tokenizer``, such as `memlm.data.datamodule.TextData`.
        n_window: Windows of text.

    Returns:
        By ``memory/layer``: ``filled``, the share of rows in which a slot holds something, (n_slot,), and ``read``, the
        total weight with which it was read, (n_slot,).
    """
    batches = ValidationBatches(data.tokens("val"), model.segment_len, data.tokenizer.pad_id)
    device = next(model.parameters()).device
    read: dict[str, Tensor] = {}
    training, state = model.training, None
    model.eval()
    for step in range(min(n_window, len(batches))):
        batch = batches[step]
        move = [None if part is None else part.to(device) for part in (batch.reset, batch.mask)]
        out = model(batch.ids.to(device), state=state, reset=move[0], mask=move[1], logits=False)
        state = out.state
        for key, reads in out.reads.items():
            name = key.partition("/")[0]
            n_slot = model.memory[name][0].filled(state.memory[name][0]).shape[1]
            total = read.setdefault(key, torch.zeros(n_slot, device=device))
            known = reads.slots >= 0
            total.scatter_add_(0, reads.slots[known], reads.weights[known])
    model.train(training)
    usage: dict[str, dict[str, Tensor]] = {}
    for key, total in read.items():
        name, _, layer = key.partition("/")
        modules = model.memory[name]
        place = model.memory_layers.index(int(layer)) if modules[0].layerwise else 0
        filled = modules[place].filled(state.memory[name][place])  # type: ignore[union-attr]
        usage[key] = {"filled": filled.float().mean(dim=0).cpu(), "read": total.cpu()}
    return usage
