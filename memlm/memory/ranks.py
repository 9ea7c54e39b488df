"""What the processes of one training run exchange about a memory that they share.

Shapes: B rows of this process, R processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from memlm.memory.state import State, tensors


class _RowsOfAll(torch.autograd.Function):
    """The rows of all processes; a row's gradient is the sum of what all of them found."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size())[distributed.get_rank()]


def rows_of_all(part: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in rank order, (R * B, ...). Every process has to ask, in the same order."""
    if part.dtype == torch.bool:
        return _RowsOfAll.apply(part.to(torch.uint8).contiguous()).bool()
    return _RowsOfAll.apply(part.contiguous())


def differ(state: State) -> bool:
    """Whether a state is not the same, bit for bit, in all processes. Every process has to ask."""
    parts = [_bits(part) for part in tensors(state)]
    own = torch.stack([part.to(parts[0].device) for part in parts])
    total = own.clone()
    distributed.all_reduce(total, distributed.ReduceOp.MAX)
    least = own.clone()
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return not torch.equal(total, least)


def _bits(part: Tensor) -> Tensor:
    """A number that changes with any bit of a tensor, for practical purposes."""
    flat = part.detach().contiguous().flatten().view(torch.uint8).to(torch.int64)
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    return (flat * (place * 2_654_435_761 % 2_147_483_647)).sum()
