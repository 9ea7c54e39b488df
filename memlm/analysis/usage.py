"""How the slots of a memory are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memlm.data.stream import ValidationBatches
from memlm.memory.base import Memory, Residual


def banks(model: Any, state: Any) -> dict[str, tuple[Memory, Any]]:
    """Every memory module with its state, by ``memory/layer``; by ``memory`` if it serves all attached layers."""
    found = {}
    for name, modules in model.memory.items():
        labels = [f"{name}/{layer}" for layer in model.memory_layers] if modules[0].layerwise else [name]
        for label, module, part in zip(labels, modules, state.memory[name], strict=True):
            found[label] = (module, part)
    return found


def read_weights(
    model: Any, reads: Mapping[str, Residual], state: Any, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Total weight with which each slot was read.

    Args:
        model: A language model.
        reads: What a call read, as the model gives it.
        state: A state of as many rows.
        mask: Tokens that count, (B, N); None for all.

    Returns:
        By bank (see `banks`), (B, n_slot).
    """
    total = {label: torch.zeros_like(module.filled(part), dtype=torch.float32)
             for label, (module, part) in banks(model, state).items()}  # fmt: skip
    for key, read in reads.items():
        label = key if key in total else key.partition("/")[0]
        known = read.slots >= 0 if mask is None else (read.slots >= 0) & mask[..., None]
        weights = torch.where(known, read.weights, 0.0).float().flatten(1)  # (B, N * k)
        if len(total[label]) == 1:  # a shared bank, read by all rows
            weights = weights.flatten()[None]
        slots = read.slots.clamp(min=0).view_as(weights)
        total[label] = total[label].scatter_add(1, slots, weights)
    return total


@torch.no_grad()
def slot_usage(model: Any, data: Any, n_window: int = 4) -> dict[str, dict[str, Tensor]]:
    """Which slots are filled and read when held-out text streams through a model.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens("val")`` and a ``tokenizer``, such as `memlm.data.datamodule.TextData`.
        n_window: Windows of text.

    Returns:
        By bank (see `banks`): ``filled``, the share of rows in which a slot holds something, (n_slot,), and ``read``,
        the total weight with which it was read, (n_slot,).
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
        for label, weights in read_weights(model, out.reads, state).items():
            read[label] = read.get(label, 0) + weights.sum(dim=0)
    model.train(training)
    return {
        label: {"filled": module.filled(part).float().mean(dim=0).cpu(), "read": read[label].cpu()}
        for label, (module, part) in banks(model, state).items()
    }
