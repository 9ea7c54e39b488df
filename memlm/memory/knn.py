"""Nearest tokens: each head attends to those of the last tokens whose keys fit its query best.

Source: Y. Wu, M. Rabe, D. Hutchins, C. Szegedy, "Memorizing transformers" (ICLR 2022, 2203.08913). The bank holds keys
and values of the layer's own heads, before positions are encoded; no gradient reaches them; each head reads its best
``top_k`` in a softmax of their own, and a gate mixes that with what attention finds. Other than there:

- A learned null key with a value of its own is read beside the best. It is all that an empty bank gives, and lets a
  head read nothing. In the paper a head that reads has no such choice.
- The temperature of normalised keys is learned per head. Keys and queries of attention itself are not normalised.
- The search is exact. There is no Transformer-XL cache beside the bank; text sees the overlap.
- Without a gate (``gate=null``) what is found joins the softmax of attention, as in Unlimiformer (2305.01625) and
  InfLLM (2402.04617): nothing has to be learned, and an empty bank changes nothing. A token then enters the bank when
  it leaves the overlap, so that none is seen twice, and may keep its place in the text (``reach``).

``chunk`` is the retrieval of LongMem (W. Wang et al., "Augmenting language models with long-term memory", NeurIPS 2023,
2306.07174): chunks of tokens are scored by the means of their keys, and all tokens of the best are read. Chunks lie on
the grid of segments here, so that they do not depend on calls. Its side network is `memlm.models.longmem`.

Shapes: B rows, S segments, T tokens per segment, N = S * Q queries, D model width, H heads, E width of a head, n tokens
of the bank, c tokens of a chunk, L cells that a window may read, k tokens read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Context, Mixer, Needs, Read, Scanned, Segment, Sizes, Trace
from memlm.memory.slots import Slots
from memlm.memory.state import own
from memlm.retrieval.exact import Pool, gather_best, search, search_best, weigh, weighted_sum
from memlm.tensors import take


class KnnState(NamedTuple):
    """The last tokens. Chunk number i of a document stands in place i modulo n / c.

    Attributes:
        key: Of each head, (B, H, n, E); zero where a slot is empty.
        value: As ``key``.
        full: Which slots hold a token, (B, n).
        n_chunk: Chunks that the document has had, (B,).
    """

    key: Tensor
    value: Tensor
    full: Tensor
    n_chunk: Tensor


class _Cells(NamedTuple):
    """What a window may read: the bank, then the window's own tokens."""

    key: Tensor  # (B, H, L, E)
    value: Tensor  # (B, H, L, E)
    visible: Tensor  # which of them segment s may read, (B, S, L)
    slot: Tensor  # where each stands in the bank, (B, L)


class KnnMemory(Slots):
    """The last ``n_token`` tokens, of which each query of each head reads the ``top_k`` best.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_token: Tokens that are kept; the oldest give way.
        top_k: Tokens that each head reads.
        chunk: Tokens that are found and replaced together. Above 1 they are found by the mean of their keys, and a
            chunk at the end of a segment may have fewer.
        norm_keys: Whether keys and queries are compared at length 1 and a learned temperature, or as attention does.
        temperature: Inverse temperature of normalised keys at first.
        gate: Share of memory in each head at first, in (0, 1); None for one softmax with what attention sees, without
            a null key. Keys are then compared as attention does.
        reach: Without a gate, tokens before a segment where the oldest of what is kept stand; None for no place: scores
            are then those of queries and keys before positions are encoded.
        gradient: Whether gradients flow into the bank, inside a window; not so in the paper.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_token",)

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        n_token: int = 2048,
        top_k: int = 32,
        chunk: int = 1,
        norm_keys: bool = True,
        temperature: float = 10.0,
        gate: float | None = 0.5,
        reach: int | None = None,
        gradient: bool = False,
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        for name, size in {"n_token": n_token, "top_k": top_k}.items():
            if size < 1 or size % chunk:
                raise ValueError(f"{name} must be a positive multiple of chunk ({chunk}), got {size}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if gate is not None and not 0 < gate < 1:
            raise ValueError(f"gate must be in (0, 1), or null for one softmax with attention, got {gate}")
        if gate is None and norm_keys:
            raise ValueError("gate can be null only with norm_keys=false: attention compares keys as they are")
        if reach is not None and (gate is not None or reach <= sizes.overlap):
            raise ValueError(
                f"reach must be null, or with gate=null a number of tokens above the overlap ({sizes.overlap}), got "
                f"{reach}"
            )
        self.n_token, self.top_k, self.chunk, self.gradient = n_token, top_k, chunk, gradient
        self.n_head, self.width = sizes.n_head, d_model // sizes.n_head
        self.overlap, self.reach = sizes.overlap, reach
        self.needs = Needs(heads=True, context=gate is None, lookback=sizes.overlap if gate is None else 0)
        self.register_buffer("cell", torch.zeros(self.width), persistent=False)  # an empty one
        self.log_temperature: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        if gate is None:
            return
        self.gate = nn.Parameter(torch.full((self.n_head,), math.log(gate / (1 - gate))))
        self.null_key = nn.Parameter(torch.randn(self.n_head, self.width))
        self.null_value = nn.Parameter(torch.zeros(self.n_head, self.width))
        if norm_keys:
            self.log_temperature = nn.Parameter(torch.full((self.n_head,), math.log(temperature)))

    def init_state(self, n_row: int) -> KnnState:
        """No tokens."""
        key = self.get_buffer("cell").new_zeros(n_row, self.n_head, self.n_token, self.width)
        return KnnState(key, key.clone(), key[:, 0, :, 0].bool(), key[:, 0, 0, 0].long())

    def mix(self, x: Tensor, prepared: KnnState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """Each head takes a share of what it finds in the bank; see `Memory.mix`."""
        heads = mixer.heads(x)
        if self.gate is None:
            return mixer(x, self._context(heads.q, prepared)), None
        slot = torch.arange(self.n_token, device=x.device).expand_as(prepared.full)
        found, read = self._find(heads.q, _Cells(prepared.key, prepared.value, prepared.full[:, None], slot))
        return mixer.out(self._mixed(found, mixer.attend(heads)), x), read

    def write(self, segment: Segment, state: KnnState) -> tuple[KnnState, Trace]:
        """Keep the segment's keys and values, in place of the oldest; see `Memory.write`."""
        return self._pass(segment, state, read=False)[1], self._gates()

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: KnnState,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        """Read and write all segments at once; see `Memory.scan`.

        Bank and window lie side by side, once: each segment sees the last ``n_token`` tokens before it.
        """
        n_segment = window.n_segment
        if n_segment == 1 or self.gate is None:
            return super().scan(x, window, state, mixer, read, write, keep_state)
        cells, after = self._pass(window, state, write, read)
        trace = self._gates() if write else {}
        rows = x.reshape(len(x) * n_segment, -1, x.shape[2])  # (B * S, Q, D)
        if cells is None:
            return Scanned(self.off(rows, mixer).view_as(x), None, after, trace)
        heads = mixer.heads(rows)
        query = heads.q.unflatten(0, (-1, n_segment)).transpose(1, 2).flatten(2, 3)  # (B, H, N, E)
        found, told = self._find(query, cells)
        found = found.unflatten(2, (n_segment, -1)).transpose(1, 2).flatten(0, 1)  # (B * S, H, Q, E)
        y = mixer.out(self._mixed(found, mixer.attend(heads)), rows)
        return Scanned(y.view_as(x), told, after, trace)

    def offsets(self, state: KnnState) -> Tensor:
        """Where each slot stands before a segment, counted in slots, (B, n): the newest right before the overlap."""
        first = (self._number(state) - state.n_chunk[:, None]) * self.chunk - self.overlap
        return (first[..., None] + torch.arange(self.chunk, device=first.device)).flatten(1)

    def places(self, state: KnnState) -> Tensor | None:
        """See `Slots.places`; None where tokens are kept in chunks, which may have gaps."""
        return None if self.chunk > 1 else self._number(state).masked_fill(~state.full, -1)

    def _number(self, state: KnnState) -> Tensor:
        """Which chunk of the text, counted from 0, has each place, (B, n / chunk); below 0 for none."""
        n_place, last = self.n_token // self.chunk, state.n_chunk[:, None] - 1
        return last - (last - torch.arange(n_place, device=last.device)).remainder(n_place)

    def filled(self, state: KnnState) -> Tensor:
        """See `Slots.filled`."""
        return state.full

    def contents(self, state: KnnState) -> Tensor:
        """Keys and values of all heads, (B, n, 2 D)."""
        return torch.cat([part.transpose(1, 2).flatten(2) for part in (state.key, state.value)], dim=2)

    def forget(self, state: KnnState, slots: Tensor) -> KnnState:
        """See `Slots.forget`."""
        key, value = (part.masked_fill(slots[:, None, :, None], 0) for part in (state.key, state.value))
        return state._replace(key=key, value=value, full=state.full & ~slots)

    def flops_per_token(self) -> int:
        """Scores of the bank, what is read of it, and keys and values made again for the write."""
        d_model, read = self.n_head * self.width, self.top_k + 1
        scored = self.n_token // self.chunk + (read if self.chunk > 1 else 1)
        return 6 * d_model**2 + 2 * d_model * (scored + read)

    def _gates(self) -> Trace:
        if self.gate is None:
            return {}
        return {f"gate_{head}": gate for head, gate in enumerate(self.gate.detach().sigmoid())}

    def _context(self, query: Tensor, bank: KnnState) -> Context:
        """The bank as attention sees it: of each head's queries (B, H, Q, E) their best."""
        place = self.offsets(bank).clamp(min=-self.reach) if self.reach is not None else None
        if self.top_k >= self.n_token:
            return Context(bank.key, bank.value, bank.full, place=place)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            key, visible = bank.key.flatten(0, 1), bank.full.repeat_interleave(self.n_head, dim=0)[:, None]
            pool = Pool(key, key, key.new_zeros(key.shape[:2]), visible)
            find = search if self.chunk == 1 else self._search_chunks
            score, index = search_best(find, query.flatten(0, 1), query.new_ones(()), -1.0, self.top_k, pool)
            best = torch.full((*score.shape[:2], self.n_token), -torch.inf, device=query.device)
            best = best.scatter(2, index, torch.zeros_like(score).masked_fill(score == -torch.inf, -torch.inf))
        return Context(bank.key, bank.value, None, best.unflatten(0, (-1, self.n_head)), place)

    def _mixed(self, found: Tensor, local: Tensor) -> Tensor:
        assert self.gate is not None
        gate = self.gate.sigmoid()[:, None, None]
        return gate * found + (1 - gate) * local

    def _find(self, query: Tensor, cells: _Cells) -> tuple[Tensor, Read]:
        """What queries (B, H, N, E) find in the bank and under the null key, (B, H, N, E)."""
        n_row, n_head, n_query, _ = query.shape
        assert self.gate is not None
        with torch.autocast(query.device.type, enabled=False):
            null_key: Tensor = self.null_key
            scale = query.new_full((n_head,), self.width**-0.5)
            if self.log_temperature is not None:
                query, null_key = F.normalize(query, dim=-1), F.normalize(null_key, dim=-1)
                scale = self.log_temperature.exp()
            query = (query * scale[:, None, None]).flatten(0, 1)  # (B * H, N, E)
            key, value = cells.key.flatten(0, 1), cells.value.flatten(0, 1)  # (B * H, L, E)
            visible = cells.visible.repeat_interleave(n_head, dim=0)
            pool = Pool(key, value, key.new_zeros(key.shape[:2]), visible)
            best_of = gather_best if key.requires_grad else search_best
            find = search if self.chunk == 1 else self._search_chunks
            score, index = best_of(find, query, query.new_ones(()), -1.0, min(self.top_k, key.shape[1]), pool)
            null = query @ null_key.repeat(n_row, 1)[..., None]  # (B * H, N, 1)
            weight = weigh(score, null)  # (B * H, N, k)
            left = 1 - weight.sum(dim=2, keepdim=True)
            found = weighted_sum(weight, value, index) + left * self.null_value.repeat(n_row, 1)[:, None]
        slots = cells.slot.repeat_interleave(n_head, dim=0).gather(1, index.flatten(1)).view_as(index)
        slots = slots.masked_fill(score == -torch.inf, -1)

        def of_tokens(part: Tensor) -> Tensor:
            """What all heads read, (B, N, H * k)."""
            return part.unflatten(0, (n_row, n_head)).transpose(1, 2).flatten(2)

        gate = self.gate.sigmoid().mean().expand(n_row, n_query)
        read = Read(slots=of_tokens(slots), weights=of_tokens(weight) / n_head, gate=gate)
        return found.unflatten(0, (n_row, n_head)), read

    def _search_chunks(
        self, query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of all tokens of the chunks with the best means; a `memlm.retrieval.exact.Search`."""
        n_row, n_query, _ = query.shape
        seen = bank.visible.unflatten(2, (-1, self.chunk))  # (B, S, chunks, c)
        n_full = seen.any(dim=1).sum(dim=2).clamp(min=1)
        mean = bank.key.unflatten(1, (-1, self.chunk)).sum(dim=2) / n_full[..., None]  # empty cells are zero
        chunks = Pool(mean, mean, mean.new_zeros(mean.shape[:2]), seen.any(dim=3))
        _, chosen = search(query, temperature, threshold, k // self.chunk, chunks)
        inside = torch.arange(self.chunk, device=query.device)
        index = (chosen[..., None] * self.chunk + inside).flatten(2)  # (B, N, k)
        key = take(bank.key, index.flatten(1)).view(n_row, n_query, k, -1)
        score = temperature * (key @ query[..., None])[..., 0]
        there = bank.visible.gather(2, index.view(n_row, seen.shape[1], -1)).view_as(index)
        return score.masked_fill(~there, -torch.inf), index

    def _pass(
        self, window: Segment, state: KnnState, write: bool = True, read: bool = True
    ) -> tuple[_Cells | None, KnnState]:
        """What the segments of a window may read, None if they do not, and the bank after it."""
        assert window.heads is not None  # as they are among the `needs`
        n_place = self.n_token // self.chunk
        valid = window.valid
        if self.gate is None:  # what attention sees no more, of one segment and the overlap before it
            cell = torch.arange(valid.shape[1], device=valid.device)
            valid = valid & ((cell < window.segment_len) | window.closes)
        new = valid.unflatten(1, (window.n_segment, -1)) & window.complete[..., None] & write  # (B, S, T)
        new = F.pad(new, (0, -new.shape[2] % self.chunk))
        number, last, count = self._last(new.unflatten(2, (-1, self.chunk)).any(dim=3), window.reset, state.n_chunk)
        key, value = self._cells(self._unit(window.heads.k), new), self._cells(window.heads.v, new)
        cells = None
        if read:
            inside = torch.arange(self.chunk, device=new.device)
            slot = (number.remainder(n_place)[..., None] * self.chunk + inside).flatten(1)  # (B, L)
            full = torch.cat([state.full, new.flatten(1)], dim=1)
            visible = full[:, None] & last[:, :-1].repeat_interleave(self.chunk, dim=2)
            cells = _Cells(torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2), visible, slot)

        # Each place takes the chunk that is kept there; one place more is for all that goes.
        where = torch.where(last[:, -1], number.remainder(n_place), n_place)
        chunk = torch.arange(where.shape[1], device=new.device).expand_as(where)
        source = where.new_full((len(where), n_place + 1), -1).scatter(1, where, chunk)[:, :n_place]
        new_parts = (key, value, new.flatten(1)[:, None, :, None])
        if not torch.is_grad_enabled():
            return cells, self._put(own(state, window.owned), new_parts, source, count)
        inside = torch.arange(self.chunk, device=new.device)
        taken = (source >= 0)[..., None].expand(-1, -1, self.chunk).flatten(1)[:, None, :, None]  # (B, 1, n, 1)
        cell = (source.clamp(min=0)[..., None] * self.chunk + inside).flatten(1)[:, None, :, None]
        kept = []
        for old, part in zip((state.key, state.value, state.full[:, None, :, None]), new_parts, strict=True):
            every = torch.cat([old, part], dim=2)
            kept.append(every.gather(2, cell.expand(-1, every.shape[1], -1, every.shape[3])) * taken)
        return cells, KnnState(kept[0], kept[1], kept[2][:, 0, :, 0], count)

    def _put(self, state: KnnState, new: tuple[Tensor, ...], source: Tensor, count: Tensor) -> KnnState:
        """The bank with what changes of it written in place.

        Args:
            state: The bank before, which is given away.
            new: Keys and values of the window (B, H, S * T, E), and which of its cells hold a token (B, 1, S * T, 1).
            source: The chunk that each place is to hold, of those of the bank and then of the window, (B, n / c); -1
                for none.
            count: Chunks that the document has had after the window, (B,).
        """
        n_place = source.shape[1]
        row, place = (source != torch.arange(n_place, device=source.device)).nonzero(as_tuple=True)
        source = source[row, place] - n_place  # of the window's own chunks
        empty = (source < 0).view(-1, 1, 1, 1)
        for old, part in zip((state.key, state.value, state.full[:, None, :, None]), new, strict=True):
            held, came = (each.unflatten(2, (-1, self.chunk)).transpose(1, 2) for each in (old, part))
            held[row, place] = came[row, source.clamp(min=0)].masked_fill(empty, 0)
        return state._replace(n_chunk=count)

    def _last(self, written: Tensor, reset: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which chunks are the last of their document, of K chunks of the bank and then of a window.

        Args:
            written: Which chunks of the window are written, (B, S, chunks).
            reset: Segments that begin a document, (B, S); None if none does.
            count: Chunks that the document of the bank has had, (B,).

        Returns:
            Numbers of the chunks in their documents, (B, K); which of them are the last n / c before each segment and
            after the window, (B, S + 1, K); and chunks that the document has had after it, (B,).
        """
        place = torch.arange(self.n_token // self.chunk, device=count.device)
        begins = torch.zeros_like(written[..., 0]) if reset is None else reset
        before = [count]  # chunks of its document before each segment
        for s in range(written.shape[1]):
            before[s] = before[s].masked_fill(begins[:, s], 0)
            before.append(before[s] + written[:, s].sum(dim=1))
        begun = torch.stack(before, dim=1)  # (B, S + 1)
        document = begins.long().cumsum(dim=1)  # 0 for that of the bank
        held = count[:, None] - 1 - (count[:, None] - 1 - place).remainder(len(place))
        number = torch.cat([held, (begun[:, :-1, None] + written.long().cumsum(dim=2) - 1).flatten(1)], dim=1)
        there = torch.cat([torch.ones_like(held, dtype=torch.bool), written.flatten(1)], dim=1)
        of = torch.cat([torch.zeros_like(held), document.repeat_interleave(written.shape[2], dim=1)], dim=1)
        same = of[:, None] == torch.cat([document, document[:, -1:]], dim=1)[..., None]
        age = begun[..., None] - number[:, None]  # from 1 on
        return number, there[:, None] & same & (age > 0) & (age <= len(place)), before[-1]

    def _unit(self, key: Tensor) -> Tensor:
        return key if self.log_temperature is None else F.normalize(key, dim=-1)

    def _cells(self, part: Tensor, new: Tensor) -> Tensor:
        """Keys or values of a window (B, H, S * T, E) as the bank keeps them, in whole chunks and zero where empty."""
        cells = (part if self.gradient else part.detach()).unflatten(2, (new.shape[1], -1))
        cells = F.pad(cells, (0, 0, 0, new.shape[2] - cells.shape[3]))
        return cells.flatten(2, 3) * new.flatten(1)[:, None, :, None]
