"""Memoria: engrams that are reminded, live on what they are worth, and die.

Source: Memoria (Park and Bak, ICML 2024) and its package memoria-pytorch: working, short-term and long-term memory;
reminding by distance, and by a depth-limited search over a graph of engrams that fired together (Hebb); a lifespan
that attention extends; an abstractor that makes a segment's working memory. With the faults of the package:
`memlm.compat.memoria.MemoriaOfSource`.

Shapes: B rows, T tokens per segment, D model width, C slots, W engrams of a segment, R engrams reminded,
A = W + R engrams read, L attached layers, H heads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Read, Segment, Trace
from memlm.memory.engrams import EMPTY, LONG_TERM, EngramGraph, Engrams, moved
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows
from memlm.tensors import take


class MemoriaState(NamedTuple):
    """Engrams, and those that the next segment reads.

    Attributes:
        engrams: Engrams and their graph.
        active: Slots of working memory, then of what it was reminded of, (B, A); -1 where none.
    """

    engrams: Engrams
    active: Tensor


class MemoriaMemory(Slots):
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

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    around = "layers"
    sized = ("n_slot", "n_stm")

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
        self.d_model, self.n_head, self.extension = d_model, n_head, extension
        self.graph = EngramGraph(n_slot, n_working, n_stm, n_reminded_stm, n_reminded_ltm, search_depth, lifespan)
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

    def prepare(self, state: MemoriaState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the engrams to read, (B, A, D) each, and their slots, (B, A), -1 where none."""
        engrams, at = state.engrams, state.active.clamp(min=0)
        held = (state.active >= 0) & (engrams.kind.gather(1, at) != EMPTY)
        content = self.engram_norm(take(engrams.data, at))
        return self.read_key(content), self.read_value(content), state.active.masked_fill(~held, -1)

    def read(self, y: Tensor, prepared: tuple[Tensor, Tensor, Tensor]) -> Read:
        """Multi-head attention of tokens over engrams and a null one of score 0 and value 0. See `Memory.read`."""
        key, value, slots = prepared
        gate = self.read_gate(y).sigmoid() * (slots >= 0).any(dim=1)[:, None, None]  # (B, T, 1)
        weight = self._weights(y, key, slots)  # (B, H, T, A)
        found = (weight @ self._heads(value)).transpose(1, 2).flatten(2)  # (B, T, D)
        slots = slots[:, None].expand(-1, y.shape[1], -1)
        return Read(gate * self.to_output(found), slots, weight.mean(dim=1), gate[..., 0])

    def write(self, segment: Segment, state: MemoriaState) -> tuple[MemoriaState, Trace]:
        """Lives go on by the attention paid, then the segment becomes working memory. See `Memory.write`.

        The attention is worked out again from the hidden states: a segment may have come in several calls.
        """
        graph = self.graph
        written = segment.complete[:, 0] & segment.valid.any(dim=1)  # (B,)
        reminded = state.active[:, graph.n_working :]
        gain = self._gain(segment, state)[:, graph.n_working :]
        engrams = graph.adjust(state.engrams, reminded, gain)
        engrams = graph.add(engrams, self._abstract(segment.hidden[:, :, -1], segment.valid | ~written[:, None]))
        given = segment.owned and not torch.is_grad_enabled()
        engrams, reminded = graph.remind(engrams, rows=written, given=given)
        active = torch.cat([graph.working(engrams), reminded], dim=1)
        trace = {
            "engrams": (engrams.kind != EMPTY).sum(dim=1).float().mean(),
            "long_term": (engrams.kind == LONG_TERM).sum(dim=1).float().mean(),
            "reminded": (reminded >= 0).sum(dim=1).float().mean(),
        } | moved(state.engrams, engrams, written)
        kept: Any = {
            name: where_rows(written, part, getattr(state.engrams, name))
            for name, part in engrams._asdict().items()
            if name != "cofire"  # by far the largest, and written in these rows alone
        }
        return MemoriaState(engrams._replace(**kept), where_rows(written, active, state.active)), trace

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
        key, _, slots = self.prepare(state)
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
