"""Recurrent memory: a few cells that pass through the whole model with every segment (RMT).

Source: A. Bulatov, Y. Kuratov, M. Burtsev, "Recurrent memory transformer" (NeurIPS 2022) and "Scaling transformer to
1M tokens and beyond with RMT" (2023). A segment is read as [memory; segment; memory]; what comes out of the cells
behind it is the memory of the next segment. Gradients flow through the segments of a window. Other than there:

- Read cells have no position and see each other alone; text sees them, and the overlap, which RMT does not have. Write
  cells stand at one fixed place after the longest segment, so that a short last segment does not move them.
- Segments lie on the grid of the text, however it is cut into calls. A context that ends early is written too.
- What comes out is normalised and mapped before it is kept (``map``): the authors' later experiments with associative
  recall learn eight pairs with a linear map, and guess without one.

Shapes: B rows, T tokens per segment, D model width, m cells.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Memory, Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.state import where_rows


class RecurrentState(NamedTuple):
    """The cells that the last segment left.

    Attributes:
        cell: What they hold, (B, m, D); zero before the first write.
        written: Whether a segment was written, (B,); the learned cells are read until then.
    """

    cell: Tensor
    written: Tensor


class RecurrentMemory(Memory):
    """Cells before each segment, which those behind the segment before came out as.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_cell: Cells.
        map: What is done to cells before they are kept: ``linear``, a learned map, or ``none``.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    around = "stack"
    sized = ("n_cell",)

    def __init__(self, d_model: int, sizes: Sizes, n_cell: int = 8, map: Literal["linear", "none"] = "linear") -> None:
        super().__init__()
        if n_cell < 1:
            raise ValueError(f"n_cell must be at least 1, got {n_cell}")
        if map not in ("linear", "none"):
            raise ValueError(f"map must be linear or none, got {map!r}")
        self.sizes = sizes
        self.needs = Needs(tail=n_cell, context=True)
        self.first = nn.Parameter(torch.randn(n_cell, d_model))  # of the variance of embeddings
        self.norm = nn.RMSNorm(d_model)
        self.to_cell = nn.Linear(d_model, d_model) if map == "linear" else nn.Identity()
        self.init_linears()

    def init_state(self, n_row: int) -> RecurrentState:
        """Nothing written."""
        cell = self.first.new_zeros(n_row, *self.first.shape)
        return RecurrentState(cell, torch.zeros(n_row, dtype=torch.bool, device=cell.device))

    def prepare(self, state: RecurrentState) -> Tensor:
        """The cells that stand before and behind the segment, (B, m, D)."""
        return torch.where(state.written[:, None, None], state.cell, self.first)

    def mix(self, x: Tensor, prepared: Tensor, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The stack with the cells before the segment; see `Memory.mix`."""
        return mixer(torch.cat([prepared, x], dim=1))[:, prepared.shape[1] :], None

    def tail(self, prepared: Tensor) -> Tensor:
        """The same cells behind the segment; see `Memory.tail`."""
        return prepared

    def write(self, segment: Segment, state: RecurrentState) -> tuple[RecurrentState, Trace]:
        """Keep what came out of the cells behind the segment; see `Memory.write`."""
        assert segment.tail is not None  # as it `needs` them
        after = RecurrentState(self.to_cell(self.norm(segment.tail)), torch.ones_like(state.written))
        written = segment.complete[:, 0] & segment.valid.any(dim=1)
        return where_rows(written, after, state), {}

    def flops_per_token(self) -> int:
        """Attention to m cells, and the way of 2 m through the layers, with a feed-forward four times as wide."""
        m, d_model = self.first.shape
        layer = 2 * m * 24 * d_model**2 + 4 * m * d_model * (self.sizes.segment_len + self.sizes.overlap + 2 * m)
        way = self.sizes.n_layer * layer + m * super().flops_per_token()
        return way // self.sizes.segment_len + 4 * m * d_model * self.sizes.n_layer
