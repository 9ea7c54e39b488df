"""Slots that are alike: which slot joins which, for a memory that merges them.

Up to 16,384 slots all pairs are compared. Of more slots each is compared with the 255 or more of its blocks: balanced
cuts by random directions, which near-duplicates seldom part. Other turns cut in other directions, so that over some
turns nearly all are found. Of more than 65,536 slots one turn looks at a part, again slots on the same side of some
cuts; as many turns in a row as there are parts see every slot.

Source: S. Dasgupta and Y. Freund, "Random projection trees and low dimensional manifolds" (STOC 2008).

Shapes: B rows, n slots of a row, P of them that a turn looks at, J slots that join another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.tensors import take

_EXACT = 16_384  # slots up to which all pairs are compared
_PART = 65_536  # most slots that one turn looks at
_BLOCK = 256  # least slots of a block, within which many slots are compared
_TREES = 2  # ways to cut many slots into blocks, in one turn
_CELLS = 2**22  # similarities held at a time


def joins(
    key: Tensor, value: Tensor, priority: Tensor, used: Tensor, threshold: float, turn: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots join a similar one: their most important, unless that one joins another itself.

    Args:
        key: Unit keys, (B, n, d_key), n at least 1.
        value: Values of any length, (B, n, d_value).
        priority: How important each slot is, (B, n); of equals the first one is.
        used: Slots that hold something, (B, n); others neither join nor are joined.
        threshold: Largest cosine distance (1 - cosine) of both keys and values, in 0..2.
        turn: Number of the call, from 0; the result depends on it and the tensors alone.

    Returns:
        Of each slot that joins another, in order: its row, its place, and the place of the slot it joins, each (J,).
    """
    cuts = _Cuts(key, turn)
    index = cuts.part()  # (B, P)
    priority, used = priority.gather(1, index), used.gather(1, index)
    rank = priority.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the most important
    wide = cuts.projection.dtype
    rounded = key.dtype != wide  # a unit key whose numbers were rounded is none
    key, value = (take(part, index).to(wide) for part in (key, value))
    key, value = F.normalize(key, dim=-1) if rounded else key, F.normalize(value, dim=-1)
    itself = torch.arange(index.shape[1], device=index.device).expand_as(index)
    best = rank.masked_fill(~used, 0)  # rank of the slot that each would join: its own for none
    for places in cuts.blocks(index):  # (B, n_block, size)
        best = torch.minimum(best, _best_similar(key, value, rank, used, places, threshold))
    target = itself.scatter(1, rank, itself).gather(1, best)
    target = torch.where(used, target, itself)
    joining = (target != itself) & (target.gather(1, target) == target)
    row, place = joining.nonzero(as_tuple=True)
    return row, index[row, place], index[row, target[row, place]]


def n_turn(n: int) -> int:
    """Turns in a row that look at every one of ``n`` slots, beginning with a multiple of them."""
    return 2 ** _n_halving(n)


def _n_halving(n: int) -> int:
    """How often ``n`` slots are halved to a part that one turn looks at."""
    return max(math.ceil(math.log2(n / _PART)), 0)


class _Cuts:
    """How rows are cut into parts and blocks of slots that are alike.

    Args:
        key: Unit keys, (B, n, d_key).
        turn: Number of the call.
    """

    def __init__(self, key: Tensor, turn: int) -> None:
        n = key.shape[1]
        self.n_halving = _n_halving(n)
        self.round, self.number = divmod(turn, 2**self.n_halving)
        n_part = -(-n // 2**self.n_halving)
        self.n_level = 0 if n <= _EXACT else int(math.log2(n_part / _BLOCK))
        generator = torch.Generator().manual_seed(self.round)  # on the CPU: the same directions on every device
        n_direction = self.n_halving + _TREES * self.n_level
        wide = torch.promote_types(key.dtype, torch.float32)
        direction = torch.randn(key.shape[2], n_direction, generator=generator).to(key.device, wide)
        parts = [key] if key.dtype == wide else key.split(_PART, dim=1)
        projected = torch.cat([part.to(wide) @ direction for part in parts], dim=1)
        self.projection = projected.movedim(2, 0)  # (n_direction, B, n)

    def part(self) -> Tensor:
        """Slots that this turn looks at, in order, (B, P)."""
        _, n_row, n = self.projection.shape
        index = torch.arange(n, device=self.projection.device).expand(n_row, -1)
        for level in range(self.n_halving):
            index = index.gather(1, self.projection[level].gather(1, index).argsort(dim=1, stable=True))
            half = index.shape[1] // 2
            index = (index[:, half:] if self.number >> level & 1 else index[:, :half]).sort(dim=1).values
        return index

    def blocks(self, index: Tensor) -> Iterator[Tensor]:
        """Places in ``index`` (B, P) of the slots of each block, (B, n_block, size); -1 fills up. Once per tree."""
        n_row, n = index.shape
        place = torch.arange(n, device=index.device).expand(n_row, -1)
        if self.n_level == 0:
            yield place[:, None]
            return
        size = -(-n // 2**self.n_level)
        place = F.pad(place, (0, size * 2**self.n_level - n), value=-1)
        for tree in range(_TREES):
            cut = place
            for level in range(self.n_level):
                projection = self.projection[self.n_halving + tree * self.n_level + level].gather(1, index)
                height = F.pad(projection, (0, 1), value=torch.inf).gather(1, cut.remainder(n + 1))
                order = height.unflatten(1, (2**level, -1)).argsort(dim=2, stable=True)
                cut = cut.unflatten(1, (2**level, -1)).gather(2, order).flatten(1)
            yield cut.unflatten(1, (2**self.n_level, size))


def _best_similar(key: Tensor, value: Tensor, rank: Tensor, used: Tensor, places: Tensor, threshold: float) -> Tensor:
    """Rank of the most important slot that is similar to each and more important; its own if there is none, (B, P).

    Args:
        key: Unit keys, (B, P, d_key).
        value: Unit values, (B, P, d_value).
        rank: Rank by importance, (B, P).
        used: Slots that hold something, (B, P).
        places: Blocks of slots that are compared, (B, n_block, size); -1 for none.
        threshold: Largest cosine distance.
    """
    n_row, n_block, size = places.shape
    best = rank.clone()
    n_together = max(_CELLS // (n_row * size * size), 1)  # blocks at a time
    n_line = max(min(_CELLS // (n_row * size), size), 1)  # slots of a block at a time
    for first in range(0, n_block, n_together):
        block = places[:, first : first + n_together]  # (B, b, size)
        flat = block.flatten(1).clamp(min=0)
        there = (block >= 0) & used.gather(1, flat).view_as(block)
        ranks = rank.gather(1, flat).view_as(block)
        keys, values = (take(part, flat).unflatten(1, block.shape[1:]) for part in (key, value))
        for line in range(0, size, n_line):
            rows = slice(line, line + n_line)
            close = keys[:, :, rows] @ keys.transpose(2, 3) >= 1 - threshold
            close &= values[:, :, rows] @ values.transpose(2, 3) >= 1 - threshold
            close &= there[:, :, rows, None] & there[:, :, None] & (ranks[:, :, None] < ranks[:, :, rows, None])
            found = ranks[:, :, None].expand_as(close).masked_fill(~close, rank.shape[1]).amin(dim=3)
            found = torch.minimum(found, ranks[:, :, rows])
            best.scatter_reduce_(1, flat.view_as(block)[:, :, rows].flatten(1), found.flatten(1), "amin")
    return best
