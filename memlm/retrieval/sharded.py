"""Top-k attention over slots that are sharded over processes.

Shapes: B rows, R processes, N queries, M slots of a shard, k slots read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from memlm import distributed
from memlm.retrieval.exact import Pool, discount, gather_best, search, search_best, weigh, weighted_sum


def attend_sharded(
    query: Tensor,
    temperature: Tensor,
    null_score: Tensor,
    threshold: float,
    top_k: int,
    shard: Pool,
    recency: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` over a bank that is sharded over R processes: rank r has slots r, r + R, r + 2 R, ...

    Queries go to all processes, each searches its shard, the scores of its best ``top_k`` come back. Who asked weighs
    them, and each process sums the values of its shard by these weights. Collective: every process calls it, with as
    many queries. Gradients go the same ways back.

    Args:
        query: See `attend`; those of this process.
        temperature: See `attend`.
        null_score: See `attend`.
        threshold: See `attend`.
        top_k: See `attend`.
        shard: Slots of this process for the queries of all, fields of one row; at most one fewer than another has.
        recency: See `attend`.

    Returns:
        See `attend`.
    """
    n_rank, rank = dist.get_world_size(), dist.get_rank()
    best_of = gather_best if any(part.requires_grad for part in shard[:3]) else search_best
    n_slot = shard.key.shape[1]
    score, index = best_of(search, distributed.rows_of_all(query), temperature, threshold, min(top_k, n_slot), shard)
    missing = (0, top_k - index.shape[2])  # as many from everyone, whose shards differ by a slot

    def for_own(found: Tensor) -> Tensor:  # (R * B, N, k) of own slots -> (B, N, R * k) of own queries
        parts = distributed.exchange(F.pad(found, missing, value=-torch.inf if found.is_floating_point() else 0))
        return torch.cat(parts.chunk(n_rank), dim=2)

    scores = for_own(score)
    best = scores.detach().topk(top_k, dim=2).indices  # (B, N, k)
    score = scores.gather(2, best)
    slots = for_own(index * n_rank + rank).gather(2, best).masked_fill(score.detach() == -torch.inf, -1)
    if recency is not None:
        assert shard.time is not None
        time = for_own(shard.time[0][index]).gather(2, best)
        score = discount(score, torch.arange(top_k, device=best.device).expand_as(best), time, temperature, recency)
    weight = weigh(score, null_score)
    sent = torch.zeros_like(scores).scatter(2, best, weight).chunk(n_rank, dim=2)  # by who has the slots
    weight_of_all = distributed.exchange(torch.cat(sent))[..., : index.shape[2]].contiguous()  # (R * B, N, k)
    return distributed.sum_of_all(weighted_sum(weight_of_all, shard.value, index)), slots, weight
