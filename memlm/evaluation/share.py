"""The part of an experiment that falls to one of several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """The items of an experiment that fall to one of several processes, which all run it at the same time.

    Attributes:
        rank: Number of this process.
        n_rank: Number of processes.
    """

    rank: int = 0
    n_rank: int = 1

    @classmethod
    def here(cls) -> Share:
        """That of this process."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def groups(self, n_item: int, size: int) -> list[range]:
        """Numbers of the items that are its own, at most ``size`` of them at a time."""
        begin, end = (n_item * rank // self.n_rank for rank in (self.rank, self.rank + 1))
        return [range(first, min(first + size, end)) for first in range(begin, end, size)]

    def join(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes, in their order. Every process has to ask."""
        if self.n_rank == 1:
            return rows
        from torch import distributed

        parts: list[Any] = [None] * self.n_rank
        distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]


ALONE = Share()
