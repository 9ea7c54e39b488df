"""A decoder layer of transformers as a layer that memories stand around.

Nothing of a layer's code is repeated here. Its attention is registered with the `AttentionInterface` of transformers:
the layer makes queries, keys and values, positions included, and asks a function of this file what they find. That
function lays keys on the grid of segments and attends by what transformers would have taken. The same door gives heads
to memories (the function keeps them, and the layer is left) and takes back what memories made of them (the function
answers with it).

A layer is called with what its base tells it beside the stream: see `memlm.models.shell`.

Shapes: B rows, S segments of the grid, R = B * S, T tokens per segment, Q columns computed, F tokens before a segment
that are taken in again, D model width, H heads, G heads of keys, E width of a head, M keys of a context.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Context, Heads
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer, find_in
from memlm.models.shell import Shell, Told

ATTENTION = "memlm"
"""Name of the attention in transformers."""

Attend = Callable[[Any, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
"""From a module of attention, queries (R, H, Q, E), keys and values (R, G, Q, E) and how to attend: what is found."""

_attend: ContextVar[Attend] = ContextVar("attend")
_ASIDE = {"position_ids", "cache_position"}  # tensors that an attention is told and does not use


class _Left(Exception):
    """A layer is left, as its heads are all that was wanted."""


def register() -> None:
    """Make the attention of this file known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **how: Any
) -> tuple[Tensor, None]:
    found = _attend.get()(module, query, key, value, how)  # (R, H, Q, E)
    return found.transpose(1, 2).contiguous(), None


class Keys(NamedTuple):
    """Keys and values, positions included, (B, S, L, G, E) or (B, L, G, E)."""

    key: Tensor
    value: Tensor


class Before(NamedTuple):
    """What is known of a grid before the layers run.

    Attributes:
        entered: What enters the first layer, (B, S, Q, D).
        told: What each layer is told.
        keys: By layer, those of the tokens that each segment takes in again, (B, S, F, G, E); None if they are known
            from the call before.
        columns: Places of the cells that are computed, (B, S, Q).
        cells: Places of the tokens that are taken in again and of all cells, (B, S, F + T).
        seen: Which of these may be seen, (B, S, Q, F + T).
        below: What came out of layers that ran before, by depth from what entered them on, (B, S, Q, D).
        kept: What their `SegmentLayer.next_cache` needs.
    """

    entered: Tensor
    told: list[Told]
    keys: list[Keys] | None
    columns: Tensor
    cells: Tensor
    seen: Tensor
    below: tuple[Tensor, ...] = ()
    kept: tuple[tuple[Keys, Keys], ...] = ()

    def of(self, begin: int, end: int) -> Before:
        """That of segments ``begin`` to ``end``, the last not included, without what ran before."""
        n_row, n_segment = self.columns.shape[:2]

        def pick(part: Tensor) -> Tensor:
            return part.unflatten(0, (n_row, n_segment))[:, begin:end].flatten(0, 1)

        keys = None if self.keys is None else [Keys(k[:, begin:end], v[:, begin:end]) for k, v in self.keys]
        told = [part.of(n_row * n_segment, pick) for part in self.told]
        columns, cells, seen = (part[:, begin:end] for part in (self.columns, self.cells, self.seen))
        return Before(self.entered[:, begin:end], told, keys, columns, cells, seen)


class Step(NamedTuple):
    """What is known of one more token of each row before the layers run.

    Attributes:
        before: Its grid, of one segment and column: cells up to those that may be seen.
        cell: Where its keys and values go, among those of `DecoderLayer.init_cache`, (B,).
        whole: Whether all these cells are seen, so that no mask is needed.
    """

    before: Before
    cell: Tensor
    whole: bool


class DecoderLayer(SegmentLayer):
    """A decoder layer of transformers, its feed-forward included: memories stand around all of it.

    Args:
        number: Its place.
        base: The layer.
        shell: The base around it.
        attention: By which attention of transformers it attends: ``sdpa`` or ``eager``.
        n_again: Tokens before a segment that are taken in again, ``F``.
        segment_len: Tokens per segment.
        scale: By how much the stream is too large for the layer.

    Raises:
        ValueError: If it is no layer whose attention can be taken.
    """

    def __init__(
        self, number: int, base: nn.Module, shell: Shell, attention: str, n_again: int, segment_len: int, scale: float
    ) -> None:
        super().__init__()
        self.number, self.base, self.feed_forward = number, base, _Nothing()
        self._shell = (shell,)  # a tuple, so that it is no part of this
        self.attention, self.n_again, self.segment_len, self.scale = attention, n_again, segment_len, scale
        self.window: int | None = None  # tokens that its attention reaches back
        self.turned: Literal["no", "halves", "pairs"] = "no"  # how places turn queries and keys
        weight = next(self.base.parameters())
        x = torch.ones(1, 3, shell.causal.config.hidden_size, dtype=weight.dtype, device=weight.device)
        at = torch.tensor([[0, 0, 0], [2, 0, 1]], device=x.device)
        (q, k, v, how), (moved, *_) = (self._heads_at(x, places[None]) for places in at)
        self.scaling, self.softcap = how.get("scaling"), how.get("softcap")
        self.n_key, self.width = k.shape[1], k.shape[3]
        if v.shape != k.shape:
            raise ValueError("its keys and values differ in width")
        window = how.get("sliding_window")
        self.window = window if isinstance(window, int) else None
        fits = [style for style in ("no", "halves", "pairs") if _alike(self._turn(q, at[1:], style), moved)]
        unknown = [name for name, value in how.items() if torch.is_tensor(value) and name not in _ASIDE]
        self.n_head = q.shape[1] if fits and not unknown else 0  # else none that memories can use
        if fits:
            self.turned = fits[0]  # type: ignore[assignment]

    # --- what every layer does ---------------------------------------------------------------------------------------

    def init_cache(self, n_row: int) -> Keys:
        """Keys and values of the tokens that the open segment took in again, and of it, (B, F + T, G, E)."""
        weight = next(self.base.parameters())
        shape = (n_row, self.n_again + self.segment_len, self.n_key, self.width)
        return Keys(*(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)))

    def mix(
        self, x: Tensor, cache: Keys, grid: Grid, contexts: Sequence[Context] = ()
    ) -> tuple[Tensor, tuple[Keys, Keys]]:
        """All of the layer; see `SegmentLayer.mix`."""
        if not x.shape[2]:
            return x, self._cells(None, cache, grid)
        kept: list[tuple[Keys, Keys]] = []

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
            own = (part.transpose(1, 2).unflatten(0, grid.new.shape[:2]) for part in (key, value))
            kept.append(self._cells(Keys(*own), cache, grid))
            if contexts:
                return self._found(query, self._seen(kept[-1]), grid.before, contexts)
            if not self.n_again and grid.fresh and grid.n_column == grid.segment_len:
                return self._plainly(module, query, key, value, None, how)
            key, value = self._seen(kept[-1])
            return self._plainly(module, query, key, value, self._mask(grid.before)[:, None], how)

        y = self._run(x.flatten(0, 1), grid.before.told[self.number], attend)
        return y.view_as(x), kept[-1]

    def next_cache(self, kept: tuple[Keys, Keys], stays_open: Callable[[Tensor, Tensor], Tensor]) -> Keys:
        """See `SegmentLayer.next_cache`."""
        parts = []
        for again, own in zip(*kept, strict=True):
            parts.append(torch.cat([stays_open(part, torch.zeros_like(part[:, 0])) for part in (again, own)], dim=1))
        return Keys(*parts)

    def again(self, x: Tensor, told: Told, mask: Tensor | None) -> tuple[Tensor, Keys]:
        """The base alone: the stream (R, L, D) behind the layer, and keys and values (R, L, G, E).

        Args:
            x: The stream.
            told: What the layer is told.
            mask: What each token sees, (R, 1, L, L); None for all before it.
        """
        kept: list[Keys] = []

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
            kept.append(Keys(key.transpose(1, 2), value.transpose(1, 2)))
            seen = mask
            if mask is not None and self.window is not None:
                place = torch.arange(x.shape[1], device=x.device)
                seen = mask & (place[:, None] - place < self.window)
            return self._plainly(module, query, key, value, seen, how)

        return self._run(x, told, attend), kept[-1]

    def opened(self, cache: Keys, place: Tensor, continues: Tensor) -> Keys:
        """See `SegmentLayer.opened`."""
        return Keys(*(part.clone() for part in cache))

    def closed(self, opened: Keys) -> Keys:
        """See `SegmentLayer.closed`."""
        return opened

    def step(self, x: Tensor, opened: Keys, column: Step, contexts: Sequence[Context] = ()) -> Tensor:
        """See `SegmentLayer.step`."""
        near = self.window is not None and self.window < column.before.cells.shape[2]
        mask = None
        if near or not column.whole or self.attention == "eager":
            mask = self._mask(column.before)[:, None]

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
            seen = _put(opened, column, key, value)
            if contexts:
                return self._found(query, seen, column.before, contexts)
            return self._plainly(module, query, *seen, mask, how)

        return self._run(x[:, None], column.before.told[self.number], attend)[:, 0]

    def attend_step(self, heads: Heads, opened: Keys, column: Step, contexts: Sequence[Context] = ()) -> Tensor:
        """See `SegmentLayer.attend_step`."""
        query, key, value = self._own(heads, column.before)
        return self._found(query, _put(opened, column, key, value), column.before, contexts)

    # --- heads, for memories -----------------------------------------------------------------------------------------

    def heads(self, x: Tensor) -> Heads:
        """See `SegmentLayer.heads`. Keys and values have as many heads as queries."""
        query, key, value, _ = self._heads_at(x, torch.zeros(1, x.shape[1], dtype=torch.long, device=x.device))
        return Heads(query, self._spread(key), self._spread(value))

    def attend(
        self, heads: Heads, cache: Keys, grid: Grid, contexts: Sequence[Context] = ()
    ) -> tuple[Tensor, tuple[Keys, Keys]]:
        """See `SegmentLayer.attend`."""
        query, key, value = self._own(heads, grid.before)
        own = (part.transpose(1, 2).unflatten(0, grid.new.shape[:2]) for part in (key, value))
        kept = self._cells(Keys(*own), cache, grid)
        return self._found(query, self._seen(kept), grid.before, contexts), kept

    def attend_to(self, query: Tensor, contexts: Sequence[Context], place: Tensor | None = None) -> Tensor:
        """See `SegmentLayer.attend_to`."""
        at = None if place is None else place[None] + self.n_again
        turned = query if at is None else self._turn(query, at)
        parts = []
        for context in contexts:
            if context.place is None:
                parts.append((query, context))
            else:
                key = self._turn(context.key, torch.atleast_2d(context.place) + self.n_again)
                parts.append((turned, context._replace(key=key)))
        return self._softmax(parts)

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See `SegmentLayer.out`. All that the layer does after its attention is done too."""
        places = torch.zeros(1, x.shape[1], dtype=torch.long, device=x.device)
        return self._run(x, self._told(x, places), lambda *_: mixed)

    def seen(self, kept: tuple[Keys, Keys], grid: Grid) -> list[Context]:
        """See `SegmentLayer.seen`."""
        key, value = self._seen(kept)
        place = torch.arange(-self.n_again, self.segment_len, device=key.device)
        key = self._turn(key, grid.before.cells.flatten(0, 1), back=True)
        before = again_seen(grid.flags.continues, self._shell[0].n_begin, self.n_again)
        mask = torch.cat([before, grid.valid], dim=2).flatten(0, 1)
        return [Context(self._spread(key), self._spread(value), mask, place=place)]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _run(self, x: Tensor, told: Told, attend: Attend) -> Tensor:
        """The layer, with another attention."""
        token = _attend.set(attend)
        try:
            found = self.base(x if self.scale == 1 else x / self.scale, *told.args, **told.kwargs)
        finally:
            _attend.reset(token)
        return found[0] if isinstance(found, tuple) else found

    def _told(self, x: Tensor, places: Tensor) -> Told:
        """What the layer is told at some places (R or 1, L)."""
        empty = x.new_zeros(len(places), places.shape[1], x.shape[2])
        return self._shell[0].tell(empty, places)[1][self.number]

    def _heads_at(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Queries, keys and values of hidden states (R, L, D) at places (1, L), and how the layer attends."""
        got: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
            got.append((query, key, value, how))
            raise _Left

        try:
            self._run(x, self._told(x, places), attend)
        except _Left:
            return got[0]
        raise ValueError("its attention does not go through the AttentionInterface of transformers")

    def _plainly(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: dict[str, Any]
    ) -> Tensor:
        """What queries (R, H, Q, E) find by the attention of transformers, (R, H, Q, E)."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function: Any = ALL_ATTENTION_FUNCTIONS.get(self.attention, eager)
        n_query, n_key = query.shape[2], key.shape[2]
        assert n_query in (1, n_key) or mask is not None
        near = n_key if self.window is None else min(n_key, self.window)
        if mask is None and n_query > 1 and (self.attention == "eager" or near < n_key):
            place = torch.arange(n_key, device=query.device)
            apart = place[:, None] - place
            mask = ((apart >= 0) & (apart < near))[None, None]
        if mask is not None and self.attention == "eager":
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return function(module, query, key, value, mask, **how)[0].transpose(1, 2)

    def _cells(self, own: Keys | None, cache: Keys, grid: Grid) -> tuple[Keys, Keys]:
        """Keys and values of what each segment takes in again, (B, S, F, G, E), and of all cells, (B, S, T, G, E)."""
        before, cells = [], []
        for i, part in enumerate(cache):
            known, opened = part[:, : self.n_again], part[:, self.n_again :]
            n_row, n_segment = grid.new.shape[:2]
            fed = grid.before.keys
            again = known[:, None].expand(-1, n_segment, *known.shape[1:]) if fed is None else fed[self.number][i]
            if fed is not None and not grid.fresh:
                stays = torch.tensor(grid.opened, device=part.device).view(n_row, 1, 1, 1, 1) > 0
                first = torch.where(stays, known[:, None], again[:, :1])
                again = torch.cat([first, again[:, 1:]], dim=1)
            before.append(again)
            cells.append(opened[:, None] if own is None else grid.fill(own[i], opened))
        return Keys(*before), Keys(*cells)

    def _mask(self, before: Before) -> Tensor:
        """Which cells each token sees, (R, Q, F + T)."""
        if self.window is None or self.window >= before.cells.shape[2]:
            return before.seen.flatten(0, 1)
        near = before.columns[..., None] - before.cells[:, :, None] < self.window
        return (before.seen & near).flatten(0, 1)

    def _seen(self, kept: tuple[Keys, Keys]) -> tuple[Tensor, Tensor]:
        """All keys and values of each segment, (R, G, F + T, E)."""
        again, cells = kept
        if not self.n_again:
            key, value = (part.flatten(0, 1).transpose(1, 2) for part in cells)
        else:
            pairs = zip(again, cells, strict=True)
            key, value = (torch.cat(pair, dim=2).flatten(0, 1).transpose(1, 2) for pair in pairs)
        return key, value

    def _own(self, heads: Heads, before: Before) -> Heads:
        """Heads of the tokens that are computed, at their places, and as many of keys and values as the base has."""
        each, places = self.n_head // self.n_key, before.columns.flatten(0, 1)
        return Heads(self._turn(heads.q, places), self._turn(heads.k[:, ::each], places), heads.v[:, ::each])

    def _found(self, query: Tensor, seen: tuple[Tensor, Tensor], before: Before, contexts: Sequence[Context]) -> Tensor:
        """What queries (R, H, Q, E) at their places find in keys and values (R, G, L, E) and contexts: one softmax."""
        key, value = (self._spread(part) for part in seen)
        parts = [(query, Context(key, value, self._mask(before)))]
        plain: Tensor | None = None
        begin = (before.cells[..., self.n_again]).flatten()[:, None]  # of the first cell of each segment, (R, 1)
        for context in contexts:
            if context.place is not None:
                parts.append((query, context._replace(key=self._turn(context.key, begin + context.place))))
                continue
            if plain is None:
                plain = self._turn(query, before.columns.flatten(0, 1), back=True)
            parts.append((plain, context))
        return self._softmax(parts)

    def _softmax(self, parts: Sequence[tuple[Tensor, Context]]) -> Tensor:
        """What queries (R, H, L, E) find in contexts, each asked by queries at places of its kind."""
        scaling = parts[0][0].shape[-1] ** -0.5 if self.scaling is None else self.scaling
        dtype = parts[0][0].dtype
        return find_in(parts, scaling, lambda score: score.float().softmax(dim=3).to(dtype), self.softcap)

    def _spread(self, part: Tensor) -> Tensor:
        """Keys or values (R, G, L, E) for each head of queries, (R, H, L, E)."""
        return part.repeat_interleave(max(self.n_head // self.n_key, 1), dim=1)

    def _turn(self, x: Tensor, places: Tensor, style: str | None = None, back: bool = False) -> Tensor:
        """Queries or keys (R, H, L, E) at places (R or 1, L), of those at place 0; or back."""
        style = style or self.turned
        if style == "no":
            return x
        hidden = x.new_zeros(1, 1, self._shell[0].causal.config.hidden_size)
        here = self._told(hidden, places).kwargs.get("position_embeddings")
        start = self._told(hidden, torch.zeros_like(places[:1, :1])).kwargs.get("position_embeddings")
        if here is None or start is None:
            return x
        cos, sin = ((part / start[0])[:, None].to(x.dtype) for part in here)  # (R, 1, L, n)
        sin = -sin if back else sin
        a, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if style == "halves":
            half = torch.cat([-a[..., a.shape[-1] // 2 :], a[..., : a.shape[-1] // 2]], dim=-1)
        else:
            half = torch.stack([-a[..., 1::2], a[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([a * cos + half * sin, rest], dim=-1)


def _put(opened: Keys, column: Step, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, L, E) of the open segment, with those (B, G, 1, E) of the next token of each row."""
    row = torch.arange(len(key), device=key.device)
    for buffer, new in zip(opened, (key, value), strict=True):
        buffer[row, column.cell] = new[:, :, 0]
    n_cell = column.before.cells.shape[2]
    all_keys, all_values = (part[:, :n_cell].transpose(1, 2) for part in opened)
    return all_keys, all_values


class _Nothing(nn.Module):
    """In place of a feed-forward, which the layer has done already."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(x)


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-2 if a.dtype == torch.bfloat16 else 1e-4
    return a.is_meta or bool(torch.allclose(a.float(), b.float(), atol=tolerance, rtol=1e-2))


def again_seen(continues: Tensor, n_begin: int, n_again: int) -> Tensor:
    """Which tokens that segments take in again may be seen, (B, S, F): the overlap only where a context goes on."""
    return continues[..., None] | (torch.arange(n_again, device=continues.device) < n_begin)
