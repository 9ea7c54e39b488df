"""What a memory sees of a grid.

Shapes: B rows, S segments, C lookback, L cells of a stream, D model width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memlm.memory.contract import Memory, Segment
from memlm.memory.state import State
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer, heads_of
from memlm.models.stack import Stack
from memlm.models.state import LocalState


def stream_of(module: Memory) -> str:
    """Which stream is `Segment.hidden` of a memory in a layer."""
    return "mixed" if module.reads_beside else "input"


def holding(model: Stack, module: Memory, state: State, grid: Grid, write: bool) -> Tensor | None:
    """Which segments of a grid find a memory that holds anything, (B, S); None if all do, or it is all the same.

    Args:
        model: The model, which says whether it matters: see `Stack.bare_when_empty`.
        module: The memory.
        state: Its state before the grid.
        grid: The grid.
        write: Whether its segments are written.
    """
    if not model.bare_when_empty or module.within:
        return None
    flags, resets = grid.flags, None if module.scope == "shared" else grid.flags.reset
    n_row, n_segment = flags.complete.shape
    now = module.holds(state).expand(n_row)
    first = now if resets is None else module.holds(module.bank.first(n_row))
    written = flags.complete & grid.valid.any(dim=2) & write
    found = []
    for s in range(n_segment):
        now = now if resets is None else torch.where(resets[:, s], first, now)
        found.append(now)
        now = now | written[:, s]
    held = torch.stack(found, dim=1)
    return None if bool(held.all()) else held


def segment_of(
    model: Stack,
    module: Memory,
    local: LocalState,
    grid: Grid,
    ids: Tensor,
    embeddings: Tensor,
    hidden: Tensor,
    output: Tensor | None = None,
    layer: SegmentLayer | None = None,
    tail: Tensor | None = None,
    signals: dict[str, Tensor] | None = None,
) -> Segment:
    """What ``module`` may use of a grid. Token fields given include the model's lookback; its own may be shorter.

    Memories work in 32 bits, whatever the model does.
    """
    needs = module.needs
    skip = model.lookback - needs.lookback
    before = grid.flags.continues[:, :1].expand(-1, needs.lookback)
    maps = None if layer is None or not needs.heads else partial(heads_of, layer, dtype=hidden.dtype)
    return Segment(
        ids=ids[:, skip:],
        embeddings=embeddings[:, skip:].float(),
        hidden=hidden[:, skip:].float(),
        valid=torch.cat([before, grid.valid.flatten(1)], dim=1),
        flags=grid.flags,
        signals=None if signals is None else {name: signals[name] for name in needs.signals if name in signals},
        lookback=needs.lookback,
        columns=grid.columns,
        surprise=_surprise(model, hidden, ids)[:, skip:] if needs.surprise else None,
        output=None if output is None or not needs.output else output[:, skip:].float(),
        heads=None if maps is None else maps(hidden[:, skip:].float()),
        maps=maps,
        tail=None if tail is None else tail.float(),
    )


@torch.no_grad()
def _surprise(model: Stack, hidden: Tensor, ids: Tensor) -> Tensor:
    """Nats of the token after each cell, predicted from ``hidden`` (B, L, D) as if by the last layer, (B, L)."""
    following = ids.roll(-1, dims=1)[..., None]  # the last cell has none, and no slot
    parts = zip(hidden.split(model.segment_len, dim=1), following.split(model.segment_len, dim=1), strict=True)
    nats = [-model.head(model.norm(part)).log_softmax(dim=-1).gather(2, targets) for part, targets in parts]
    return torch.cat(nats, dim=1)[..., 0].float()
