"""LM2: a bank of slots with input and forget gates, read by cross attention beside the layer's own attention.

Source: J. Kang et al., "LM2: Large memory models" (2025, 2502.06049), and its public code. Slots begin as rows of the
identity. A token reads by attention to the slots, and an output gate made of what it found lets that in; a write adds
new content through an input gate, and keeps the old through a forget gate. Other than there:

- **The gates of a write are made of a complete segment, and reach later segments alone.** In the public code the input
  gate averages over the whole sequence and scales what is added at every position, so that a token sees later ones.
- A slot finds its new content in the tokens of the segment. In the source tokens attend to slots, and what they find
  takes the place of the slots: that needs as many slots as tokens, and only gates and weights come from the text.
- A bank is a state of each row, fresh in every document, one for each attached layer. In the public code it is an
  attribute of the model that all layers change in turn, and goes on from batch to batch whatever the documents.
- Tokens are normalised before they are attended to, and slots when they are read. The layers behind the attention to
  slots are left out, and so is dropout there (0.9 in the public code).

Shapes: B rows, T tokens per segment, D model width, n slots, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Read, Segment, Trace, at_once
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows
from memlm.tensors import attend


class GatedState(NamedTuple):
    """The bank of one layer.

    Attributes:
        slot: Contents, (B, n, D); rows of the identity at first.
        written: Which slots were written, (B, n).
    """

    slot: Tensor
    written: Tensor


class GatedMemory(Slots):
    """Slots that every segment rewrites through gates.

    Args:
        d_model: Width of the hidden states.
        n_slot: Slots, at most ``d_model``.
        n_head: Attention heads of reads and writes.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)
    scan = at_once

    def __init__(self, d_model: int, n_slot: int = 64, n_head: int = 4) -> None:
        super().__init__()
        if not 1 <= n_slot <= d_model:
            raise ValueError(f"n_slot must be in 1..d_model ({d_model}), as slots begin as unit vectors, got {n_slot}")
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"n_head must divide d_model ({d_model}), got {n_head}")
        self.n_slot, self.n_head = n_slot, n_head
        self.norm = nn.RMSNorm(d_model)
        self.slot_norm = nn.RMSNorm(d_model)
        self.read_query = nn.Linear(d_model, d_model, bias=False)
        self.read_key = nn.Linear(d_model, d_model, bias=False)
        self.read_value = nn.Linear(d_model, d_model, bias=False)
        self.output_gate = nn.Linear(d_model, d_model)
        self.write_query = nn.Linear(d_model, d_model, bias=False)
        self.write_key = nn.Linear(d_model, d_model, bias=False)
        self.write_value = nn.Linear(d_model, d_model, bias=False)
        self.gate_of_text = nn.Linear(d_model, 2 * d_model, bias=False)  # input gate, then forget gate
        self.gate_of_slot = nn.Linear(d_model, 2 * d_model)
        self.init_linears()
        with torch.no_grad():
            self.gate_of_slot.bias[d_model:] = 1.0  # slots keep what they hold at first
        self.register_buffer("start", torch.eye(n_slot, d_model), persistent=False)

    def init_state(self, n_row: int) -> GatedState:
        """Rows of the identity."""
        slot = self.get_buffer("start").expand(n_row, -1, -1)
        return GatedState(slot, torch.zeros(slot.shape[:2], dtype=torch.bool, device=slot.device))

    def prepare(self, state: GatedState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the slots, (B, n, D) each, and which were written, (B, n)."""
        content = self.slot_norm(state.slot)
        return self.read_key(content), self.read_value(content), state.written

    def read(self, y: Tensor, prepared: tuple[Tensor, Tensor, Tensor]) -> Read:
        """Attention of tokens to the slots, behind a gate made of what was found; see `Memory.read`."""
        key, value, written = prepared
        found, weight = attend(self.read_query(self.norm(y)), key, value, self.n_head)
        gate = self.output_gate(found).sigmoid()  # (B, T, D)
        empty = ~written[:, None]
        slots = torch.arange(self.n_slot, device=y.device).expand_as(weight).masked_fill(empty, -1)
        return Read(gate * found, slots, weight.masked_fill(empty, 0.0), gate.mean(dim=2))

    def write(self, segment: Segment, state: GatedState) -> tuple[GatedState, Trace]:
        """Let what slots find in the segment in, and what they held stay; see `Memory.write`."""
        x, valid = self.norm(segment.hidden), segment.valid
        mask = valid | ~valid.any(dim=1, keepdim=True)  # no softmax over nothing
        query = self.write_query(self.slot_norm(state.slot))
        found, _ = attend(query, self.write_key(x), self.write_value(x), self.n_head, mask)
        gates = self.of_text(x, valid)[:, None] + self.gate_of_slot(state.slot.tanh())
        enters, stays = gates.sigmoid().chunk(2, dim=2)  # (B, n, D)
        after = GatedState(enters * found.tanh() + stays * state.slot, torch.ones_like(state.written))
        trace = {"input_gate": enters.mean(dim=(1, 2)), "forget_gate": stays.mean(dim=(1, 2))}
        return where_rows(segment.complete[:, 0] & valid.any(dim=1), after, state), trace

    def of_text(self, x: Tensor, valid: Tensor) -> Tensor:
        """What the ``valid`` (B, T) ones of normalised tokens ``x`` (B, T, D) say to both gates, (B, 2 * D)."""
        weight = valid[..., None].to(x.dtype)
        return (self.gate_of_text(x).relu() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def filled(self, state: GatedState) -> Tensor:
        """Which slots hold something, (B, n): all of them once a segment was written."""
        return state.written

    def flops_per_token(self) -> int:
        """Maps, and attention to the slots and of the slots."""
        return super().flops_per_token() + 8 * self.n_slot * self.norm.weight.numel()
