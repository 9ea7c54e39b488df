"""Inverted file: top-k search over the slots whose lists are nearest to a query.

Each slot is assigned to the list whose centroid is nearest to its key and has room; a query scores all
centroids and searches the lists of the nearest ones exactly, so that the work grows with the square root of the slots.
Lists change with each slot that is written. While slots are few every slot is searched; then all are assigned to lists,
and from then on lists are mended each time that an eighth of the slots were written: as slots get more the largest
lists are parted in two, and one that is crowded is parted while one that holds little is given up. So no write has to
assign all slots. What decides is the number of slots written, never how the text was cut into calls.

Source: the inverted file with coarse centroids of Sivic and Zisserman (Video Google, 2003) and of Jegou et al. (Product
quantization for nearest neighbor search, 2011). Lists that are parted as they grow: SPFresh (Xu et al., 2023).

Shapes: B rows of slots, S segments, N = S * T queries of a row, M slots, L lists, l of them in use, C cells of a list,
p lists probed by a query, K slots written at a time, k slots read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memlm.retrieval import exact, list_search
from memlm.retrieval.clusters import CHUNK, centroids, halves
from memlm.retrieval.exact import Pool
from memlm.retrieval.list_search import GROUP
from memlm.retrieval.lists import Lists, assigned, each, fields_written, rows_of
from memlm.tensors import Host, copied, owned, take

_FIRST = 2**14  # slots that are searched one and all before they are assigned for the first time, at most
_ROOM = 2  # cells for each slot
_SAMPLE = 16  # keys for each list that centroids are made from
_OFTEN = 8  # lists are mended when one in so many slots was written
_CROWDED = 0.75  # of its room: what a list holds that is parted while another is given up
_NEAR = 16  # lists that what was in one is dealt out to when that is parted or given up
_AT_ONCE = 64  # lists whose keys are looked at together
_CHOICES = 3  # tries for the nearest list with room; at the last one, any list will do


class InvertedFile:
    """How slots are assigned to lists, and found.

    Args:
        n_slot: Slots of a row.
        d_key: Width of keys.
        n_list: Lists of a full row; None for four times the square root of ``n_slot``. Fewer slots have fewer.
        n_probe: Lists that a query searches; None for 48.
        dtype: Type of keys. Centroids have 32 bits.

    Attributes:
        n_cell: Room of a list.
        n_first: Slots that are written before all are assigned for the first time.
        n_scored: Keys that a query is compared with in a full row, centroids included.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        n_slot: int,
        d_key: int,
        n_list: int | None = None,
        n_probe: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, number in {"n_list": n_list, "n_probe": n_probe}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or null for a number that fits n_slot, got {number}")
        if n_list is not None and n_list > n_slot:
            raise ValueError(f"n_list must be at most n_slot ({n_slot}), got {n_list}")
        self.n_slot, self.d_key, self.dtype = n_slot, d_key, dtype
        self.n_list = math.ceil(4 * math.sqrt(n_slot)) if n_list is None else n_list
        self.n_list = min(self.n_list, n_slot)
        self.n_cell = GROUP * math.ceil(_ROOM * n_slot / self.n_list / GROUP)
        self.n_probe = 48 if n_probe is None else n_probe
        self.n_scored = self.n_list + min(self.n_probe, self.n_list) * self.n_cell
        self.n_first = max(1, min(n_slot // 2, _FIRST))

    def empty(self, n_row: int, device: torch.device) -> Lists:
        """Lists of ``n_row`` rows without slots."""

        def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.long) -> Tensor:
            # A view of one number: lists take no memory before slots are assigned.
            return torch.full((), value, dtype=dtype, device=device).expand(n_row, *shape)

        n_cell = self.n_list * self.n_cell + 1
        return Lists(
            centroid=full(self.n_list, self.d_key, dtype=torch.float32),
            slot=full(n_cell, value=-1, dtype=torch.int32),
            key=full(n_cell, self.d_key, dtype=self.dtype),
            place=full(self.n_slot, value=-1, dtype=torch.int32),
            n_held=full(self.n_list),
            extent=full(self.n_list),
            n_list=full(),
            left=full(value=self.n_first),
            known_n_list=Host(torch.zeros(n_row, dtype=torch.long)),
            known_left=Host(torch.full((n_row,), self.n_first)),
        )

    # --- writing -------------------------------------------------------------------------------------------------

    def own(self, lists: Lists, given: bool = False, keys: bool = True) -> Lists:
        """``lists`` that may be changed in place: a copy, or themselves if they were ``given`` away.

        Args:
            lists: Any.
            given: Whether nobody else needs them.
            keys: Whether keys and centroids may be changed too: not by `replace`.
        """
        changed: Any = {name: owned(getattr(lists, name), given) for name in fields_written(lists, keys)}
        return lists._replace(**changed | {"left": lists.left.clone()})  # few numbers, of which a bound is kept

    def replace(self, lists: Lists, slot: Tensor, key: Tensor, accept: Tensor) -> Tensor | None:
        """Note, in place, that slots have new keys.

        Args:
            lists: What `own` gave.
            slot: Slots that were written, (B, K), all different.
            key: Their keys, (B, K, d_key).
            accept: Which of them were, (B, K).

        Returns:
            Cells whose key is another now, to be told to `fill`, (B, n); None if there are none.
        """
        lists.left.sub_(accept.sum(dim=1))
        if not assigned(lists):
            return None
        cells = [self._remove(lists, slot, accept)]
        left = accept & (lists.n_list > 0)[:, None]
        key = key.detach()
        for choice in range(_CHOICES):
            if choice and left.is_cpu:  # few are left, if any
                some = left.any(dim=0)
                if not bool(some.any()):
                    break
                slot, key, left = slot[:, some], key[:, some], left[:, some]
            placed, cell = self._insert(lists, slot, key, left, anywhere=choice == _CHOICES - 1)
            left = left & ~placed
            cells.append(cell)
        return torch.cat(cells, dim=1)

    def fill(self, lists: Lists, cells: Tensor | None, key: Tensor) -> None:
        """Put, in place, the keys of their slots into ``cells`` (B, n); ``key`` (B, M, d_key) is of all slots."""
        if cells is not None:
            slot = lists.slot.gather(1, cells)
            mine = take(key.detach(), slot.clamp(min=0).long()) * (slot >= 0)[..., None]
            mine = mine.to(lists.key.dtype)
            cell = cells + lists.slot.shape[1] * torch.arange(len(cells), device=cells.device)[:, None]
            lists.key.view(-1, self.d_key).index_copy_(0, cell.flatten(), mine.flatten(0, 1))

    def _remove(self, lists: Lists, slot: Tensor, chosen: Tensor) -> Tensor:
        """Take ``slot`` (B, K) out of their lists where ``chosen`` (B, K); their cells, (B, K)."""
        place = lists.place.gather(1, slot).long()  # (B, K)
        chosen = chosen & (place >= 0)
        place = torch.where(chosen, place, lists.slot.shape[1] - 1)
        lists.slot.scatter_(1, place, -1)
        lists.n_held.scatter_add_(1, (place // self.n_cell).clamp(max=self.n_list - 1), -chosen.long())
        lists.place.scatter_(1, slot, lists.place.gather(1, slot).masked_fill(chosen, -1))
        return place

    def _insert(
        self,
        lists: Lists,
        slot: Tensor,
        key: Tensor,
        chosen: Tensor,
        anywhere: bool = False,
        packed: bool = False,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put each slot into the list that is nearest of those with room, as long as the room lasts.

        Args:
            lists: Changed in place.
            slot: Slots that are in no list, (B, K).
            key: Their keys, (B, K, d_key).
            chosen: Which of them, (B, K); only in rows whose slots are assigned.
            anywhere: Whether those for which the room does not last go into any list with room.
            packed: Whether the empty cells of every list are known to be the last ones.
            into: The list of each, (B, K), if it is known.

        Returns:
            Which slots are in a list now, (B, K), and their cells, (B, K), the last of all for the others.
        """
        n_list = max(1, int(lists.known_n_list.tensor.max()))
        number = torch.arange(n_list, device=key.device)
        room = torch.where(number < lists.n_list[:, None], self.n_cell - lists.n_held[:, :n_list], 0)  # (B, l)
        if into is None:
            full = torch.where(room > 0, 0.0, -torch.inf)[:, None]
            centroid = lists.centroid[:, :n_list]
            into = torch.baddbmm(full, key.to(centroid.dtype), centroid.transpose(1, 2)).argmax(dim=2)  # (B, K)
        rank = _rank(torch.where(chosen, into, n_list))
        placed = chosen & (rank < room.gather(1, into))
        if anywhere:
            homeless = chosen & ~placed
            room = room.scatter_add(1, into, -placed.long())
            order = (homeless.cumsum(dim=1) - 1).clamp(min=0)
            some = torch.searchsorted(room.cumsum(dim=1), order, right=True).clamp(max=n_list - 1)
            into, placed = torch.where(homeless, some, into), chosen
            rank = _rank(torch.where(chosen, into, n_list))
        if not packed and key.is_cpu:  # as while slots are only added
            packed = bool((lists.n_held == lists.extent).gather(1, into).all())
        if packed:
            cell = lists.n_held.gather(1, into) + rank
        else:
            cells = lists.slot[:, :-1].unflatten(1, (self.n_list, self.n_cell))  # (B, L, C)
            free = take(cells, into) < 0  # (B, K, C)
            cell = ((free.cumsum(dim=2) == rank[..., None] + 1) & free).long().argmax(dim=2)
        place = torch.where(placed, into * self.n_cell + cell, lists.slot.shape[1] - 1)
        lists.slot.scatter_(1, place, torch.where(placed, slot, -1).int())
        lists.place.scatter_(1, slot, torch.where(placed, place, lists.place.gather(1, slot).long()).int())
        lists.n_held.scatter_add_(1, into, placed.long())
        lists.extent.scatter_reduce_(1, into, torch.where(placed, cell + 1, 0), "amax")
        return placed, place

    def settle(self, lists: Lists, n_written: int, key: Tensor, used: Callable[[], Tensor]) -> Lists:
        """``lists``, assigned or mended in the rows where it is time. The device is asked only if it may be.

        Args:
            lists: What `own` gave; changed in place.
            n_written: Most slots that a row was given since ``known_left`` was worked out.
            key: Keys of all slots, (B, M, d_key).
            used: Tells which of them hold something, (B, M).
        """
        left = lists.known_left.tensor - n_written
        if bool((left > 0).all()):
            return lists._replace(known_left=Host(left))
        left = lists.left.cpu().clone()
        due, first = left <= 0, lists.known_n_list.tensor == 0
        lists = lists._replace(known_left=Host(left))
        if bool((due & first).any()):
            lists = self.rebuild(lists, key, used(), due & first)
        if bool((due & ~first).any()):
            lists = lists._replace(
                centroid=copied(lists.centroid), known_n_list=Host(lists.known_n_list.tensor.clone())
            )
            for row in (due & ~first).nonzero()[:, 0].tolist():
                self._mend(rows_of(lists, slice(row, row + 1)), key[row].detach())
        return lists

    def is_due(self, lists: Lists, n_written: int) -> bool:
        """Whether lists of a row may have to be mended, or made, before it was given ``n_written`` slots more."""
        return bool((lists.known_left.tensor <= n_written).any()) and bool((lists.left <= n_written).any())

    def rebuild(self, lists: Lists, key: Tensor, used: Tensor, rows: Tensor) -> Lists:
        """A copy of ``lists`` with the slots of ``rows`` (B,) assigned anew, which takes longer; see `settle`."""
        if not bool(rows.any()):
            return lists
        lists = each(lists, copied)
        for row in rows.nonzero()[:, 0].tolist():
            self._cluster(rows_of(lists, slice(row, row + 1)), key[row].detach(), used[row])
        return lists

    def _cluster(self, lists: Lists, key: Tensor, used: Tensor) -> None:
        """Assign, in place, all ``used`` (M,) slots of the one row of ``lists`` by their ``key`` (M, d_key)."""
        slot = used.nonzero()[:, 0]
        n_used = len(slot)
        if n_used < self.n_first:  # few again, as after forgetting: every slot is searched, as before the first time
            self.start(lists, torch.ones(1, dtype=torch.bool, device=key.device))
            lists.known_n_list.tensor.fill_(0)
            for part in (lists.left, lists.known_left.tensor):
                part.fill_(self.n_first - n_used)
            return
        n_list = self._n_list_for(n_used)
        lists.centroid.zero_()
        if n_used:
            sample = key[slot[:: max(1, n_used // (_SAMPLE * n_list))]]
            lists.centroid[0, :n_list] = centroids(sample.to(lists.centroid.dtype), n_list)
        n_cell = self.n_cell * max(n_list, int(lists.known_n_list.tensor))  # all others are empty
        for part, value in (
            (lists.slot[:, :n_cell], -1),
            (lists.key[:, :n_cell], 0),
            (lists.place, -1),
            (lists.n_held, 0),
            (lists.extent, 0),
        ):
            part.fill_(value)
        for part in (lists.n_list, lists.known_n_list.tensor):
            part.fill_(n_list)
        self._deal_out(lists, slot, key, packed=True)
        self._wait(lists, n_used)

    def _mend(self, lists: Lists, key: Tensor) -> None:
        """Part, in place, large lists of the one row of ``lists``; ``key`` (M, d_key) is of all slots.

        As many are parted as lists are wanted beside those in use, and as many more as are crowded, in place of those
        that hold least. What was in them goes to the nearest of the lists around.
        """
        held, n_list = lists.n_held[0], int(lists.known_n_list.tensor)
        n_used = int(held.sum())
        wanted = max(n_list, self._n_list_for(n_used))
        n_new = min(wanted - n_list, int((held > 1).sum()))
        n_crowded = int((held > max(_CROWDED * self.n_cell, 1)).sum())
        n_spare = max(0, min(n_crowded - n_new, (n_list - n_new) // 2, 1 + n_list // _OFTEN))
        by_size = held[:n_list].argsort(descending=True, stable=True)
        parted, spare = by_size[: n_new + n_spare], by_size[n_list - n_spare :]
        number = torch.cat([spare, torch.arange(n_list, n_list + n_new, device=spare.device)])
        for part in (lists.n_list, lists.known_n_list.tensor):
            part.fill_(n_list + n_new)
        self._wait(lists, n_used)
        if not len(parted):
            return
        cells = lists.slot[0, :-1].view(self.n_list, self.n_cell)
        keys = lists.key[0, :-1].view(self.n_list, self.n_cell, self.d_key)
        emptied = torch.cat([parted, spare])
        before, centroid = lists.centroid[0, emptied], lists.centroid[0, : n_list + n_new]
        wide = centroid.dtype
        centre = torch.cat([halves(keys[some].to(wide), cells[some] >= 0) for some in parted.split(_AT_ONCE)])
        centroid[parted], centroid[number] = centre.unbind(dim=1)
        near = (before @ centroid.T).topk(min(_NEAR, len(centroid)), dim=1).indices  # (l, n)
        best = [
            (keys[some].to(wide) @ centroid[mine].mT).argmax(dim=2)  # (l, C)
            for some, mine in zip(emptied.split(_AT_ONCE), near.split(_AT_ONCE), strict=True)
        ]
        slot, into = cells[emptied].flatten(), near.gather(1, torch.cat(best)).flatten()
        slot, into = slot[slot >= 0].long(), into[slot >= 0]
        place = self._remove(lists, slot[None], torch.ones_like(slot, dtype=torch.bool)[None])
        lists.key[0, place[0]] = 0
        lists.extent[0, emptied] = 0
        self._deal_out(lists, slot, key, into=into)

    def _n_list_for(self, n_used: int) -> int:
        """Lists that a row with so many slots should have."""
        return min(self.n_list, max(1, math.ceil(self.n_list * math.sqrt(n_used / self.n_slot))))

    def _wait(self, lists: Lists, n_used: int) -> None:
        """Note, in place, of one row with so many slots when lists are to be mended next."""
        for part in (lists.left, lists.known_left.tensor):
            part.fill_(max(n_used, self.n_first) // _OFTEN or 1)

    def _deal_out(
        self, lists: Lists, slot: Tensor, key: Tensor, packed: bool = False, into: Tensor | None = None
    ) -> None:
        """Put, in place, slots (n,) that are in no list of the one row into some; see `_insert`.

        Args:
            lists: One row.
            slot: The slots.
            key: Keys of all slots, (M, d_key).
            packed: See `_insert`.
            into: The list that each is to go to if there is room, (n,); None for the nearest with room.
        """
        for choice in range(_CHOICES):
            left = [slot[:0]]
            known = [None] * len(slot) if choice or into is None else into[None].split(CHUNK, dim=1)
            for some, mine in zip(slot.split(CHUNK), known, strict=False):
                all_ = torch.ones_like(some, dtype=torch.bool)[None]
                last = choice == _CHOICES - 1
                placed, place = self._insert(lists, some[None], key[some][None], all_, last, packed, mine)
                self.fill(lists, place, key[None])
                left.append(some[~placed[0]])
            slot = torch.cat(left)

    def start(self, lists: Lists, rows: Tensor, keys: bool = True) -> None:
        """Make, in place, the lists of ``rows`` (B,) as fresh, all but what is on the CPU.

        Args:
            lists: What `own` gave.
            rows: Which rows, on the device.
            keys: As `own` was told.
        """
        fresh = self.empty(len(rows), rows.device)
        for name in fields_written(lists, keys):
            part = getattr(lists, name)
            part.copy_(torch.where(rows.view(-1, *[1] * (part.dim() - 1)), getattr(fresh, name), part))

    def check(self, lists: Lists, key: Tensor, used: Tensor) -> None:
        """Refuse lists that do not hold just the slots that are ``used`` (B, M), each once and with its ``key``.

        Raises:
            ValueError: If there is a difference; the message names the field.
        """
        for name, (found, bound) in {
            "n_list": (lists.n_list, self.n_list),
            "left": (lists.left, max(self.n_slot, self.n_first)),
            "extent": (lists.extent, self.n_cell),
            "slot": (lists.slot + 1, self.n_slot),
        }.items():
            if bool(((found < 0) | (found > bound)).any()):
                raise ValueError(f"lists_{name} is out of range")
        host = lists.known_n_list.tensor.to(lists.n_list.device), lists.known_left.tensor.to(lists.left.device)
        if bool((host[0] != lists.n_list).any() | (host[1] < 1).any() | (host[1] > lists.left).any()):
            raise ValueError("lists_known_n_list or lists_known_left is not that of the rows")
        if not bool((lists.centroid.norm(dim=2) <= 1.01).all()):
            raise ValueError("lists_centroid is not finite, or longer than 1")
        there = lists.n_list > 0  # rows whose slots are assigned
        held = lists.slot >= 0  # (B, L * C + 1)
        cell, slot = torch.arange(held.shape[1], device=held.device), lists.slot.clamp(min=0).long()
        n_row, n_slot = used.shape
        place = torch.full((n_row, n_slot + 1), -1, device=used.device)  # one more, for cells that hold nothing
        place.scatter_(1, torch.where(held, slot, n_slot), torch.where(held, cell, -1))
        by_list = held[:, :-1].unflatten(1, (self.n_list, self.n_cell))
        last = (by_list * (cell[: self.n_cell] + 1)).amax(dim=2)  # cells of a list up to the last that holds a slot
        beyond = torch.arange(self.n_list, device=held.device) >= lists.n_list[:, None]
        mine = torch.where(held[..., None], take(key, slot), 0.0)
        for name, wrong in {
            "slot": (held.sum(dim=1) != used.sum(dim=1) * there) | held[:, -1] | (last * beyond).any(dim=1),
            "place": (place[:, :-1] != lists.place).any(dim=1)
            | ((lists.place >= 0) != (used & there[:, None])).any(dim=1),
            "key": (lists.key != mine).flatten(1).any(dim=1),
            "n_held": (by_list.sum(dim=2) != lists.n_held).any(dim=1),
            "extent": (lists.extent < last).any(dim=1),
            "centroid": (lists.centroid.any(dim=2) & beyond).any(dim=1),
        }.items():
            if bool(wrong.any()):
                raise ValueError(f"lists_{name} is not what the slots say")

    # --- reading -------------------------------------------------------------------------------------------------

    def list_of(self, lists: Lists, slot: Tensor) -> Tensor:
        """The list of each ``slot`` (B, K), (B, K); -1 if it is in none."""
        return lists.place.gather(1, slot).long().div(self.n_cell, rounding_mode="floor")

    @torch.no_grad()
    def reach(self, lists: Lists, query: Tensor, list_of: Tensor) -> Tensor:
        """Whether a query would search the list of a slot that is not assigned yet.

        Args:
            lists: Lists before the slots were written.
            query: Unit queries, (B, N, d_key).
            list_of: The list that each slot went to, (B, P); -1 if none.

        Returns:
            A mask (B, N, P).
        """
        probed = self._probed(lists, query)  # (B, N, L)
        index = list_of.clamp(min=0)[:, None].expand(-1, probed.shape[1], -1)
        return probed.gather(2, index) | (list_of < 0)[:, None]

    def _probed(self, lists: Lists, query: Tensor) -> Tensor:
        """Which lists each query searches, (B, N, L)."""
        probed = torch.zeros(*query.shape[:2], self.n_list, dtype=torch.bool, device=query.device)
        for row, n_list in enumerate(lists.known_n_list.tensor.tolist()):
            if n_list:
                near = self._nearest(lists.centroid[row, :n_list], query[row])
                probed[row].scatter_(1, near, True)
        return probed

    def _nearest(self, centroid: Tensor, query: Tensor) -> Tensor:
        """The lists (N, p) that ``query`` (N, d_key) searches, in no order, by the ``centroid`` (l, d_key) in use."""
        return (query @ centroid.T).topk(min(self.n_probe, len(centroid)), dim=1, sorted=False).indices

    def search(
        self, lists: Lists, query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool
    ) -> tuple[Tensor, Tensor]:
        """As `exact.search`, in the lists that each query probes."""
        n_row, n_query = query.shape[:2]
        if len(bank.key) == 1 and len(bank.visible) == 1 and bank.visible.shape[1] == 1:
            query = query.flatten(0, 1)[None]  # of all rows together
        found = []
        for row in range(len(query)):
            bank_row = row if len(bank.key) > 1 else 0
            one = Pool(*(None if part is None else part[min(row, len(part) - 1)][None] for part in bank))  # type: ignore[arg-type]
            if int(lists.known_n_list.tensor[bank_row]):
                mine = rows_of(lists, bank_row)
                near = self._nearest(mine.centroid[: int(mine.known_n_list.tensor)], query[row])
                found.append(list_search.search(mine, near, query[row], temperature, threshold, k, one))
            else:
                score, index = exact.search(query[row : row + 1], temperature, threshold, k, one)
                found.append((score[0], index[0]))
        score, index = (torch.stack(parts).view(n_row, n_query, k) for parts in zip(*found, strict=True))
        return score, index


def _rank(label: Tensor) -> Tensor:
    """How many entries of the same ``label`` (B, K) come before each, (B, K)."""
    order = label.argsort(dim=1, stable=True)
    ordered = label.gather(1, order)
    rank = torch.arange(label.shape[1], device=label.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(1, order, rank)
