"""Implicit memory: a few slots that are moved towards the text and read by their similarity to it.

Source: LinformerMemory of the Implicit Memory Module (IMM). What differs: a segment is read before it is written, every
row has a bank of its own, the bank is a state and no optimised parameter, and gradients flow through its updates.

Shapes: B rows, T tokens per segment, L layers that write, D model width, n slots.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Read, Segment, Trace
from memlm.memory.slots import Slots


class ImplicitState(NamedTuple):
    """The bank.

    Attributes:
        slot: Contents, (B, n, D); unit vectors once they were written.
        written: Which slots were written, (B, n).
        n_written: Segments written since the bank was last reset, (B,).
    """

    slot: Tensor
    written: Tensor
    n_written: Tensor


class ImplicitMemory(Slots):
    """A few slots that drift towards the tokens most similar to them.

    Write: every token is dealt out among the slots by its similarity to them, and each slot moves a little towards the
    direction of its tokens. Read: the similarities of a token to the slots, projected to the model's width.

    Args:
        d_model: Width of the hidden states.
        n_slot: Number of slots.
        temperature: Initial temperature of the write, learned; scores are divided by it and by the root of ``d_model``.
        update_rate: Rate of an update, in (0, 1]; a slot moves by half of it, see ``docs/memories/imm.md``.
        update: ``soft``, all tokens of a segment count alike; ``importance``, by a learned gate.
        reset_every: Segments after which the bank begins anew; null: never.
        norm: ``layer``, hidden states pass a layer norm before they are compared; ``none``.
        content_read: Whether what the slots hold is read as well as how similar they are.
        shared_layers: Whether all attached layers share one bank, which those from the middle one on write.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)

    def __init__(
        self,
        d_model: int,
        n_slot: int = 8,
        temperature: float = 0.8,
        update_rate: float = 0.04,
        update: Literal["soft", "importance"] = "soft",
        reset_every: int | None = None,
        norm: Literal["layer", "none"] = "layer",
        content_read: bool = True,
        shared_layers: bool = True,
    ) -> None:
        super().__init__()
        if n_slot < 1:
            raise ValueError(f"n_slot must be at least 1, got {n_slot}")
        if not 1e-6 <= temperature <= 1e6:  # far below, scores of 32 bits have no gradients that are finite
            raise ValueError(f"temperature must be in 1e-6..1e6, got {temperature}")
        if not 0 < update_rate <= 1:
            raise ValueError(f"update_rate must be in (0, 1], got {update_rate}")
        if update not in ("soft", "importance"):
            raise ValueError(f"update must be 'soft' or 'importance', got {update!r}")
        if reset_every is not None and reset_every < 1:
            raise ValueError(f"reset_every must be at least 1 or null, got {reset_every}")
        if norm not in ("layer", "none"):
            raise ValueError(f"norm must be 'layer' or 'none', got {norm!r}")
        self.n_slot, self.update_rate, self.reset_every = n_slot, update_rate, reset_every
        self.around = "layers" if shared_layers else "layer"
        self.start = nn.Parameter(0.01 * torch.randn(n_slot, d_model))
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else nn.Identity()
        self.importance = nn.Linear(d_model, 1) if update == "importance" else None
        self.similarity_to_output = nn.Linear(n_slot, d_model)
        self.content_to_output = nn.Linear(d_model, d_model, bias=False) if content_read else None
        self.read_gate = nn.Linear(d_model, 1)
        self.init_linears()

    def init_state(self, n_row: int) -> ImplicitState:
        """Slots at their start, which are not read before they are written."""
        slot = self.start.expand(n_row, -1, -1)
        written = torch.zeros(n_row, self.n_slot, dtype=torch.bool, device=slot.device)
        return ImplicitState(slot, written, torch.zeros(n_row, dtype=torch.long, device=slot.device))

    def read(self, y: Tensor, prepared: ImplicitState) -> Read:
        """Similarities to the slots, and what they hold; see `Memory.read`.

        The weight of a slot is its share in the magnitudes of what all slots add; with ``content_read`` the mean of
        that and of its share in what is read of the contents.
        """
        unit, written = F.normalize(prepared.slot, dim=-1), prepared.written[:, None]  # (B, n, D), (B, 1, n)
        similarity = (F.normalize(self.norm(y), dim=-1) @ unit.transpose(1, 2)).masked_fill(~written, 0.0)  # (B, T, n)
        read = self.similarity_to_output(similarity)  # (B, T, D)
        loud = similarity.abs() * self.similarity_to_output.weight.norm(dim=0)
        weights = loud / loud.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        if self.content_to_output is not None:
            score = self._scores(similarity)
            score = score.masked_fill(~written, torch.finfo(score.dtype).min)
            share = score.softmax(dim=-1) * written  # (B, T, n), 0 if nothing is written
            read = read + self.content_to_output(share @ unit * unit.shape[-1] ** 0.5)
            weights = (weights + share) / 2
        gate = self.read_gate(y).sigmoid() * written.any(dim=2, keepdim=True)  # (B, T, 1)
        slots = torch.arange(self.n_slot, device=y.device).expand_as(weights)
        return Read(gate * read, slots, weights, gate[..., 0])

    def write(self, segment: Segment, state: ImplicitState) -> tuple[ImplicitState, Trace]:
        """Move every slot towards its tokens, by the hidden states of one layer after the other; see `Memory.write`."""
        hidden = segment.hidden[:, segment.lookback :]
        layers = [hidden] if hidden.dim() == 3 else list(hidden.unbind(dim=2))[hidden.shape[2] // 2 :]
        valid = segment.valid[:, segment.lookback :, None]  # (B, T, 1)
        wrote = segment.complete[:, 0] & valid.any(dim=1)[:, 0]  # (B,)
        slot, n_written = state.slot, state.n_written
        if self.reset_every is not None:
            full = n_written == self.reset_every
            slot, n_written = torch.where(full[:, None, None], self.start, slot), n_written.masked_fill(full, 0)
        usage = slot.new_zeros(slot.shape[:2])
        for x in layers:
            token = self.norm(x)
            unit = F.normalize(token, dim=-1)  # (B, T, D)
            share = self._scores(unit @ F.normalize(slot, dim=-1).transpose(1, 2)).softmax(dim=-1) * valid  # (B, T, n)
            if self.importance is not None:
                share = share * self.importance(token).sigmoid()
            moved = F.normalize(share.transpose(1, 2) @ unit, dim=-1)  # (B, n, D)
            rate = self.update_rate / (1 + moved.norm(dim=-1, keepdim=True))
            slot = F.normalize(slot + rate * moved, dim=-1)
            usage = usage + share.sum(dim=1)
        new = ImplicitState(
            torch.where(wrote[:, None, None], slot, state.slot),
            state.written | wrote[:, None],
            torch.where(wrote, n_written + 1, state.n_written),
        )
        used = usage / usage.sum(dim=1, keepdim=True).clamp(min=1e-12)
        entropy = -(used * used.clamp(min=1e-12).log()).sum(dim=1).mean()
        return new, {"slots_used": entropy.exp(), "not_finite": (~new.slot.isfinite()).sum().float()}

    def filled(self, state: ImplicitState) -> Tensor:
        """Which slots hold something, (B, n)."""
        return state.written

    def flops_per_token(self) -> int:
        """Projections, and similarities and sums over the slots when reading and writing."""
        projected = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * projected + 8 * self.start.numel()

    def _scores(self, similarity: Tensor) -> Tensor:
        """Cosines (..., n) over the temperature, as the source scales them."""
        return similarity / (self.start.shape[1] ** 0.5 * self.log_temperature.exp())
