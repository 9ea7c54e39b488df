"""Small memories of every kind that the contract is for, to prove that it carries them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import (
    Context,
    Memory,
    Mixer,
    Needs,
    Read,
    Scanned,
    Segment,
    Sizes,
    Trace,
    at_once,
    mean_trace,
)
from memlm.memory.state import where_rows


class RingState(NamedTuple):
    held: Tensor  # the last n tokens of complete segments, (B, n, ...)
    full: Tensor  # which of them there are, (B, n)


def push(state: RingState, new: Tensor, valid: Tensor, complete: Tensor) -> RingState:
    """The last n of what is held and the valid ones of ``new`` (B, L, ...), in rows that are complete."""
    n = state.full.shape[1]
    held, full = torch.cat([state.held, new], dim=1), torch.cat([state.full, valid], dim=1)
    order = full.long().argsort(dim=1, stable=True)[:, -n:]
    index = order.view(*order.shape, *[1] * (held.dim() - 2)).expand(-1, -1, *held.shape[2:])
    return where_rows(complete, RingState(held.gather(1, index), full.gather(1, order)), state)


class Cache(Memory):
    """What the layer saw of the last ``n_slot`` tokens, as more keys and values of its own maps (Transformer-XL)."""

    needs = Needs(context=True)
    placed = False

    def __init__(self, d_model: int, n_slot: int = 60) -> None:
        super().__init__()
        self.n_slot, self.d_model = n_slot, d_model
        self.scale = nn.Parameter(torch.ones(d_model))

    def init_state(self, n_row: int) -> RingState:
        held = torch.zeros(n_row, self.n_slot, self.d_model, device=self.scale.device)
        return RingState(held, torch.zeros(n_row, self.n_slot, dtype=torch.bool, device=held.device))

    def mix(self, x: Tensor, prepared: RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        place = torch.arange(-self.n_slot, 0) if self.placed else None
        return mixer(x, Context.of(mixer, prepared.held * self.scale, prepared.full, place)), None

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        here = slice(segment.lookback, None)
        return push(state, segment.hidden[:, here], segment.valid[:, here], segment.complete[:, 0]), {}


class CacheAtOnce(Cache):
    """The same, all segments of a window in one call of the mixer."""

    scan = at_once


class PlacedCache(Cache):
    """The same, with keys that have a place before the segment."""

    placed = True
    scan = at_once


class Nearest(Memory):
    """Keys and values of the layer's own heads, of which each query of each head finds the ``k`` best."""

    needs = Needs(heads=True, context=True)
    scan = at_once

    def __init__(self, d_model: int, sizes: Sizes, n_slot: int = 60, k: int = 3) -> None:
        super().__init__()
        self.n_slot, self.k, self.n_head, self.width = n_slot, k, sizes.n_head, d_model // sizes.n_head
        self.bias = nn.Parameter(torch.zeros(sizes.n_head))

    def init_state(self, n_row: int) -> RingState:
        held = torch.zeros(n_row, self.n_slot, 2, self.n_head, self.width, device=self.bias.device)
        return RingState(held, torch.zeros(n_row, self.n_slot, dtype=torch.bool, device=held.device))

    def mix(self, x: Tensor, prepared: RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        heads = mixer.heads(x)
        key, value = prepared.held.movedim(1, 3).unbind(1)  # (B, H, n, E)
        score = heads.q @ key.transpose(2, 3)
        score = score.masked_fill(~prepared.full[:, None, None], -torch.inf)
        best = score.topk(self.k, dim=3)  # (B, H, T, k)

        def pick(part: Tensor) -> Tensor:
            index = best.indices.flatten(2)[..., None].expand(-1, -1, -1, self.width)
            return part.gather(2, index).unflatten(2, best.indices.shape[2:])

        there = torch.where(best.values.isinf(), -torch.inf, 0.0)
        context = Context(pick(key), pick(value), bias=there + self.bias[:, None, None])
        return mixer.out(mixer.attend(heads, context), x), None

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        assert segment.heads is not None
        new = torch.stack([segment.heads.k, segment.heads.v], dim=1).movedim(3, 1)  # (B, T, 2, H, E)
        return push(state, new, segment.valid, segment.complete[:, 0]), {}


class PerHead(Memory):
    """A matrix per head, mixed with what the head finds before the output map (Infini-attention)."""

    needs = Needs(heads=True)

    def __init__(self, d_model: int, sizes: Sizes) -> None:
        super().__init__()
        self.n_head, self.width = sizes.n_head, d_model // sizes.n_head
        self.gate = nn.Parameter(torch.zeros(sizes.n_head))

    def init_state(self, n_row: int) -> Tensor:
        return torch.zeros(n_row, self.n_head, self.width, self.width, device=self.gate.device)

    def mix(self, x: Tensor, prepared: Tensor, mixer: Mixer) -> tuple[Tensor, Read | None]:
        heads, gate = mixer.heads(x), self.gate.sigmoid()[:, None, None]
        mixed = gate * (heads.q.tanh() @ prepared) + (1 - gate) * mixer.attend(heads)
        return mixer.out(mixed, x), None

    def write(self, segment: Segment, state: Tensor) -> tuple[Tensor, Trace]:
        assert segment.heads is not None
        k, v = segment.heads.k.tanh() * segment.valid[:, None, :, None], segment.heads.v
        count = segment.valid.sum(dim=1).clamp(min=1)[:, None, None, None]
        written = segment.complete[:, 0] & segment.valid.any(dim=1)
        return where_rows(written, 0.9 * state + k.transpose(2, 3) @ v / count, state), {}


class Pool(Memory):
    """What came out of the layer for the last tokens of each segment, through the layer's own maps (MemoryLLM)."""

    needs = Needs(context=True, output=True)

    def __init__(self, d_model: int, n_slot: int = 12, n_new: int = 3) -> None:
        super().__init__()
        self.n_slot, self.n_new, self.d_model = n_slot, n_new, d_model
        self.scale = nn.Parameter(torch.ones(d_model))

    def init_state(self, n_row: int) -> RingState:
        held = torch.zeros(n_row, self.n_slot, self.d_model, device=self.scale.device)
        return RingState(held, torch.zeros(n_row, self.n_slot, dtype=torch.bool, device=held.device))

    def mix(self, x: Tensor, prepared: RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        return mixer(x, Context.of(mixer, prepared.held * self.scale, prepared.full)), None

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        assert segment.output is not None
        rank = segment.valid.flip(1).cumsum(dim=1).flip(1)  # 1 for the last valid token
        return push(state, segment.output, segment.valid & (rank <= self.n_new), segment.complete[:, 0]), {}


class Cells(Memory):
    """Cells before each segment, which those behind the one before came out as (RMT)."""

    around = "stack"

    def __init__(self, d_model: int, n_cell: int = 3) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(n_cell, d_model))
        self.to_cell = nn.Linear(d_model, d_model)
        self.needs = Needs(tail=n_cell, context=True)

    def init_state(self, n_row: int) -> RingState:
        full = torch.zeros(n_row, 1, dtype=torch.bool, device=self.start.device)
        return RingState(self.start.expand(n_row, -1, -1), full)

    def mix(self, x: Tensor, prepared: RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        m = prepared.held.shape[1]
        return mixer(torch.cat([prepared.held, x], dim=1))[:, m:], None

    def tail(self, prepared: RingState) -> Tensor:
        return prepared.held

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        assert segment.tail is not None
        written = segment.complete[:, 0] & segment.valid.any(dim=1)
        new = self.to_cell(nn.functional.rms_norm(segment.tail, segment.tail.shape[-1:]))
        return where_rows(written, RingState(new, torch.ones_like(state.full)), state), {}


class TokenWise(Memory):
    """A running mean of all tokens so far, the token itself included (a relative of the delta rule)."""

    within = True

    def __init__(self, d_model: int, decay: float = 0.95) -> None:
        super().__init__()
        self.decay = decay
        self.to_value = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, n_row: int) -> Tensor:
        return self.to_value.weight.new_zeros(n_row, self.to_value.in_features)

    def mix(self, x: Tensor, prepared: Any, mixer: Mixer) -> tuple[Tensor, Read | None]:
        raise AssertionError("reads lie within the scan")

    def after(self, state: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        """The state after each token of a segment, (B, T, D)."""
        found = []
        for t in range(value.shape[1]):
            state = torch.where(valid[:, t, None], self.decay * state + (1 - self.decay) * value[:, t], state)
            found.append(state)
        return torch.stack(found, dim=1)

    def write(self, segment: Segment, state: Tensor) -> tuple[Tensor, Trace]:
        after = self.after(state, self.to_value(segment.hidden), segment.valid)[:, -1]
        return where_rows(segment.complete[:, 0], after, state), {}

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: Tensor,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        y, found = mixer(x), []
        for s in range(window.n_segment):
            segment = window.at(s)
            state = self.start_documents(segment.reset, state)
            within = self.after(state, self.to_value(segment.hidden), segment.valid)
            found.append(within[:, segment.columns])
            if write:
                state = where_rows(segment.complete[:, 0], within[:, -1], state)
        return Scanned(y + torch.cat(found, dim=1) if read else y, None, state, mean_trace([]))
