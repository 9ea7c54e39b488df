"""Search of slots as one Triton kernel: score, bias, running top-k and softmax in one pass over the slots.

No scores are written to memory but those of the slots that are read. The readable reference is `search` of
`memlm.retrieval.exact`, which this gives the results of; gradients are those of its `search_best`, which need only the
slots that were found. Triton comes with builds of torch for CUDA; only a search on a GPU imports this.

Shapes: B rows, S segments, T tokens per segment, N = S * T queries, M slots, k slots read, P parts of the slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memlm.retrieval.exact import weigh

_QUERIES, _SLOTS = 16, 64  # of a block
_PROGRAMS, _PART = 512, 1024  # programs that keep a GPU busy; least slots of a part, where queries alone are too few


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    bias,
    visible,
    temperature,
    null,
    score,
    index,
    weight,
    n_query,
    n_token,
    n_segment,
    n_slot,
    part_len,
    k,
    threshold,
    key_row,
    key_slot,
    bias_row,
    visible_row,
    visible_segment,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The best slots of a block of queries of one segment, among one part of the slots."""
    here, part = tl.program_id(0), tl.program_id(2)
    row, segment = here // n_segment, here % n_segment
    token = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    number = here.to(tl.int64) * n_token + token  # of the query, through rows and segments
    width, column, cell = tl.arange(0, WIDTH), tl.arange(0, K), tl.arange(0, SLOTS)
    inside = token < n_token
    heat = tl.load(temperature)
    q = tl.load(query + number[:, None] * D + width[None, :], mask=inside[:, None] & (width < D)[None, :], other=0.0)
    q = q * heat
    # Columns beyond k hold infinity, so that none of them is ever the worst.
    best = tl.zeros((QUERIES, K), tl.float32) + tl.where(column < k, -float("inf"), float("inf"))[None, :]
    found = tl.zeros((QUERIES, K), tl.int32)
    first = part * part_len
    last = tl.minimum(first + part_len, n_slot)
    for start in range(first, last, SLOTS):
        slot = start + cell
        there = slot < last
        keys = tl.load(
            key + row.to(tl.int64) * key_row + slot[:, None].to(tl.int64) * key_slot + width[None, :],
            mask=there[:, None] & (width < D)[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(keys.to(tl.float32)), input_precision=PRECISION)  # (QUERIES, SLOTS)
        b = tl.load(bias + row.to(tl.int64) * bias_row + slot, mask=there, other=0.0)
        seen = tl.load(
            visible + row.to(tl.int64) * visible_row + segment.to(tl.int64) * visible_segment + slot,
            mask=there,
            other=0,
        )
        readable = (seen != 0)[None, :] & inside[:, None]
        if threshold > -1:
            readable = readable & (s >= threshold * heat)
        s = tl.where(readable, s + b[None, :], -float("inf"))
        # As long as a query has a better slot than its worst one, it takes the best of the block in its place.
        most, least = tl.max(s, axis=1), tl.min(best, axis=1)
        while tl.max((most > least).to(tl.int32), axis=0) > 0:
            takes = (most > least)[:, None]
            at, worst = tl.argmax(s, axis=1), tl.argmin(best, axis=1)
            hit = takes & (column[None, :] == worst[:, None])
            best = tl.where(hit, most[:, None], best)
            found = tl.where(hit, (start + at)[:, None], found)
            s = tl.where(takes & (cell[None, :] == at[:, None]), -float("inf"), s)
            most, least = tl.max(s, axis=1), tl.min(best, axis=1)
    kept = column[None, :] < k
    best = tl.where(kept, best, -float("inf"))
    nothing = tl.load(null)
    most = tl.maximum(tl.max(best, axis=1), nothing)
    likely = tl.exp(best - most[:, None])
    share = likely / (tl.sum(likely, axis=1) + tl.exp(nothing - most))[:, None]
    place = (part.to(tl.int64) * n_query + number[:, None]) * k + column[None, :]
    mask = inside[:, None] & kept
    tl.store(score + place, best, mask=mask)
    tl.store(index + place, found.to(tl.int64), mask=mask)
    tl.store(weight + place, share, mask=mask)


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
    """The best slots of a bank, and their weights beside a null slot, without gradients.

    Args:
        query: Unit queries, (B, N, d_key).
        temperature: Inverse temperature, a scalar on the device.
        null_score: Score of the null slot, a scalar on the device.
        threshold: Least cosine similarity of a slot that is read.
        k: Slots that each query reads, at most 64 or so.
        key: Unit keys, (B, M, d_key) or (1, M, d_key).
        bias: Added to the score, (B, M) or (1, M).
        visible: Which slots segment s may read, (B, S, M) or (1, S, M).

    Returns:
        Scores (B, N, k), -inf where there is no further slot; indices and weights of these slots. In no order.
    """
    n_row, n_query, width = query.shape
    n_segment, n_slot = visible.shape[1:]
    n_token = n_query // n_segment
    query = query.detach().float().contiguous()
    bank = (part.detach() if part.stride(-1) == 1 else part.detach().contiguous() for part in (key, bias, visible))
    key, bias, visible = (part.expand(n_row, *part.shape[1:]) for part in bank)
    n_block = triton.cdiv(n_token, _QUERIES)
    n_part = max(1, min(_PROGRAMS // (n_row * n_segment * n_block), n_slot // _PART))
    part_len = triton.cdiv(triton.cdiv(n_slot, n_part), _SLOTS) * _SLOTS
    n_part = triton.cdiv(n_slot, part_len)
    score = query.new_empty(n_part, n_row, n_query, k)
    index, weight = torch.empty_like(score, dtype=torch.long), torch.empty_like(score)
    kernel: Any = _kernel[(n_row * n_segment, n_block, n_part)]
    kernel(
        query, key, bias, visible.view(torch.uint8), temperature.detach(), null_score.detach(), score, index, weight,
        n_row * n_query, n_token, n_segment, n_slot, part_len, k, threshold,
        key.stride(0), key.stride(1), bias.stride(0), visible.stride(0), visible.stride(1),
        D=width, WIDTH=max(16, triton.next_power_of_2(width)), K=max(2, triton.next_power_of_2(k)), QUERIES=_QUERIES,
        SLOTS=_SLOTS, PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    )  # fmt: skip
    if n_part == 1:
        return score[0], index[0], weight[0]
    best = score.movedim(0, 2).flatten(2).topk(k, dim=2, sorted=False)
    index = index.movedim(0, 2).flatten(2).gather(2, best.indices)
    return best.values, index, weigh(best.values, null_score.detach())
