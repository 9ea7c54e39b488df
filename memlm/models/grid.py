"""Where the tokens of a call lie among segments.

A call may hold any number of tokens. They are laid out on a grid of segments, the first of which may have been begun by
an earlier call.

Shapes: B rows, L tokens of a call, S segments of the grid, T tokens per segment, Q columns computed, C lookback,
N = S * T cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.config import ConfigError
from memlm.memory.contract import Flags
from memlm.models.state import LocalState


class Grid(NamedTuple):
    """Where the tokens of a call lie among segments.

    Attributes:
        ids: Token ids, (B, N).
        new: Cells computed by this call, (B, S, T).
        valid: Cells that hold a token after it, (B, S, T).
        flags: What is known of the segments as a whole.
        n_complete: Complete segments of each row.
        open_len: Tokens of each row in the segment that stays open.
        opened: Tokens of each row in the first segment that an earlier call brought.
        columns: Columns that are computed; all unless ``S`` is 1.
        cell: Cell of each token of the call, (B, L); None if they lie in order from cell 0.
        before: What the model knows before its layers run: see `Stack.ready`. It has an ``of`` as the grid has.
    """

    ids: Tensor
    new: Tensor
    valid: Tensor
    flags: Flags
    n_complete: list[int]
    open_len: list[int]
    opened: list[int]
    columns: slice
    cell: Tensor | None
    before: Any = None

    @property
    def n_segment(self) -> int:
        """``S``."""
        return self.new.shape[1]

    @property
    def segment_len(self) -> int:
        """``T``."""
        return self.new.shape[2]

    @property
    def n_column(self) -> int:
        """``Q``."""
        return len(range(self.segment_len)[self.columns])

    @property
    def fresh(self) -> bool:
        """Whether no cell was filled by an earlier call."""
        return not any(self.opened)

    def of(self, begin: int, end: int) -> Grid:
        """Segments ``begin`` to ``end``, the last not included."""
        return Grid(
            ids=self.ids[:, begin * self.segment_len : end * self.segment_len],
            new=self.new[:, begin:end],
            valid=self.valid[:, begin:end],
            flags=self.flags.of(begin, end),
            n_complete=[min(max(n - begin, 0), end - begin) for n in self.n_complete],
            open_len=[0 if n >= end else o for n, o in zip(self.n_complete, self.open_len, strict=True)],
            opened=self.opened if begin == 0 else [0] * len(self.opened),
            columns=self.columns,
            cell=None,
            before=None if self.before is None else self.before.of(begin, end),
        )

    def fill(self, computed: Tensor, opened: Tensor) -> Tensor:
        """All cells (B, S, T, ...): those ``computed`` (B, S, Q, ...), and what was ``opened`` before, (B, T, ...)."""
        new = self.new.view(*self.new.shape, *[1] * (opened.dim() - 2))
        cells = opened[:, None]  # (B, 1, T, ...)
        if computed.shape[2] < self.new.shape[2]:
            here, start, stop = self.columns, self.columns.start, self.columns.stop
            computed = torch.where(new[:, :, here], computed, cells[:, :, here])
            return torch.cat([cells[:, :, :start], computed, cells[:, :, stop:]], dim=2)
        if self.fresh:
            return computed
        return torch.cat([torch.where(new[:, :1], computed[:, :1], cells), computed[:, 1:]], dim=1)


class OpenSegment:
    """Picks for each row what belongs to the segment of a grid that stays open."""

    def __init__(self, grid: Grid) -> None:
        self.n_segment, self.segment_len = grid.n_segment, grid.segment_len
        same = len(set(grid.n_complete)) == 1
        self.n = grid.n_complete[0]
        # Numbers known to the host are copied to the device only where they are needed: a copy waits for the device.
        self.done = None if same else torch.tensor(grid.n_complete, device=grid.ids.device)

    def of(self, parts: Tensor, beyond: Tensor) -> Tensor:
        """Part (B, ...) of the open segment, of (B, S, ...); of ``beyond`` (B, ...) if all are complete."""
        if self.done is None:
            return parts[:, self.n] if self.n < self.n_segment else beyond
        choice = torch.cat([parts, beyond[:, None]], dim=1)
        index = self.done.view(-1, *[1] * (choice.dim() - 1)).expand(-1, 1, *choice.shape[2:])
        return choice.gather(1, index)[:, 0]

    def cells(self, flat: Tensor) -> Tensor:
        """Cells of the open segment and the lookback, (B, C + T, ...), of (B, C + N, ...)."""
        n_cell = flat.shape[1] - (self.n_segment - 1) * self.segment_len
        flat = torch.cat([flat, flat.new_zeros(len(flat), self.segment_len, *flat.shape[2:])], dim=1)
        if self.done is None:
            return flat[:, self.n * self.segment_len : self.n * self.segment_len + n_cell]
        index = self.done[:, None] * self.segment_len + torch.arange(n_cell, device=flat.device)
        return flat.gather(1, index.view(*index.shape, *[1] * (flat.dim() - 2)).expand(-1, -1, *flat.shape[2:]))


def closing_grid(local: LocalState, rows: Tensor, lookback: int) -> Grid:
    """The open segment, without a new token, as it is closed in ``rows`` (B,)."""
    ids = local.ids[:, lookback:]
    n_row, device = len(rows), ids.device
    one = rows.to(device)[:, None]
    open_len = local.n_open.tensor.to(device)[:, None]
    position, document = local.position[:, None] - open_len, local.document[:, None]
    return Grid(
        ids=ids,
        new=torch.zeros(n_row, 1, ids.shape[1], dtype=torch.bool, device=device),
        valid=(torch.arange(ids.shape[1], device=device) < open_len)[:, None],
        flags=Flags(one, local.continues[:, None], one, None, position, document),
        n_complete=rows.long().tolist(),
        open_len=[0] * n_row,
        opened=[0] * n_row,
        columns=slice(0, 0),
        cell=None,
    )


def lay_out(
    ids: Tensor,
    local: LocalState,
    segment_len: int,
    rows: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    breaks: Tensor | None,
) -> Grid:
    """Place the tokens of a call on the grid of segments.

    Args:
        ids: Token ids, (B, L).
        local: Where the text stopped.
        segment_len: Tokens per segment.
        rows: Rows that begin a new document with the call, (B,), if that was not told by segment.
        reset: Segments that begin a new document, (B, S).
        mask: Tokens that are no padding, (B, L).
        breaks: Segments that begin a new context, (B, S).

    Raises:
        ConfigError: If flags by segment do not fit, or padding stands where text goes on.
    """
    n_row, n_token = ids.shape
    device = ids.device
    opened: list[int] = local.n_open.tensor.tolist()
    by_segment = breaks is not None or reset is not None
    in_place = not any(opened) and n_token % segment_len == 0 and (mask is None or by_segment)
    if by_segment and not in_place:
        raise ConfigError("breaks and reset by segment need rows with no open segment, and whole segments")
    if in_place:
        n_segment = n_token // segment_len
        for name, starts in (("reset", reset), ("breaks", breaks)):
            if starts is not None and starts.shape != (n_row, n_segment):
                raise ConfigError(f"{name} must be ({n_row}, {n_segment}) here, got {tuple(starts.shape)}")
        cell, grid_ids = None, ids
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        new = valid = valid.view(n_row, n_segment, segment_len)
        complete, closes = valid.all(dim=2), torch.zeros(n_row, n_segment, dtype=torch.bool, device=device)
        for starts in (reset, breaks):
            if starts is not None:
                closes = closes | F.pad(starts[:, 1:], (0, 1))
        complete = complete | closes
        n_complete, open_len = [n_segment] * n_row, [0] * n_row
        if mask is not None:
            if not bool((valid[..., 1:] <= valid[..., :-1]).all() & (complete[:, 1:] <= complete[:, :-1]).all()):
                raise ConfigError("padding may only end a document: it needs reset or breaks in the next segment")
            n_complete = complete.sum(dim=1).tolist()
            counts = F.pad(valid.sum(dim=2), (0, 1)).tolist()
            open_len = [count[n] for count, n in zip(counts, n_complete, strict=True)]
        columns = slice(0, segment_len)
    else:
        n_valid = [n_token] * n_row if mask is None else mask.sum(dim=1).tolist()
        total = [a + b for a, b in zip(opened, n_valid, strict=True)]
        n_segment = max(1, -(-max(total) // segment_len))
        n_complete, open_len = [t // segment_len for t in total], [t % segment_len for t in total]
        begin = local.n_open.tensor.to(device)[:, None]
        end = torch.tensor(total, device=device)[:, None]
        order = torch.arange(n_token, device=device).expand(n_row, -1) if mask is None else mask.cumsum(dim=1) - 1
        cell = begin + order
        nowhere = n_segment * segment_len
        target = cell if mask is None else torch.where(mask, cell, nowhere)
        cells = torch.arange(nowhere, device=device)
        grid_ids = F.pad(local.ids[:, -segment_len:], (0, nowhere + 1 - segment_len))
        grid_ids = grid_ids.scatter(1, target, ids)[:, :-1]
        valid = (cells < end).view(n_row, n_segment, segment_len)
        new = valid & (cells >= begin).view(n_row, n_segment, segment_len)
        complete = torch.arange(n_segment, device=device) < end // segment_len
        closes = torch.zeros_like(complete)
        columns = slice(0, segment_len) if n_segment > 1 else slice(min(opened), max(max(total), min(opened) + 1))
    continues = torch.ones_like(complete)
    continues[:, 0] = local.continues
    if breaks is not None:
        continues = continues & ~breaks
    start = torch.arange(n_segment, device=device) * segment_len
    if in_place and mask is not None:
        start = F.pad(valid.sum(dim=2).cumsum(dim=1), (1, 0))[:, :-1]
    begins = local.position if in_place else local.position - local.n_open.tensor.to(device)
    position = begins[:, None] + start
    document = local.document[:, None].expand(-1, n_segment)
    if rows is not None:
        reset = F.pad(rows[:, None], (0, n_segment - 1))
    if reset is not None:
        continues = continues & ~reset
        last_reset = torch.where(reset, start, -1).cummax(dim=1).values
        position = torch.where(last_reset >= 0, start - last_reset, position)
        document = document + reset.cumsum(dim=1)
    flags = Flags(complete, continues, closes, reset, position, document)
    return Grid(grid_ids, new, valid, flags, n_complete, open_len, opened, columns, cell)
