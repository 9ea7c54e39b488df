"""One bank that the rows of several processes write, whole in each of them or sharded over them.

Sharded over R ranks, rank r holds slots r, r + R, r + 2 R, ... so that shards fill evenly. States are then shards too,
with slots in that order. Methods that exchange something are collective: all ranks call them.

Shapes: B rows, n slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlm import distributed
from memlm.memory.slots import Slots
from memlm.memory.state import named_tensors


class SharedBank(Slots):
    """A memory of slots whose bank, if its scope is ``shared``, several processes write.

    Attributes:
        n_slot: Slots of the bank.
        over_ranks: Whether the rows of all processes write the bank in the same step; set while training. A write then
            takes what it needs of each row through `rows_of_all`.
        shard: Whether training in several processes shards the bank over them.
        rank: Rank and number of the processes over which the bank is sharded now; (0, 1) if it is whole.
    """

    technical = frozenset({"shard"})
    n_slot: int
    over_ranks: bool = False
    shard: bool = False
    rank: tuple[int, int] = (0, 1)

    def rows_of_all(self, part: Tensor) -> Tensor:
        """``part`` (B, ...) of the rows that write one bank together: with ``over_ranks`` those of all processes."""
        return distributed.rows_of_all(part) if self.over_ranks else part

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a shard of the bank; then states are shards too, numbered within it."""
        return self.rank[1] > 1

    def shard_bank(self, rank: int, n_rank: int) -> None:
        """Keep the shard of one process of the persistent bank alone."""
        for name, part in self.by_slot().items():
            setattr(self.bank, name, part[:, rank::n_rank].clone())
        self.rank = (rank, n_rank)

    def gather_bank(self, device: torch.device | str) -> None:
        """Hold the whole bank again, its slots on ``device``."""
        for name, part in self.by_slot().items():
            setattr(self.bank, name, distributed.whole(part, self.n_slot, device))
        self.rank = (0, 1)

    def whole_bank(self, keep: bool) -> dict[str, Tensor | None]:
        """All slots of a sharded bank, by name of the buffer, on the CPU; the bank stays sharded.

        Ranks that do not ``keep`` it get None for each.
        """
        return {name: distributed.whole(part, self.n_slot, "cpu", keep) for name, part in self.by_slot().items()}

    def by_slot(self) -> dict[str, Tensor]:
        """The buffers of the persistent bank that have a slot in each column, by name: those that are sharded."""
        state = self.init_state(1)
        shape = self.filled(state).shape
        names = [name for name, part in named_tensors(state).items() if part.shape[:2] == shape]
        return {name: self.bank.get_buffer(name) for name in names}
