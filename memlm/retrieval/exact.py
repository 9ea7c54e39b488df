"""Exact top-k attention over slots.

Slots come from two pools: a bank that was there before the window, in which each query searches its best k, and slots
written inside the window, which are few and searched densely so that gradients reach their keys and values cheaply.
The scores of a bank exist for a few segments of a few rows at a time: on a CPU one, so that they stay in its cache, on
a GPU as many as keep it busy; of a very large bank for a few tokens. A bank that needs no gradient (what earlier
windows wrote) is read without a copy of what was found. Keys and values may be of 16 bits; they are made 32 bits wide a
part at a time, and all sums are of 32. On a GPU with Triton a kernel searches without writing scores
(`memlm.retrieval.slot_kernel`); `search` is its reference.

Shapes: B rows, S segments, N = S * T queries, M slots of a bank, P slots of a window, k slots read.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.retrieval import coarse
from memlm.tensors import rows_of, widened

_ON_CPU, _ON_GPU = 2**20, 2**28  # scores that exist at a time, at most, where a segment of a row has fewer
_MOST = 2**27  # scores that exist at a time, at most, where a token of a row has fewer
_FEW = 2**15  # scores that are ranked as they are
_WIDE, _WIDE_ON_GPU = 2**13, 2**18  # keys of 16 bits that are made wider at a time
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_SLOTS, _KERNEL_WIDTH = 64, 256  # slots that a query reads and width of its key, at most: both lie in registers
_GROUP, _GROUP_ON_GPU = 4, 32  # scores whose maximum is ranked before they are; a GPU wants few, large steps


class Pool(NamedTuple):
    """Slots that can be read.

    Attributes:
        key: Unit keys, (B, M, d_key), or (1, M, d_key) for all rows; of 32 bits, or of 16.
        value: Values, (B, M, d_value) or (1, M, d_value), likewise.
        bias: Added to the score, (B, M) or (1, M).
        visible: Which slots segment s may read, (B, S, M), or (1, S, M).
        time: When each was written, larger is later, (B, M) or (1, M); None if nobody asks.
        coarse: The same in whole numbers, for a search on a CPU; None if it is still to be made.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    visible: Tensor
    time: Tensor | None = None
    coarse: coarse.Coarse | None = None


Search = Callable[[Tensor, Tensor, float, int, Pool], tuple[Tensor, Tensor]]
"""Finds the best slots of a bank, in any order; see `search`."""


def attend(
    query: Tensor,
    temperature: Tensor,
    null_score: Tensor,
    threshold: float,
    top_k: int,
    bank: Pool | None,
    window: Pool | None,
    recency: Tensor | None = None,
    find: Search | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft attention over the ``top_k`` best slots and a null slot that holds nothing.

    The score of a slot is ``temperature * cosine + bias``; slots under the cosine ``threshold`` are not read.

    Args:
        query: Unit queries, (B, N, d_key).
        temperature: Inverse temperature, a scalar.
        null_score: Score of the null slot, a scalar.
        threshold: Least cosine similarity of a slot that is read.
        top_k: Slots that each query reads, at most.
        bank: Slots from before the window.
        window: Slots of this window.
        recency: What a newer slot that matches perfectly takes off the score of each older one, a scalar; None for
            nothing. Slots compete only with those that the same query reads.
        find: How the best slots of the bank are found; None for `search`, which scores all of them.

    Returns:
        What was read (B, N, d_value); the slots read, numbered through the bank and then the window, (B, N, k); their
        weights (B, N, k), 0 for slots that may not be read.
    """
    scores = []
    k = min(top_k, bank.key.shape[1]) if bank is not None else 0
    alone = window is None and recency is None and find is None
    if bank is not None and alone and has_kernel(query, k):
        learned = any(part.requires_grad for part in (query, temperature, null_score, *bank[:3]))
        if not (learned and torch.is_grad_enabled()):
            return _attend_at_once(query, temperature, null_score, threshold, k, top_k, bank)
    if bank is not None:
        best_of = gather_best if any(part.requires_grad for part in bank[:3]) else search_best
        similarity, index = best_of(find or search, query, temperature, threshold, k, bank)
        if window is None and recency is None:  # the same for less
            weight, score = weigh(similarity, null_score), similarity.detach()
            slots, shown = index, weight
            if find is not None:  # in no order
                best = score.topk(k, dim=2)
                score, slots, shown = best.values, index.gather(2, best.indices), weight.gather(2, best.indices)
            slots, missing = slots.masked_fill(score == -torch.inf, -1), (0, top_k - k)
            if k < top_k:
                slots, shown = F.pad(slots, missing, value=-1), F.pad(shown, missing)
            return weighted_sum(weight, bank.value, index), slots, shown
        scores.append(similarity)
    if window is not None:
        scores.append(_all_scores(query, temperature, threshold, window))
    score = torch.cat([null_score.to(query.dtype).expand(*query.shape[:2], 1), *scores], dim=2)
    best = score.detach()[..., 1:].topk(min(top_k, score.shape[2] - 1), dim=2)
    slots = best.indices
    if bank is not None:
        slots = torch.where(slots < k, index.gather(2, slots.clamp(max=k - 1)), slots - k + bank.key.shape[1])
    left_out = score.detach() < best.values[..., -1:]
    left_out[..., 0] = False
    score.detach().masked_fill_(left_out, -torch.inf)  # in place: no gradient goes through a weight of 0
    if recency is not None:
        times = [pool.time.expand(len(query), -1) for pool in (bank, window) if pool is not None]  # type: ignore[union-attr]
        time = torch.cat(times, dim=1).gather(1, slots.flatten(1)).view_as(slots)
        score = discount(score, best.indices + 1, time, temperature, recency)
    weight = score.softmax(dim=2)[..., 1:]
    read = query.new_zeros(())
    if bank is not None:
        read = weighted_sum(weight[..., :k], bank.value, index)
    if window is not None:
        read = read + weight[..., k:] @ window.value
    slots = slots.masked_fill(best.values == -torch.inf, -1)
    missing = (0, top_k - slots.shape[2])  # so that reads of few slots and of many can be joined
    return read, F.pad(slots, missing, value=-1), F.pad(weight.gather(2, best.indices), missing)


def _attend_at_once(
    query: Tensor,
    temperature: Tensor,
    null_score: Tensor,
    threshold: float,
    k: int,
    top_k: int,
    bank: Pool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` over a bank alone, without gradients, where a kernel weighs what it finds."""
    score, index, weight = find_and_weigh(
        query, temperature, null_score, threshold, k, bank.key, bank.bias, bank.visible
    )
    best = score.topk(k, dim=2)  # the best first
    index, weight = index.gather(2, best.indices), weight.gather(2, best.indices)
    missing = (0, top_k - k)
    slots = F.pad(index.masked_fill(best.values == -torch.inf, -1), missing, value=-1)
    return weighted_sum(weight, bank.value, index), slots, F.pad(weight, missing)


def weigh(score: Tensor, null_score: Tensor) -> Tensor:
    """Weights (B, N, M) of slots beside a null slot."""
    null = null_score.to(score.dtype).expand(*score.shape[:2], 1)
    return torch.cat([null, score], dim=2).softmax(dim=2)[..., 1:]


def discount(score: Tensor, best: Tensor, time: Tensor, temperature: Tensor, recency: Tensor) -> Tensor:
    """``score`` (B, N, M) less what newer slots take off those at ``best`` (B, N, k), written at ``time`` (B, N, k)."""
    match = (score.gather(2, best) - temperature).exp()  # (B, N, k), in 0..1
    newer = time[..., None, :] > time[..., None]  # (B, N, k, k): whether the last index is newer than the one before
    shadow = (newer * match[..., None, :]).sum(dim=3)
    return score.scatter_add(2, best, -recency * shadow)


def _all_scores(query: Tensor, temperature: Tensor, threshold: float, pool: Pool) -> Tensor:
    """Scores (B, N, M) of all slots of a pool; -inf for those that may not be read."""
    hidden = hidden_by(pool)  # (B, S, M)
    score = (query * temperature) @ pool.key.transpose(1, 2)
    if threshold > -1:
        score = score.masked_fill(score.detach() < threshold * temperature, -torch.inf)
    return (score.unflatten(1, (hidden.shape[1], -1)) + hidden[:, :, None]).flatten(1, 2)


def search(query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool) -> tuple[Tensor, Tensor]:
    """Scores (B, N, k), without gradients, and indices of the best slots of a bank, the best first.

    A score of -inf says that there is no further slot that may be read.
    """
    if has_kernel(query, k):
        score, index, _ = find_and_weigh(
            query, temperature, temperature, threshold, k, bank.key, bank.bias, bank.visible
        )
        best = score.topk(k, dim=2)
        return best.values, index.gather(2, best.indices)
    n_row = len(query)
    rounded = bank.coarse if coarse.pays(query, threshold, k, bank.key, bank.coarse is not None) else None
    hidden = hidden_by(bank) if rounded is None else rounded.hidden  # (B, S, M)
    if rounded is None and coarse.pays(query, threshold, k, bank.key, ready=False):
        rounded = coarse.coarse(bank.key, hidden, temperature)
    n_segment, n_slot = hidden.shape[1:]
    scaled = (query * temperature).unflatten(1, (n_segment, -1))  # (B, S, T, d_key)
    n_token = scaled.shape[2]

    def of_each(part: Tensor) -> Tensor:
        return part if len(part) == n_row else part.expand(n_row, *part.shape[1:])

    keys, hidden = of_each(bank.key), of_each(hidden)
    rounded = rounded and coarse.Coarse(*map(of_each, rounded))
    if rounded is not None and n_row * n_segment * n_token * n_slot <= _ON_CPU:
        room = query.new_empty(n_row, n_segment * n_token, n_slot)
        score, index = _surely(scaled, k, keys, rounded, room)
        return score.flatten(1, 2), index.flatten(1, 2)
    best = query.new_empty(n_row, n_segment, n_token, k)
    index = torch.empty(best.shape, dtype=torch.long, device=query.device)
    limit = _ON_GPU if query.is_cuda else _ON_CPU
    by_segment = min(n_segment, max(1, limit // (n_token * n_slot)))
    by_row = min(n_row, max(1, limit // (by_segment * n_token * n_slot)))
    by_token = min(n_token, max(1, _MOST // n_slot))
    buffer = query.new_empty(by_row, by_segment * by_token, n_slot)  # one: fresh memory of this size is slow to get
    starts = (range(0, n_row, by_row), range(0, n_segment, by_segment), range(0, n_token, by_token))
    for row, segment, token in itertools.product(*starts):
        here = slice(row, row + by_row), slice(segment, segment + by_segment), slice(token, token + by_token)
        part = scaled[here]  # (by_row, by_segment, by_token, d_key), fewer at the end
        score = buffer[: part.shape[0], : part.shape[1] * part.shape[2]]
        if rounded is not None:
            best[here], index[here] = _surely(part, k, keys[here[0]], rounded.of(*here[:2]), score)
            continue
        _products(part.flatten(1, 2), keys[here[0]], score)
        score = score.unflatten(1, (-1, part.shape[2]))
        if threshold > -1:
            score.masked_fill_(score < threshold * temperature, -torch.inf)
        score.add_(hidden[here[:2]][:, :, None])
        best[here], index[here] = top(score, k)
    return best.flatten(1, 2), index.flatten(1, 2)


def _products(query: Tensor, key: Tensor, out: Tensor) -> None:
    """Products of queries (b, q, d) and keys (b, M, d), put into ``out`` (b, q, M)."""
    if key.dtype != query.dtype:
        n_key = max(1, (_WIDE_ON_GPU if key.is_cuda else _WIDE) // len(key))
        for keys, part in zip(key.split(n_key, dim=1), out.split(n_key, dim=2), strict=True):
            wide = keys[:1].to(query.dtype).expand_as(keys) if keys.stride(0) == 0 else keys.to(query.dtype)
            part.copy_(query @ wide.mT)
    elif query.shape[1] == 1:  # of a row one token: the same product, with the bank read in the order it lies in
        torch.bmm(key, query.transpose(1, 2), out=out.transpose(1, 2))
    else:
        torch.bmm(query, key.transpose(1, 2), out=out)


def hidden_by(bank: Pool) -> Tensor:
    """What is added to scores, (B, S, M): the bias of slots that may be read, -inf for others."""
    return torch.where(bank.visible, bank.bias[:, None], -torch.inf)


def _surely(query: Tensor, k: int, key: Tensor, slots: coarse.Coarse, room: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and indices of the best slots by `coarse.best`; of queries where it is not sure, by all scores."""
    best, index, sure = coarse.best(query, k, key, slots, room)
    if not bool(sure.all()):
        for row, segment in (~sure).any(dim=2).nonzero().tolist():
            token = (~sure[row, segment]).nonzero()[:, 0]
            asked, bias = query[row, segment, token], slots.hidden[row, segment]
            if key.dtype == asked.dtype:
                score = torch.addmm(bias, asked, key[row].T)
            else:
                score = asked.new_empty(1, len(asked), len(bias))
                _products(asked[None], key[row : row + 1], score)
                score = score[0] + bias
            found = top(score, k)[1]
            exactly = coarse.rescored(asked[None, None], key[row : row + 1], bias[None, None], found[None, None])
            best[row, segment, token], index[row, segment, token] = exactly[0, 0], found
    return best, index


def has_kernel(query: Tensor, k: int) -> bool:
    """Whether a kernel searches ``k`` slots for these queries (B, N, d_key): Triton comes with torch for CUDA."""
    return query.is_cuda and _HAS_TRITON and k <= _KERNEL_SLOTS and query.shape[2] <= _KERNEL_WIDTH


@torch.library.custom_op("memlm::find_and_weigh", mutates_args=())
def find_and_weigh(
    query: Tensor,
    temperature: Tensor,
    null_score: Tensor,
    threshold: float,
    k: int,
    key: Tensor,
    bias: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`memlm.retrieval.slot_kernel.find_and_weigh`, imported when it is called; what compiles need not look inside."""
    kernel = importlib.import_module("memlm.retrieval.slot_kernel")
    return kernel.find_and_weigh(query, temperature, null_score, threshold, k, key, bias, visible)


@find_and_weigh.register_fake
def _(
    query: Tensor, temperature: Any, null_score: Any, threshold: Any, k: int, key: Any, bias: Any, visible: Any
) -> Any:
    score = query.new_empty(*query.shape[:2], k, dtype=torch.float32)
    return score, torch.empty_like(score, dtype=torch.long), torch.empty_like(score)


def top(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of scores (..., M) and their indices, (..., k), the best first.

    The best ``k`` lie in the ``k`` groups with the best maxima, which are found in the same way: what is dropped is
    never ranked.
    """
    size = _GROUP_ON_GPU if score.is_cuda else _GROUP
    n_group = score.shape[-1] // size
    if n_group < 4 * k or score.numel() < _FEW:  # not worth it
        found = score.topk(k, dim=-1)
        return found.values, found.indices
    groups = score[..., : n_group * size].unflatten(-1, (size, n_group))  # members side by side: a fast maximum
    chosen = top(groups.amax(dim=-2), k)[1]
    index = (chosen[..., None] + n_group * torch.arange(size, device=score.device)).flatten(-2)  # (..., k * size)
    if n_group * size < score.shape[-1]:
        rest = torch.arange(n_group * size, score.shape[-1], device=score.device)
        index = torch.cat([index, rest.expand(*score.shape[:-1], -1)], dim=-1)
    best = score.gather(-1, index).topk(k, dim=-1)
    return best.values, index.gather(-1, best.indices)


class _SearchBest(torch.autograd.Function):
    """A `Search` with gradients for query and temperature."""

    @staticmethod
    def forward(
        ctx: Any, find: Search, query: Tensor, temperature: Tensor, threshold: float, k: int, *bank: Tensor
    ) -> tuple[Tensor, Tensor]:
        score, index = find(query, temperature, threshold, k, Pool(bank[0], bank[1], bank[2], bank[3]))
        ctx.save_for_backward(query, temperature, bank[0], index)
        ctx.mark_non_differentiable(index)
        return score, index

    @staticmethod
    def backward(ctx: Any, grad_score: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, temperature, key, index = ctx.saved_tensors
        keys = weighted_sum(grad_score.contiguous(), key, index)  # (B, N, d_key)
        return (None, keys * temperature, (keys * query).sum(), *[None] * 6)


def search_best(
    find: Search, query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool
) -> tuple[Tensor, Tensor]:
    """Scores (B, N, k), with gradients for query and temperature, and indices of the best slots of a bank."""
    if not torch.is_grad_enabled():
        return find(query, temperature, threshold, k, bank)
    return _SearchBest.apply(find, query, temperature, threshold, k, *bank[:4])


def gather_best(
    find: Search, query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool
) -> tuple[Tensor, Tensor]:
    """The same with gradients for keys and biases of the bank too."""
    with torch.no_grad():
        score, index = find(query, temperature, threshold, k, bank)
    key = _rows(bank.key, index)  # (B, N, k, d_key)
    bias = _rows(bank.bias[..., None], index)[..., 0]
    exact = temperature * (key @ query[..., None])[..., 0] + bias
    return exact.masked_fill(score == -torch.inf, -torch.inf), index


def _flat(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``table`` (B, M, d) or (1, M, d) as (n, d), and ``index`` (B, N, k) into it."""
    flat, n_between = rows_of(table)
    if n_between:
        index = index + n_between * torch.arange(len(table), device=index.device)[:, None, None]
    return flat, index


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """``table`` (B, M, d) or (1, M, d) at ``index`` (B, N, k): (B, N, k, d).

    An embedding look-up: its backward pass is deterministic, unlike that of indexing. In 32 bits, gradients too.
    """
    flat, index = _flat(table, index)
    return F.embedding(index, flat.to(torch.promote_types(flat.dtype, torch.float32)))


def weighted_sum(weight: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Sum of the rows ``index`` (B, N, k) of ``table`` (B, M, d), or (1, M, d), by ``weight`` (B, N, k): (B, N, d)."""
    if table.requires_grad:
        return (weight[..., None, :] @ _rows(table, index))[..., 0, :]
    flat, index = widened(*_flat(table, index), weight)
    bags = F.embedding_bag(index.flatten(0, 1), flat, mode="sum", per_sample_weights=weight.flatten(0, 1))
    return bags.unflatten(0, index.shape[:2])
