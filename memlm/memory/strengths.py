"""Strengths of an adaptive memory: what repeats is reinforced, what is unused fades, what is strong is long-term.

Source: Adaptive Neural Memory; see `memlm.memory.adaptive`.

Shapes: B rows, K items offered by one segment, M = n_short + n_slot slots, the short-term ones first, N slots or items.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


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

    def init_state(self, n_row: int) -> AdaptiveState:
        """A fresh state."""


def settle(memory: Rules, state: AdaptiveState, items: AdaptiveState) -> tuple[AdaptiveState, Tensor]:
    """Slots and items (B, M + K) after decay and reinforcement, and which of them each slot is to hold, (B, M)."""
    n, n_item = state.strength.shape[1], items.strength.shape[1]
    strength = state.strength * memory.decay  # (B, M)
    chosen = items.strength > 0  # (B, K)
    joins = joins_of(memory, state._replace(strength=strength), items) * chosen[..., None]  # (B, K, M + K)
    touched = joins.any(dim=1)[..., None]
    gained = torch.einsum("bk,bkn->bn", torch.log1p(-items.strength.clamp(max=1 - 1e-6)), joins)
    held = F.pad(strength, (0, n_item))  # (B, M + K)
    weight = (joins * items.strength[..., None]).transpose(1, 2)  # (B, M + K, K)
    total = held[..., None] + weight.sum(dim=2, keepdim=True)
    old_key, old_value = (F.pad(part, (0, 0, 0, n_item)) for part in (state.key, state.value))
    key = F.normalize(held[..., None] * old_key + weight @ items.key, dim=-1)
    value = (held[..., None] * old_value + weight @ items.value) / total.clamp(min=1e-9)
    met = torch.where(joins > 0, items.position[..., None], -1).amax(dim=1)
    everything = AdaptiveState(
        key=torch.where(touched, key, old_key),
        value=torch.where(touched, value, old_value),
        strength=1 - (1 - held) * gained.exp(),
        position=torch.maximum(F.pad(state.position, (0, n_item), value=-1), met),
    )
    alive = everything.strength > 0
    is_long = (torch.arange(n + n_item, device=strength.device) >= memory.n_short).expand_as(alive).clone()
    is_long[:, n:] = False
    is_long = is_long | (everything.strength >= memory.promote_at)
    short = _keep((everything.position + 1) * (alive & ~is_long), 0, memory.n_short)
    long = _keep(everything.strength.detach() * (alive & is_long), memory.n_short, memory.n_slot)
    return everything, torch.cat([short, long], dim=1)


def placed(memory: Rules, everything: AdaptiveState, source: Tensor) -> AdaptiveState:
    """What `settle` found, put into slots."""
    new = [
        torch.where(like(source >= 0, part), part.gather(1, like(source.clamp(min=0), part)), empty)
        for part, empty in zip(everything, memory.init_state(len(source)), strict=True)
    ]
    return AdaptiveState(*new)


@torch.no_grad()
def joins_of(memory: Rules, state: AdaptiveState, items: AdaptiveState) -> Tensor:
    """Where each item goes, one-hot over the slots and the items themselves, (B, K, M + K)."""
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
    return F.one_hot(target, n + n_item).to(items.strength.dtype)


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
