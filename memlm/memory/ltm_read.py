"""How `ltm` is read: top-k attention of queries over slots.

Shapes: B rows, S segments, N = S * T queries, D model width, M slots, P slots of a window, k slots read per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.contract import Read
from memlm.memory.ltm_write import USED
from memlm.retrieval.coarse import Coarse, coarse, pays
from memlm.retrieval.exact import Pool, attend, hidden_by
from memlm.retrieval.lists import Lists
from memlm.retrieval.sharded import attend_sharded

if TYPE_CHECKING:
    from memlm.memory.ltm import LongTermMemory, LongTermState


class Prepared(NamedTuple):
    """What the reads of a segment need of a state: its slots, and the lists to find them by, if there are any."""

    bank: Pool | None
    lists: Lists | None


def read(
    memory: LongTermMemory,
    y: Tensor,
    bank: Pool | None,
    window: Pool | None,
    lists: Lists | None = None,
    window_list: Tensor | None = None,
) -> Read:
    """Gated read of ``y`` (B, N, D); of a bank with ``lists`` by these, and of a window as if it were in them."""
    gate = memory.read_gate(y).sigmoid()  # (B, N, 1)
    if bank is None and window is None:
        none = torch.zeros(*y.shape[:2], memory.top_k, device=y.device)
        return Read(torch.zeros_like(y), none.long() - 1, none, gate[..., 0])
    with torch.autocast(y.device.type, enabled=False):
        # As in a write, `memory.norm` of it: of that only the weights are left in a unit query.
        query = F.normalize(memory.to_key(y.float() * memory.norm.weight), dim=-1)  # (B, N, d_key)
        temperature = temperature_of(memory)
        null = temperature * memory.null_similarity
        recency = None if memory.log_recency is None else memory.log_recency.exp()
        how = (query, temperature, null, memory.retrieval_threshold, memory.top_k)
        if memory.is_sharded:
            assert bank is not None
            read, slots, weights = attend_sharded(*how, bank, recency)
        else:
            find = None if lists is None else memory.search_index().find(lists)
            if window is not None and window_list is not None and lists is not None:
                reach = memory.search_index().reach(lists, query, window_list)
                if reach is not None:
                    visible = window.visible.repeat_interleave(y.shape[1] // window.visible.shape[1], dim=1)
                    window = window._replace(visible=visible & reach)
            read, slots, weights = attend(*how, bank, window, recency, find)
    return Read(gate * memory.to_output(read.to(y.dtype)), slots, weights, gate[..., 0])


def temperature_of(memory: LongTermMemory) -> Tensor:
    """Inverse temperature of the read."""
    return memory.log_temperature.exp() * memory.temperature_scale


def coarsened(memory: LongTermMemory, bank: Pool, rows: Tensor | None, old: Coarse | None) -> Pool:
    """A bank with its slots in whole numbers where that pays; of ``old`` ones only ``rows`` (N,) are made anew."""
    if not pays(None, memory.retrieval_threshold, memory.top_k, bank.key, ready=True):
        return bank
    hidden, temperature = hidden_by(bank), temperature_of(memory)
    if rows is None or old is None or len(bank.key) == 1 or old.key.shape != bank.key.shape:
        return bank._replace(coarse=coarse(bank.key, hidden, temperature))
    new = coarse(bank.key[rows], hidden[rows], temperature)
    if new is None:
        return bank
    pairs = zip(old, new, strict=True)
    return bank._replace(coarse=Coarse(*(mine.index_copy_(0, rows, part) for mine, part in pairs)))


def pool(memory: LongTermMemory, state: LongTermState, visible: Tensor | None = None) -> Pool | None:
    """The slots that may hold something, and which of them each segment may read; None if there is none."""
    n = n_used(memory, state)
    if n == 0:
        return None
    if visible is None:
        visible = state.priority[:, None, :n] > USED  # (B, 1, M)
    return Pool(
        state.key[:, :n],
        state.value[:, :n],
        memory.bias(state.log_gate[:, :n]),
        visible[..., :n],
        time_of(memory, state.record[:, :n], state.position[:, :n]),
    )


def time_of(memory: LongTermMemory, record: Tensor, position: Tensor) -> Tensor | None:
    """When slots were written: by record, then by place in the document. None if reads need not know."""
    return None if memory.log_recency is None else record * 2**32 + position


def n_used(memory: LongTermMemory, state: LongTermState) -> int:
    """How many slots from the first on may hold something; of a sharded bank, of this process's shard."""
    return min(-(-int(state.n_used.tensor.max()) // memory.rank[1]), state.key.shape[1])
