"""Tensors, wherever they are used.

Shapes: B rows, M entries of a row, K of them that are taken; L queries, D width of all heads together.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
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


_GROUP = 64  # numbers whose least is ranked before they are
_MAPPED = 2**20  # bytes from which zeros are mapped

# Tells how many tensors and others share a storage. Torch counts for its own use; without it all count as shared.
_users_of: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def _n_user(tensor: Tensor) -> int:
    return 0 if _users_of is None else _users_of(tensor.untyped_storage()._cdata)


_ALONE = _n_user(torch.empty(1))


def is_alone(tensor: Tensor) -> bool:
    """Whether a tensor may be changed in place: no other shares its numbers, and no gradient goes through it."""
    if tensor.requires_grad or not tensor.is_contiguous() or _ALONE == 0:
        return False
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return _n_user(tensor) == _ALONE


def copied(tensor: Tensor) -> Tensor:
    """A copy without gradients, to be changed in place. What is zero everywhere takes no memory before it is."""
    n_byte = tensor.numel() * tensor.element_size()
    if n_byte >= _MAPPED and not any(tensor.stride()) and tensor.is_cpu and not bool(tensor.flatten()[0]):
        zeros = mmap.mmap(-1, n_byte, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(zeros, dtype=tensor.dtype).resize_(tensor.shape)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def owned(tensor: Tensor, given: bool) -> Tensor:
    """``tensor``, to be changed in place: itself if it was ``given`` away and is alone, else a copy."""
    return tensor if given and is_alone(tensor) else copied(tensor)


def least(number: Tensor, n: int) -> Tensor:
    """Indices (B, n) of the ``n`` least of ``number`` (B, M), in 32 bits, least first; of equal ones the first.

    The least ``n`` lie in the ``n`` groups with the least minima, so that few are ranked.
    """
    n_group = number.shape[1] // _GROUP
    place = torch.arange(number.shape[1], device=number.device)
    if n_group < 4 * n:
        return _ranked(number, place).topk(n, dim=1, largest=False).indices
    minima = number[:, : n_group * _GROUP].unflatten(1, (n_group, _GROUP)).amin(dim=2)
    chosen = _ranked(minima, place[:n_group]).topk(n, dim=1, largest=False).indices  # (B, n)
    index = (chosen[..., None] * _GROUP + place[:_GROUP]).flatten(1)
    index = torch.cat([index, place[n_group * _GROUP :].expand(len(number), -1)], dim=1)
    return index.gather(1, _ranked(number.gather(1, index), index).topk(n, dim=1, largest=False).indices)


def _ranked(number: Tensor, place: Tensor) -> Tensor:
    """Whole numbers, all different, in the order of ``number`` (B, M), of equal ones in that of ``place``."""
    bits = number.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32 + place


def take(part: Tensor, index: Tensor) -> Tensor:
    """``part`` (B, M, ...) at ``index`` (B, K): (B, K, ...)."""
    if part.dim() > 2 and part.is_contiguous() and not part.requires_grad:  # whole rows at a time
        row = part.shape[1] * torch.arange(len(part), device=index.device)[:, None]
        return part.flatten(0, 1).index_select(0, (index + row).flatten()).unflatten(0, index.shape)
    return part.gather(1, index.view(*index.shape, *[1] * (part.dim() - 2)).expand(*index.shape, *part.shape[2:]))


def rows_of(table: Tensor) -> tuple[Tensor, int]:
    """``table`` (B, M, d) as rows one after the other, (n, d), and how many lie from one of the B to the next.

    Without a copy where it can be: also of the first M of more, and of one for all B (then 0 lie between).
    """
    n_row, n_slot, width = table.shape
    apart, *inside = table.stride()
    if apart == 0 or n_row == 1:
        return table[0], 0
    if inside == [width, 1] and apart % width == 0:
        n_between = apart // width
        return table.as_strided(((n_row - 1) * n_between + n_slot, width), (width, 1)), n_between
    return table.reshape(n_row * n_slot, width), n_slot


def widened(table: Tensor, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """A ``table`` (n, d) in the type of ``like``, and an ``index`` into the table, of any shape, into what is given.

    Of a table of another type only the rows that are asked for are copied, or all if these are fewer.
    """
    if table.dtype == like.dtype:
        return table, index
    if index.numel() >= len(table):
        return table.to(like.dtype), index
    rows = table.index_select(0, index.flatten()).to(like.dtype)
    return rows, torch.arange(len(rows), device=index.device).view(index.shape)


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
