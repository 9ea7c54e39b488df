"""Memoria: engrams that are reminded, live on what they are worth, and die.

Source: Memoria (Park and Bak, ICML 2024) and its package memoria-pytorch: working, short-term and long-term memory;
reminding by distance, and by a depth-limited search over a graph of engrams that fired together (Hebb); a lifespan
that attention extends; an abstractor that makes a segment's working memory.

Shapes: B rows, T tokens per segment, D model width, C slots, W engrams of a segment, R engrams reminded,
A = W + R engrams read, S engrams of short-term memory, L attached layers, H heads.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.base import Memory, Residual, Segment, Trace
from memlm.memory.state import take, where_rows

Compat = Literal["none", "1.0.0", "1.1.0"]

EMPTY, WORKING, SHORT_TERM, LONG_TERM = range(4)

_NEVER = torch.iinfo(torch.int64).min  # birth of an empty slot
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
    """The life of engrams: one step is `add`, `remind`, `adjust`. Rows are independent unless ``compat`` is a version.

    Args:
        n_slot: Most engrams of a row. Where room is wanted, long-term ones with the least life left go, the oldest
            first.
        n_working: Engrams that one segment adds.
        n_stm: Engrams of short-term memory; the oldest beyond become long-term.
        n_reminded_stm: Most short-term engrams that are reminded.
        n_reminded_ltm: Most long-term engrams that are reminded.
        search_depth: Edges that the search follows from each long-term engram found first.
        lifespan: Initial lifespan.
        compat: ``none``; or a version of memoria-pytorch, whose every step this then equals, faults included.
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
        compat: Compat = "none",
    ) -> None:
        self.n_slot, self.n_working, self.n_stm = n_slot, n_working, n_stm
        self.n_reminded_stm, self.n_reminded_ltm = min(n_reminded_stm, n_stm), min(n_reminded_ltm, n_slot)
        self.search_depth, self.lifespan, self.compat = search_depth, lifespan, compat

    def empty(
        self, n_row: int, d_model: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Engrams:
        """No engrams. ``dtype`` is of contents and lifespans."""
        shape = (n_row, self.n_slot)
        return Engrams(
            data=torch.zeros(*shape, d_model, device=device, dtype=dtype),
            kind=torch.full(shape, EMPTY, device=device),
            lifespan=torch.full(shape, _DEAD, device=device, dtype=dtype),
            birth=torch.full(shape, _NEVER, device=device),
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
    def remind(self, engrams: Engrams, noise: Tensor | None = None) -> tuple[Engrams, Tensor]:
        """What working memory brings to mind, and the engrams after all of these fired together.

        Args:
            engrams: Engrams, working ones just added.
            noise: For ``compat``, numbers in [0, 1) that break ties between long-term engrams that a short-term one
                fired with equally often, (B, S, C): the source's own, aligned at their ends. None makes them of births.

        Returns:
            The engrams, and the slots that were reminded, (B, R), -1 where none.
        """
        score = self._score(engrams)
        if self.compat == "none":
            near = score[:, :-1].masked_fill(engrams.kind != SHORT_TERM, -torch.inf)
            short = _best(near, self.n_reminded_stm)
            found = score[:, :-1].masked_fill(~self._search(engrams, short), -torch.inf)
            reminded = torch.cat([short, _best(found, self.n_reminded_ltm)], dim=1)
        else:
            reminded = self._remind_as_source(engrams, score, noise)
        return engrams._replace(cofire=self._fire(engrams.cofire, self.working(engrams), reminded)), reminded

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
        youngest = engrams.birth.masked_fill(~short, _NEVER).topk(self.n_stm, dim=1).values
        kind = kind.masked_fill(short & (engrams.birth < youngest[:, -1:]), LONG_TERM)
        dead = lifespan <= 0
        birth = engrams.birth
        if self.compat != "none":  # an empty slot that the source reminded by mistake now lives, as the oldest of all
            ghost = torch.arange(self.n_slot, device=birth.device) - engrams.n_born[:, None] * self.n_slot
            birth = torch.where(birth == _NEVER, ghost, birth)
        return engrams._replace(
            data=engrams.data.masked_fill(dead[..., None], 0),
            kind=kind.masked_fill(dead, EMPTY),
            lifespan=lifespan.masked_fill(dead, _DEAD),
            birth=birth.masked_fill(dead, _NEVER),
        )

    def forget(self, engrams: Engrams, slots: Tensor) -> Engrams:
        """The engrams without those in ``slots`` (B, C)."""
        return engrams._replace(
            data=engrams.data.masked_fill(slots[..., None], 0),
            kind=engrams.kind.masked_fill(slots, EMPTY),
            lifespan=engrams.lifespan.masked_fill(slots, _DEAD),
            birth=engrams.birth.masked_fill(slots, _NEVER),
        )

    def working(self, engrams: Engrams) -> Tensor:
        """Slots of working memory, (B, W), the newest first; -1 where there is none."""
        birth = engrams.birth.masked_fill(engrams.kind != WORKING, _NEVER)
        newest = birth.topk(self.n_working, dim=1)
        return newest.indices.masked_fill(newest.values == _NEVER, -1)

    def _fire(self, cofire: Tensor, working: Tensor, reminded: Tensor) -> Tensor:
        """``cofire`` after the slots ``working`` (B, W), for the first time, and ``reminded`` (B, R) fired together."""
        n_slot = self.n_slot
        old = (~_mask(working, n_slot)).to(cofire.dtype)
        cofire = (cofire * old[:, :, None]).mul_(old[:, None])  # a product is several times faster than `masked_fill`
        fired = torch.cat([working, reminded], dim=1)  # (B, A)
        both = ((fired[:, :, None] >= 0) & (fired[:, None] >= 0)).flatten(1)
        fired = fired.clamp(min=0)
        pair = (fired[:, :, None] * n_slot + fired[:, None]).flatten(1)  # (B, A * A)
        flat = cofire.view(len(cofire), -1)
        flat.scatter_add_(1, pair, (both & (flat.gather(1, pair) < _MOST)).to(flat.dtype))
        return cofire

    def _score(self, engrams: Engrams) -> Tensor:
        """Nearness of every engram to working memory, and of a zero vector, (B, C + 1). Only the order matters."""
        slots = self.working(engrams)
        working = take(engrams.data, slots.clamp(min=0))  # (B, W, D)
        data = F.pad(engrams.data, (0, 0, 0, 1))
        if self.compat == "1.0.0":  # mean of exp(-d^2), as a logarithm: it does not underflow
            return torch.cdist(working, data).square().neg().logsumexp(dim=1)
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
            edges = _rows(engrams.cofire, last.clamp(min=0)).masked_fill_(~unseen[:, None], 0)  # (B, K, C)
            strongest = edges.max(dim=2)
            last = torch.where((strongest.values > 0) & (last >= 0), strongest.indices, -1)
            unseen = unseen & ~_mask(last, self.n_slot)
        return long & ~unseen

    def _remind_as_source(self, engrams: Engrams, score: Tensor, noise: Tensor | None) -> Tensor:
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
        first = n_slot - (engrams.birth != _NEVER).sum(dim=1).max()  # place of the source's index 0
        some_short, some_long = n_short.max() > 0, n_long.max() > 0
        end = n_slot - (kind == WORKING).sum(dim=1, keepdim=True) - n_short  # behind the last long-term engram, (B, 1)

        near = score.masked_fill(~short, -torch.inf)
        chosen = _best(near, self.n_reminded_stm, (null, n_short.max() - n_short))  # (B, K)

        # Where searches start: one for each short-term engram or null one, (B, S).
        column = end + n_short - self.n_stm + torch.arange(self.n_stm, device=device)
        starts = take(_mask(chosen, n_slot), column)
        edges = _rows(engrams.cofire, order.gather(1, column))  # (B, S, C)
        edges = edges.gather(2, order[:, None].expand_as(edges)) * starts[..., None]
        edges = edges.masked_fill(~long[:, None], -1)
        if noise is None:
            noise = _noise(engrams.birth.gather(1, order), column)
        tie = noise * (edges == edges.amax(dim=2, keepdim=True))
        begun = tie.masked_fill(place < first, -1.0).argmax(dim=2)
        begun = torch.where((column >= column[:, -1:] + 1 - n_short.max()) & take(long, begun), begun, -1)
        found = _mask(begun, n_slot)  # (B, C)

        # Each distinct start is one path; -1 is a path of nothing, and -2 none at all.
        begun = torch.where(found, place, -2).topk(min(self.n_stm, n_slot), dim=1).values
        n_path = found.sum(dim=1, keepdim=True)
        path = torch.cat([begun, torch.where(n_path < n_path.max(), -1, -2)], dim=1)  # (B, S + 1)
        nothing = (path == -1).any(dim=1, keepdim=True)
        last_long = (end - 1).clamp(min=0)
        unseen = long & ~found & ~_mask(torch.where(path == -1, last_long, -1), n_slot)
        for _ in range(self.search_depth):
            at = torch.where(path >= 0, path, last_long)
            edges = _rows(engrams.cofire, order.gather(1, at))
            edges = edges.gather(2, order[:, None].expand_as(edges)).masked_fill(~unseen[:, None], -1)
            strongest = edges.max(dim=2)
            path = torch.where(path == -2, -2, torch.where(strongest.values >= 0, strongest.indices, -1))
            nothing = nothing | (path == -1).any(dim=1, keepdim=True)
            found = found | _mask(path, n_slot)
            unseen = unseen & ~found & ~_mask(torch.where(path == -1, last_long, -1), n_slot)

        n_found = found.sum(dim=1, keepdim=True)
        missing = (n_found + nothing).max() - n_found
        shift = first + n_long.max() - end
        wrong = torch.where(found, place + shift, -1).topk(n_slot, dim=1).values
        wrong = torch.where(some_long, _mask(wrong, n_slot), (place == first) & some_short)
        final = _best(score.masked_fill(~wrong, -torch.inf), self.n_reminded_ltm, (null, missing))
        final = torch.where(take(_mask(chosen, n_slot), final.clamp(min=0)), -1, final)
        reminded = torch.cat([chosen, final], dim=1)
        return torch.where(reminded >= 0, order.gather(1, reminded.clamp(min=0)), -1)


def _moved(before: Engrams, after: Engrams, written: Tensor) -> dict[str, Tensor]:
    """Engrams of a row that became long-term memory, or whose life ended or place was taken, mean over rows."""
    there, stays = before.kind != EMPTY, before.birth == after.birth
    found = {
        "promoted": there & stays & (before.kind != LONG_TERM) & (after.kind == LONG_TERM),
        "evicted": there & ~stays,
    }
    return {name: (moved & written[:, None]).sum(dim=1).float().mean() for name, moved in found.items()}


def _best(score: Tensor, k: int, null: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Places of the ``k`` best finite scores (B, C), best first, (B, k); -1 where there are fewer.

    With ``null``, a score (B, 1) and a number (B, 1), so many more candidates of this score take places, and are not
    given.
    """
    best = score.topk(k, dim=1)
    keep = best.values > -torch.inf
    if null is not None:
        rank = torch.arange(k, device=score.device)
        keep = keep & (rank + torch.where(best.values < null[0], null[1], 0) < k)
    return torch.where(keep, best.indices, -1)


def _mask(index: Tensor, n: int) -> Tensor:
    """Which of ``n`` places ``index`` (B, K) names, (B, n); negative ones are ignored."""
    mask = torch.zeros(len(index), n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, torch.where(index < 0, n, index), True)[:, :n]


def _rows(cofire: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of ``cofire`` (B, C, C): (B, K, C). As `take`, but whole rows are copied at once."""
    start = torch.arange(len(cofire), device=index.device)[:, None] * cofire.shape[1]
    return cofire.flatten(0, 1).index_select(0, (start + index).flatten()).unflatten(0, index.shape)


def _noise(birth: Tensor, column: Tensor) -> Tensor:
    """Numbers in [0, 1) made of births (B, C) and columns (B, S), (B, S, C)."""
    mixed = (birth[:, None] * 40_503 + column[..., None] * 69_069 + birth[:, -1:, None] * 30_011) * 2_654_435_761
    return ((mixed >> 16) & 2047) / 2048


class MemoriaState(NamedTuple):
    """Engrams, and those that the next segment reads.

    Attributes:
        engrams: Engrams and their graph.
        active: Slots of working memory, then of what it was reminded of, (B, A); -1 where none.
    """

    engrams: Engrams
    active: Tensor


class MemoriaMemory(Memory):
    """Working, short-term and long-term engrams; tokens attend to working memory and to what it reminds of.

    After each segment an abstractor makes ``n_working`` engrams of it, the new working memory; what they remind of is
    found in short-term memory by distance, in long-term memory by a search along edges. One state, and one set of
    projections, serves all attached layers; the abstractor reads the last of them.

    Args:
        d_model: Width of the hidden states.
        n_slot: Most engrams of a row. Where room is wanted, long-term ones with the least life left go, the oldest
            first.
        n_working: Engrams that one segment adds.
        n_stm: Engrams of short-term memory; the oldest beyond become long-term.
        n_reminded_stm: Most short-term engrams that are reminded.
        n_reminded_ltm: Most long-term engrams that are reminded.
        search_depth: Edges that the search follows from each long-term engram found first.
        lifespan: Segments that an engram lives if it is never attended to; its first counts.
        extension: Lifespan that a segment gives to each reminded engram, if attended to evenly.
        n_head: Attention heads of reads.
        compat: ``none``; or a version of memoria-pytorch, 1.0.0 or 1.1.0, which reminding then equals, faults included:
            rows depend on each other.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    layerwise = False

    def __init__(
        self,
        d_model: int,
        n_slot: int = 1024,
        n_working: int = 32,
        n_stm: int = 256,
        n_reminded_stm: int = 32,
        n_reminded_ltm: int = 32,
        search_depth: int = 10,
        lifespan: int = 9,
        extension: float = 8.0,
        n_head: int = 4,
        compat: Compat = "none",
    ) -> None:
        super().__init__()
        least = {"n_working": 1, "n_stm": 1, "n_reminded_stm": 1, "n_reminded_ltm": 0, "search_depth": 0, "lifespan": 2}
        for name, value in locals().items():
            if name in least and value < least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if search_depth > 1000:  # edges, one after the other
            raise ValueError(f"search_depth must be at most 1000, got {search_depth}")
        if n_slot < n_working + n_stm:
            raise ValueError(
                f"n_slot must hold working and short-term memory, n_working + n_stm = {n_working + n_stm}, got {n_slot}"
            )
        if not 0 <= extension < math.inf:
            raise ValueError(f"extension must be at least 0, got {extension}")
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"n_head must divide d_model ({d_model}), got {n_head}")
        if compat not in get_args(Compat):
            raise ValueError(f"compat must be one of {', '.join(get_args(Compat))}, got {compat!r}")
        self.d_model, self.n_head, self.extension = d_model, n_head, extension
        self.graph = EngramGraph(
            n_slot, n_working, n_stm, n_reminded_stm, n_reminded_ltm, search_depth, lifespan, compat
        )
        self.norm = nn.RMSNorm(d_model)
        self.abstract_query = nn.Parameter(torch.randn(n_working, d_model))
        self.abstract_key = nn.Linear(d_model, d_model, bias=False)
        self.abstract_value = nn.Linear(d_model, d_model, bias=False)
        self.engram_norm = nn.RMSNorm(d_model)
        self.read_query = nn.Linear(d_model, d_model, bias=False)
        self.read_key = nn.Linear(d_model, d_model, bias=False)
        self.read_value = nn.Linear(d_model, d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        self.init_linears()

    def init_state(self, n_row: int) -> MemoriaState:
        """No engrams."""
        graph, device = self.graph, self.abstract_query.device
        n_active = graph.n_working + graph.n_reminded_stm + graph.n_reminded_ltm
        active = torch.full((n_row, n_active), -1, device=device)
        return MemoriaState(graph.empty(n_row, self.d_model, device), active)

    def recall(self, state: MemoriaState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the engrams to read, (B, A, D) each, and their slots, (B, A), -1 where none."""
        engrams, at = state.engrams, state.active.clamp(min=0)
        held = (state.active >= 0) & (engrams.kind.gather(1, at) != EMPTY)
        content = self.engram_norm(take(engrams.data, at))
        return self.read_key(content), self.read_value(content), state.active.masked_fill(~held, -1)

    def read(self, x: Tensor, recalled: tuple[Tensor, Tensor, Tensor], layer: int) -> Residual:
        """Multi-head attention of tokens over engrams and a null one of score 0 and value 0. See `Memory.read`."""
        key, value, slots = recalled
        gate = self.read_gate(x).sigmoid() * (slots >= 0).any(dim=1)[:, None, None]  # (B, T, 1)
        weight = self._weights(x, key, slots)  # (B, H, T, A)
        found = (weight @ self._heads(value)).transpose(1, 2).flatten(2)  # (B, T, D)
        slots = slots[:, None].expand(-1, x.shape[1], -1)
        return Residual(gate * self.to_output(found), slots, weight.mean(dim=1), gate[..., 0])

    def write(self, segment: Segment, state: MemoriaState, reads: list[Residual]) -> tuple[MemoriaState, Trace]:
        """Lives go on by the attention paid, then the segment becomes working memory. See `Memory.write`.

        The attention is worked out again from the hidden states, as ``reads`` are only of the last call.
        """
        graph = self.graph
        written = segment.complete[:, 0] & segment.valid.any(dim=1)  # (B,)
        reminded = state.active[:, graph.n_working :]
        gain = self._gain(segment, state)[:, graph.n_working :]
        engrams = graph.adjust(state.engrams, reminded, gain)
        engrams = graph.add(engrams, self._abstract(segment.hidden[:, :, -1], segment.valid | ~written[:, None]))
        engrams, reminded = graph.remind(engrams)
        new = MemoriaState(engrams, torch.cat([graph.working(engrams), reminded], dim=1))
        trace = {
            "engrams": (engrams.kind != EMPTY).sum(dim=1).float().mean(),
            "long_term": (engrams.kind == LONG_TERM).sum(dim=1).float().mean(),
            "reminded": (reminded >= 0).sum(dim=1).float().mean(),
        } | _moved(state.engrams, engrams, written)
        return where_rows(written, new, state), trace

    def filled(self, state: MemoriaState) -> Tensor:
        """Which slots hold an engram, (B, C)."""
        return state.engrams.kind != EMPTY

    def contents(self, state: MemoriaState) -> Tensor:
        """Contents of the engrams, (B, C, D)."""
        return state.engrams.data

    def forget(self, state: MemoriaState, slots: Tensor) -> MemoriaState:
        """The state without some engrams and their edges; see `Memory.forget`."""
        return state._replace(engrams=self.graph.forget(state.engrams, slots))

    def flops_per_token(self) -> int:
        """Projections, and attention in both directions; reminding, whose cost is of a segment, is left out."""
        n_active = self.graph.n_working + self.graph.n_reminded_stm + self.graph.n_reminded_ltm
        return super().flops_per_token() + 4 * (2 * n_active + self.graph.n_working) * self.d_model

    def _abstract(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Engrams (B, W, D) of the cells of ``hidden`` (B, T, D) where ``mask`` (B, T)."""
        x = self.norm(hidden)
        score = self.abstract_query @ self.abstract_key(x).transpose(1, 2) / self.d_model**0.5  # (B, W, T)
        return score.masked_fill(~mask[:, None], -torch.inf).softmax(dim=2) @ self.abstract_value(x)

    @torch.no_grad()
    def _gain(self, segment: Segment, state: MemoriaState) -> Tensor:
        """Lifespan that each engram read gets, (B, A): ``extension`` times its attention over the mean of the reminded.

        Attention is summed over the tokens, layers and heads of the segment.
        """
        key, _, slots = self.recall(state)
        weight = self._weights(segment.hidden.flatten(1, 2), key, slots).sum(dim=1)  # (B, T * L, A)
        valid = segment.valid.repeat_interleave(segment.hidden.shape[2], dim=1)
        attention = (weight * valid[..., None]).sum(dim=1).float()  # (B, A)
        attention[:, : self.graph.n_working] = 0
        n_reminded = (slots[:, self.graph.n_working :] >= 0).sum(dim=1, keepdim=True)
        return self.extension * n_reminded * attention / attention.sum(dim=1, keepdim=True).clamp(min=1e-12)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def _weights(self, x: Tensor, key: Tensor, slots: Tensor) -> Tensor:
        """Attention (B, H, N, A) of ``x`` (B, N, D) to keys (B, A, D); what is missing to 1 is the null engram's."""
        query, key = self._heads(self.read_query(self.norm(x))), self._heads(key)
        score = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        score = score.masked_fill((slots < 0)[:, None, None], -torch.inf)
        return F.softmax(F.pad(score, (1, 0)), dim=-1)[..., 1:]
