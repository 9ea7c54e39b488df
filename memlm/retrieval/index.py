"""How a read finds its slots: all are scored, or those in lists near the query.

What a write has to note of it is hidden here, so that a memory writes slots in the same way whatever index finds them.

Shapes: B rows of slots, N queries of a row, M slots, K slots written at a time, P slots of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from memlm.retrieval.exact import Search
from memlm.retrieval.inverted import InvertedFile
from memlm.retrieval.lists import Lists, assigned
from memlm.tensors import Host, owned

Kind = Literal["exact", "inverted"]


class Follower:
    """Notes the slots that the segments of a window write, one segment after the other. This one has nothing to note.

    Attributes:
        lists: After what was noted so far; None if all slots are scored.
    """

    lists: Lists | None = None

    def reset(self, rows: Tensor) -> None:
        """Banks of ``rows`` (B,) are empty from now on."""

    def put(self, slot: Tensor, key: Tensor, accept: Tensor) -> Tensor:
        """Slots (B, K) have new keys (B, K, d_key) where accepted: the list of each, (B, K), -1 for none."""
        return torch.full_like(slot, -1)


class Index:
    """All slots are scored: there is nothing to note.

    Attributes:
        n_scored: Keys that a query is compared with in a full row.
    """

    def __init__(self, n_slot: int) -> None:
        self.n_scored = n_slot

    def empty(self, n_row: int, device: torch.device) -> Lists | None:
        """The lists of ``n_row`` empty rows."""
        return None

    def assign(self, lists: Lists | None, key: Tensor, used: Tensor, rows: Tensor) -> Lists | None:
        """``lists`` with the ``used`` (B, M) slots of ``rows`` (B,), on the CPU, assigned anew by ``key``."""
        return None

    def assign_again(self, lists: Lists | None, key: Tensor, used: Tensor, rows: Tensor) -> Lists | None:
        """`assign` of those of ``rows`` whose slots are assigned already."""
        return None

    def own(self, lists: Lists | None, given: bool) -> Lists | None:
        """``lists``, to be changed in place: a copy, or themselves if they were ``given`` away."""
        return None

    def start(self, lists: Lists | None, fresh: Lists | None, rows: Tensor) -> Lists | None:
        """``lists`` that are given away, as ``fresh`` in ``rows`` (B,)."""
        return None

    def written(
        self,
        lists: Lists | None,
        slot: Tensor,
        new: Tensor,
        accept: Tensor,
        key: Tensor,
        used: Callable[[], Tensor],
        given: bool,
    ) -> Lists | None:
        """The lists after slots were written.

        Args:
            lists: Those before, changed in place if they are ``given`` away.
            slot: Slots that were written, (B, K).
            new: Their keys, (B, K, d_key).
            accept: Which of them were, (B, K).
            key: Keys of all slots after it, (B, M, d_key).
            used: Tells which slots hold something after it, (B, M).
            given: Whether nobody else needs ``lists``.
        """
        return None

    def is_due(self, lists: Lists | None, n_written: int) -> bool:
        """Whether all slots of a row may be assigned anew before ``n_written`` more are written."""
        return False

    def follow(self, lists: Lists | None) -> Follower:
        """What notes the writes of a window."""
        return Follower()

    def settle(
        self,
        follower: Follower,
        before: Lists | None,
        n_written: int,
        key: Tensor,
        used: Callable[[], Tensor],
        given: bool,
    ) -> Lists | None:
        """The lists after a window of at most ``n_written`` writes, which ``follower`` noted; else as `written`."""
        return None

    def check(self, lists: Lists | None, key: Tensor, used: Tensor) -> None:
        """Refuse lists that are not those of the ``used`` slots (B, M) with these keys.

        Raises:
            ValueError: If there is a difference; the message names the field.
        """

    def find(self, lists: Lists | None) -> Search | None:
        """How the best slots of a bank are found; None if all are scored."""
        return None

    def reach(self, lists: Lists | None, query: Tensor, list_of: Tensor) -> Tensor | None:
        """Whether a query would search the list ``list_of`` (B, P) that a slot of the window went to, (B, N, P).

        None if all are scored.
        """
        return None


class _ListFollower(Follower):
    def __init__(self, file: InvertedFile, lists: Lists) -> None:
        self.file, self.lists = file, file.own(lists, keys=False)
        self.cells: list[Tensor] = []  # whose keys change

    def reset(self, rows: Tensor) -> None:
        assert self.lists is not None
        self.file.start(self.lists, rows, keys=False)

    def put(self, slot: Tensor, key: Tensor, accept: Tensor) -> Tensor:
        assert self.lists is not None
        cells = self.file.replace(self.lists, slot, key, accept)
        if cells is not None:
            self.cells.append(cells)
        return self.file.list_of(self.lists, slot).masked_fill(~accept, -1)


class InvertedIndex(Index):
    """Slots in the lists near a query are scored. Arguments are those of `memlm.retrieval.inverted.InvertedFile`."""

    def __init__(self, n_slot: int, d_key: int, n_list: int | None, n_probe: int | None, dtype: torch.dtype) -> None:
        self.file = InvertedFile(n_slot, d_key, n_list, n_probe, dtype)
        super().__init__(self.file.n_scored)

    def empty(self, n_row: int, device: torch.device) -> Lists | None:
        """See `Index.empty`."""
        return self.file.empty(n_row, device)

    def assign(self, lists: Lists | None, key: Tensor, used: Tensor, rows: Tensor) -> Lists | None:
        """See `Index.assign`."""
        return lists and self.file.rebuild(lists, key, used, rows)

    def assign_again(self, lists: Lists | None, key: Tensor, used: Tensor, rows: Tensor) -> Lists | None:
        """See `Index.assign_again`."""
        return lists and self.file.rebuild(lists, key, used, rows & (lists.known_n_list.tensor > 0))

    def own(self, lists: Lists | None, given: bool) -> Lists | None:
        """See `Index.own`."""
        return lists and self.file.own(lists, given)

    def start(self, lists: Lists | None, fresh: Lists | None, rows: Tensor) -> Lists | None:
        """See `Index.start`."""
        if lists is None or fresh is None:
            return None

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(rows.to(old.device).view(-1, *[1] * (old.dim() - 1)), new, old)

        if not assigned(fresh):
            lists = self.file.own(lists, given=True)
            self.file.start(lists, rows)
            fresh = lists._replace(known_n_list=fresh.known_n_list, known_left=fresh.known_left)
        pairs: Any = zip(fresh, lists, strict=True)
        parts: Any = (
            new if new is old else Host(choose(new.tensor, old.tensor)) if isinstance(new, Host) else choose(new, old)
            for new, old in pairs
        )
        return Lists(*parts)

    def written(
        self,
        lists: Lists | None,
        slot: Tensor,
        new: Tensor,
        accept: Tensor,
        key: Tensor,
        used: Callable[[], Tensor],
        given: bool,
    ) -> Lists | None:
        """See `Index.written`."""
        if lists is None:
            return None
        lists = self.file.own(lists, given)
        self.file.fill(lists, self.file.replace(lists, slot, new, accept), key)
        return self.file.settle(lists, slot.shape[1], key, used)

    def is_due(self, lists: Lists | None, n_written: int) -> bool:
        """See `Index.is_due`."""
        return lists is not None and self.file.is_due(lists, n_written)

    def follow(self, lists: Lists | None) -> Follower:
        """See `Index.follow`."""
        return Follower() if lists is None else _ListFollower(self.file, lists)

    def settle(
        self,
        follower: Follower,
        before: Lists | None,
        n_written: int,
        key: Tensor,
        used: Callable[[], Tensor],
        given: bool,
    ) -> Lists | None:
        """See `Index.settle`."""
        if follower.lists is None or before is None:
            return None
        assert isinstance(follower, _ListFollower)
        lists = follower.lists._replace(
            known_n_list=before.known_n_list, known_left=before.known_left, centroid=before.centroid
        )
        if follower.cells:
            lists = lists._replace(key=owned(before.key, given))
            self.file.fill(lists, torch.cat(follower.cells, dim=1), key)
        return self.file.settle(lists, n_written, key, used)

    def check(self, lists: Lists | None, key: Tensor, used: Tensor) -> None:
        """See `Index.check`."""
        if lists is not None:
            self.file.check(lists, key, used)

    def find(self, lists: Lists | None) -> Search | None:
        """See `Index.find`."""
        return None if lists is None or not assigned(lists) else partial(self.file.search, lists)

    def reach(self, lists: Lists | None, query: Tensor, list_of: Tensor) -> Tensor | None:
        """See `Index.reach`."""
        return None if lists is None or not assigned(lists) else self.file.reach(lists, query, list_of)


def make_index(
    kind: Kind, n_slot: int, d_key: int, n_list: int | None, n_probe: int | None, dtype: torch.dtype = torch.float32
) -> Index:
    """The index of a bank of ``n_slot`` slots whose keys are of type ``dtype``.

    Raises:
        ValueError: If lists of such numbers cannot be; the message names the setting.
    """
    inverted = InvertedIndex(n_slot, d_key, n_list, n_probe, dtype)
    return inverted if kind == "inverted" else Index(n_slot)
