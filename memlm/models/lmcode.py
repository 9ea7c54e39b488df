"""LMCODE: a causal transformer whose layers read and write memories.

Source: LMCODE (Language Model with Memory CODE): token and position embeddings, memory-augmented layers (causal
self-attention, memories with gates, feed-forward), a language-model head, autoregressive generation.

How text is cut into segments: `memlm.models.segments`.

Shapes: B rows, S segments of the grid, T tokens per segment, Q columns computed, O overlap, D model width, H heads,
E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Context, Heads, Memory
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer, find_in
from memlm.models.segments import SegmentModel


class Column(NamedTuple):
    """Where the next token of each row stands, for `Layer.step`.

    Attributes:
        cell: Its cell in the caches of all rows one after the other, (B,).
        mask: Added to scores: 0 for the cells that it sees, -inf for others, (B, 1, 1, N) for the first N cells.
        turn: Cosines and sines of its rotation, (2, B, 1, 1, E); None if positions are learned.
    """

    cell: Tensor
    mask: Tensor
    turn: Tensor | None


class Opened(NamedTuple):
    """What a layer has of the open segment and the overlap before it, to be changed in place.

    Attributes:
        cache: As in `Layer.init_cache`.
        key: Keys after position encoding, (B, O + T, H, E).
    """

    cache: Tensor
    key: Tensor


class Attention(nn.Module):
    """Causal self-attention over a segment and the end of the one before, and over contexts that memories give."""

    causal: Tensor
    cells: Tensor
    own: Tensor
    rotation: Tensor | None

    def __init__(self, d_model: int, n_head: int, segment_len: int, overlap: int, rope: bool, dropout: float) -> None:
        super().__init__()
        self.n_head, self.overlap, self.dropout = n_head, overlap, dropout
        self.to_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        place = torch.arange(overlap + segment_len)
        # Query in column c sees the cells up to its own: (T, O + T).
        self.register_buffer("causal", place <= place[overlap:, None], persistent=False)
        self.register_buffer("cells", place, persistent=False)
        self.register_buffer("own", place >= overlap, persistent=False)  # cells of the segment itself, (O + T,)
        table = _rotation(place, d_model // n_head) if rope else None
        self.register_buffer("rotation", table, persistent=False)  # (2, O + T, E / 2)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of normalised hidden states (..., D): (..., 3, H, E)."""
        return self.to_qkv(x).unflatten(-1, (3, self.n_head, -1))

    def forward(
        self, qkv: Tensor, cache: Tensor, grid: Grid, contexts: Sequence[Context] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            qkv: What `project` gives, (B, S, Q, 3, H, E).
            cache: Keys and values of the segment before and of the open one, (B, O + T, 2, H, E).
            grid: Where the tokens lie.
            contexts: What is seen beside, with R rows.

        Returns:
            What was found (B * S, H, Q, E); keys and values of the grid (B, S, T, 2, H, E); and of the ends of the
            segments before each segment (B, S, O, 2, H, E).
        """
        query, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
        tail, opened = cache[:, : self.overlap], cache[:, self.overlap :]
        kv = grid.fill(kv, opened)  # (B, S, T, 2, H, E)
        before = torch.cat([tail[:, None], kv[:, :-1, kv.shape[2] - self.overlap :]], dim=1)  # (B, S, O, 2, H, E)
        key, value = torch.cat([before, kv], dim=2).flatten(0, 1).unbind(2)  # (B * S, O + T, H, E)
        query = query.flatten(0, 1)  # (B * S, Q, H, E)
        mask = self.causal[grid.columns] & (grid.flags.continues[..., None, None] | self.own)  # (B, S, Q, O + T)
        if contexts or not query.shape[1]:
            place = torch.arange(-self.overlap, kv.shape[2], device=kv.device)
            own = Context(key.transpose(1, 2), value.transpose(1, 2), mask.flatten(0, 1), place=place)
            out = self.attend_to(query.transpose(1, 2), [own, *contexts], place[self.overlap :][grid.columns])
            return out, kv, before
        if self.rotation is not None:
            query = _rotate(query, self.rotation[:, self.overlap :][:, grid.columns])
            key = _rotate(key, self.rotation)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask.flatten(0, 1)[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return out, kv, before

    def column(self, place: Tensor, continues: Tensor, most: int) -> Column:
        """See `SegmentLayer.column`."""
        n_cell = len(self.own)
        cell = place + self.overlap  # within its row
        n = self.overlap + most
        hidden = (self.cells[:n] > cell[:, None]) | ~(self.own[:n] | continues[:, None])
        mask = torch.zeros_like(hidden, dtype=self.to_qkv.weight.dtype).masked_fill_(hidden, -torch.inf)
        turn = None
        if self.rotation is not None:
            cos, sin = self.rotation.index_select(1, cell)[:, :, None, None]
            turn = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
        return Column(cell + n_cell * torch.arange(len(cell), device=cell.device), mask[:, None, None], turn)

    def step(self, qkv: Tensor, opened: Opened, column: Column, contexts: Sequence[Context] = ()) -> Tensor:
        """Attend from one more token of each row, of its queries, keys and values (B, 3, H, E): (B, H, 1, E)."""
        qk, plain = qkv[:, :2], qkv[:, 0, :, None]
        if column.turn is not None:
            cos, sin = column.turn.to(qk.dtype)
            qk = qk * cos + qk.roll(qk.shape[-1] // 2, dims=-1) * sin
        for buffer, new in ((opened.cache, qkv[:, 1:]), (opened.key, qk[:, 1])):
            buffer.flatten(0, 1).index_copy_(0, column.cell, new.to(buffer.dtype))
        n = column.mask.shape[-1]
        key, value = opened.key[:, :n].transpose(1, 2), opened.cache[:, :n, 1].transpose(1, 2)
        query, mask = qk[:, 0, :, None], column.mask.to(qk.dtype)
        if not contexts:
            return F.scaled_dot_product_attention(query, key, value, mask)
        own = (query, Context(key, value, bias=mask))
        return self._find([own, *self._turned(plain, query, contexts)])

    def attend_to(self, query: Tensor, contexts: Sequence[Context], place: Tensor | None = None) -> Tensor:
        """What queries (R, H, L, E) find in contexts, in one softmax over all of them: (R, H, L, E)."""
        return self._find(self._turned(query, self._at(query, place), contexts))

    def _turned(self, query: Tensor, turned: Tensor, contexts: Sequence[Context]) -> list[tuple[Tensor, Context]]:
        """Contexts, keys that have a place at it, each with the queries that ask it: without or at their place."""
        return [
            (query, context)
            if context.place is None
            else (turned, context._replace(key=self._at(context.key, context.place)))
            for context in contexts
        ]

    def _find(self, parts: Sequence[tuple[Tensor, Context]]) -> Tensor:
        """What queries find in the contexts that they ask, in one softmax over all, (R, H, L, E)."""
        scale = parts[0][0].shape[-1] ** -0.5
        return find_in(parts, scale, lambda score: F.dropout(score.softmax(dim=3), self.dropout, self.training))

    def _at(self, x: Tensor, place: Tensor | None) -> Tensor:
        """Queries or keys (R, H, ..., L, E) at ``place`` (L,), or (R, L), of the segment."""
        if place is None or self.rotation is None:
            return x
        cos, sin = _rotation(place + self.overlap, x.shape[-1]).to(x.dtype)
        if place.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _rotation(place: Tensor, width: int) -> Tensor:
    """Cosines and sines by which heads of a ``width`` are turned at each ``place`` (..., L), (2, ..., L, E / 2)."""
    angle = place[..., None] / 10_000 ** (torch.arange(0, width, 2, device=place.device) / width)
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position encoding of ``x`` (N, L, H, E) by ``rotation`` (2, L, E / 2)."""
    cos, sin = rotation.to(x.dtype)
    # Tables for all heads side by side, so that a pass runs over long rows: half the time on a CPU.
    both = torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])  # (2, L, E)
    cos, sin = both[:, :, None].expand(-1, -1, x.shape[2], -1).contiguous()
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1) * sin


class Layer(SegmentLayer):
    """Memory-augmented layer: self-attention, memories, feed-forward."""

    def __init__(
        self, d_model: int, n_head: int, d_ff: int, segment_len: int, overlap: int, rope: bool, dropout: float
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = Attention(d_model, n_head, segment_len, overlap, rope, dropout)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(d_model),
            nn.Linear(d_model, d_ff, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(d_ff, d_model, bias=False),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def init_cache(self, n_row: int) -> Tensor:
        """Keys and values before position encoding of the end of the segment before and of the open segment.

        Shape (B, O + T, 2, H, E).
        """
        attention, weight = self.attention, self.attention.to_qkv.weight
        n_cell, width = len(attention.own), weight.shape[1] // attention.n_head
        shape = (n_row, n_cell, 2, attention.n_head, width)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # no part of a weight that is dealt out

    def mix(
        self, x: Tensor, cache: Tensor, grid: Grid, contexts: Sequence[Context] = ()
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Self-attention with its residual; see `Attention`."""
        found, kv, before = self.attention(self.attention.project(self.attention_norm(x)), cache, grid, contexts)
        return self.out(found, x), (kv, before)

    def column(self, place: Tensor, continues: Tensor, most: int) -> Column:
        """See `SegmentLayer.column`."""
        return self.attention.column(place, continues, most)

    def opened(self, cache: Tensor, place: Tensor, continues: Tensor) -> Opened:
        """See `SegmentLayer.opened`."""
        rotation, key = self.attention.rotation, cache[:, :, 0]
        return Opened(cache.clone(), key.clone() if rotation is None else _rotate(key, rotation))

    def step(self, x: Tensor, opened: Opened, column: Column, contexts: Sequence[Context] = ()) -> Tensor:
        """See `SegmentLayer.step`."""
        attention = self.attention
        found = attention.step(attention.project(self.attention_norm(x)), opened, column, contexts)
        return x + attention.to_output(found.flatten(1))

    def attend_step(self, heads: Heads, opened: Opened, column: Column, contexts: Sequence[Context] = ()) -> Tensor:
        """See `SegmentLayer.attend_step`."""
        return self.attention.step(torch.cat(heads, dim=2).transpose(1, 2), opened, column, contexts)

    def closed(self, opened: Opened) -> Tensor:
        """See `SegmentLayer.closed`."""
        return opened.cache

    def heads(self, x: Tensor) -> Heads:
        """See `SegmentLayer.heads`."""
        query, key, value = self.attention.project(self.attention_norm(x)).movedim(2, 0).transpose(2, 3)
        return Heads(query, key, value)

    def attend(
        self, heads: Heads, cache: Tensor, grid: Grid, contexts: Sequence[Context] = ()
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `SegmentLayer.attend`."""
        parts = [part.transpose(1, 2).reshape(*grid.new.shape[:2], grid.n_column, *part.shape[1::2]) for part in heads]
        found, kv, before = self.attention(torch.stack(parts, dim=3), cache, grid, contexts)
        return found, (kv, before)

    def attend_to(self, query: Tensor, contexts: Sequence[Context], place: Tensor | None = None) -> Tensor:
        """See `SegmentLayer.attend_to`."""
        return self.attention.attend_to(query, contexts, place)

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See `SegmentLayer.out`."""
        return x + self.dropout(self.attention.to_output(mixed.transpose(1, 2).reshape(x.shape)))

    def seen(self, kept: tuple[Tensor, Tensor], grid: Grid) -> list[Context]:
        """See `SegmentLayer.seen`."""
        kv, before = kept
        place = torch.arange(-before.shape[2], kv.shape[2], device=kv.device)
        found = []
        masks = (grid.flags.continues[..., None].expand(-1, -1, before.shape[2]), grid.valid)
        for part, mask, at in zip((before, kv), masks, place.split([before.shape[2], kv.shape[2]]), strict=True):
            key, value = part.flatten(0, 1).transpose(1, 3).unbind(2)  # (R, H, L, E)
            found.append(Context(key, value, mask.flatten(0, 1), place=at))
        return found

    def next_cache(self, kept: tuple[Tensor, Tensor], stays_open: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """See `SegmentLayer.next_cache`."""
        kv, before = kept
        tail = stays_open(before, kv[:, -1, kv.shape[2] - self.attention.overlap :])
        return torch.cat([tail, stays_open(kv, torch.zeros_like(kv[:, 0]))], dim=1)


class LMCode(SegmentModel):
    """Transformer language model with memory.

    Args:
        n_vocab: Size of the vocabulary.
        memories: By name, a constructor of one memory module, called with ``d_model``.
        n_layer: Number of layers.
        n_head: Attention heads per layer.
        d_model: Width.
        d_ff: Width of the feed-forward; None for four times ``d_model``.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that attention still sees.
        position: ``rope`` (rotary) or ``learned`` (an embedding of the place within the segment).
        dropout: Dropout probability.
        memory_layers: Layers with memory: ``middle``, ``all``, or a list of indices from 0.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        n_vocab: int,
        memories: Mapping[str, Callable[..., Memory]],
        n_layer: int = 4,
        n_head: int = 4,
        d_model: int = 128,
        d_ff: int | None = None,
        segment_len: int = 128,
        overlap: int = 16,
        position: Literal["rope", "learned"] = "rope",
        dropout: float = 0.0,
        memory_layers: Literal["middle", "all"] | list[int] = "middle",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(n_vocab, n_layer, d_model, segment_len, overlap, memory_layers, gradient_checkpointing)
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"model.n_head must divide model.d_model ({d_model}), got {n_head}")
        if position == "rope" and (d_model // n_head) % 2:
            raise ValueError(
                f"rotary positions need an even head width, got {d_model} / {n_head} = {d_model // n_head}"
            )
        if d_ff is not None and d_ff < 1:
            raise ValueError(f"model.d_ff must be at least 1 or null, got {d_ff}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {dropout}")
        self.n_head = n_head

        self.embedding = nn.Embedding(n_vocab, d_model)
        self.position_embedding = nn.Embedding(segment_len, d_model) if position == "learned" else None
        self.layers = nn.ModuleList(
            Layer(d_model, n_head, d_ff or 4 * d_model, segment_len, overlap, position == "rope", dropout)
            for _ in range(n_layer)
        )
        self.norm = nn.RMSNorm(d_model)
        self.attach(memories)
        self._initialise()

    def _initialise(self) -> None:
        """All initial values of the transformer; memories have their own.

        Embeddings enter with unit variance (`embed` scales them) and so dominate the stream at first; weights have
        variance 1 / fan-in, residual outputs less.
        """
        nn.init.normal_(self.embedding.weight, std=self.d_model**-0.5)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=0.1)
        for layer in self.layers:
            for linear in (layer.attention.to_qkv, layer.feed_forward[1]):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (layer.attention.to_output, layer.feed_forward[3]):
                nn.init.normal_(linear.weight, std=(2 * self.n_layer * linear.in_features) ** -0.5)

    def enter(self, embeddings: Tensor, columns: slice | Tensor) -> Tensor:
        """Embeddings, with learned positions if there are any."""
        return embeddings if self.position_embedding is None else embeddings + self.position_embedding.weight[columns]
