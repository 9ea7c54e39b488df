"""Strengths of an adaptive memory: what repeats is reinforced, what is unused fades, what is strong is long-term.

Source: Adaptive Neural Memory; see `memlm.memory.adaptive`.

Shapes: B rows, K items offered by one segment, M = n_short + n_slot slots, the short-term ones first, N slots or items.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.tensors import owned, take


class AdaptiveState(NamedTuple):
    """Slots of one layer, short-term ones first.

    Attributes:
        key: Unit keys, (B, M, d_key).
        value: Contents, (B, M, d_value).
        strength: How firmly each is remembered, in 0..1, (B, M); 0 if empty.
        position: When each was last met: place of its cue in the document, (B, M); -1 if empty.
    """

    key: Tensor
    value: Tensor
    strength: Tensor
    position: Tensor


class Rules(Protocol):
    """What is asked of the memory: see `memlm.memory.adaptive.AdaptiveMemory`."""

    n_short: int
    n_slot: int
    decay: float
    match_threshold: float
    promote_at: float


class Settled(NamedTuple):
    """What becomes of slots and of the items behind them, M + K entries of a row.

    Attributes:
        strength: Of each entry, (B, M + K).
        position: When each was last met, (B, M + K).
        key: What stands where each item goes, with all items that go there, (B, K, d_key).
        value: As ``key``, (B, K, d_value).
        item: The item by which an entry is another now, (B, M + K); -1 for slots that no item joins.
        source: The entry that each slot is to hold, (B, M); -1 for none.
    """

    strength: Tensor
    position: Tensor
    key: Tensor
    value: Tensor
    item: Tensor
    source: Tensor


def settle(memory: Rules, state: AdaptiveState, items: AdaptiveState) -> Settled:
    """What decay, reinforcement and promotion make of slots and items."""
    n, n_item = state.strength.shape[1], items.strength.shape[1]
    number = torch.arange(n_item, device=items.strength.device)
    strength = state.strength * memory.decay  # (B, M)
    chosen = items.strength > 0  # (B, K)
    target = joins_of(memory, state._replace(strength=strength), items).where(chosen, n + number)  # (B, K)
    together = (target[..., None] == target[:, None]) & chosen[:, None]  # (B, K, K)
    first = ~(together & (number < number[:, None])).any(dim=2)  # it stands for all that go where it goes
    place = target.where(first, n + number)  # (B, K), all different: where no item goes stays nothing
    held = F.pad(strength, (0, n_item))  # (B, M + K)
    before = held.gather(1, target)
    weight = together * items.strength[:, None]  # (B, K, K)
    total = before[..., None] + weight.sum(dim=2, keepdim=True)
    old_key, old_value = (take(part, target.clamp(max=n - 1)) for part in (state.key, state.value))
    gained = (together * torch.log1p(-items.strength.clamp(max=1 - 1e-6))[:, None]).sum(dim=2)
    weak = torch.where(first, (1 - before) * gained.exp(), 1.0)
    position = F.pad(state.position, (0, n_item), value=-1)
    met = torch.where(together, items.position[:, None], -1).amax(dim=2)
    met = torch.maximum(position.gather(1, target), met).where(first, -1)
    strength, position = 1 - (1 - held).scatter(1, place, weak), position.scatter(1, place, met)
    alive = strength > 0
    is_long = (torch.arange(n + n_item, device=strength.device) >= memory.n_short).expand_as(alive).clone()
    is_long[:, n:] = False
    is_long = is_long | (strength >= memory.promote_at)
    short = _keep((position + 1) * (alive & ~is_long), 0, memory.n_short)
    long = _keep(strength.detach() * (alive & is_long), memory.n_short, memory.n_slot)
    return Settled(
        strength=strength,
        position=position,
        key=F.normalize(before[..., None] * old_key + weight @ items.key, dim=-1),
        value=(before[..., None] * old_value + weight @ items.value) / total.clamp(min=1e-9),
        item=torch.full_like(position, -1).scatter(1, place, number.expand_as(place)),
        source=torch.cat([short, long], dim=1),
    )


def placed(state: AdaptiveState, settled: Settled, rows: Tensor, given: bool = False) -> AdaptiveState:
    """What `settle` found, put into the slots of ``rows`` (B,); of keys and values only those that change are written.

    Args:
        state: The state before.
        settled: What became of it.
        rows: Which rows; others keep their state.
        given: Whether nobody else needs ``state``. Without gradients it is then changed in place.
    """
    n, source = state.strength.shape[1], settled.source
    item = settled.item.gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)
    moves = (source != torch.arange(n, device=source.device)) & ((source >= 0) | (state.strength > 0))
    changed = (moves | (item >= 0)) & rows[:, None]  # of a slot that was empty and stays so nothing
    row, slot = changed.nonzero(as_tuple=True)
    entry, item = source[row, slot], item[row, slot, None]

    def put(old: Tensor, joined: Tensor) -> Tensor:
        new = torch.where(item >= 0, joined[row, item[:, 0].clamp(min=0)], old[row, entry.clamp(0, n - 1)])
        new = new.masked_fill((entry < 0)[:, None], 0)
        if torch.is_grad_enabled():
            return old.index_put((row, slot), new)
        return owned(old, given).index_put_((row, slot), new)

    def moved(part: Tensor, empty: float, old: Tensor) -> Tensor:
        new = part.gather(1, source.clamp(min=0)).masked_fill(source < 0, empty)
        return torch.where(rows[:, None], new, old)

    return AdaptiveState(
        key=put(state.key, settled.key),
        value=put(state.value, settled.value),
        strength=moved(settled.strength, 0, state.strength),
        position=moved(settled.position, -1, state.position),
    )


@torch.no_grad()
def joins_of(memory: Rules, state: AdaptiveState, items: AdaptiveState) -> Tensor:
    """Where each item goes, numbered through the slots and then the items themselves, (B, K)."""
    n, n_item = state.strength.shape[1], items.strength.shape[1]
    number = torch.arange(n_item, device=state.strength.device)
    chosen = items.strength > 0
    of_slot = _similarity(items, state).masked_fill(state.strength[:, None] <= 0, -1)  # (B, K, M)
    slot = of_slot.max(dim=2)
    repeats = (_similarity(items, items) >= memory.match_threshold) & chosen[:, None]
    repeats = repeats & (number < number[:, None])  # of earlier items
    item = torch.where(repeats.any(dim=2), repeats.int().argmax(dim=2), number) + n
    target = torch.where(slot.values >= memory.match_threshold, slot.indices, item)  # (B, K)
    for _ in range(n_item.bit_length()):  # each round doubles how far a chain of repeats is followed
        followed = target.gather(1, (target - n).clamp(min=0))
        target = torch.where(target >= n, followed, target)
    return target


def _similarity(a: AdaptiveState, b: AdaptiveState) -> Tensor:
    """Cosine of keys or of values, whichever is less, (B, K, N)."""
    value = F.normalize(a.value, dim=-1) @ F.normalize(b.value, dim=-1).transpose(1, 2)
    return torch.minimum(a.key @ b.key.transpose(1, 2), value)


def _keep(rank: Tensor, first: int, n: int) -> Tensor:
    """What the ``n`` places from ``first`` on hold: the best of ``rank`` (B, N), those of rank 0 left out, (B, n).

    What already has one of these places keeps it, the rest goes to the free ones; -1 where a place stays empty.
    """
    best = rank.topk(n, dim=1)
    kept = torch.zeros_like(rank, dtype=torch.uint8).scatter(1, best.indices, (best.values > 0).to(torch.uint8))
    stays = kept[:, first : first + n]
    comes = kept.clone()
    comes[:, first : first + n] = 0
    newcomers = comes.argsort(dim=1, descending=True, stable=True)[:, :n]
    number = torch.arange(n, device=rank.device)
    newcomers = torch.where(number < comes.sum(dim=1, keepdim=True), newcomers, -1)
    free = stays.argsort(dim=1, stable=True)  # free places first
    return torch.where(stays > 0, first + number, torch.zeros_like(free).scatter(1, free, newcomers))


def like(index: Tensor, part: Tensor) -> Tensor:
    """``index`` (B, N) spread over the trailing dimensions of ``part`` (B, M, ...)."""
    return index.view(*index.shape, *[1] * (part.dim() - 2)).expand(*index.shape, *part.shape[2:])
