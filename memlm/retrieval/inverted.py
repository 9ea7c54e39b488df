"""Inverted file: top-k search over the slots whose lists are nearest to a query.

Each slot is assigned to the list whose centroid is nearest to its key and has room; a query scores all
centroids and searches the lists of the nearest ones exactly, so that the work grows with the square root of the slots.
Lists change with each slot that is written. All slots are assigned anew when as many were written as there were at
the last time; what decides is the number of slots written, never how the text was cut into calls. Before the first
time, while slots are few, every slot is searched.

Source: the inverted file with coarse centroids of Sivic and Zisserman (Video Google, 2003) and of Jegou et al. (Product
quantization for nearest neighbor search, 2011), with spherical k-means (Dhillon and Modha, 2001).

Shapes: B rows of slots, S segments, N = S * T queries of a row, M slots, L lists, C cells of a list, p lists probed by
a query, l lists probed by any, K slots written at a time, k slots read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.retrieval import exact
from memlm.retrieval.exact import Pool
from memlm.tensors import Host, copied, owned, take

_FIRST = 2**14  # slots that are searched one and all before they are assigned for the first time, at most
_ROOM = 2  # cells for each slot
_SAMPLE = 16  # keys for each list that centroids are made from
_ROUNDS = 4  # of k-means
_CHOICES = 3  # tries for the nearest list with room; at the last one, any list will do
_CHUNK = 4096  # keys that are compared with all centroids at a time
_SCORES = 2**24  # scores that exist at a time
_GROUP = 16  # scores whose maximum is ranked before they are


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
        left: Slots that may be written before all are assigned anew, (B,).
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


class InvertedFile:
    """How slots are assigned to lists, and found.

    Args:
        n_slot: Slots of a row.
        d_key: Width of keys.
        n_list: Lists of a full row; None for four times the square root of ``n_slot``. Fewer slots have fewer.
        n_probe: Lists that a query searches; None for 48.

    Attributes:
        n_cell: Room of a list.
        n_first: Slots that are written before all are assigned for the first time.
        n_scored: Keys that a query is compared with in a full row, centroids included.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(self, n_slot: int, d_key: int, n_list: int | None = None, n_probe: int | None = None) -> None:
        for name, number in {"n_list": n_list, "n_probe": n_probe}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or null for a number that fits n_slot, got {number}")
        if n_list is not None and n_list > n_slot:
            raise ValueError(f"n_list must be at most n_slot ({n_slot}), got {n_list}")
        self.n_slot, self.d_key = n_slot, d_key
        self.n_list = math.ceil(4 * math.sqrt(n_slot)) if n_list is None else n_list
        self.n_list = min(self.n_list, n_slot)
        self.n_cell = _GROUP * math.ceil(_ROOM * n_slot / self.n_list / _GROUP)
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
            key=full(n_cell, self.d_key, dtype=torch.float32),
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
        changed: Any = {name: owned(getattr(lists, name), given) for name in _changed(lists, keys)}
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
        for choice in range(_CHOICES):
            if choice and left.is_cpu and not bool(left.any()):
                break
            placed, cell = self._insert(lists, slot, key.detach(), left, anywhere=choice == _CHOICES - 1)
            left = left & ~placed
            cells.append(cell)
        return torch.cat(cells, dim=1)

    def fill(self, lists: Lists, cells: Tensor | None, key: Tensor) -> None:
        """Put, in place, the keys of their slots into ``cells`` (B, n); ``key`` (B, M, d_key) is of all slots."""
        if cells is not None:
            slot = lists.slot.gather(1, cells)
            mine = take(key.detach(), slot.clamp(min=0).long()) * (slot >= 0)[..., None]
            lists.key.scatter_(1, cells[..., None].expand_as(mine), mine)

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
        self, lists: Lists, slot: Tensor, key: Tensor, chosen: Tensor, anywhere: bool = False, packed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Put each slot into the list that is nearest of those with room, as long as the room lasts.

        Args:
            lists: Changed in place.
            slot: Slots that are in no list, (B, K).
            key: Their keys, (B, K, d_key).
            chosen: Which of them, (B, K); only in rows whose slots are assigned.
            anywhere: Whether those for which the room does not last go into any list with room.
            packed: Whether the empty cells of every list are known to be the last ones.

        Returns:
            Which slots are in a list now, (B, K), and their cells, (B, K), the last of all for the others.
        """
        number = torch.arange(self.n_list, device=key.device)
        room = torch.where(number < lists.n_list[:, None], self.n_cell - lists.n_held, 0)  # (B, L)
        full = torch.where(room > 0, 0.0, -torch.inf)[:, None]
        into = torch.baddbmm(full, key, lists.centroid.transpose(1, 2)).argmax(dim=2)  # (B, K)
        rank = _rank(torch.where(chosen, into, self.n_list))
        placed = chosen & (rank < room.gather(1, into))
        if anywhere:
            homeless = chosen & ~placed
            room = room.scatter_add(1, into, -placed.long())
            order = (homeless.cumsum(dim=1) - 1).clamp(min=0)
            some = torch.searchsorted(room.cumsum(dim=1), order, right=True).clamp(max=self.n_list - 1)
            into, placed = torch.where(homeless, some, into), chosen
            rank = _rank(torch.where(chosen, into, self.n_list))
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
        """``lists``, assigned anew in the rows where it is time. The device is asked only if it may be.

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
        return self.rebuild(lists._replace(known_left=Host(left)), key, used(), left <= 0)

    def is_due(self, lists: Lists, n_written: int) -> bool:
        """Whether a row may have to be assigned anew before it was given ``n_written`` slots more."""
        return bool((lists.known_left.tensor <= n_written).any()) and bool((lists.left <= n_written).any())

    def rebuild(self, lists: Lists, key: Tensor, used: Tensor, rows: Tensor) -> Lists:
        """A copy of ``lists`` with the slots of ``rows`` (B,) assigned anew, which takes longer; see `settle`."""
        if not bool(rows.any()):
            return lists
        lists = _each(lists, copied)
        for row in rows.nonzero()[:, 0].tolist():
            self._cluster(_rows_of(lists, slice(row, row + 1)), key[row].detach(), used[row])
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
        n_list = min(self.n_list, max(1, math.ceil(self.n_list * math.sqrt(n_used / self.n_slot))))
        lists.centroid.zero_()
        if n_used:
            sample = key[slot[:: max(1, n_used // (_SAMPLE * n_list))]]
            lists.centroid[0, :n_list] = _centroids(sample, n_list)
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
        for choice in range(_CHOICES):
            left = [slot[:0]]
            for some in slot.split(_CHUNK):
                all_ = torch.ones_like(some, dtype=torch.bool)[None]
                last = choice == _CHOICES - 1
                placed, place = self._insert(lists, some[None], key[some][None], all_, anywhere=last, packed=True)
                self.fill(lists, place, key[None])
                left.append(some[~placed[0]])
            slot = torch.cat(left)
        for part in (lists.left, lists.known_left.tensor):
            part.fill_(max(n_used, self.n_first))

    def start(self, lists: Lists, rows: Tensor, keys: bool = True) -> None:
        """Make, in place, the lists of ``rows`` (B,) as fresh, all but what is on the CPU.

        Args:
            lists: What `own` gave.
            rows: Which rows, on the device.
            keys: As `own` was told.
        """
        fresh = self.empty(len(rows), rows.device)
        for name in _changed(lists, keys):
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
                mine = _rows_of(lists, bank_row)
                found.append(self._search(mine, query[row], temperature, threshold, k, one))
            else:
                score, index = exact.search(query[row : row + 1], temperature, threshold, k, one)
                found.append((score[0], index[0]))
        score, index = (torch.stack(parts).view(n_row, n_query, k) for parts in zip(*found, strict=True))
        return score, index

    def _search(
        self, lists: Lists, query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool
    ) -> tuple[Tensor, Tensor]:
        """`search` of the queries (N, d_key) of one row, whose slots are assigned: (N, k) each."""
        visible, bias = bank.visible[0], bank.bias[0]  # (S, M), (M,)
        n_list, n_query, n_segment = int(lists.known_n_list.tensor), len(query), len(visible)
        near = self._nearest(lists.centroid[:n_list], query)  # (N, p)
        if query.is_cuda:
            searched = torch.arange(n_list, device=query.device)
        else:  # few queries search few of the lists
            searched, near = near.unique(return_inverse=True)
        cells = lists.slot[:-1].view(self.n_list, -1)[searched].long()  # (l, C)
        empty, cells = cells < 0, cells.clamp(min=0)
        table = torch.where(visible[:, cells] & ~empty, bias[cells], -torch.inf)  # what each adds, (S, l, C)
        keys, extent = lists.key[:-1].view(self.n_list, self.n_cell, -1), lists.extent[searched]
        segment = torch.arange(n_query, device=query.device) // (n_query // n_segment)
        n_probe = near.shape[1]
        n_group = n_probe * self.n_cell // _GROUP
        values, slots = [], []
        most = table.amax(dim=0)
        for part in torch.arange(n_query, device=query.device).split(max(1, _SCORES // (n_probe * self.n_cell))):
            score, place = _by_list(query[part], temperature, threshold, keys, searched, most, extent, near[part])
            if n_segment > 1:
                pair = torch.empty_like(place.flatten()).scatter_(0, place.flatten(), near[part].flatten())
                reader = torch.empty_like(pair).scatter_(0, place.flatten(), segment[part].repeat_interleave(n_probe))
                score.masked_fill_((table == -torch.inf)[reader, pair], -torch.inf)
            # As in `exact.top`, but maxima of groups are put in order, not all scores.
            members = score.view(len(score), _GROUP, -1)  # (n * p, G, C / G)
            best = members.amax(dim=1)[place].flatten(1).topk(min(k, n_group), dim=1, sorted=False).indices
            probe, group = best // members.shape[2], best % members.shape[2]  # (n, k) each
            inside = group[..., None] + members.shape[2] * torch.arange(_GROUP, device=query.device)  # (n, k, G)
            found = score[place.gather(1, probe)[..., None], inside].flatten(1)
            value, index = found.topk(min(k, found.shape[1]), dim=1, sorted=False)
            cell = (near[part].gather(1, probe)[..., None] * self.n_cell + inside).flatten(1).gather(1, index)
            values.append(value)
            slots.append(cells.flatten()[cell])
        value, slot = torch.cat(values), torch.cat(slots)
        # The rounding of a product of many queries depends on which they are. A query's own result must not.
        slot, order = slot.sort(dim=1)
        exactly = temperature * (bank.key[0, slot] * query[:, None]).sum(dim=2) + bias[slot]
        exactly = exactly.masked_fill(~visible[segment[:, None], slot], -torch.inf)
        value = exactly.masked_fill(value.gather(1, order) == -torch.inf, -torch.inf)
        missing = (0, k - slot.shape[1])
        return F.pad(value, missing, value=-torch.inf), F.pad(slot, missing)


def assigned(lists: Lists) -> bool:
    """Whether the slots of any row are assigned to lists."""
    return bool((lists.known_n_list.tensor > 0).any())


def _changed(lists: Lists, keys: bool) -> tuple[str, ...]:
    """Names of what may be another after a write; ``keys`` as `InvertedFile.own` is told."""
    if not assigned(lists):
        return ("left",)
    return tuple(name for name in Lists._fields[:8] if keys or name not in ("key", "centroid"))


def _rows_of(lists: Lists, rows: int | slice) -> Lists:
    """Views of some rows."""
    return _each(lists, lambda part: part[rows])


def _each(lists: Lists, function: Callable[[Tensor], Tensor]) -> Lists:
    """``function`` of every tensor."""
    found: Any = (Host(function(part.tensor)) if isinstance(part, Host) else function(part) for part in lists)
    return Lists(*found)


def _by_list(
    query: Tensor,
    temperature: Tensor,
    threshold: float,
    keys: Tensor,
    searched: Tensor,
    bias: Tensor,
    extent: Tensor,
    near: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores of each ``query`` (N, d_key) in the lists that are near it.

    On a CPU list by list, each with all its queries: no key is copied, and each is read once.

    Args:
        query: Unit queries.
        temperature: Inverse temperature.
        threshold: Least cosine similarity.
        keys: Keys of the cells of all lists, (L, C, d_key).
        searched: Lists that any query searches, (l,).
        bias: What each of their cells adds, (l, C).
        extent: Cells of each of them beyond which all are empty, (l,).
        near: Which of them each query searches, (N, p).

    Returns:
        Scores in the order in which they were made, (N * p, C), and which of them each probe has, (N, p).
    """
    scaled, least = query * temperature, threshold * temperature
    flat = near.flatten()
    if query.is_cuda:
        score = (keys[searched[near]] @ scaled[:, None, :, None])[..., 0].flatten(0, 1)
        if threshold > -1:
            score.masked_fill_(score < least, -torch.inf)
        return score.add_(bias[flat]), torch.arange(len(flat), device=flat.device).view_as(near)
    order = flat.argsort(stable=True)
    scaled = scaled[order // near.shape[1]]  # (N * p, d_key)
    score = query.new_full((len(flat), keys.shape[1]), -torch.inf)
    start = 0
    sizes = flat.bincount(minlength=len(searched))
    for row, (number, size, end) in enumerate(zip(searched.tolist(), sizes.tolist(), extent.tolist(), strict=True)):
        if size and end:
            part = score[start : start + size, :end]
            torch.mm(scaled[start : start + size], keys[number, :end].T, out=part)
            if threshold > -1:
                part.masked_fill_(part < least, -torch.inf)
            part.add_(bias[row, :end])
        start += size
    return score, torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(near)


def _rank(label: Tensor) -> Tensor:
    """How many entries of the same ``label`` (B, K) come before each, (B, K)."""
    order = label.argsort(dim=1, stable=True)
    ordered = label.gather(1, order)
    rank = torch.arange(label.shape[1], device=label.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(1, order, rank)


def _centroids(key: Tensor, n_list: int) -> Tensor:
    """Spherical k-means of ``key`` (n, d_key): (n_list, d_key). The same keys give the same centroids."""
    start = torch.arange(n_list, device=key.device) * len(key) // n_list
    centroid = key[start]
    for _ in range(_ROUNDS):
        nearest = torch.cat([(part @ centroid.T).argmax(dim=1) for part in key.split(_CHUNK)])
        order, n_held = nearest.argsort(stable=True), nearest.bincount(minlength=n_list)
        mean = F.embedding_bag(order, key, n_held.cumsum(0) - n_held, mode="sum")  # the same sums on every device
        centroid = torch.where((n_held > 0)[:, None], F.normalize(mean, dim=1), centroid)
    return centroid
