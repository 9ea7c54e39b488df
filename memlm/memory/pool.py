"""Pool: hidden vectors of each layer, of which every write drops some at random (MemoryLLM).

Source: Y. Wang et al., "MemoryLLM: towards self-updatable large language models" (ICML 2024), arXiv 2402.04624. As
there, each layer has N vectors that its own maps make keys and values of, before the text; a write puts K new ones
behind them and drops a random K of the N old ones, in each layer by itself, so that of what a write brought the share
(1 - K / N)^t is left after t more. Other than there:

- What is written comes out of the layer at the last K tokens as they were read, with the whole pool in sight. The
  source runs a context a second time, with the last K vectors of the pool alone before it, and adds a learned vector to
  its last K cells; cells behind a segment would need to come out of every layer, not only of the stack.
- Which vectors are dropped is a hash of the layer's salt, the segment's place in its document and its tokens: the same
  text gives the same pool in any row of any batch, and other texts drop others. The salt is drawn with the weights and
  is part of the checkpoint. The source draws from the global random state, and stores row 0 of a batch.
- The pool begins empty, where that of the source is filled up with copies at the first write. Empty cells are dropped
  like others, so the share above holds from the first write on. A segment of fewer than K tokens brings, and drops, as
  many as it has.
- There is no learned vector in front of the pool; attention always has the token itself.
- All weights are trained, and gradients flow through the pool to the edge of a window. The source trains LoRA, and lets
  them flow through one write in half of its steps.

Shapes: B rows, T tokens per segment, D model width, N vectors of the pool, K new ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.memory.contract import Context, Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows
from memlm.tensors import take


class PoolState(NamedTuple):
    """Vectors of one layer, oldest first.

    Attributes:
        hidden: What came out of the layer, (B, N, D).
        position: Place in its document of the token where it came out, (B, N); -1 for an empty cell.
    """

    hidden: Tensor
    position: Tensor


class PoolMemory(Slots):
    """Vectors before the text, of which each write replaces a random part.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_token: Vectors of a layer (N).
        n_new: Vectors that a segment brings (K): what came out of the layer at its last tokens.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    needs = Needs(context=True, output=True)
    sized: tuple[str, ...] = ("n_token", "n_new")

    def __init__(self, d_model: int, sizes: Sizes, n_token: int = 512, n_new: int = 16) -> None:
        super().__init__()
        if n_new < 1:
            raise ValueError(f"n_new must be at least 1, got {n_new}")
        if n_token < n_new:
            raise ValueError(f"n_token must be at least n_new ({n_new}), got {n_token}")
        self.n_token, self.n_new, self.sizes = n_token, n_new, sizes
        self.register_buffer("salt", torch.randint(2**31, ()))
        self.register_buffer("cell", torch.zeros(d_model), persistent=False)  # an empty one

    def init_state(self, n_row: int) -> PoolState:
        """Empty cells."""
        return self._empty(n_row, self.n_token)

    def filled(self, state: PoolState) -> Tensor:
        """Which cells hold a vector, (B, N)."""
        return state.position >= 0

    def places(self, state: PoolState) -> Tensor:
        """See `Slots.places`."""
        return state.position

    def mix(self, x: Tensor, prepared: PoolState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The layer with the pool before the text; see `Memory.mix`."""
        return mixer(x, self._context(prepared, self.filled(prepared), mixer)), None

    def write(self, segment: Segment, state: PoolState) -> tuple[PoolState, Trace]:
        """Drop some vectors and append new ones; see `Memory.write`."""
        return where_rows(segment.complete[:, 0], self.replaced(segment, state)[1], state), {}

    def replaced(self, segment: Segment, state: PoolState) -> tuple[PoolState, PoolState]:
        """What a segment drops from a pool, K cells some of which are empty, and the pool after it, both in order."""
        assert segment.output is not None  # as it `needs` it
        n_valid = segment.valid.sum(dim=1, keepdim=True)  # (B, 1)
        last = n_valid - self.n_new + torch.arange(self.n_new, device=n_valid.device)  # (B, K)
        there = last >= 0
        hidden = take(segment.output, last.clamp(0, segment.segment_len - 1)).where(there[..., None], self._cell)
        position = (segment.position + last).where(there, -1)
        held = PoolState(torch.cat([state.hidden, hidden], dim=1), torch.cat([state.position, position], dim=1))
        drawn = draws(segment, self.get_buffer("salt"), self.n_token)  # (B, N)
        rank = drawn.argsort(dim=1, stable=True).argsort(dim=1)
        stays = torch.cat([rank >= n_valid.clamp(max=self.n_new), there], dim=1)  # (B, N + K), N of them
        order = stays.long().argsort(dim=1, stable=True)
        dropped, pool = (
            PoolState(take(held.hidden, part), take(held.position, part))
            for part in order.split([self.n_new, self.n_token], dim=1)
        )
        return dropped, pool

    def flops_per_token(self) -> int:
        """Attention to the cells, and their keys and values, made anew for each segment."""
        return self._flops(self.n_token)

    @property
    def _cell(self) -> Tensor:
        """An empty cell, (D,)."""
        return self.get_buffer("cell")

    def _empty(self, n_row: int, n_cell: int) -> PoolState:
        """So many empty cells."""
        hidden = self._cell.new_zeros(n_row, n_cell, self.sizes.d_model)
        return PoolState(hidden, torch.full((n_row, n_cell), -1, device=hidden.device))

    def _context(self, held: PoolState, seen: Tensor, mixer: Mixer) -> Context:
        """Vectors at the places before those that the layer sees by itself, as far as they are ``seen``."""
        n_cell = held.hidden.shape[1]
        place = torch.arange(-n_cell, 0, device=held.hidden.device) - self.sizes.overlap
        return Context.of(mixer, held.hidden, seen, place)

    def _flops(self, n_cell: int) -> int:
        d_model = self.sizes.d_model
        return 4 * n_cell * d_model + 6 * n_cell * d_model**2 // self.sizes.segment_len


def draws(segment: Segment, salt: Tensor, n_cell: int) -> Tensor:
    """A number of 32 bits for each cell, (B, n), from the ``salt``, the segment's place and its tokens."""
    place = torch.arange(segment.segment_len, device=salt.device)
    words = scrambled(scrambled(place) ^ segment.ids) * segment.valid
    seed = scrambled(scrambled(words.sum(dim=1, keepdim=True) ^ salt) ^ segment.position)  # (B, 1)
    return scrambled(seed ^ scrambled(torch.arange(n_cell, device=salt.device)))


def scrambled(number: Tensor) -> Tensor:
    """A hash of whole numbers, of their last 32 bits: the finaliser of MurmurHash3 (A. Appleby)."""
    low = 2**32 - 1
    number = number & low
    for factor, shift in ((1, 16), (0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        number = (number * factor) & low
        number = number ^ (number >> shift)
    return number
