"""Compressive cache: what leaves the cache of the last tokens is compressed into a second one.

Source: J. Rae, A. Potapenko, S. Jayakumar, T. Lillicrap, "Compressive transformers for long-range sequence modelling"
(ICLR 2020, 1911.05507). Every ``ratio`` tokens that leave the cache become one cell of a second cache, and attention
sees both before its segment. As there, the compressor learns from one loss alone, the error of attention over its cells
against attention over the tokens they replace; that loss teaches nothing else, and no other loss the compressor. Other
than there:

- The cache is `memlm.memory.cache`, with positions of the model and moves at the ends of segments. A compressed cell
  stands at one place, as in the paper, so that what is compressed moves nearer.
- Tokens leave the cache in whole groups, however many a segment brings: it holds up to ``ratio`` - 1 tokens more.
- The error is a mean over heads, tokens and numbers of its square, not a norm.
- The convolution begins as the mean.

The paper has it in every layer: ``model.memory_layers=all``.

Shapes: B rows, T tokens per segment, C tokens of lookback, D model width, H heads, E width of a head, L cells of cache
and segment, G groups that leave, c tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.cache import CacheState, last, unseen
from memlm.memory.contract import Context, Heads, Memory, Mixer, Needs, Read, Segment, Sizes, Trace, at_once
from memlm.memory.state import where_rows
from memlm.tensors import take


class CompressiveState(NamedTuple):
    """The last tokens, and what those before them became.

    Attributes:
        cache: Tokens, ``n_token`` and up to ``ratio`` - 1 more.
        compressed: Cells that each stand for ``ratio`` tokens, oldest first.
    """

    cache: CacheState
    compressed: CacheState


class CompressiveMemory(Memory):
    """A cache of the last tokens, and one of compressed tokens before it, in one softmax with the segment.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_token: Tokens that are kept as they are.
        n_compressed: Compressed cells that are kept.
        ratio: Tokens that become one cell.
        compressor: What makes a cell of them: ``conv``, a convolution that learns; ``mean``; or ``max``.
        gradient: Whether gradients flow into both caches, inside a window, and so to the compressor too; not so in the
            paper.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_token", "n_compressed")
    scan = at_once

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        n_token: int = 256,
        n_compressed: int = 256,
        ratio: int = 4,
        compressor: Literal["conv", "mean", "max"] = "conv",
        gradient: bool = False,
    ) -> None:
        super().__init__()
        for name, size in {"n_token": n_token, "n_compressed": n_compressed, "ratio": ratio}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if compressor not in ("conv", "mean", "max"):
            raise ValueError(f"compressor must be 'conv', 'mean' or 'max', got {compressor!r}")
        self.needs = Needs(lookback=sizes.overlap, heads=compressor == "conv", context=True)
        self.sizes, self.ratio, self.compressor, self.gradient = sizes, ratio, compressor, gradient
        self.n_token, self.n_compressed = n_token, n_compressed
        self.register_buffer("cell", torch.zeros(d_model), persistent=False)  # an empty one
        self.conv = None
        if compressor == "conv":
            self.conv = nn.Conv1d(d_model, d_model, ratio, stride=ratio)
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(d_model)[..., None].expand(-1, -1, ratio) / ratio)
                self.conv.bias.zero_()  # type: ignore[union-attr]

    def init_state(self, n_row: int) -> CompressiveState:
        """No tokens."""
        hidden = self.get_buffer("cell").new_zeros(n_row, self.n_held + self.n_compressed, self.sizes.d_model)
        parts = hidden.split([self.n_held, self.n_compressed], dim=1)
        return CompressiveState(*(CacheState(part.clone(), part[..., 0].bool()) for part in parts))

    @property
    def n_held(self) -> int:
        """Most tokens that are kept as they are."""
        return self.n_token + self.ratio - 1

    def mix(self, x: Tensor, prepared: CompressiveState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The layer with both caches in its softmax; see `Memory.mix`."""
        hidden, full = (torch.cat(parts, dim=1) for parts in zip(prepared.compressed, prepared.cache, strict=True))
        place = torch.arange(-full.shape[1], 0, device=x.device) - self.sizes.overlap
        return mixer(x, Context.of(mixer, hidden, full, place)), None

    def write(self, segment: Segment, state: CompressiveState) -> tuple[CompressiveState, Trace]:
        """Append what attention sees no more, and compress what there is too much of; see `Memory.write`."""
        new = unseen(segment, self.gradient)
        n_cell = state.cache.full.shape[1] + new.full.shape[1]
        held = last(state.cache, new, n_cell)  # all of it, in order
        n_full = held.full.sum(dim=1)
        n_group = (n_full - self.n_token).clamp(min=0) // self.ratio  # (B,)
        first = n_cell - n_full
        cell = torch.arange(n_cell, device=n_full.device)
        stays = held.full & (cell >= (first + n_group * self.ratio)[:, None])
        cache = CacheState((held.hidden * stays[..., None])[:, -self.n_held :], stays[:, -self.n_held :])
        most = (n_cell - self.n_token) // self.ratio  # groups that may leave
        index = first[:, None] + cell[: most * self.ratio]
        groups = take(held.hidden, index.clamp(max=n_cell - 1)).unflatten(1, (-1, self.ratio))  # (B, G, c, D)
        there = (cell[:most] < n_group[:, None]) & segment.complete  # (B, G)
        compressed = self.compress(groups)
        new = CacheState(compressed if self.gradient else compressed.detach(), there)
        after = CompressiveState(cache, last(state.compressed, new, self.n_compressed))
        trace: Trace = {}
        if self.conv is not None and torch.is_grad_enabled():
            trace["reconstruction"] = self._error(segment, groups, there)
        return where_rows(segment.complete[:, 0], after, state), trace

    def compress(self, groups: Tensor) -> Tensor:
        """A cell of each group of tokens, (B, G, c, D) -> (B, G, D)."""
        if self.conv is None:
            return groups.mean(dim=2) if self.compressor == "mean" else groups.amax(dim=2)
        with torch.autocast(groups.device.type, enabled=False):
            return self.conv(groups.flatten(1, 2).mT).mT

    def losses(self, trace: Trace, nll: Tensor) -> dict[str, Tensor]:
        """What is lost where attention sees compressed cells; see `Memory.losses`."""
        return {name: error.mean() for name, error in trace.items()}

    def flops_per_token(self) -> int:
        """Attention to all cells, whose keys and values are made anew for each segment; and the convolution."""
        d_model, n_cell = self.sizes.d_model, self.n_held + self.n_compressed
        made = 4 * n_cell * d_model + 6 * n_cell * d_model**2 // self.sizes.segment_len
        return made if self.conv is None else made + 6 * d_model**2 + 2 * d_model**2

    def _error(self, segment: Segment, groups: Tensor, there: Tensor) -> Tensor:
        """Mean squared error of attention over cells in place of their tokens, (B,), which the compressor alone learns.

        Queries are those of the segment. Weights of the layer get no gradient: that of the error stops at the cells.
        """
        assert segment.heads is not None  # as they are among the `needs`
        assert segment.maps is not None
        groups, query = groups.detach(), segment.heads.q[:, :, segment.lookback :].detach()
        valid = segment.valid[:, segment.lookback :]
        cells = self.compress(groups)
        with torch.no_grad():
            tokens = self._found(query, groups.flatten(1, 2), there.repeat_interleave(self.ratio, dim=1), segment.maps)
        leaf = cells.detach().requires_grad_()
        wrong = (self._found(query, leaf, there, segment.maps) - tokens).square().mean(dim=(1, 3))  # (B, T)
        error = (wrong * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
        (slope,) = torch.autograd.grad(error.sum(), leaf)
        part = (cells * slope).sum(dim=(1, 2))
        return error.detach() + part - part.detach()

    def _found(self, query: Tensor, hidden: Tensor, there: Tensor, maps: Callable[[Tensor], Heads]) -> Tensor:
        """What queries (B, H, T, E) find in hidden states (B, L, D), without positions; 0 where there is none."""
        heads = maps(hidden)
        with torch.autocast(query.device.type, enabled=False):
            score = query @ heads.k.mT * query.shape[3] ** -0.5
            least = torch.finfo(score.dtype).min  # no softmax over nothing
            weight = score.masked_fill(~there[:, None, None], least).softmax(dim=3) * there[:, None, None]
            return weight @ heads.v
