"""Infini-attention: each head has a matrix of all earlier segments, mixed with what its attention finds.

Source: T. Munkhdalai, M. Faruqui, S. Gopal, "Leave no context behind: Efficient infinite context transformers with
Infini-attention" (2024, 2404.07143). Queries, keys and values are those of the layer, before positions are encoded, as
there. Other than there:

- Attention also sees the overlap, so its tokens are seen by both.
- Gates begin at a setting; the paper does not say where.
- Reads off leaves attention alone, without its gate.

With ``rule: linear`` a read is linear attention, with its denominator, to all tokens of earlier segments. The paper has
a matrix in every layer: ``model.memory_layers=all``.

Shapes: B rows, T tokens of a segment, D model width, H heads, E width of a head.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Memory, Mixer, Needs, Read, Segment, Sizes, Trace, at_once
from memlm.memory.state import where_rows


class InfiniState(NamedTuple):
    """What each head knows of all earlier segments.

    Attributes:
        matrix: Maps a key to a value, (B, H, E, E).
        total: Sum of the keys, (B, H, E).
    """

    matrix: Tensor
    total: Tensor

    def under(self, key: Tensor) -> Tensor:
        """What the matrix holds under positive keys or queries (B, H, L, E), a mean of values; 0 if nothing."""
        weight = key @ self.total[..., None]  # (B, H, L, 1)
        return key @ self.matrix / weight.clamp(min=1e-6)


class InfiniMemory(Memory):
    """A matrix per head, and a gate per head that mixes what it holds with what attention finds.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        rule: ``linear``, values are added under their keys; ``delta``, less what was known under them.
        gate: Share of memory in each head at first, in (0, 1).

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    needs = Needs(heads=True)
    scan = at_once

    def __init__(
        self, d_model: int, sizes: Sizes, rule: Literal["linear", "delta"] = "linear", gate: float = 0.5
    ) -> None:
        super().__init__()
        if rule not in ("linear", "delta"):
            raise ValueError(f"rule must be 'linear' or 'delta', got {rule!r}")
        if not 0 < gate < 1:
            raise ValueError(f"gate must be in (0, 1), got {gate}")
        self.rule, self.n_head, self.width = rule, sizes.n_head, d_model // sizes.n_head
        self.gate = nn.Parameter(torch.full((sizes.n_head,), math.log(gate / (1 - gate))))

    def init_state(self, n_row: int) -> InfiniState:
        """Nothing."""
        matrix = self.gate.new_zeros(n_row, self.n_head, self.width, self.width)
        return InfiniState(matrix, matrix[..., 0])

    def mix(self, x: Tensor, prepared: InfiniState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """Each head takes a share of what its matrix holds; see `Memory.mix`."""
        heads, gate = mixer.heads(x), self.gate.sigmoid()[:, None, None]
        with torch.autocast(x.device.type, enabled=False):
            known = prepared.under(positive(heads.q))
        return mixer.out(gate * known + (1 - gate) * mixer.attend(heads), x), None

    def write(self, segment: Segment, state: InfiniState) -> tuple[InfiniState, Trace]:
        """Add the segment's keys and values, and tell the gates; see `Memory.write`."""
        assert segment.heads is not None  # as they are among the `needs`
        with torch.autocast(segment.hidden.device.type, enabled=False):
            key, value = positive(segment.heads.k) * segment.valid[:, None, :, None], segment.heads.v
            if self.rule == "delta":
                value = value - state.under(key)
            after = InfiniState(state.matrix + key.mT @ value, state.total + key.sum(dim=2))
        trace = {f"gate_{head}": gate for head, gate in enumerate(self.gate.detach().sigmoid())}
        return where_rows(segment.complete[:, 0], after, state), trace

    def flops_per_token(self) -> int:
        """A read and a write of each matrix, a read under the key for the delta rule; keys and values, made again."""
        d_model = self.n_head * self.width
        n_product = 3 if self.rule == "delta" else 2
        return 6 * d_model**2 + n_product * 2 * d_model * (self.width + 1)


def positive(x: Tensor) -> Tensor:
    """Queries or keys as they are compared: above 0."""
    return F.elu(x) + 1
