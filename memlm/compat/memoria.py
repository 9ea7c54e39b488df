"""Memoria under its own names: `Memoria`, `EngramType`.

Source: the package memoria-pytorch; the steps are those of `memlm.memory.engrams.EngramGraph`, with the faults of
the version 1.0.0, whose numbers the tutorial of the source prints. To train a language model with this memory:
``memory=memoria``.

Shapes: B rows, W engrams of a segment, N engrams of the longest row, C slots, R engrams reminded, S short-term engrams.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory import memoria
from memlm.memory.engrams import EMPTY, LONG_TERM, NEVER, SHORT_TERM, WORKING, EngramGraph, mask_of, rows_of
from memlm.tensors import take

Version = Literal["1.0.0", "1.1.0"]


class SourceGraph(EngramGraph):
    """The graph as a version of memoria-pytorch has it: every step is equal, faults included. Rows are not independent.

    Args:
        version: The version.
        *sizes: See `EngramGraph`.
        **more: See `EngramGraph`.
    """

    def __init__(self, version: Version, *sizes: int, **more: int) -> None:
        if version not in get_args(Version):
            raise ValueError(f"version must be one of {', '.join(get_args(Version))}, got {version!r}")
        super().__init__(*sizes, **more)
        self.version = version

    @torch.no_grad()
    def remind(
        self, engrams: memoria.Engrams, noise: Tensor | None = None, *, rows: Tensor | None = None, given: bool = False
    ) -> tuple[memoria.Engrams, Tensor]:
        """See `EngramGraph.remind`.

        Args:
            engrams: Engrams, working ones just added.
            noise: Numbers in [0, 1) that break ties between long-term engrams that a short-term one fired with equally
                often, (B, S, C): the source's own, aligned at their ends. None makes them of births.
            rows: See `EngramGraph.remind`.
            given: See `EngramGraph.remind`.
        """
        reminded = self._found(engrams, self.nearness(engrams), noise)
        return self.fire(engrams, reminded, rows, given), reminded

    def adjust(self, engrams: memoria.Engrams, reminded: Tensor, gain: Tensor) -> memoria.Engrams:
        """See `EngramGraph.adjust`. An empty slot that was reminded by mistake now lives, as the oldest of all."""
        ghost = torch.arange(self.n_slot, device=reminded.device) - engrams.n_born[:, None] * self.n_slot
        birth = torch.where(engrams.birth == NEVER, ghost, engrams.birth)
        return super().adjust(engrams._replace(birth=birth), reminded, gain)

    def nearness(self, engrams: memoria.Engrams) -> Tensor:
        """See `EngramGraph.nearness`; in 1.0.0 the mean of exp(-d^2), as a logarithm: it does not underflow."""
        if self.version != "1.0.0":
            return super().nearness(engrams)
        working = take(engrams.data, self.working(engrams).clamp(min=0))  # (B, W, D)
        return torch.cdist(working, F.pad(engrams.data, (0, 0, 0, 1))).square().neg().logsumexp(dim=1)

    def _found(self, engrams: memoria.Engrams, score: Tensor, noise: Tensor | None) -> Tensor:
        """What memoria-pytorch reminds, faults included; otherwise as in `remind`.

        The source keeps the engrams of a row in the order of their births, behind null ones that fill up what a row
        has fewer than the longest, and takes -1 (nothing) for an index, that of the last engram. Its faults:

        1. Null engrams are candidates: they compete as zero vectors, and fill places.
        2. A short-term engram that is not reminded, and a null one, starts a search from the last engram of all, which
           has fired with none, so from a long-term engram by chance.
        3. A path that ended, or that a row lacks, goes on from the last long-term engram, which then counts as found.
        4. What is found are places among the long-term engrams of the row; they are used as places among all engrams.
        5. Where no row has a long-term engram, the first engram of all is reminded in its place.

        Places here are those of the source plus C minus its number of engrams: both end together.
        """
        n_slot, device = self.n_slot, engrams.birth.device
        order = engrams.birth.argsort(dim=1, stable=True)  # (B, C)
        kind, place = engrams.kind.gather(1, order), torch.arange(n_slot, device=device)
        null = score[:, -1:]
        score = torch.where(kind == EMPTY, null, score.gather(1, order))
        short, long = kind == SHORT_TERM, kind == LONG_TERM
        n_short, n_long = short.sum(dim=1, keepdim=True), long.sum(dim=1, keepdim=True)  # (B, 1)
        first = n_slot - (engrams.birth != NEVER).sum(dim=1).max()  # place of the source's index 0
        some_short, some_long = n_short.max() > 0, n_long.max() > 0
        end = n_slot - (kind == WORKING).sum(dim=1, keepdim=True) - n_short  # behind the last long-term engram, (B, 1)

        near = score.masked_fill(~short, -torch.inf)
        chosen = _best(near, self.n_reminded_stm, (null, n_short.max() - n_short))  # (B, K)

        # Where searches start: one for each short-term engram or null one, (B, S).
        column = end + n_short - self.n_stm + torch.arange(self.n_stm, device=device)
        starts = take(mask_of(chosen, n_slot), column)
        edges = rows_of(engrams.cofire, order.gather(1, column))  # (B, S, C)
        edges = edges.gather(2, order[:, None].expand_as(edges)) * starts[..., None]
        edges = edges.masked_fill(~long[:, None], -1)
        if noise is None:
            noise = _noise(engrams.birth.gather(1, order), column)
        tie = noise * (edges == edges.amax(dim=2, keepdim=True))
        begun = tie.masked_fill(place < first, -1.0).argmax(dim=2)
        begun = torch.where((column >= column[:, -1:] + 1 - n_short.max()) & take(long, begun), begun, -1)
        found = mask_of(begun, n_slot)  # (B, C)

        # Each distinct start is one path; -1 is a path of nothing, and -2 none at all.
        begun = torch.where(found, place, -2).topk(min(self.n_stm, n_slot), dim=1).values
        n_path = found.sum(dim=1, keepdim=True)
        path = torch.cat([begun, torch.where(n_path < n_path.max(), -1, -2)], dim=1)  # (B, S + 1)
        nothing = (path == -1).any(dim=1, keepdim=True)
        last_long = (end - 1).clamp(min=0)
        unseen = long & ~found & ~mask_of(torch.where(path == -1, last_long, -1), n_slot)
        for _ in range(self.search_depth):
            at = torch.where(path >= 0, path, last_long)
            edges = rows_of(engrams.cofire, order.gather(1, at))
            edges = edges.gather(2, order[:, None].expand_as(edges)).masked_fill(~unseen[:, None], -1)
            strongest = edges.max(dim=2)
            path = torch.where(path == -2, -2, torch.where(strongest.values >= 0, strongest.indices, -1))
            nothing = nothing | (path == -1).any(dim=1, keepdim=True)
            found = found | mask_of(path, n_slot)
            unseen = unseen & ~found & ~mask_of(torch.where(path == -1, last_long, -1), n_slot)

        n_found = found.sum(dim=1, keepdim=True)
        missing = (n_found + nothing).max() - n_found
        shift = first + n_long.max() - end
        wrong = torch.where(found, place + shift, -1).topk(n_slot, dim=1).values
        wrong = torch.where(some_long, mask_of(wrong, n_slot), (place == first) & some_short)
        final = _best(score.masked_fill(~wrong, -torch.inf), self.n_reminded_ltm, (null, missing))
        final = torch.where(take(mask_of(chosen, n_slot), final.clamp(min=0)), -1, final)
        reminded = torch.cat([chosen, final], dim=1)
        return torch.where(reminded >= 0, order.gather(1, reminded.clamp(min=0)), -1)


class MemoriaOfSource(memoria.MemoriaMemory):
    """The memory ``memoria`` that reminds as a version of memoria-pytorch does: rows depend on each other.

    Args:
        d_model: Width of the hidden states.
        version: The version, 1.0.0 or 1.1.0.
        **settings: See `memlm.memory.memoria.MemoriaMemory`.
    """

    def __init__(self, d_model: int, version: Version = "1.0.0", **settings: Any) -> None:
        super().__init__(d_model, **settings)
        own = self.graph
        sizes = (own.n_slot, own.n_working, own.n_stm, own.n_reminded_stm, own.n_reminded_ltm)
        self.graph = SourceGraph(version, *sizes, own.search_depth, own.lifespan)


def _best(score: Tensor, k: int, null: tuple[Tensor, Tensor]) -> Tensor:
    """`best_of`, where so many more candidates of a score (``null``, (B, 1) each) take places, and are not given."""
    best = score.topk(k, dim=1)
    rank = torch.arange(k, device=score.device)
    keep = (best.values > -torch.inf) & (rank + torch.where(best.values < null[0], null[1], 0) < k)
    return torch.where(keep, best.indices, -1)


def _noise(birth: Tensor, column: Tensor) -> Tensor:
    """Numbers in [0, 1) made of births (B, C) and columns (B, S), (B, S, C)."""
    mixed = (birth[:, None] * 40_503 + column[..., None] * 69_069 + birth[:, -1:, None] * 30_011) * 2_654_435_761
    return ((mixed >> 16) & 2047) / 2048


class EngramType(Enum):
    """What an engram is."""

    NULL = EMPTY
    WORKING = WORKING
    SHORTTERM = SHORT_TERM
    LONGTERM = LONG_TERM


class Engrams:
    """The engrams of all rows, oldest first; rows with fewer than the longest begin with null ones.

    Attributes:
        data: Contents, (B, N, D).
        engrams_types: Values of `EngramType`, (B, N), uint8.
        lifespan: Segments left to live, (B, N); -1 for null ones.
    """

    def __init__(self, data: Tensor, engrams_types: Tensor, lifespan: Tensor) -> None:
        self.data, self.engrams_types, self.lifespan = data, engrams_types, lifespan

    def __len__(self) -> int:
        """Engrams of all rows, null ones included."""
        return self.lifespan.numel()


class _Memory(NamedTuple):
    """What is remembered, from the first working memory on."""

    graph: SourceGraph
    engrams: memoria.Engrams


class Memoria:
    """Engrams that are reminded, live on what they are worth, and die.

    Ties between long-term engrams are broken by random numbers in half precision as PyTorch drew them when the tutorial
    was written, and indices come in the order in which `torch.topk` gives equal numbers: the tutorial's printed numbers
    depend on both. The faults of the source are kept: see `SourceGraph`, and `memlm.memory.memoria` for
    the algorithm without them.

    Args:
        num_reminded_stm: Short-term engrams that are reminded.
        stm_capacity: Engrams of short-term memory; the oldest beyond become long-term.
        ltm_search_depth: Edges that the search of long-term memory follows.
        initial_lifespan: Lifespan of a new engram.
        num_final_ltms: Long-term engrams that are reminded.
        n_slot: Most engrams of a row. The source keeps all that live; here, where there is no room, long-term ones with
            the least life left go.
    """

    def __init__(
        self,
        num_reminded_stm: int,
        stm_capacity: int,
        ltm_search_depth: int,
        initial_lifespan: int,
        num_final_ltms: int,
        n_slot: int = 1024,
    ) -> None:
        self._settings = {
            "n_slot": n_slot, "n_stm": stm_capacity, "n_reminded_stm": num_reminded_stm,
            "n_reminded_ltm": num_final_ltms, "search_depth": ltm_search_depth, "lifespan": initial_lifespan,
        }  # fmt: skip
        self._memory: _Memory | None = None

    def add_working_memory(self, data: Tensor) -> None:
        """Add the working memory of a segment.

        Args:
            data: Contents, (B, W, D).
        """
        graph = SourceGraph("1.0.0", n_working=data.shape[1], **self._settings)
        old = self._memory.engrams if self._memory else graph.empty(len(data), data.shape[2], data.device, data.dtype)
        self._memory = _Memory(graph, graph.add(old, data.detach()))

    @torch.no_grad()
    def remind(self) -> tuple[Tensor, Tensor]:
        """What working memory brings to mind.

        Returns:
            Contents (B, R, D), and indices into `engrams` (B, R), -1 where a row is reminded of fewer; each row ends
            with at least one -1, as in the source, unless nothing is reminded at all.
        """
        graph, engrams = self._held()
        order = self._order()
        engrams, slots = graph.remind(engrams, self._ties(order))
        self._memory = _Memory(graph, engrams)
        place = torch.full_like(engrams.birth, -1).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        found = torch.where(slots >= 0, place.gather(1, slots.clamp(min=0)), -1)  # (B, R)
        if not bool((found >= 0).any()):
            return engrams.data[:, :0], found[:, :0]
        asked = F.pad(found, (0, 1), value=-1) + 1
        mask = torch.zeros(len(asked), int(asked.max()) + 1, device=asked.device).scatter(1, asked, 1.0)
        there, at = mask.topk(int(mask.sum(dim=1).max()), dim=1)
        indices = torch.where(there > 0, at - 1, -1)
        memories = take(engrams.data, order.gather(1, indices.clamp(min=0)))
        return memories.masked_fill((indices < 0)[..., None], 0), indices

    @torch.no_grad()
    def adjust_lifespan_and_memories(self, indices: Tensor, lifespan_delta: Tensor) -> None:
        """A segment has passed: lives are extended and run down, memory moves on, what has no life left is gone.

        Args:
            indices: Indices into `engrams`, (B, R); what stands at -1 is ignored.
            lifespan_delta: By how much the life of each is extended, (B, R).
        """
        graph, engrams = self._held()
        slots = torch.where(indices >= 0, self._order().gather(1, indices.clamp(min=0)), -1)
        self._memory = _Memory(graph, graph.adjust(engrams, slots, lifespan_delta))

    @property
    def engrams(self) -> Engrams:
        """All that is remembered now."""
        if self._memory is None:
            return Engrams(torch.zeros(0, 0, 0), torch.zeros(0, 0, dtype=torch.uint8), torch.zeros(0, 0))
        engrams, order = self._memory.engrams, self._order()
        kind, lifespan = (part.gather(1, order) for part in (engrams.kind, engrams.lifespan))
        return Engrams(take(engrams.data, order), kind.to(torch.uint8), lifespan)

    def reset_memory(self) -> None:
        """Forget everything."""
        self._memory = None

    def _held(self) -> _Memory:
        if self._memory is None:
            raise ValueError("there is no working memory: call add_working_memory(data) first")
        return self._memory

    def _order(self) -> Tensor:
        """Slots in the order of `engrams`, (B, N)."""
        birth = self._held().engrams.birth
        return birth.argsort(dim=1, stable=True)[:, birth.shape[1] - int((birth != NEVER).sum(dim=1).max()) :]

    def _ties(self, order: Tensor) -> Tensor:
        """Random numbers for `SourceGraph.remind`, (B, S, C): those that the source draws, aligned at their ends."""
        graph, engrams = self._held()
        n_short = int((engrams.kind == SHORT_TERM).sum(dim=1).max())
        drawn = (torch.rand(len(order), n_short, order.shape[1]) * 2**24).long() % 2**11 / 2**11
        padded = F.pad(drawn, (graph.n_slot - order.shape[1], 0, graph.n_stm - n_short, 0))
        return padded.half().to(engrams.birth.device)
