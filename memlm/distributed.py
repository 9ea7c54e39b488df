"""What the processes of one training run exchange about a memory that they share.

Every function is collective: all processes call it, in the same order.

Shapes: B rows of this process, R processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed


def _gather(part: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, (R * B, ...)."""
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part)
    return torch.cat(parts)


def _exchange(part: Tensor) -> Tensor:
    """Chunk r of (R * B, ...) goes to process r; what came from process r is chunk r."""
    part = part.contiguous()
    received = torch.empty_like(part)
    distributed.all_to_all_single(received, part)
    return received


def _sum(part: Tensor) -> Tensor:
    """Own rows (B, ...) of the sum of what all processes have for all rows, (R * B, ...), in rank order."""
    return _exchange(part).unflatten(0, (distributed.get_world_size(), -1)).sum(dim=0)


class _RowsOfAll(torch.autograd.Function):
    """`_gather`; a row's gradient is the sum of what all processes found."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _gather(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _sum(grad)


class _SumOfAll(torch.autograd.Function):
    """`_sum`; its gradient is that of all rows, for all processes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _sum(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _gather(grad.contiguous())


class _Exchange(torch.autograd.Function):
    """`_exchange`; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _exchange(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _exchange(grad)


def rows_of_all(part: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in rank order, (R * B, ...)."""
    if part.dtype == torch.bool:
        return _RowsOfAll.apply(part.to(torch.uint8).contiguous()).bool()
    return _RowsOfAll.apply(part.contiguous())


def sum_of_all(part: Tensor) -> Tensor:
    """Own rows (B, ...) of the sum over processes of ``part`` (R * B, ...), in rank order."""
    return _SumOfAll.apply(part)


def exchange(part: Tensor) -> Tensor:
    """For own rows what each process found, (R * B, ...), of what this one found for the rows of each, (R * B, ...).

    Applied twice it is nothing.
    """
    return _Exchange.apply(part)


def whole(shard: Tensor, n_slot: int, device: torch.device | str, keep: bool = True) -> Tensor | None:
    """All slots of a field (1, n_slot, ...) of which rank r of R holds slots r, r + R, r + 2 R, ...

    Shards come one by one, so that no more than two are on the device of ``shard``.

    Args:
        shard: What this process holds.
        n_slot: Slots in all.
        device: Where the whole is put together.
        keep: Whether this process wants it.

    Returns:
        The field in the order of slots; None where it is not kept.
    """
    n_rank = distributed.get_world_size()
    found = torch.empty(1, n_slot, *shard.shape[2:], dtype=shard.dtype, device=device) if keep else None
    for rank in range(n_rank):
        own = rank == distributed.get_rank()
        shape = (1, len(range(rank, n_slot, n_rank)), *shard.shape[2:])
        part = shard.contiguous() if own else torch.empty(shape, dtype=shard.dtype, device=shard.device)
        distributed.broadcast(part, rank)
        if found is not None:
            found[:, rank::n_rank] = part.to(device)
    return found


def differ(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is not the same, bit for bit, in all processes."""
    parts = [_bits(part) for part in tensors]
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
