"""Short-term memory: a few recurrent slots.

Source: LMCODE's ShortTermMemory (read and write projections, update gates, soft updates at a small rate).

Shapes: B rows, T tokens per segment, D model width, n slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Read, Segment, Trace
from memlm.memory.slots import Slots


class ShortTermState(NamedTuple):
    """Slots of one layer.

    Attributes:
        slot: Contents, (B, n, D); zero before the first write.
        n_written: Segments written, (B,).
    """

    slot: Tensor
    n_written: Tensor


class ShortTermMemory(Slots):
    """Recurrent slots with update gates.

    After each segment every slot attends to the segment's tokens (write projections), and moves towards what it found:
    ``slot += update_rate * gate * (found - slot)``. Tokens attend to the slots (read projections). Contents are
    normalized when read, so that a small ``update_rate`` sets how fast slots forget, not how loud they are.

    Args:
        d_model: Width of the hidden states.
        n_slot: Number of slots.
        n_head: Attention heads of reads and writes.
        update_rate: Rate of the soft update, in (0, 1].

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)

    def __init__(self, d_model: int, n_slot: int = 16, n_head: int = 4, update_rate: float = 0.01) -> None:
        super().__init__()
        if n_slot < 1:
            raise ValueError(f"n_slot must be at least 1, got {n_slot}")
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"n_head must divide d_model ({d_model}), got {n_head}")
        if not 0 < update_rate <= 1:
            raise ValueError(f"update_rate must be in (0, 1], got {update_rate}")
        self.n_slot, self.n_head, self.update_rate = n_slot, n_head, update_rate
        self.norm = nn.RMSNorm(d_model)
        self.slot_norm = nn.RMSNorm(d_model, eps=1e-12)
        self.address = nn.Parameter(torch.randn(n_slot, d_model))
        self.write_query = nn.Linear(d_model, d_model, bias=False)
        self.write_key = nn.Linear(d_model, d_model, bias=False)
        self.write_value = nn.Linear(d_model, d_model, bias=False)
        self.update_gate = nn.Linear(2 * d_model, d_model)
        self.read_query = nn.Linear(d_model, d_model, bias=False)
        self.read_key = nn.Linear(d_model, d_model, bias=False)
        self.read_value = nn.Linear(d_model, d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        self.init_linears()

    def init_state(self, n_row: int) -> ShortTermState:
        """Empty slots."""
        n_slot, d_model = self.address.shape
        zero = torch.zeros(n_row, n_slot, d_model, device=self.address.device)
        return ShortTermState(zero, torch.zeros(n_row, dtype=torch.long, device=self.address.device))

    def prepare(self, state: ShortTermState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the slots, (B, n, D) each, and which rows hold anything, (B,)."""
        content = self.slot_norm(state.slot)
        return self.read_key(content + self.address), self.read_value(content), state.n_written > 0

    def read(self, y: Tensor, prepared: tuple[Tensor, Tensor, Tensor]) -> Read:
        """Multi-head attention of tokens over slots; rows that hold nothing read nothing. See `Memory.read`."""
        key, value, filled = prepared
        gate = self.read_gate(y).sigmoid() * filled[:, None, None]  # (B, T, 1)
        weight = self._weights(self.read_query(self.norm(y)), key)  # (B, H, T, n)
        read = (weight @ self._heads(value)).transpose(1, 2).flatten(2)  # (B, T, D)
        slots = torch.arange(self.n_slot, device=y.device).expand(*y.shape[:2], -1)
        weights = weight.mean(dim=1) * filled[:, None, None]
        return Read(gate * self.to_output(read), slots, weights, gate[..., 0])

    def write(self, segment: Segment, state: ShortTermState) -> tuple[ShortTermState, Trace]:
        """Move each slot towards what it finds in the segment; see `Memory.write`."""
        x = self.norm(segment.hidden[:, segment.lookback :])  # (B, T, D)
        valid = segment.valid[:, segment.lookback :]
        written = segment.complete[:, 0] & valid.any(dim=1)  # (B,)
        content = self.slot_norm(state.slot)
        # A row without a token attends to cells it then does not use: no softmax over nothing.
        mask = (valid | ~written[:, None])[:, None, None]
        weight = self._weights(self.write_query(content + self.address), self.write_key(x), mask)  # (B, H, n, T)
        found = (weight @ self._heads(self.write_value(x))).transpose(1, 2).flatten(2)  # (B, n, D)
        gate = self.update_gate(torch.cat([content + self.address, found], dim=-1)).sigmoid()
        moved = state.slot + self.update_rate * gate * (found - state.slot)
        slot = torch.where(written[:, None, None], moved, state.slot)
        return ShortTermState(slot, state.n_written + written.long()), {"write_gate": gate.mean()}

    def filled(self, state: ShortTermState) -> Tensor:
        """Which slots hold something, (B, n): all of them once a segment was written."""
        return (state.n_written > 0)[:, None].expand(-1, self.n_slot)

    def flops_per_token(self) -> int:
        """Projections, and attention over the slots when reading and writing."""
        return super().flops_per_token() + 8 * self.n_slot * self.address.shape[1]

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, D / H)."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights (B, H, L, M)."""
        query, key = self._heads(query), self._heads(key)
        score = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        return F.softmax(score if mask is None else score.masked_fill(~mask, -torch.inf), dim=-1)
