"""How the slots of a memory are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.data.stream import ValidationBatches
from memlm.memory.contract import Read
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel, placed

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


def banks(model: LanguageModel, state: Any) -> dict[str, tuple[Slots, Any]]:
    """Every memory module that has slots, with its state, by its label (see `Placed`)."""
    return {
        label: (module, state.memory[name][number])
        for label, name, number, _, module in placed(model)
        if isinstance(module, Slots)
    }


def check_slots(model: LanguageModel, what: str) -> None:
    """Refuse a model one of whose memories has no slots to look into.

    Args:
        model: A language model.
        what: What wants to look, for the error.

    Raises:
        ConfigError: If there is such a memory.
    """
    without = sorted({part.name for part in placed(model) if not isinstance(part.module, Slots)})
    if without:
        raise ConfigError(
            f"{what} looks into the slots of a memory, but {', '.join(without)} has none: choose a memory of slots, "
            "such as memory=ltm"
        )


def slot_reads(reads: Mapping[str, Read]) -> dict[str, tuple[Tensor, Tensor]]:
    """Slots and weights of the reads that tell them, by the names of the reads, (B, N, k) each."""
    return {
        name: (read.slots, read.weights)
        for name, read in reads.items()
        if read.slots is not None and read.weights is not None
    }


def read_weights(
    model: LanguageModel, reads: Mapping[str, Read], state: Any, mask: Tensor | None = None
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
    for key, (number, weight) in slot_reads(reads).items():
        label = key if key in total else key.partition("/")[0]
        known = number >= 0 if mask is None else (number >= 0) & mask[..., None]
        weights = torch.where(known, weight, 0.0).float().flatten(1)  # (B, N * k)
        if len(total[label]) == 1:  # a shared bank, read by all rows
            weights = weights.flatten()[None]
        slots = number.clamp(min=0).view_as(weights)
        total[label] = total[label].scatter_add(1, slots, weights)
    return total


def memory_numbers(out: Any) -> dict[str, Tensor]:
    """What the memories did in a call of a model, scalars by the names under which training logs them.

    Args:
        out: The output of the call.

    Returns:
        ``memory/<name>/<key>`` for all that a memory says of its writes. For each layer ``memory/<name>/<layer>/...``:
        ``read_gate``, how far reads are let in; ``read_mass``, the weight on slots; ``read_entropy`` in nats, that of
        the weights within this mass. Means over tokens.
    """
    numbers = {
        f"memory/{name}/{key}": value.mean() for name, trace in out.trace.items() for key, value in trace.items()
    }
    for name, read in out.reads.items():
        if read.gate is not None:
            numbers[f"memory/{name}/read_gate"] = read.gate.mean()
        if read.weights is None:
            continue
        mass = read.weights.sum(dim=-1)
        share = read.weights / mass.clamp(min=1e-9)[..., None]
        entropy = -(share * share.clamp(min=1e-9).log()).sum(dim=-1)
        numbers |= {
            f"memory/{name}/read_mass": mass.mean(),
            f"memory/{name}/read_entropy": (entropy * mass).sum() / mass.sum().clamp(min=1e-9),
        }
    return numbers


def slot_fields(module: Slots, state: Any) -> dict[str, Tensor]:
    """The numbers that a memory keeps of each slot, by the names its state gives them, (B, n_slot) each."""
    shape = module.filled(state).shape
    return {name: part for name, part in _named(state) if part.shape == shape}


def _named(state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state with the names of their fields."""
    for name, part in state._asdict().items():
        if isinstance(part, Tensor):
            yield name, part
        elif hasattr(part, "_asdict"):
            yield from _named(part)


def slot_changes(module: Slots, before: Any, after: Any) -> tuple[Tensor, Tensor]:
    """Which slots a write filled anew, and which lost what they held.

    Where a memory tells the places of its tokens (`Slots.places`), a slot is *written* if it holds a token that the
    memory did not hold, and *evicted* if the memory no longer holds its token, wherever it may have moved. A shared
    bank has such places of many documents, so there slots are compared one by one. Other memories blend the new into
    the old: their slots are written over and over, and evicted only when they become empty.

    Args:
        module: The memory.
        before: A state of it.
        after: The state after the write.

    Returns:
        Written and evicted, (B, n_slot) bool each.
    """
    filled, full = module.filled(before), module.filled(after)
    places, now = module.places(before), module.places(after)
    if places is None or now is None:
        return full & (~filled | (module.contents(before) != module.contents(after)).any(dim=2)), filled & ~full
    if module.scope == "shared":
        moved = places != now
        return full & (~filled | moved), filled & (~full | moved)
    places, now = places.masked_fill(~filled, -1), now.masked_fill(~full, -1)
    return full & ~_among(now, places), filled & ~_among(places, now)


def _among(values: Tensor, pool: Tensor) -> Tensor:
    """Which ``values`` (B, n) are in the same row of ``pool`` (B, m), bool."""
    ordered = pool.sort(dim=1).values
    index = torch.searchsorted(ordered, values.contiguous()).clamp(max=pool.shape[1] - 1)
    return ordered.gather(1, index) == values


@torch.no_grad()
def slot_usage(model: LanguageModel, data: TextData, n_window: int = 4) -> dict[str, dict[str, Tensor]]:
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
        out = model(batch.ids.to(device), state=state, reset=move[0], mask=move[1], logits=False, donate=True)
        state = out.state
        for label, weights in read_weights(model, out.reads, state).items():
            read[label] = read.get(label, 0) + weights.sum(dim=0)
    model.train(training)
    return {
        label: {"filled": module.filled(part).float().mean(dim=0).cpu(), "read": read[label].cpu()}
        for label, (module, part) in banks(model, state).items()
    }
