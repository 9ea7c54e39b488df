"""Which list of an inverted file each slot is in.

Shapes: B rows, M slots, L lists, C cells of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from memlm.tensors import Host


class Lists(NamedTuple):
    """Which list each slot is in. A row whose slots were not assigned yet has no list.

    Attributes:
        centroid: Unit centres of the lists, (B, L, d_key); zero for those not in use.
        slot: Slot in each cell, list after list, (B, L * C + 1), int32; -1 for none. The last cell stays empty.
        key: Its key, (B, L * C + 1, d_key); zero for none.
        place: Cell of each slot, (B, M), int32; -1 if it is in no list.
        n_held: Slots in each list, (B, L).
        extent: Cells of each list, from the first, beyond which all are empty, (B, L).
        n_list: Lists in use, (B,).
        left: Slots that may be written before all are assigned for the first time, or lists are mended, (B,).
        known_n_list: ``n_list`` on the CPU.
        known_left: A lower bound on ``left``, on the CPU.
    """

    centroid: Tensor
    slot: Tensor
    key: Tensor
    place: Tensor
    n_held: Tensor
    extent: Tensor
    n_list: Tensor
    left: Tensor
    known_n_list: Host
    known_left: Host


def assigned(lists: Lists) -> bool:
    """Whether the slots of any row are assigned to lists."""
    return bool((lists.known_n_list.tensor > 0).any())


def fields_written(lists: Lists, keys: bool) -> tuple[str, ...]:
    """Names of what may be another after a write; ``keys`` as `InvertedFile.own` is told."""
    if not assigned(lists):
        return ("left",)
    return tuple(name for name in Lists._fields[:8] if keys or name not in ("key", "centroid"))


def rows_of(lists: Lists, rows: int | slice) -> Lists:
    """Views of some rows."""
    return each(lists, lambda part: part[rows])


def each(lists: Lists, function: Callable[[Tensor], Tensor]) -> Lists:
    """``function`` of every tensor."""
    found: Any = (Host(function(part.tensor)) if isinstance(part, Host) else function(part) for part in lists)
    return Lists(*found)
