"""Memory by gradient: cells before each segment, written by steps down the model's own next-token loss (GradMem).

Source: GradMem (2603.13875). As there, the model is trained through the steps, by gradients of gradients. What differs:

- There one context is written once, from the learned cells. Here each segment is, from the cells that the segment
  before left; so memory goes on, and what a segment does not need may be written over.
- The steps use the model's own head, and the gradient of a step does not train it: through it all embeddings would be
  part of every write. There they have a head of their own.
- A text sees the overlap where it is read. Where it is written, it stands alone behind its cells.
- Cells have no place and see each other alone, as those of `memlm.memory.rmt`.

Shapes: B rows, T tokens per segment, D model width, m cells.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Memory, Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.state import where_rows


class GradientState(NamedTuple):
    """What text has changed.

    Attributes:
        change: What all steps have added to the learned cells, (B, m, D).
    """

    change: Tensor


class GradientMemory(Memory):
    """Cells before each segment, which steps of gradient descent make predict the segment before.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_cell: Cells.
        n_step: Steps per segment; with 0 cells stay as they were learned.
        rate: Size of a step.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    around = "stack"
    needs = Needs(context=True, nll=True)
    sized = ("n_cell",)

    def __init__(self, d_model: int, sizes: Sizes, n_cell: int = 8, n_step: int = 2, rate: float = 10.0) -> None:
        super().__init__()
        if n_cell < 1:
            raise ValueError(f"n_cell must be at least 1, got {n_cell}")
        if n_step < 0:
            raise ValueError(f"n_step must be at least 0, got {n_step}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be above 0, got {rate}")
        self.sizes, self.n_step, self.rate = sizes, n_step, rate
        self.first = nn.Parameter(torch.randn(n_cell, d_model))  # of the variance of embeddings

    def init_state(self, n_row: int) -> GradientState:
        """Nothing written."""
        return GradientState(self.first.new_zeros(n_row, *self.first.shape))

    def prepare(self, state: GradientState) -> Tensor:
        """The cells that stand before the segment, (B, m, D)."""
        return self.first + state.change

    def mix(self, x: Tensor, prepared: Tensor, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The stack with the cells before the segment; see `Memory.mix`."""
        return mixer(torch.cat([prepared, x], dim=1))[:, prepared.shape[1] :], None

    def write(self, segment: Segment, state: GradientState) -> tuple[GradientState, Trace]:
        """Step down the loss of the segment; see `Memory.write`.

        The steps need gradients even where none are asked for around them; only then is their own gradient not kept.
        """
        assert segment.nll is not None  # as it `needs` it
        rows = segment.complete[:, 0] & (segment.valid.sum(dim=1) > 1)  # a token alone predicts nothing
        if not bool(rows.any()):
            return state, {}
        train = torch.is_grad_enabled()
        losses: list[Tensor] = []
        with torch.inference_mode(False), torch.enable_grad():
            change = state.change if train else state.change.clone()
            for _ in range(self.n_step):
                if not train or not change.requires_grad:
                    change = change.detach().requires_grad_()
                loss = segment.nll(self.first + change)
                losses.append((loss.detach() * rows).sum() / rows.sum())
                (gradient,) = torch.autograd.grad(loss.sum(), change, create_graph=train)
                change = change - self.rate * gradient
        trace = {"nll": losses[0]} if losses else {}
        return where_rows(rows, GradientState(change), state), trace

    def flops_per_token(self) -> int:
        """Attention to the cells, their way, and three passes of cells and segment through the model for each step."""
        m, d_model = self.first.shape
        n_token, n_layer = self.sizes.segment_len, self.sizes.n_layer
        cells = n_layer * m * (24 * d_model**2 + 4 * d_model * m) // n_token
        read = cells + 4 * m * d_model * n_layer
        alone = n_layer * (24 * d_model**2 + 4 * d_model * n_token) + 2 * d_model * self.sizes.n_vocab
        return read + 3 * self.n_step * (read + alone)
