"""Which slots may be the best, by keys and queries of 8 bits: exact, as what rounding can do is bounded.

Whole numbers of 8 bits are multiplied several times as fast as floats, and take a quarter of the memory. By them a few
slots more than are asked for are found for each query, and scored by the keys themselves. Of every other slot the score
is known up to the rounding of key and query: where one of them might be among the best after all, that is told, and the
query has to be searched in another way.

Shapes: B rows, S segments, T tokens per segment, N = S * T queries of a row, M slots, d width of keys, k slots asked
for, c candidates.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from memlm.tensors import rows_of, widened

_LEAST, _FEW = 4096, 64  # slots, and queries of a row, from which it is worth it; a bank that is ready serves fewer
_MORE = 3  # candidates for each slot that is asked for
_WIDE, _PLACES = 2**9, 9  # numbers that are ranked at once, and the bits that their places take
_ALONE = 2**16  # numbers that are ranked as they are: fewer steps
_SIZE = 4  # of groups whose maximum is ranked before they are, at least
_ALSO = 1024  # slots that are scored for a query at most, on the average, where the candidates do not suffice
_MOST = 2**20  # of a product or a bias, in steps
_HIDDEN = -3 * _MOST  # bias of a slot that may not be read: under all others, and the sum has 23 bits


class Coarse(NamedTuple):
    """The slots of a bank in whole numbers.

    Attributes:
        key: Multiples of a step, 8 bits, (B, M, d) or (1, M, d) for all rows. Each is off by half a step at most.
        asks: What one is worth in a query, (B, 1, 1, 1) or (1, 1, 1, 1).
        unit: What one is worth in a product of keys and queries, (B, 1, 1) or (1, 1, 1).
        by_sum: By how much a score may be off for the sum of a query's absolute numbers, of the same shape.
        by_lost: By how much it may be off for the length of what rounding takes from a query, of the same shape.
        bias: What is added to products in units, (B, S, M) or (1, S, M).
        hidden: What is added to scores, of the same shape; -inf for slots that may not be read.
    """

    key: Tensor
    asks: Tensor
    unit: Tensor
    by_sum: Tensor
    by_lost: Tensor
    bias: Tensor
    hidden: Tensor

    def of(self, rows: slice, segments: slice) -> Coarse:
        """Those of some rows, for some segments."""
        return Coarse(*(part[rows] for part in self[:5]), *(part[rows, segments] for part in self[5:]))


def pays(query: Tensor | None, threshold: float, k: int, key: Tensor, ready: bool) -> bool:
    """Whether to search so: queries (B, N, d) for ``k`` slots with ``key`` (B, M, d); ``ready`` if there is a `Coarse`.

    Without queries, whether that may pay once there are some.

    Only processors that multiply whole numbers of 8 bits as they are gain by it.
    """
    return (
        key.is_cpu
        and key.shape[1] >= max(_LEAST, _MORE * k)
        and (query is None or ready or query.shape[1] >= _FEW)
        and threshold <= -1
        and _MORE * k < _WIDE // _SIZE
        and (query is None or query.dtype == torch.float32)
        and key.dtype in (torch.float32, torch.bfloat16)
        and torch.cpu._is_vnni_supported()
        and not torch.compiler.is_compiling()
    )


@torch.no_grad()
def coarse(key: Tensor, hidden: Tensor, temperature: Tensor) -> Coarse | None:
    """Slots in whole numbers, or None if these cannot tell them apart.

    Args:
        key: Keys, (B, M, d) or (1, M, d).
        hidden: What is added to scores, (B, S, M) or (1, S, M); -inf for slots that may not be read.
        temperature: Inverse temperature of the scores.
    """
    if key.stride(0) == 0:
        key = key[:1]
    step, longest = torch.empty(2, len(key))
    rounded = torch.empty(key.shape, dtype=torch.int8)
    buffer = torch.empty(key.shape[1:])
    for row, part in enumerate(key):  # one at a time, so that it stays in a cache
        part = part if part.dtype == buffer.dtype else buffer.copy_(part)
        least, most = part.aminmax()
        step[row] = torch.maximum(-least, most).clamp(min=1e-6) / 127
        longest[row] = part.norm(dim=1).max()
        rounded[row].copy_(torch.mul(part, 1 / step[row], out=buffer).round_())
    added = hidden / (temperature * step * step)[:, None, None]
    wide = key.shape[2] ** 0.5
    largest = torch.maximum(((longest / step).max() + wide / 2) * 127 * wide, added.max())
    if not float(largest) < _MOST:  # also where numbers are none
        return None
    invisible = added == -torch.inf
    bias = added.clamp_(min=1 - _MOST).round_().to(torch.int32).masked_fill_(invisible, _HIDDEN)
    each, asks = step[:, None, None], temperature * step  # one map makes keys and queries
    long = longest[:, None, None]
    # Each number of a key is off by half a step at most, and by the rounding of floats.
    by_sum, by_lost = 0.5005 * each + 1e-5 * long, 1.001 * (long + 0.5 * wide * each)
    return Coarse(rounded, asks[:, None, None, None], asks[:, None, None] * each, by_sum, by_lost, bias, hidden)


def best(query: Tensor, k: int, key: Tensor, slots: Coarse, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best slots of each query.

    Args:
        query: Queries times the inverse temperature, (B, S, T, d).
        k: Slots asked for.
        key: Keys, (B, M, d).
        slots: What `coarse` made of them.
        room: Room for scores of 32 bits, (B, S * T, M).

    Returns:
        Scores and indices of ``k`` slots, (B, S, T, k), the best first; whether these are known to be the best,
        (B, S, T).
    """
    rounded = (query / slots.asks).round_().clamp_(-127, 127)
    score = room.view(torch.int32)
    for part, slot, out in zip(rounded.to(torch.int8).flatten(1, 2), slots.key, score, strict=True):
        torch._int_mm(part, slot.T, out=out)
    score = score.unflatten(1, query.shape[1:3]).add_(slots.bias[:, :, None])
    index, floor = candidates(score, _MORE * k)
    top = rescored(query, key, slots.hidden, index).topk(k, dim=3)
    index = index.gather(3, top.indices)
    lost = torch.addcmul(query, rounded, slots.asks, value=-1)
    off = (vector_norm(query, 1, dim=3) * slots.by_sum).addcmul_(vector_norm(lost, dim=3), slots.by_lost)
    # Whole numbers of slots that may be as good as the worst of these; a bias is off by half a one.
    least = (top.values[..., -1] - off) / slots.unit - 1
    sure = (floor <= least) | (floor < -2 * _MOST)  # or all that may be read are candidates
    if not bool(sure.all()):
        _look_again(query, key, slots.hidden, score, least, sure, top.values, index)
    return top.values, index, sure


def _look_again(
    query: Tensor, key: Tensor, hidden: Tensor, score: Tensor, least: Tensor, sure: Tensor, best: Tensor, index: Tensor
) -> None:
    """Where it is not ``sure``: the best of all slots whose whole number is at ``least`` so large, if they are few."""
    row, segment, token = (~sure).nonzero().unbind(dim=1)
    asked, slot = (score[row, segment, token] >= least[row, segment, token, None]).nonzero().unbind(dim=1)
    count = asked.bincount(minlength=len(row))
    if len(slot) > _ALSO * len(row) or int(count.min()) < best.shape[3]:  # too few: numbers that are none
        return
    table, n_between = rows_of(key)
    start = count.cumsum(0) - count
    each = _products(query[row, segment, token], table, slot + n_between * row[asked], asked, start)
    each = each + hidden[row[asked], segment[asked], slot]
    place = torch.arange(len(slot)) - start[asked]
    values = query.new_full((len(row), int(count.max())), -torch.inf)
    values[asked, place] = each
    slots = torch.zeros_like(values, dtype=torch.long)
    slots[asked, place] = slot
    top = values.topk(best.shape[3], dim=1)
    best[row, segment, token], index[row, segment, token] = top.values, slots.gather(1, top.indices)
    sure[row, segment, token] = True


def candidates(score: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices (..., n) of the ``n`` best of whole numbers (..., M) of 23 bits, and the least of these, (...).

    The best ``n`` lie in the ``n`` groups with the best maxima, which are found in the same way; see `exact.top`.
    """
    n_score = score.shape[-1]
    if n_score > _WIDE and score.numel() < _ALONE:
        found = score.topk(n, dim=-1)
        return found.indices, found.values[..., -1]
    if n_score <= _WIDE:
        placed = torch.add(torch.arange(n_score, dtype=torch.int32), score, alpha=_WIDE)
        # That of numpy takes a fraction of the time of topk.
        best_placed = torch.from_numpy(np.partition(placed.numpy(), n_score - n, axis=-1)[..., n_score - n :])
        return (best_placed & (_WIDE - 1)).long(), best_placed[..., 0] >> _PLACES
    size = (_WIDE + 1) // (n + 1)  # what is left is ranked at once: each level of groups takes time
    n_group = n_score // size
    groups = score[..., : n_group * size].unflatten(-1, (size, n_group))  # members side by side: a fast maximum
    chosen, _ = candidates(groups.amax(dim=-2), n)
    index = (chosen[..., None] + n_group * torch.arange(size)).flatten(-2)  # (..., n * size)
    if n_group * size < n_score:
        rest = torch.arange(n_group * size, n_score)
        index = torch.cat([index, rest.expand(*score.shape[:-1], -1)], dim=-1)
    within, floor = candidates(score.gather(-1, index), n)
    return index.gather(-1, within), floor


def rescored(query: Tensor, key: Tensor, hidden: Tensor, index: Tensor) -> Tensor:
    """Scores (B, S, T, c) of slots ``index`` (B, S, T, c), without gradients; see `best`.

    The rounding of one score does not depend on which others are worked out with it.
    """
    table, n_between = rows_of(key)
    flat = index if not n_between else index + n_between * torch.arange(len(index))[:, None, None, None]
    n_each = index.shape[3]
    each = _products(query.flatten(0, 2), table, flat.flatten(), *_in_order(index.numel() // n_each, n_each))
    return each.view(index.shape) + hidden.gather(2, index.flatten(2)).view(index.shape)


@functools.lru_cache(maxsize=16)
def _in_order(n_query: int, n_each: int) -> tuple[Tensor, Tensor]:
    """Of so many for each query, those of one after those of the query before: which asks for each; their starts."""
    return torch.arange(n_query).repeat_interleave(n_each), torch.arange(n_query) * n_each


def _products(query: Tensor, table: Tensor, row: Tensor, asked: Tensor, start: Tensor) -> Tensor:
    """Products (P,) of rows of a ``table`` (n, d) and the queries (Q, d) that ``asked``.

    Without a copy of the rows, unless the table is of 16 bits: so are gradients of a sum of rows by their weights made.

    Args:
        query: Queries.
        table: The table.
        row: Rows of it, (P,), those of one query after those of the query before.
        asked: The query of each, (P,).
        start: Where the rows of each query begin, (Q,).
    """
    table, row = widened(table, row, query)
    products: Any = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return products(query, table, row, start, asked, 0)
