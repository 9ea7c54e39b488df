"""HMT: one vector of each of the last segments, from which a cell before the next segment is recalled.

Source: Z. He et al., "HMT: Hierarchical memory transformer for efficient long context language processing" (2024,
2405.06067), and its public code. What comes out of a cell behind a segment is the vector of that segment; the last
``n_slot`` are held. A summary is compared with them, and their mean under a softmax, without a map of values, is the
cell that stands before the segment, and behind it. Other than there:

- **The summary that recalls for a segment is that of the segment before it**, made by a second cell behind that one.
  There it is a summary of the first half of the segment itself: what its first tokens read depends on later ones.
- The summary takes no pass of its own through the model.
- What comes out of cells is normalised before it is kept or compared, and what was recalled before it enters the
  model, so that it is as loud as embeddings are.
- A cell before a segment has no place. The last tokens of the segment before are ``model.overlap`` (32 there).

Shapes: B rows, T tokens per segment, D model width, n slots, K width of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows


class RecallState(NamedTuple):
    """What was made of segments.

    Attributes:
        held: A vector of each of the last n segments, the oldest first, (B, n, D); empty slots stand before them.
        full: Which slots hold one, (B, n).
        summary: The summary of the last segment, (B, 1, D).
    """

    held: Tensor
    full: Tensor
    summary: Tensor


class Recalled(NamedTuple):
    """What is recalled for a segment.

    Attributes:
        cell: The cell before and behind it, (B, 1, D); the learned one if nothing is held.
        weight: Share of each slot in it, (B, n).
    """

    cell: Tensor
    weight: Tensor


class RecallMemory(Slots):
    """A vector of each of the last segments; what fits the summary of the last one stands before the next.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_slot: Segments that are held.
        d_key: Width of keys and of the query.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    around = "stack"
    needs = Needs(tail=2, context=True)
    sized = ("n_slot",)

    def __init__(self, d_model: int, sizes: Sizes, n_slot: int = 300, d_key: int = 128) -> None:
        super().__init__()
        for name, size in {"n_slot": n_slot, "d_key": d_key}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.n_slot, self.sizes = n_slot, sizes
        self.first = nn.Parameter(torch.randn(1, d_model))  # of the variance of embeddings
        self.asks = nn.Parameter(torch.randn(1, d_model))  # comes out as the summary
        self.norm = nn.RMSNorm(d_model)
        self.cell_norm = nn.RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, d_key, bias=False)
        self.to_key = nn.Linear(d_model, d_key, bias=False)
        self.init_linears()

    def init_state(self, n_row: int) -> RecallState:
        """No segments."""
        held = self.first.new_zeros(n_row, self.n_slot, self.first.shape[1])
        return RecallState(held, torch.zeros(held.shape[:2], dtype=torch.bool, device=held.device), held[:, :1].clone())

    def prepare(self, state: RecallState) -> Recalled:
        """Recall by the summary of the segment before."""
        return self.recall(state.summary, state)

    def recall(self, summary: Tensor, state: RecallState) -> Recalled:
        """What is held, weighted by how well it fits ``summary`` (B, 1, D)."""
        with torch.autocast(summary.device.type, enabled=False):
            query, key = self.to_query(summary), self.to_key(state.held)
            score = (query @ key.mT)[:, 0] / query.shape[2] ** 0.5  # (B, n)
            there = state.full.any(dim=1, keepdim=True)
            weight = (
                score.masked_fill(~state.full & there, -torch.inf).softmax(dim=1) * there
            )  # no softmax over nothing
            cell = self.cell_norm(weight[:, None] @ state.held)
        return Recalled(torch.where(there[..., None], cell, self.first), weight)

    def mix(self, x: Tensor, prepared: Recalled, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The stack with the recalled cell before the segment; see `Memory.mix`."""
        y = mixer(torch.cat([prepared.cell, x], dim=1))[:, 1:]
        weights = prepared.weight[:, None].expand(-1, x.shape[1], -1)
        slots = torch.arange(self.n_slot, device=x.device).expand_as(weights)
        return y, Read(slots=slots.masked_fill(weights == 0, -1), weights=weights)

    def tail(self, prepared: Recalled) -> Tensor:
        """The recalled cell again, and the one that becomes the summary; see `Memory.tail`."""
        return torch.cat([prepared.cell, self.asks.expand(len(prepared.cell), -1, -1)], dim=1)

    def write(self, segment: Segment, state: RecallState) -> tuple[RecallState, Trace]:
        """Hold the vector of the segment in place of the oldest, and its summary; see `Memory.write`."""
        assert segment.tail is not None  # as it `needs` them
        new, summary = self.norm(segment.tail).split(1, dim=1)
        full = torch.cat([state.full[:, 1:], torch.ones_like(state.full[:, :1])], dim=1)
        after = RecallState(torch.cat([state.held[:, 1:], new], dim=1), full, summary)
        return where_rows(segment.complete[:, 0] & segment.valid.any(dim=1), after, state), {}

    def filled(self, state: RecallState) -> Tensor:
        """Which slots hold a segment, (B, n)."""
        return state.full

    def contents(self, state: RecallState) -> Tensor:
        """The vectors of segments, (B, n, D)."""
        return state.held

    def flops_per_token(self) -> int:
        """The way of three cells through the layers, with a feed-forward four times as wide, and keys of all slots."""
        n_layer, t, d_model = self.sizes.n_layer, self.sizes.segment_len, self.sizes.d_model
        layer = 72 * d_model**2 + 12 * d_model * (t + self.sizes.overlap + 3)
        recall = 2 * self.n_slot * (self.to_key.weight.numel() + len(self.to_key.weight) + d_model)
        return (n_layer * layer + recall + 2 * self.to_query.weight.numel()) // t + 4 * d_model * n_layer
