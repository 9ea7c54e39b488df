"""Memoria under its own names: `Memoria`, `EngramType`.

Source: the package memoria-pytorch; the steps are those of `memlm.memory.memoria.EngramGraph`, in the version 1.0.0
whose numbers the tutorial of the source prints. To train a language model with this memory: ``memory=memoria``.

Shapes: B rows, W engrams of a segment, N engrams of the longest row, C slots, R engrams reminded, S short-term engrams.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory import memoria
from memlm.tensors import take

_NEVER = torch.iinfo(torch.int64).min  # birth of an empty slot


class EngramType(Enum):
    """What an engram is."""

    NULL = memoria.EMPTY
    WORKING = memoria.WORKING
    SHORTTERM = memoria.SHORT_TERM
    LONGTERM = memoria.LONG_TERM


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

    graph: memoria.EngramGraph
    engrams: memoria.Engrams


class Memoria:
    """Engrams that are reminded, live on what they are worth, and die.

    Ties between long-term engrams are broken by random numbers in half precision as PyTorch drew them when the tutorial
    was written, and indices come in the order in which `torch.topk` gives equal numbers: the tutorial's printed numbers
    depend on both. The faults of the source are kept: see `memlm.memory.memoria`, where ``compat=none`` is
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
        graph = memoria.EngramGraph(n_working=data.shape[1], compat="1.0.0", **self._settings)
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
        return birth.argsort(dim=1, stable=True)[:, birth.shape[1] - int((birth != _NEVER).sum(dim=1).max()) :]

    def _ties(self, order: Tensor) -> Tensor:
        """Random numbers for `EngramGraph.remind`, (B, S, C): those that the source draws, aligned at their ends."""
        graph, engrams = self._held()
        n_short = int((engrams.kind == memoria.SHORT_TERM).sum(dim=1).max())
        drawn = (torch.rand(len(order), n_short, order.shape[1]) * 2**24).long() % 2**11 / 2**11
        padded = F.pad(drawn, (graph.n_slot - order.shape[1], 0, graph.n_stm - n_short, 0))
        return padded.half().to(engrams.birth.device)
