"""Exact top-k attention over slots.

Slots come from two pools: a bank that was there before the window, of which each query gathers its best k, and slots
written inside the window, which are few and searched densely so that gradients reach their keys and values cheaply.

Shapes: B rows, S segments, N = S * T queries, M slots of a bank, P slots of a window, k slots read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Pool(NamedTuple):
    """Slots that can be read.

    Attributes:
        key: Unit keys, (B, M, d_key), or (1, M, d_key) for all rows.
        value: Values, (B, M, d_value) or (1, M, d_value).
        bias: Added to the score, (B, M) or (1, M).
        visible: Which slots segment s may read, (B, S, M), or (1, S, M).
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    visible: Tensor


def attend(
    query: Tensor,
    temperature: Tensor,
    null_score: Tensor,
    threshold: float,
    top_k: int,
    bank: Pool | None,
    window: Pool | None,
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

    Returns:
        What was read (B, N, d_value); the slots read, numbered through the bank and then the window, (B, N, k); their
        weights (B, N, k), 0 for slots that may not be read.
    """
    scores, found = [], []
    if bank is not None:
        similarity, index = _gather_best(query, temperature, threshold, min(top_k, bank.key.shape[1]), bank)
        scores.append(similarity)
        found.append(index)
    if window is not None:
        cosine = query @ window.key.transpose(1, 2)  # (B, N, P)
        dense = temperature * cosine + window.bias[:, None]
        dense = dense.masked_fill(~_readable(cosine.detach(), window.visible, threshold), -torch.inf)
        scores.append(dense)
        offset = bank.key.shape[1] if bank is not None else 0
        found.append(torch.arange(offset, offset + dense.shape[2], device=query.device).expand_as(dense))
    score = torch.cat(scores, dim=2)
    best = score.detach().topk(min(top_k, score.shape[2]), dim=2)
    score = score.masked_fill(score < best.values[..., -1:], -torch.inf)
    null = null_score.to(score.dtype).expand(*score.shape[:2], 1)
    weight = torch.cat([null, score], dim=2).softmax(dim=2)[..., 1:]
    n_bank = scores[0].shape[2] if bank is not None else 0
    read = query.new_zeros(())
    if bank is not None:
        read = read + (weight[..., None, :n_bank] @ _rows(bank.value, found[0]))[..., 0, :]
    if window is not None:
        read = read + weight[..., n_bank:] @ window.value
    slots = torch.cat(found, dim=2).gather(2, best.indices).masked_fill(best.values == -torch.inf, -1)
    missing = (0, top_k - slots.shape[2])  # so that reads of few slots and of many can be joined
    return read, F.pad(slots, missing, value=-1), F.pad(weight.gather(2, best.indices), missing)


def _readable(cosine: Tensor, visible: Tensor, threshold: float) -> Tensor:
    """Mask (B, N, M) of the slots that may be read."""
    _n_row, n_query, n_slot = cosine.shape
    n_segment = visible.shape[1]
    mask = visible[:, :, None].expand(-1, -1, n_query // n_segment, -1).reshape(-1, n_query, n_slot)
    return mask & (cosine >= threshold) if threshold > -1 else mask


def _gather_best(query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool) -> tuple[Tensor, Tensor]:
    """Scores (B, N, k), differentiable, and indices of the best slots of a bank."""
    with torch.no_grad():
        score = (query * temperature) @ bank.key.transpose(1, 2)  # (B, N, M)
        n_segment = bank.visible.shape[1]
        if threshold > -1:
            score.masked_fill_(score < threshold * temperature, -torch.inf)
        hidden = torch.where(bank.visible, bank.bias[:, None], -torch.inf)  # (B, S, M)
        score.unflatten(1, (n_segment, -1)).add_(hidden[:, :, None])
        best = score.topk(k, dim=2, sorted=False)
    key = _rows(bank.key, best.indices)  # (B, N, k, d_key)
    bias = _rows(bank.bias[..., None], best.indices)[..., 0]
    exact = temperature * (key @ query[..., None])[..., 0] + bias
    return exact.masked_fill(best.values == -torch.inf, -torch.inf), best.indices


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """``table`` (B, M, d) or (1, M, d) at ``index`` (B, N, k): (B, N, k, d).

    An embedding look-up: its backward pass is deterministic, unlike that of indexing.
    """
    n_row, n_slot, width = table.shape
    if n_row > 1:
        index = index + n_slot * torch.arange(n_row, device=index.device)[:, None, None]
    return F.embedding(index, table.reshape(n_row * n_slot, width))
