"""Tensors, wherever they are used.

Shapes: B rows, M entries of a row, K of them that are taken.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Host(NamedTuple):
    """A tensor of a state that stays on the CPU when the state moves.

    It holds bookkeeping that the program must know without waiting for an accelerator.

    Attributes:
        tensor: The tensor, with rows in front.
    """

    tensor: Tensor


def take(part: Tensor, index: Tensor) -> Tensor:
    """``part`` (B, M, ...) at ``index`` (B, K): (B, K, ...)."""
    return part.gather(1, index.view(*index.shape, *[1] * (part.dim() - 2)).expand(*index.shape, *part.shape[2:]))
