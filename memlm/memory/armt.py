"""Associative recurrent memory: cells behind each segment write a matrix per layer, which later segments read (ARMT).

Source: I. Rodkin, Y. Kuratov, A. Bulatov, M. Burtsev, "Associative recurrent memory transformer" (2024, 2407.04841),
and the authors' code. Cells stand behind a segment alone, and begin every segment as they were learned. Each layer has
a matrix: before the layer, all that enters it reads the matrix; what comes out of the cells behind the layer is
written. Values start at zero, so that an untrained memory changes nothing. Other than there:

- Cells and what enters a layer are normalised before keys, values and queries are made of them. In the source nothing
  stands between a read and the next write of the same layer, so that both may grow from segment to segment without end.
- Features have the length 1 before they are compared: in the code they do, in the paper's equations they do not.
- Cells stand at one fixed place behind the longest segment, and text sees ``model.overlap`` tokens of the segment
  before.
- Segments lie on the grid of the text, however it is cut into calls. A context that ends early is written too.
- The matrix has one head. The code can have several, gates per channel, and reads that repeat until they stop.

Shapes: B rows, T tokens per segment, D model width, m cells, L layers, M width of keys before their features, K = 6 M
features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Memory, Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.state import where_rows

_TINY = 1e-5  # beside what a key or query meets


class AssociativeState(NamedTuple):
    """What each layer has stored.

    Attributes:
        matrix: Sums of keys times values, (B, L, K, D).
        total: Sums of keys, (B, L, K).
    """

    matrix: Tensor
    total: Tensor


def features(x: Tensor) -> Tensor:
    """DPFP-3 of keys or queries (..., M): products of each of [relu(x), relu(-x)] with its next three, of length 1."""
    r = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return F.normalize(torch.cat([r * r.roll(j, dims=-1) for j in (1, 2, 3)], dim=-1), dim=-1)


class Association(nn.Module):
    """The block of one layer.

    Args:
        d_model: Width of the stream.
        d_mem: Width of keys and queries before their features.
    """

    def __init__(self, d_model: int, d_mem: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, d_mem, bias=False)
        self.cell_norm = nn.RMSNorm(d_model)
        self.to_key = nn.Linear(d_model, d_mem, bias=False)
        self.to_value = nn.Linear(d_model, d_model, bias=False)
        self.to_rate = nn.Linear(d_model, 1)

    def read(self, x: Tensor, matrix: Tensor, total: Tensor) -> Tensor:
        """What is found for ``x`` (B, L, D), shaped as it; zero if nothing was written."""
        query = features(self.to_query(self.norm(x)))
        return query @ matrix / ((query @ total[..., None]) + _TINY)

    def written(self, cells: Tensor, matrix: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix and sum of keys after ``cells`` (B, m, D), and the share of each key that is new, (B, m)."""
        x = self.cell_norm(cells)
        key, rate = features(self.to_key(x)), self.to_rate(x).sigmoid()
        met = key @ total[..., None]  # (B, m, 1)
        new = (1 - met / key.square().sum(dim=-1, keepdim=True).clamp(min=_TINY)).clamp(0, 1).detach()
        change = self.to_value(x) - key @ matrix / (met + _TINY)
        return matrix + key.mT @ (rate * change), total + (new * key).sum(dim=1), new[..., 0]


class AssociativeMemory(Memory):
    """A matrix per layer, written by the cells behind a segment and read by all that enters the layer.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_cell: Cells behind a segment, each of which writes one key and value in every layer.
        d_mem: Width of keys and queries before their features, of which there are six times as many.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    around = "stack"
    sized = ("d_mem",)

    def __init__(self, d_model: int, sizes: Sizes, n_cell: int = 8, d_mem: int = 64) -> None:
        super().__init__()
        if n_cell < 1:
            raise ValueError(f"n_cell must be at least 1, got {n_cell}")
        if d_mem < 2:
            raise ValueError(f"d_mem must be at least 2, as features are products of neighbours, got {d_mem}")
        self.sizes, self.d_key = sizes, 6 * d_mem
        self.needs = Needs(tail=n_cell, each_layer=True)
        self.cell = nn.Parameter(torch.randn(n_cell, d_model))  # of the variance of embeddings
        self.blocks = nn.ModuleList(Association(d_model, d_mem) for _ in range(sizes.n_layer))
        self.init_linears()
        for block in self.blocks:
            nn.init.zeros_(block.to_value.weight)  # type: ignore[union-attr, arg-type]

    def init_state(self, n_row: int) -> AssociativeState:
        """Nothing written."""
        matrix = self.cell.new_zeros(n_row, len(self.blocks), self.d_key, self.cell.shape[1])
        return AssociativeState(matrix, matrix[..., 0].clone())

    def mix(self, x: Tensor, prepared: AssociativeState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The stack, before each layer of which its matrix is read: see `enter`."""
        return mixer(x), None

    def enter(self, x: Tensor, prepared: AssociativeState, layer: int) -> Tensor:
        """The stream with what the layer's matrix holds for it; see `Memory.enter`."""
        with torch.autocast(x.device.type, enabled=False):
            return x + self.blocks[layer].read(x, prepared.matrix[:, layer], prepared.total[:, layer])  # type: ignore[operator]

    def tail(self, prepared: AssociativeState) -> Tensor:
        """The cells behind the segment, always the same; see `Memory.tail`."""
        return self.cell.expand(len(prepared.total), -1, -1)

    def write(self, segment: Segment, state: AssociativeState) -> tuple[AssociativeState, Trace]:
        """Write what came out of the cells behind each layer into its matrix; see `Memory.write`."""
        assert segment.tail is not None  # as it `needs` them
        cells, parts = segment.tail.unbind(dim=2), zip(state.matrix.unbind(1), state.total.unbind(1), strict=True)
        with torch.autocast(segment.tail.device.type, enabled=False):
            each = [b.written(c, *held) for b, c, held in zip(self.blocks, cells, parts, strict=True)]  # type: ignore[operator]
        matrix, total, new = (torch.stack(part, dim=1) for part in zip(*each, strict=True))
        written = segment.complete[:, 0] & segment.valid.any(dim=1)
        return where_rows(written, AssociativeState(matrix, total), state), {"new_keys": new.mean(dim=(1, 2))}

    def flops_per_token(self) -> int:
        """A read before each layer; the way of the cells through the layers, with a feed-forward four times as wide."""
        m, d_model = self.cell.shape
        block: nn.Module = self.blocks[0]
        d_mem = self.d_key // 6
        read = 2 * d_model * d_mem + 2 * self.d_key * (d_model + 1)
        write = 2 * sum(p.numel() for p in block.parameters()) - 2 * d_model * d_mem + 4 * self.d_key * d_model
        layer = 24 * d_model**2 + 4 * d_model * (self.sizes.segment_len + self.sizes.overlap + m)
        return self.sizes.n_layer * (read + m * (read + write + layer) // self.sizes.segment_len)
