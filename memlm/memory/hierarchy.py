"""Hierarchy: banks of slots at several time scales, each written from the one below.

Source: memories at several time scales are the future work that LMCODE names; no published mechanism is behind this
one. Each segment leaves a few slots in the lowest bank. After every ``period`` segments a few slots are made of that
bank, and join the bank above it, and so on: level j is written after every ``period**j`` segments. In each bank the
oldest slots make room, and all others stay as they are, so that a level changes rarely and in few places. With the
defaults a bank holds just the slots from which the next one is written: 64 slots tell of the last 256 segments, the
older the coarser.

- What stands in a slot before it is written is learned, and read.
- One set of maps makes slots of slots, whatever the level, so that what the lower levels do trains the highest too.

Shapes: B rows, T tokens per segment, D model width, J levels, n slots per level, M = J * n, w slots per write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Read, Segment, Trace, at_once
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows
from memlm.tensors import attend


class HierarchyState(NamedTuple):
    """Banks of all levels, one behind the other, the lowest first.

    Attributes:
        slot: Contents, in each level the oldest first, (B, M, D).
        written: Which of them were written, (B, M).
        n_written: Segments written, (B,): it says which levels are due.
    """

    slot: Tensor
    written: Tensor
    n_written: Tensor


class Writer(nn.Module):
    """Makes a few vectors of many: learned queries attend to them.

    Args:
        d_model: Width.
        n_write: Vectors that are made.
        n_head: Attention heads.
    """

    def __init__(self, d_model: int, n_write: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.query = nn.Parameter(torch.randn(n_write, d_model))
        self.to_key = nn.Linear(d_model, d_model, bias=False)
        self.to_value = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors (B, w, D) of ``x`` (B, L, D), those that ``mask`` (B, L) names."""
        query = self.query.expand(len(x), -1, -1)
        return attend(query, self.to_key(x), self.to_value(x), self.n_head, mask)[0]


class HierarchyMemory(Slots):
    """Banks that are written after 1, ``period``, ``period**2``, ... segments, and read together.

    Args:
        d_model: Width of the hidden states.
        n_level: Banks.
        period: Writes of a bank after which the next one is written.
        n_slot: Slots of each bank.
        n_write: Slots that a write adds to a bank; the oldest go.
        n_head: Attention heads of reads and writes.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)
    scan = at_once

    def __init__(
        self, d_model: int, n_level: int = 4, period: int = 4, n_slot: int = 16, n_write: int = 4, n_head: int = 4
    ) -> None:
        super().__init__()
        if not 1 <= n_level <= 16:
            raise ValueError(f"n_level must be in 1..16, got {n_level}")
        if not 2 <= period <= 2 ** (60 // n_level):
            raise ValueError(f"period must be in 2..{2 ** (60 // n_level)} with {n_level} levels, got {period}")
        if not 1 <= n_write <= n_slot:
            raise ValueError(f"n_write must be in 1..n_slot ({n_slot}), got {n_write}")
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"n_head must divide d_model ({d_model}), got {n_head}")
        self.n_level, self.period, self.n_slot, self.n_write, self.n_head = n_level, period, n_slot, n_write, n_head
        self.norm = nn.RMSNorm(d_model)
        self.slot_norm = nn.RMSNorm(d_model)
        self.start = nn.Parameter(torch.randn(n_level * n_slot, d_model))
        self.address = nn.Parameter(torch.randn(n_level * n_slot, d_model))  # of each level and age
        self.of_tokens = Writer(d_model, n_write, n_head)
        self.of_slots = Writer(d_model, n_write, n_head)
        self.to_query = nn.Linear(d_model, d_model, bias=False)
        self.to_key = nn.Linear(d_model, d_model, bias=False)
        self.to_value = nn.Linear(d_model, d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        self.init_linears()

    def init_state(self, n_row: int) -> HierarchyState:
        """Slots as they were learned."""
        slot = self.start.expand(n_row, -1, -1)
        written = torch.zeros(slot.shape[:2], dtype=torch.bool, device=slot.device)
        return HierarchyState(slot, written, torch.zeros(n_row, dtype=torch.long, device=slot.device))

    def prepare(self, state: HierarchyState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the slots, (B, M, D) each, and which were written, (B, M)."""
        content = self.slot_norm(state.slot)
        return self.to_key(content + self.address), self.to_value(content), state.written

    def read(self, y: Tensor, prepared: tuple[Tensor, Tensor, Tensor]) -> Read:
        """One attention of tokens to the slots of all levels; see `Memory.read`."""
        key, value, written = prepared
        found, weight = attend(self.to_query(self.norm(y)), key, value, self.n_head)
        gate = self.read_gate(y).sigmoid()  # (B, T, 1)
        empty = ~written[:, None]
        slots = torch.arange(key.shape[1], device=y.device).expand_as(weight).masked_fill(empty, -1)
        return Read(gate * self.to_output(found), slots, weight.masked_fill(empty, 0.0), gate[..., 0])

    def write(self, segment: Segment, state: HierarchyState) -> tuple[HierarchyState, Trace]:
        """Write the lowest level, and each above it that is due, from the one below; see `Memory.write`."""
        valid = segment.valid
        wrote = segment.complete[:, 0] & valid.any(dim=1)
        n_written = state.n_written + wrote
        levels = state.slot.chunk(self.n_level, dim=1)
        filled = state.written.chunk(self.n_level, dim=1)
        slots: list[Tensor] = []
        written: list[Tensor] = []
        for level, (slot, full) in enumerate(zip(levels, filled, strict=True)):
            if level == 0:
                new = self.of_tokens(self.norm(segment.hidden), valid | ~wrote[:, None])
            else:
                new = self.of_slots(self.slot_norm(slots[-1]))
            due = wrote & (n_written % self.period**level == 0)
            slots.append(where_rows(due, torch.cat([slot[:, self.n_write :], new], dim=1), slot))
            now = torch.cat([full[:, self.n_write :], torch.ones_like(full[:, : self.n_write])], dim=1)
            written.append(where_rows(due, now, full))
        return HierarchyState(torch.cat(slots, dim=1), torch.cat(written, dim=1), n_written), {}

    def filled(self, state: HierarchyState) -> Tensor:
        """Which slots hold something, (B, M)."""
        return state.written

    def flops_per_token(self) -> int:
        """Maps of tokens, attention to the slots, and, once a segment, maps of the slots."""
        d_model = self.norm.weight.numel()
        return 10 * d_model**2 + 4 * (len(self.start) + self.n_write) * d_model
