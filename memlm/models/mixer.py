"""A language model without attention: a short gated convolution, then the memory in place of attention.

Source: the models of zoology's table of associative recall (2312.04927 and its repository): two layers of
``x + conv(x) * W x`` and a sequence mixer, no feed-forward, tied embedding. What differs: what the convolution adds
stays in the stream, which the memory reads through a norm of its own and adds to; norms are RMSNorm.

How text is cut into segments: `memlm.models.segments`. The convolution goes on across segments of a context; all else
that is older than a few tokens reaches the model through memory only.

Shapes: B rows, S segments of the grid, T tokens per segment, Q columns computed, O tokens before a segment, D model
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from memlm.memory.contract import Context, Memory
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer
from memlm.models.segments import SegmentModel


class Nothing(nn.Module):
    """In place of a feed-forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(x)


class Column(NamedTuple):
    """Where the next token of each row stands in the caches of all rows one after the other, for `Layer.step`."""

    cell: Tensor  # its own cell, (B,)
    seen: Tensor  # the cells that the convolution sees, (B, O + 1)


class Layer(SegmentLayer):
    """A gated convolution, memories, a feed-forward if there is one."""

    def __init__(self, d_model: int, d_conv: int, d_ff: int | None, segment_len: int) -> None:
        super().__init__()
        self.segment_len, self.overlap = segment_len, d_conv - 1
        self.norm = nn.RMSNorm(d_model)
        self.conv = nn.Parameter(torch.empty(d_conv, d_model))  # the last row is for the token itself
        self.gate = nn.Linear(d_model, d_model)
        self.feed_forward = Nothing()
        if d_ff is not None:
            self.feed_forward = nn.Sequential(
                nn.RMSNorm(d_model),
                nn.Linear(d_model, d_ff, bias=False),
                nn.GELU(approximate="tanh"),
                nn.Linear(d_ff, d_model, bias=False),
            )

    def init_cache(self, n_row: int) -> Tensor:
        """Normalised inputs of the tokens before the open segment and in it, (B, O + T, D)."""
        weight = self.norm.weight
        shape = (n_row, self.overlap + self.segment_len, self.conv.shape[1])
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def mix(
        self, x: Tensor, cache: Tensor, grid: Grid, contexts: Sequence[Context] = ()
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The convolution, gated, with its residual; see `SegmentLayer.mix`."""
        normed = self.norm(x)  # (B, S, Q, D)
        inputs = grid.fill(normed, cache[:, self.overlap :])  # (B, S, T, D)
        ends = inputs[:, :-1, self.segment_len - self.overlap :]
        before = torch.cat([cache[:, None, : self.overlap], ends], dim=1)  # (B, S, O, D)
        seen = torch.cat([before * grid.flags.continues[..., None, None], inputs], dim=2)
        width = len(self.conv)
        parts = (seen[:, :, i : i + self.segment_len][:, :, grid.columns] * self.conv[i] for i in range(width))
        return x + sum(parts) * self.gate(normed), (inputs, before)

    def next_cache(self, kept: tuple[Tensor, Tensor], stays_open: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """See `SegmentLayer.next_cache`."""
        inputs, before = kept
        ends = stays_open(before, inputs[:, -1, self.segment_len - self.overlap :])
        return torch.cat([ends, stays_open(inputs, torch.zeros_like(inputs[:, 0]))], dim=1)

    def column(self, place: Tensor, continues: Tensor, most: int) -> Column:
        """See `SegmentLayer.column`."""
        cell = place + (self.overlap + self.segment_len) * torch.arange(len(place), device=place.device) + self.overlap
        return Column(cell, cell[:, None] + torch.arange(-self.overlap, 1, device=place.device))

    def opened(self, cache: Tensor, place: Tensor, continues: Tensor) -> Tensor:
        """See `SegmentLayer.opened`."""
        before, own = cache.split([self.overlap, self.segment_len], dim=1)
        return torch.cat([before * continues[:, None, None], own], dim=1)

    def step(self, x: Tensor, opened: Tensor, column: Column, contexts: Sequence[Context] = ()) -> Tensor:
        """See `SegmentLayer.step`."""
        normed, cells = self.norm(x), opened.flatten(0, 1)
        cells.index_copy_(0, column.cell, normed.to(cells.dtype))
        return x + (cells[column.seen] * self.conv).sum(dim=1) * self.gate(normed)

    def closed(self, opened: Tensor) -> Tensor:
        """See `SegmentLayer.closed`."""
        return opened


class MixerModel(SegmentModel):
    """Language model whose layers are a short convolution and a memory.

    Args:
        n_vocab: Size of the vocabulary.
        memories: By name, a constructor of one memory module, called with ``d_model``.
        n_layer: Number of layers.
        d_model: Width.
        d_conv: Tokens that the convolution sees, the token itself included.
        d_ff: Width of the feed-forward; None for no feed-forward.
        segment_len: Tokens per segment.
        dropout: Dropout probability of embeddings.
        memory_layers: Layers with memory: ``middle``, ``all``, or a list of indices from 0.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        n_vocab: int,
        memories: Mapping[str, Callable[..., Memory]],
        n_layer: int = 2,
        d_model: int = 128,
        d_conv: int = 3,
        d_ff: int | None = None,
        segment_len: int = 128,
        dropout: float = 0.1,
        memory_layers: Literal["middle", "all"] | list[int] = "all",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(n_vocab, n_layer, d_model, segment_len, 0, memory_layers, gradient_checkpointing)
        if not 1 <= d_conv <= segment_len:
            raise ValueError(f"model.d_conv must be in 1..segment_len ({segment_len}), got {d_conv}")
        if d_ff is not None and d_ff < 1:
            raise ValueError(f"model.d_ff must be at least 1 or null, got {d_ff}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {dropout}")
        self.overlap = d_conv - 1
        self.embedding = nn.Embedding(n_vocab, d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(d_model, d_conv, d_ff, segment_len) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model)
        self.attach(memories)
        self._initialise()

    def _initialise(self) -> None:
        """All initial values of the network; memories have their own.

        As in `LMCode`: embeddings dominate the stream at first.
        """
        nn.init.normal_(self.embedding.weight, std=self.d_model**-0.5)
        for layer in cast("list[Layer]", list(self.layers)):
            nn.init.normal_(layer.conv, std=len(layer.conv) ** -0.5)
            nn.init.normal_(layer.gate.weight, std=(2 * self.n_layer * self.d_model) ** -0.5)
            nn.init.zeros_(layer.gate.bias)
            if isinstance(layer.feed_forward, nn.Sequential):
                parts: Any = layer.feed_forward  # whose items torch types as bare modules
                into, out = parts[1], parts[3]
                nn.init.normal_(into.weight, std=into.in_features**-0.5)
                nn.init.normal_(out.weight, std=(2 * self.n_layer * out.in_features) ** -0.5)

    def enter(self, embeddings: Tensor, columns: slice | Tensor) -> Tensor:
        """Embeddings, of which some are dropped in training."""
        return self.dropout(embeddings)
