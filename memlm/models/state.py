"""What a `memlm.models.segments.SegmentModel` knows of the text so far, and what a call of it gives.

Shapes: B rows, L tokens of a call, T tokens per segment, C lookback, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.memory.contract import Read, Trace
from memlm.memory.state import State, tensors, where_rows
from memlm.tensors import Host


class LocalState(NamedTuple):
    """What the model itself carries between calls; dropped by `SegmentModel.new_context`.

    Attributes:
        cache: By layer, what it has to know of the segment before and of the open one: see `SegmentLayer`. None for
            layers that `SegmentModel.absorb` left out. Those of `Stack.below` come last.
        streams: The stream in the open segment and in the tokens before it that writes need, (B, n, C + T, D), at each
            place that some memory writes from: ``input`` before the mixers of the n layers with memory, ``mixed``
            behind them, ``output`` behind these layers, ``top`` behind the whole stack (n is 1).
        ids: Token ids of the same cells, (B, C + T).
        continues: Whether the open segment has a segment before it, (B,).
        position: Place of the next token in its document, (B,).
        document: Number of the document within the row, (B,).
        n_open: Tokens in the open segment, (B,).
    """

    cache: tuple[State, ...]
    streams: dict[str, Tensor]
    ids: Tensor
    continues: Tensor
    position: Tensor
    document: Tensor
    n_open: Host

    @property
    def n_row(self) -> int:
        """``B``."""
        return len(self.n_open.tensor)


class ModelState(NamedTuple):
    """Everything the model knows of the text so far.

    Attributes:
        memory: By name of the memory, one state per module.
        local: Local context.
    """

    memory: dict[str, tuple[State, ...]]
    local: LocalState


class Output(NamedTuple):
    """Result of a call.

    Attributes:
        logits: (B, L, V); None if the head was not asked for.
        state: State after the call; None if it was not to be kept.
        hidden: Output of the last layer, normalised, (B, L, D).
        reads: What each memory read over the cells of the grid, by ``name/layer``, or ``name`` if it stands around the
            stack.
        trace: Numbers about reads and writes, by memory name.
    """

    logits: Tensor | None
    state: ModelState | None
    hidden: Tensor
    reads: dict[str, Read]
    trace: dict[str, Trace]


def shapes(local: LocalState) -> list[torch.Size]:
    """Shapes of all that a model carries, without the rows."""
    return [part.shape[1:] for part in tensors(local)]


def renewed(local: LocalState, fresh: LocalState, rows: Tensor) -> LocalState:
    """``fresh`` in ``rows`` (B,), on the CPU, else ``local``; what `absorb` left out is missing until all rows are."""
    if bool(rows.all()):
        return fresh
    cache = tuple(None if old is None else new for old, new in zip(local.cache, fresh.cache, strict=True))
    return where_rows(rows, fresh._replace(cache=cache), local)
