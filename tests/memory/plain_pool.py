"""A pool as a list, and a segment for it, to compare memories with."""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.memory.contract import Segment
from tests.memory.segments import segment_of

Cell = tuple[int, Tensor] | None  # place of the token, and what came out of the layer there


def mixed(number: int) -> int:
    """The finaliser of MurmurHash3, in whole numbers of Python."""
    number ^= number >> 16
    number = number * 0x85EBCA6B % 2**32
    number ^= number >> 13
    number = number * 0xC2B2AE35 % 2**32
    return number ^ (number >> 16)


class PlainPool:
    """N cells, oldest first, of which K go with every write."""

    def __init__(self, n: int, k: int, salt: int) -> None:
        self.cells: list[Cell] = [None] * n
        self.k, self.salt = k, salt

    def write(self, ids: list[int], position: int, output: Tensor) -> list[Cell]:
        """Append what came out (L, D) at the last tokens of a segment that begins at ``position``, and what goes."""
        word = sum(mixed(mixed(place) ^ token) for place, token in enumerate(ids)) ^ self.salt
        seed = mixed(mixed(word % 2**32) ^ position)
        drawn = [mixed(seed ^ mixed(i)) for i in range(len(self.cells))]
        n_new = min(self.k, len(ids))
        gone = sorted(range(len(drawn)), key=lambda i: drawn[i])[:n_new]
        dropped = [self.cells[i] for i in sorted(gone)]
        stay = [cell for i, cell in enumerate(self.cells) if i not in gone]
        self.cells = stay + [(position + t, output[t]) for t in range(len(ids) - n_new, len(ids))]
        return dropped


def segment_for(
    output: Tensor,
    ids: Tensor,
    position: int | list[int],
    valid: list[int] | None = None,
    complete: list[bool] | None = None,
) -> Segment:
    """A segment of tokens (B, T) that begins at a place in its document and came out of the layer as (B, T, D)."""
    segment = segment_of(output, valid, complete)
    start = torch.tensor(position).expand(len(ids))[:, None]
    return segment._replace(ids=ids, output=output, flags=segment.flags._replace(position=start))


def same_cells(hidden: Tensor, position: Tensor, cells: list[Cell]) -> None:
    """Cells of one row, (n, D) and (n,), against a list."""
    assert position.tolist() == [-1 if cell is None else cell[0] for cell in cells]
    expected = [torch.zeros(hidden.shape[1]) if cell is None else cell[1] for cell in cells]
    torch.testing.assert_close(hidden, torch.stack(expected), atol=2e-4, rtol=0)
