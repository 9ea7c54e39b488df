"""Cache: the last tokens, as more keys and values of the layer's own attention (Transformer-XL).

Source: Z. Dai et al., "Transformer-XL: Attentive language models beyond a fixed-length context" (ACL 2019). As there,
hidden states are kept, which the layer's own maps make keys and values of. Other than there:

- Positions are those of the model: rotary ones go on to the left, learned ones stay those of a cell in its own segment.
- The cache moves on where a segment is complete, not with every call. Between two of these moments it stands still, so
  a token sees the rest of its segment, the overlap, and n tokens before that.
- A context that ends does not end the cache; a document does.

It is the control of every other memory: what do as many bytes of the plain last tokens give? A layer keeps
``n_token * (4 * d_model + 1)`` bytes of a row in fp32, half of what keys and values would take. The paper has a cache
in every layer: ``model.memory_layers=all``.

Shapes: B rows, T tokens per segment, C tokens of lookback, D model width, n tokens held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.memory.contract import Context, Memory, Mixer, Needs, Read, Segment, Sizes, Trace, at_once
from memlm.memory.state import where_rows
from memlm.tensors import take


class CacheState(NamedTuple):
    """The last tokens before the overlap, oldest first; empty cells stand before them.

    Attributes:
        hidden: What entered the layer, (B, n, D).
        full: Which cells hold a token, (B, n).
    """

    hidden: Tensor
    full: Tensor


def unseen(segment: Segment, gradient: bool) -> CacheState:
    """The tokens of a segment, and of the overlap before it, that attention sees no more; maybe without gradients."""
    hidden = segment.hidden if gradient else segment.hidden.detach()
    leaves = torch.arange(hidden.shape[1], device=hidden.device) < segment.segment_len  # all but the next overlap
    return CacheState(hidden, segment.valid & (leaves | segment.closes))


def last(held: CacheState, new: CacheState, n: int) -> CacheState:
    """The last ``n`` tokens of those held and the new ones: what is empty first and zero, then by place."""
    hidden, full = (torch.cat(parts, dim=1) for parts in zip(held, new, strict=True))
    index = full.long().argsort(dim=1, stable=True)[:, -n:]
    full = full.gather(1, index)
    return CacheState(take(hidden, index) * full[..., None], full)


class CacheMemory(Memory):
    """The last ``n_token`` tokens that attention sees no more, in one softmax with those that it sees.

    A token enters the cache when it leaves the overlap, or when its context ends; so no token is seen twice, and each
    has the place that it has in the text, counted in tokens that were written.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_token: Tokens that are kept.
        gradient: Whether gradients flow into the cells of the cache, inside a window; not so in the paper, where they
            reach the maps that make keys and values of them, and no further.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_token",)
    scan = at_once

    def __init__(self, d_model: int, sizes: Sizes, n_token: int = 512, gradient: bool = False) -> None:
        super().__init__()
        if n_token < 1:
            raise ValueError(f"n_token must be at least 1, got {n_token}")
        self.n_token, self.gradient, self.sizes = n_token, gradient, sizes
        self.needs = Needs(lookback=sizes.overlap, context=True)
        self.register_buffer("cell", torch.zeros(d_model), persistent=False)  # an empty one

    def init_state(self, n_row: int) -> CacheState:
        """No tokens."""
        hidden = self.get_buffer("cell").new_zeros(n_row, self.n_token, self.sizes.d_model)
        return CacheState(hidden, hidden[..., 0].bool())

    def mix(self, x: Tensor, prepared: CacheState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The layer with the cache in its softmax; see `Memory.mix`."""
        place = torch.arange(-self.n_token, 0, device=x.device) - self.sizes.overlap
        return mixer(x, Context.of(mixer, prepared.hidden, prepared.full, place)), None

    def write(self, segment: Segment, state: CacheState) -> tuple[CacheState, Trace]:
        """Append what attention sees no more, and keep the last ``n_token``; see `Memory.write`."""
        after = last(state, unseen(segment, self.gradient), self.n_token)
        return where_rows(segment.complete[:, 0], after, state), {}

    def flops_per_token(self) -> int:
        """Attention to the cells, and their keys and values, made anew for each segment."""
        d_model = self.sizes.d_model
        return 4 * self.n_token * d_model + 6 * self.n_token * d_model**2 // self.sizes.segment_len
