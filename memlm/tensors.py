"""Tensors, wherever they are used.

Shapes: B rows, M entries of a row, K of them that are taken; L queries, D width of all heads together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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


def attend(
    query: Tensor, key: Tensor, value: Tensor, n_head: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in 32 bits or more, whatever autocast says.

    Args:
        query: (B, L, D), all heads side by side.
        key: (B, M, D).
        value: (B, M, D).
        n_head: Heads.
        mask: Which entries may be seen, (B, M), at least one of each row; None for all.

    Returns:
        What is found, (B, L, D), and with which weight, the mean over heads, (B, L, M).
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (
            part.to(torch.promote_types(part.dtype, torch.float32)).unflatten(2, (n_head, -1)).transpose(1, 2)
            for part in (query, key, value)
        )
        score = q @ k.mT / q.shape[3] ** 0.5  # (B, H, L, M)
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None], -torch.inf)
        weight = score.softmax(dim=3)
        return (weight @ v).transpose(1, 2).flatten(2), weight.mean(dim=1)
