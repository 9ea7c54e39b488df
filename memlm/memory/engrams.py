"""Engrams and the graph between them: how they come, are reminded, live on what they are worth, and die.

Source: Memoria (Park and Bak, ICML 2024) and its package memoria-pytorch; see `memlm.memory.memoria`.

Shapes: B rows, D model width, C slots, W engrams of a segment, R engrams reminded, A = W + R, S engrams of short-term
memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.tensors import owned, take

EMPTY, WORKING, SHORT_TERM, LONG_TERM = range(4)

NEVER = torch.iinfo(torch.int64).min
"""Birth of an empty slot."""
_DEAD = -1.0  # lifespan of an empty slot
_MOST = torch.iinfo(torch.int16).max  # two engrams that fired together this often are counted no further


class Engrams(NamedTuple):
    """Engrams and the graph between them.

    Attributes:
        data: Contents, (B, C, D); zero where empty.
        kind: `EMPTY`, `WORKING`, `SHORT_TERM` or `LONG_TERM`, (B, C).
        lifespan: Segments it has left to live, (B, C); -1 where empty.
        birth: Number in the order of creation within the row, (B, C); the least integer where empty.
        cofire: How often two engrams fired together, on the diagonal how often one fired, up to 32,767, (B, C, C). What
            stands for slots that never fired is of no meaning: empty ones, and working memory before `remind`.
        n_born: Engrams created so far, (B,).
    """

    data: Tensor
    kind: Tensor
    lifespan: Tensor
    birth: Tensor
    cofire: Tensor
    n_born: Tensor


class EngramGraph:
    """The life of engrams: one step is `add`, `remind`, `adjust`. Rows are independent.

    Args:
        n_slot: Most engrams of a row. Where room is wanted, long-term ones with the least life left go, the oldest
            first.
        n_working: Engrams that one segment adds.
        n_stm: Engrams of short-term memory; the oldest beyond become long-term.
        n_reminded_stm: Most short-term engrams that are reminded.
        n_reminded_ltm: Most long-term engrams that are reminded.
        search_depth: Edges that the search follows from each long-term engram found first.
        lifespan: Initial lifespan.
    """

    def __init__(
        self,
        n_slot: int,
        n_working: int,
        n_stm: int,
        n_reminded_stm: int,
        n_reminded_ltm: int,
        search_depth: int,
        lifespan: int,
    ) -> None:
        self.n_slot, self.n_working, self.n_stm = n_slot, n_working, n_stm
        self.n_reminded_stm, self.n_reminded_ltm = min(n_reminded_stm, n_stm), min(n_reminded_ltm, n_slot)
        self.search_depth, self.lifespan = search_depth, lifespan

    def empty(
        self, n_row: int, d_model: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Engrams:
        """No engrams. ``dtype`` is of contents and lifespans."""
        shape = (n_row, self.n_slot)
        return Engrams(
            data=torch.zeros(*shape, d_model, device=device, dtype=dtype),
            kind=torch.full(shape, EMPTY, device=device),
            lifespan=torch.full(shape, _DEAD, device=device, dtype=dtype),
            birth=torch.full(shape, NEVER, device=device),
            cofire=torch.zeros(*shape, self.n_slot, device=device, dtype=torch.int16),
            n_born=torch.zeros(n_row, device=device, dtype=torch.long),
        )

    def add(self, engrams: Engrams, data: Tensor) -> Engrams:
        """New working engrams with contents ``data`` (B, W, D), which keep their gradient."""
        by_age = engrams.birth.argsort(dim=1, stable=True)
        life = engrams.lifespan.masked_fill(engrams.kind == SHORT_TERM, torch.inf).gather(1, by_age)
        slots = by_age.gather(1, life.argsort(dim=1, stable=True)[:, : data.shape[1]])  # (B, W)
        birth = engrams.n_born[:, None] + torch.arange(data.shape[1], device=data.device)
        return engrams._replace(
            data=engrams.data.scatter(1, slots[..., None].expand_as(data), data.to(engrams.data.dtype)),
            kind=engrams.kind.scatter(1, slots, WORKING),
            lifespan=engrams.lifespan.scatter(1, slots, float(self.lifespan)),
            birth=engrams.birth.scatter(1, slots, birth),
            n_born=engrams.n_born + data.shape[1],
        )

    @torch.no_grad()
    def remind(self, engrams: Engrams, *, rows: Tensor | None = None, given: bool = False) -> tuple[Engrams, Tensor]:
        """What working memory, just added, brings to mind, and the engrams after all of these fired together.

        Args:
            engrams: Engrams after `add`.
            rows: Rows in which they fire, (B,); None for all.
            given: Whether nobody else needs ``cofire``, so that it may be changed in place.

        Returns:
            The engrams, and the slots that were reminded, (B, R), -1 where none.
        """
        score = self.nearness(engrams)
        near = score[:, :-1].masked_fill(engrams.kind != SHORT_TERM, -torch.inf)
        short = best_of(near, self.n_reminded_stm)
        found = score[:, :-1].masked_fill(~self._search(engrams, short), -torch.inf)
        reminded = torch.cat([short, best_of(found, self.n_reminded_ltm)], dim=1)
        return self.fire(engrams, reminded, rows, given), reminded

    def adjust(self, engrams: Engrams, reminded: Tensor, gain: Tensor) -> Engrams:
        """A segment has passed: lives are extended and run down, memory moves on, what has no life left is gone.

        Args:
            engrams: Engrams after `remind`.
            reminded: Slots that `remind` gave, (B, R).
            gain: By how much the life of each is extended, (B, R); what stands at -1 is ignored.
        """
        gain = torch.where(reminded >= 0, gain, 0).to(engrams.lifespan.dtype)
        lifespan = engrams.lifespan.scatter_add(1, reminded.clamp(min=0), gain) - 1
        kind = engrams.kind.masked_fill(engrams.kind == WORKING, SHORT_TERM)
        short = kind == SHORT_TERM
        youngest = engrams.birth.masked_fill(~short, NEVER).topk(self.n_stm, dim=1).values
        kind = kind.masked_fill(short & (engrams.birth < youngest[:, -1:]), LONG_TERM)
        dead = lifespan <= 0
        return engrams._replace(
            data=engrams.data.masked_fill(dead[..., None], 0),
            kind=kind.masked_fill(dead, EMPTY),
            lifespan=lifespan.masked_fill(dead, _DEAD),
            birth=engrams.birth.masked_fill(dead, NEVER),
        )

    def forget(self, engrams: Engrams, slots: Tensor) -> Engrams:
        """The engrams without those in ``slots`` (B, C)."""
        return engrams._replace(
            data=engrams.data.masked_fill(slots[..., None], 0),
            kind=engrams.kind.masked_fill(slots, EMPTY),
            lifespan=engrams.lifespan.masked_fill(slots, _DEAD),
            birth=engrams.birth.masked_fill(slots, NEVER),
        )

    def working(self, engrams: Engrams) -> Tensor:
        """Slots of working memory, (B, W), the newest first; -1 where there is none."""
        birth = engrams.birth.masked_fill(engrams.kind != WORKING, NEVER)
        newest = birth.topk(self.n_working, dim=1)
        return newest.indices.masked_fill(newest.values == NEVER, -1)

    def fire(self, engrams: Engrams, reminded: Tensor, rows: Tensor | None = None, given: bool = False) -> Engrams:
        """The engrams after working memory, for the first time, and ``reminded`` (B, R) fired; see `remind`."""
        n_slot, working, cofire = self.n_slot, self.working(engrams), owned(engrams.cofire, given)
        if rows is not None:
            working, reminded = working.where(rows[:, None], -1), reminded.where(rows[:, None], -1)
        row, place = (working >= 0).nonzero(as_tuple=True)
        new = working[row, place]  # slots that others were in
        cofire[row, new] = 0
        cofire[row, :, new] = 0
        fired = torch.cat([working, reminded], dim=1)  # (B, A)
        both = ((fired[:, :, None] >= 0) & (fired[:, None] >= 0)).flatten(1)
        fired = fired.clamp(min=0)
        pair = (fired[:, :, None] * n_slot + fired[:, None]).flatten(1)  # (B, A * A)
        flat = cofire.view(len(cofire), -1)
        flat.scatter_add_(1, pair, (both & (flat.gather(1, pair) < _MOST)).to(flat.dtype))
        return engrams._replace(cofire=cofire)

    def nearness(self, engrams: Engrams) -> Tensor:
        """Nearness of every engram to working memory, and of a zero vector, (B, C + 1). Only the order matters."""
        slots = self.working(engrams)
        working = take(engrams.data, slots.clamp(min=0))  # (B, W, D)
        data = F.pad(engrams.data, (0, 0, 0, 1))
        # The mean of -d^2 over working memory is -d^2 to its mean, but for a constant.
        held = (slots >= 0)[..., None]
        centre = (working * held).sum(dim=1, keepdim=True) / held.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.cdist(centre, data, compute_mode="donot_use_mm_for_euclid_dist")[:, 0].neg()

    def _search(self, engrams: Engrams, start: Tensor) -> Tensor:
        """Long-term engrams found from the slots ``start`` (B, K), (B, C).

        Every start goes to the long-term engram it fired with most often (ties: the first slot), and from there on to
        the next, ``search_depth`` times. All go one step at a time; nothing that was found is found again, except by
        several in the same step. A path ends where nothing fired with its last engram.
        """
        long = engrams.kind == LONG_TERM
        unseen, last = long, start
        for _ in range(self.search_depth + 1):
            edges = rows_of(engrams.cofire, last.clamp(min=0)).masked_fill_(~unseen[:, None], 0)  # (B, K, C)
            strongest = edges.max(dim=2)
            last = torch.where((strongest.values > 0) & (last >= 0), strongest.indices, -1)
            unseen = unseen & ~mask_of(last, self.n_slot)
        return long & ~unseen


def moved(before: Engrams, after: Engrams, written: Tensor) -> dict[str, Tensor]:
    """Engrams of a row that became long-term memory, or whose life ended or place was taken, mean over rows."""
    there, stays = before.kind != EMPTY, before.birth == after.birth
    found = {
        "promoted": there & stays & (before.kind != LONG_TERM) & (after.kind == LONG_TERM),
        "evicted": there & ~stays,
    }
    return {name: (these & written[:, None]).sum(dim=1).float().mean() for name, these in found.items()}


def best_of(score: Tensor, k: int) -> Tensor:
    """Places of the ``k`` best finite scores (B, C), best first, (B, k); -1 where there are fewer."""
    best = score.topk(k, dim=1)
    return torch.where(best.values > -torch.inf, best.indices, -1)


def mask_of(index: Tensor, n: int) -> Tensor:
    """Which of ``n`` places ``index`` (B, K) names, (B, n); negative ones are ignored."""
    mask = torch.zeros(len(index), n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, torch.where(index < 0, n, index), True)[:, :n]


def rows_of(cofire: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``cofire`` (B, C, C): (B, K, C). As `take`, but whole rows are copied at once."""
    start = torch.arange(len(cofire), device=index.device)[:, None] * cofire.shape[1]
    return cofire.flatten(0, 1).index_select(0, (start + index).flatten()).unflatten(0, index.shape)
