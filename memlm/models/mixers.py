"""What a layer does where no memory stands, as memories get it: see `memlm.memory.contract.Mixer`.

Shapes: B rows, S segments of the grid, R = B * S, T tokens per segment, Q columns computed, D model width, H heads,
E width of a head, M keys of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Context, Heads
from memlm.memory.state import State, where_rows
from memlm.models.grid import Grid, OpenSegment


def find_in(
    parts: Sequence[tuple[Tensor, Context]], scale: float, weigh: Callable[[Tensor], Tensor], cap: float | None = None
) -> Tensor:
    """What queries (R, H, L, E) find in contexts, in one softmax over all of them, (R, H, L, E).

    Args:
        parts: Contexts, each with the queries that ask it.
        scale: Factor of the products of queries and keys.
        weigh: Makes weights of scores, (R, H, L, M).
        cap: Soft cap of scores; None for none.
    """
    scores = []
    for query, context in parts:
        key = context.key
        score = query @ key.transpose(2, 3) if key.dim() == 4 else (key @ query[..., None])[..., 0]  # (R, H, L, M)
        score = score * scale
        if cap is not None:
            score = cap * (score / cap).tanh()
        if context.bias is not None:
            score = score + context.bias
        if context.mask is not None:
            mask = context.mask[:, None] if context.mask.dim() == 3 else context.mask[:, None, None]
            score = score.masked_fill(~mask, -torch.inf)
        scores.append(score)
    weights = weigh(torch.cat(scores, dim=3))
    found = parts[0][0].new_zeros(())
    for weight, (_, context) in zip(weights.split([s.shape[3] for s in scores], dim=3), parts, strict=True):
        value = context.value
        found = found + (weight @ value if value.dim() == 4 else (weight[..., None, :] @ value)[..., 0, :])
    return found


class SegmentLayer(nn.Module):
    """A layer of a `SegmentModel`: it mixes the tokens of a segment; memories stand around that; then its feed-forward.

    A layer with attention (``n_head`` is not 0) defines `heads`, `attend`, `attend_to`, `out` and `seen` too, and
    `attend_step` if it has a `step`.

    Attributes:
        feed_forward: What is added to the stream after the memories.
        n_head: Heads of its attention; 0 if it has none.
    """

    feed_forward: nn.Module
    n_head: int = 0

    def init_cache(self, n_row: int) -> State:
        """What `mix` knows where no text came before."""
        raise NotImplementedError

    def mix(self, x: Tensor, cache: State, grid: Grid, contexts: Sequence[Context] = ()) -> tuple[Tensor, Any]:
        """Let the tokens of each segment, and the ``overlap`` last ones of the segment before, reach later ones.

        Args:
            x: Hidden states, (B, S, Q, D).
            cache: What is known of the segment before and of the open one.
            grid: Where the tokens lie.
            contexts: What attention sees beside, with R rows.

        Returns:
            The new hidden states (B, S, Q, D), and what `next_cache` needs.
        """
        raise NotImplementedError

    def next_cache(self, kept: Any, stays_open: Callable[[Tensor, Tensor], Tensor]) -> State:
        """The cache after the grid.

        Args:
            kept: What `mix` or `attend` kept.
            stays_open: Picks for each row the part (B, ...) of the segment that is not complete, of parts (B, S, ...);
                the second argument (B, ...) is for rows whose segments are all complete.
        """
        raise NotImplementedError

    # One token of each row at a time, where nothing is asked of the layer but that: see `memlm.models.decoding`.

    def column(self, place: Tensor, continues: Tensor, most: int) -> Any:
        """What `step` of every layer of a model has to know of the next token's place.

        Args:
            place: Its place in the open segment, (B,).
            continues: Whether that segment continues its context, (B,).
            most: A place that is known to be beyond all of ``place``.
        """
        raise NotImplementedError

    def opened(self, cache: State, place: Tensor, continues: Tensor) -> Any:
        """A copy of ``cache`` that `step` changes in place; ``place`` and ``continues`` are those of `column`."""
        raise NotImplementedError

    def step(self, x: Tensor, opened: Any, column: Any, contexts: Sequence[Context] = ()) -> Tensor:
        """`mix` for one more token of each row, (B, D)."""
        raise NotImplementedError

    def attend_step(self, heads: Heads, opened: Any, column: Any, contexts: Sequence[Context] = ()) -> Tensor:
        """`attend` for one more token of each row: heads (B, H, 1, E)."""
        raise NotImplementedError

    def closed(self, opened: Any) -> State:
        """The cache that `next_cache` would give, but for cells without a token; it shares memory with ``opened``."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> Heads:
        """Queries, keys and values of any hidden states (B, L, D), before positions."""
        raise NotImplementedError

    def attend(self, heads: Heads, cache: State, grid: Grid, contexts: Sequence[Context] = ()) -> tuple[Tensor, Any]:
        """What heads (R, H, Q, E) find in their segment and the contexts, (R, H, Q, E), and what `next_cache` needs."""
        raise NotImplementedError

    def attend_to(self, query: Tensor, contexts: Sequence[Context], place: Tensor | None = None) -> Tensor:
        """What queries (R, H, L, E), at ``place`` (L,) of the segment, find in contexts alone, (R, H, L, E)."""
        raise NotImplementedError

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The stream ``x`` (R, L, D) with what heads found, (R, H, L, E), mapped and added."""
        raise NotImplementedError

    def seen(self, kept: Any, grid: Grid) -> list[Context]:
        """Keys and values of all that stands in each segment and the overlap before it, with R rows."""
        raise NotImplementedError


class LayerMixer:
    """What a layer does with the segments of a grid.

    Args:
        layer: The layer.
        cache: What it knows of the segment before and of the open one.
        grid: Where the tokens lie.
        call: How functions of the layer are called (to recompute them in the backward pass).
        dtype: Type of the layer's numbers; those of memories have 32 bits.
        contexts: What attention sees beside in any case: cells before the segments.
    """

    def __init__(
        self,
        layer: SegmentLayer,
        cache: State,
        grid: Grid,
        call: Callable[..., Any],
        dtype: torch.dtype,
        contexts: tuple[Context, ...] = (),
    ) -> None:
        self.layer, self.cache, self.grid, self.call = layer, cache, grid, call
        self.dtype, self.contexts = dtype, contexts
        self.kept: Any = None  # by the last call
        self.parts: list[LayerMixer] = []  # by segment, where they are mixed one after the other

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """See `Mixer`."""
        grid = self.grid
        cells = x.reshape(len(grid.new), grid.n_segment, grid.n_column, x.shape[-1])
        y, self.kept = self.call(self.layer.mix, cells.to(self.dtype), self.cache, grid, self._all(context))
        return y.reshape(x.shape).to(x.dtype)

    def heads(self, x: Tensor) -> Heads:
        """See `Mixer`."""
        return heads_of(self.layer, x, self.dtype)

    def attend(self, heads: Heads, context: Context | None = None) -> Tensor:
        """See `Mixer`."""
        own = Heads(*(part.to(self.dtype) for part in heads))
        mixed, self.kept = self.layer.attend(own, self.cache, self.grid, self._all(context))
        return mixed.to(heads.q.dtype)

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See `Mixer`."""
        return self.layer.out(mixed.to(self.dtype), x.to(self.dtype)).to(x.dtype)

    def instead(self, held: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """What a memory made of ``x`` (B, S, Q, D): ``y`` where ``held`` (B, S), else what the mixer makes of it."""
        n = int((~held).any(dim=0).nonzero().max()) + 1  # segments behind these all hold something
        alone = LayerMixer(self.layer, self.cache, self.grid.of(0, n), self.call, self.dtype, self.contexts)
        first = torch.where(held[:, :n, None, None], y[:, :n], alone(x[:, :n]))
        return torch.cat([first, y[:, n:]], dim=1)

    def at(self, s: int) -> LayerMixer:
        """See `Mixer`."""
        if self.grid.n_segment == 1:
            return self
        assert s == len(self.parts), "segments are mixed one after the other"
        cache = self.parts[-1].next_cache(s - 1, self.grid) if self.parts else self.cache
        self.parts.append(LayerMixer(self.layer, cache, self.grid.of(s, s + 1), self.call, self.dtype, self.contexts))
        return self.parts[-1]

    def next_cache(self, s: int | None = None, window: Grid | None = None) -> State:
        """The cache after the grid; after segment ``s`` of a ``window`` if this is its mixer."""
        if self.parts:
            return self.parts[-1].next_cache(len(self.parts) - 1, self.grid)
        if self.kept is None:  # the memory leaves the mixer out
            return self.cache
        after = self.layer.next_cache(self.kept, OpenSegment(self.grid).of)
        if s is None or window is None:
            return after
        active = window.new[:, s].any(dim=1)  # (B,)
        after = where_rows(active, after, self.cache)
        if s == 0:
            return after
        fresh = self.layer.init_cache(len(active))
        return where_rows(~active & ~window.flags.continues[:, s], fresh, after)

    def _all(self, context: Context | None) -> tuple[Context, ...]:
        n_row = self.grid.new.shape[0] * self.grid.n_segment
        return (*self.contexts, *seen_beside(self.layer, context, n_row, self.dtype))


class ColumnMixer:
    """What a layer does with one more token of each row: see `memlm.models.decoding`.

    Args:
        layer: The layer.
        opened: What it has of the open segment: see `SegmentLayer.opened`.
        column: Where the token stands: see `SegmentLayer.column`.
        dtype: Type of the layer's numbers; those of memories have 32 bits.

    Attributes:
        ran: Whether the layer knows the token now.
    """

    def __init__(self, layer: SegmentLayer, opened: Any, column: Any, dtype: torch.dtype) -> None:
        self.layer, self.opened, self.column, self.dtype = layer, opened, column, dtype
        self.ran = False

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """See `Mixer`."""
        self.ran = True
        contexts = seen_beside(self.layer, context, len(x), self.dtype)
        return self.layer.step(x[:, 0].to(self.dtype), self.opened, self.column, contexts)[:, None].to(x.dtype)

    def heads(self, x: Tensor) -> Heads:
        """See `Mixer`."""
        return heads_of(self.layer, x, self.dtype)

    def attend(self, heads: Heads, context: Context | None = None) -> Tensor:
        """See `Mixer`."""
        self.ran = True
        own = Heads(*(part.to(self.dtype) for part in heads))
        contexts = seen_beside(self.layer, context, len(own.q), self.dtype)
        return self.layer.attend_step(own, self.opened, self.column, contexts).to(heads.q.dtype)

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """See `Mixer`."""
        return self.layer.out(mixed.to(self.dtype), x.to(self.dtype)).to(x.dtype)

    def at(self, s: int) -> ColumnMixer:
        """Itself."""
        return self


class Done:
    """In place of a mixer that has run already."""

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The stream as it is."""
        return x

    def at(self, s: int) -> Done:
        """Itself."""
        return self

    def heads(self, x: Tensor) -> Heads:
        """Not to be had any more."""
        raise ValueError("a memory that only reads behind the mixer cannot use heads: define mix")

    def attend(self, heads: Heads, context: Context | None = None) -> Tensor:
        """Not to be had any more."""
        raise ValueError("a memory that only reads behind the mixer cannot use heads: define mix")

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Not to be had any more."""
        raise ValueError("a memory that only reads behind the mixer cannot use heads: define mix")


def seen_beside(layer: SegmentLayer, context: Context | None, n_row: int, dtype: torch.dtype) -> tuple[Context, ...]:
    """What the attention of a layer is to see beside, for ``n_row`` rows, in the layer's type of numbers.

    Raises:
        ValueError: If the layer has no attention, or the context is not of so many rows.
    """
    if context is None:
        return ()
    if not layer.n_head:
        raise ValueError("a context needs attention, which this model does not have: choose model=lmcode")
    if len(context.key) != n_row:
        raise ValueError(
            f"a context has a row for each segment of each row, {n_row} here, got {len(context.key)}: see `at_once`"
        )
    return (context._replace(key=context.key.to(dtype), value=context.value.to(dtype)),)


def heads_of(layer: SegmentLayer, x: Tensor, dtype: torch.dtype) -> Heads:
    """Heads of a layer whose numbers are of another type than those of ``x``, in that of ``x``."""
    return Heads(*(part.to(x.dtype) for part in layer.heads(x.to(dtype))))


def cells_of(layer: SegmentLayer, cells: Tensor, contexts: Sequence[Context], place: Tensor | None = None) -> Tensor:
    """Cells (B, m, D) of a memory behind a layer's attention, in which they see each other and the contexts.

    Args:
        layer: The layer.
        cells: The cells.
        contexts: What else they see.
        place: Where they stand in the segment, (m,); None for no place.
    """
    heads = layer.heads(cells)
    own = Context(heads.k, heads.v, place=place)
    return layer.out(layer.attend_to(heads.q, [*contexts, own], place), cells)


class Cells(NamedTuple):
    """Cells of a memory around the stack, on their way through the layers."""

    front: Tensor | None  # before each segment, (B, m, D)
    tail: Tensor | None  # behind it, (B, n, D)
    tails: tuple[Tensor, ...] = ()  # what came out of those behind it, by layer
    seen: Tensor | None = None  # rows whose text sees the cells before it, (B, 1); None for all


class StackMixer:
    """What the whole stack of layers does with one segment.

    Args:
        layers: Runs them over a stream (B, 1, Q, D) and cells.
        n_column: ``Q``.
        dtype: Type of the stream.
        tail: What enters the cells behind the segment; None if there are none.
        each_layer: Whether what comes out of these cells is wanted of each layer.
        seen: Rows whose text sees cells before the segment, (B, 1); None for all.

    Attributes:
        tail: What came out of the cells behind the segment.
    """

    def __init__(
        self,
        layers: Callable[[Tensor, Cells], tuple[Tensor, Cells]],
        n_column: int,
        dtype: torch.dtype,
        tail: Tensor | None,
        each_layer: bool,
        seen: Tensor | None = None,
    ) -> None:
        self._layers, self._n_column, self._dtype = layers, n_column, dtype
        self._enters, self._each_layer, self._seen = tail, each_layer, seen
        self.tail: Tensor | None = None

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """See `Mixer`. Cells before those of the segment go through the layers with it."""
        if context is not None:
            raise ValueError("a memory around the stack puts cells before a segment: a context is of one layer")
        m = x.shape[1] - self._n_column
        own = x.to(self._dtype)
        stream, cells = self._layers(own[:, None, m:], Cells(own[:, :m] if m else None, self._enters, seen=self._seen))
        self.tail, y = cells.tail, stream[:, 0]
        if self._each_layer and cells.tails:
            self.tail = torch.stack(cells.tails, dim=2)
        return (y if cells.front is None else torch.cat([cells.front, y], dim=1)).to(x.dtype)

    def at(self, s: int) -> StackMixer:
        """Itself: the stack is run for one segment at a time."""
        return self

    def heads(self, x: Tensor) -> Heads:
        """The stack has none."""
        raise ValueError("the stack has no heads: only a memory around a layer can use them")

    def attend(self, heads: Heads, context: Context | None = None) -> Tensor:
        """The stack has none."""
        raise ValueError("the stack has no heads: only a memory around a layer can use them")

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The stack has none."""
        raise ValueError("the stack has no heads: only a memory around a layer can use them")
