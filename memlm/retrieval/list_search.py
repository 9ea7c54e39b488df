"""Top-k search in the lists of an inverted file that queries probe.

Shapes: S segments, N queries of one row, M slots, L lists, C cells of a list, p lists probed by a query, l lists probed
by any, k slots read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.retrieval.exact import Pool
from memlm.retrieval.lists import Lists

GROUP = 16
"""Scores whose maximum is ranked before they are; lists have room for a multiple of them."""

_SCORES = 2**24  # scores that exist at a time


def search(
    lists: Lists, near: Tensor, query: Tensor, temperature: Tensor, threshold: float, k: int, bank: Pool
) -> tuple[Tensor, Tensor]:
    """As `memlm.retrieval.exact.search`, of the queries of one row, whose slots are assigned.

    Args:
        lists: Those of the row, without the dimension of rows.
        near: The lists that each query probes, (N, p).
        query: Unit queries, (N, d_key).
        temperature: Inverse temperature.
        threshold: Least cosine similarity.
        k: Slots that a query finds.
        bank: The slots of the row, B = 1.

    Returns:
        Scores and slots, (N, k) each.
    """
    visible, bias = bank.visible[0], bank.bias[0]  # (S, M), (M,)
    n_query, n_segment, n_list = len(query), len(visible), len(lists.centroid)
    n_cell = (len(lists.slot) - 1) // n_list
    if query.is_cuda:
        searched = torch.arange(int(lists.known_n_list.tensor), device=query.device)
    else:  # few queries search few of the lists
        searched, near = near.unique(return_inverse=True)
    cells = lists.slot[:-1].view(n_list, -1)[searched].long()  # (l, C)
    empty, cells = cells < 0, cells.clamp(min=0)
    table = torch.where(visible[:, cells] & ~empty, bias[cells], -torch.inf)  # what each adds, (S, l, C)
    keys, extent = lists.key[:-1].view(n_list, n_cell, -1), lists.extent[searched]
    segment = torch.arange(n_query, device=query.device) // (n_query // n_segment)
    n_probe = near.shape[1]
    n_group = n_probe * n_cell // GROUP
    values, slots = [], []
    most = table.amax(dim=0)
    for part in torch.arange(n_query, device=query.device).split(max(1, _SCORES // (n_probe * n_cell))):
        score, place = _by_list(query[part], temperature, threshold, keys, searched, most, extent, near[part])
        if n_segment > 1:
            pair = torch.empty_like(place.flatten()).scatter_(0, place.flatten(), near[part].flatten())
            reader = torch.empty_like(pair).scatter_(0, place.flatten(), segment[part].repeat_interleave(n_probe))
            score.masked_fill_((table == -torch.inf)[reader, pair], -torch.inf)
        # As in `exact.top`, but maxima of groups are put in order, not all scores.
        members = score.view(len(score), GROUP, -1)  # (n * p, G, C / G)
        best = members.amax(dim=1)[place].flatten(1).topk(min(k, n_group), dim=1, sorted=False).indices
        probe, group = best // members.shape[2], best % members.shape[2]  # (n, k) each
        inside = group[..., None] + members.shape[2] * torch.arange(GROUP, device=query.device)  # (n, k, G)
        found = score[place.gather(1, probe)[..., None], inside].flatten(1)
        value, index = found.topk(min(k, found.shape[1]), dim=1, sorted=False)
        cell = (near[part].gather(1, probe)[..., None] * n_cell + inside).flatten(1).gather(1, index)
        values.append(value)
        slots.append(cells.flatten()[cell])
    value, slot = torch.cat(values), torch.cat(slots)
    # The rounding of a product of many queries depends on which they are. A query's own result must not.
    slot, order = slot.sort(dim=1)
    exactly = temperature * (bank.key[0, slot] * query[:, None]).sum(dim=2) + bias[slot]
    exactly = exactly.masked_fill(~visible[segment[:, None], slot], -torch.inf)
    value = exactly.masked_fill(value.gather(1, order) == -torch.inf, -torch.inf)
    missing = (0, k - slot.shape[1])
    return F.pad(value, missing, value=-torch.inf), F.pad(slot, missing)


def _by_list(
    query: Tensor,
    temperature: Tensor,
    threshold: float,
    keys: Tensor,
    searched: Tensor,
    bias: Tensor,
    extent: Tensor,
    near: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores of each ``query`` (N, d_key) in the lists that are near it.

    On a CPU list by list, each with all its queries: no key is copied, and each is read once.

    Args:
        query: Unit queries.
        temperature: Inverse temperature.
        threshold: Least cosine similarity.
        keys: Keys of the cells of all lists, (L, C, d_key).
        searched: Lists that any query searches, (l,).
        bias: What each of their cells adds, (l, C).
        extent: Cells of each of them beyond which all are empty, (l,).
        near: Which of them each query searches, (N, p).

    Returns:
        Scores in the order in which they were made, (N * p, C), and which of them each probe has, (N, p).
    """
    scaled, least = query * temperature, threshold * temperature
    flat = near.flatten()
    if query.is_cuda:
        score = (keys[searched[near]].to(scaled.dtype) @ scaled[:, None, :, None])[..., 0].flatten(0, 1)
        if threshold > -1:
            score.masked_fill_(score < least, -torch.inf)
        return score.add_(bias[flat]), torch.arange(len(flat), device=flat.device).view_as(near)
    order = flat.argsort(stable=True)
    scaled = scaled[order // near.shape[1]]  # (N * p, d_key)
    score = query.new_full((len(flat), keys.shape[1]), -torch.inf)
    start = 0
    sizes = flat.bincount(minlength=len(searched))
    for row, (number, size, end) in enumerate(zip(searched.tolist(), sizes.tolist(), extent.tolist(), strict=True)):
        if size and end:
            part = score[start : start + size, :end]
            torch.mm(scaled[start : start + size], keys[number, :end].to(scaled.dtype).T, out=part)
            if threshold > -1:
                part.masked_fill_(part < least, -torch.inf)
            part.add_(bias[row, :end])
        start += size
    return score, torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(near)
