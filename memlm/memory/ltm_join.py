"""Slots of `ltm` that are joined, in consolidation, and those of another bank that are admitted.

Shapes: B rows, M slots, J slots that join others, G slots that others join.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.ltm_write import EMPTY, ORIGINS, USED, Candidates, put, replace
from memlm.memory.records import MANY
from memlm.retrieval import similar
from memlm.tensors import Host, owned, take

if TYPE_CHECKING:
    from memlm.memory.ltm import LongTermMemory, LongTermState


def consolidate(
    memory: LongTermMemory, state: LongTermState, threshold: float, turn: int, given: bool = False
) -> tuple[LongTermState, dict[str, int]]:
    """Join similar slots: keys within ``threshold`` in cosine distance that hold similar values.

    Every slot joins its most important similar slot, unless that one joins another itself. The survivor keeps its
    place, id and origin, and lists the records of the others; its key and value become the importance-weighted
    means; the joined slots become empty.
    It needs the whole bank: one that is sharded has to be gathered first.

    Up to 16,384 slots all pairs are compared; in a larger bank some turns find nearly all that are similar, and of
    one of more than 65,536 slots each turn looks at a part: see `memlm.retrieval.similar`.

    Args:
        memory: Whose bank it is.
        state: The bank.
        threshold: Largest cosine distance (1 - cosine) of both keys and values that is merged, in 0..2.
        turn: Number of the call; the result depends on it and the state alone.
        given: Whether nobody else needs the state, so that it may be changed in place.

    Returns:
        The new bank and ``{"merged": number of slots that were joined to another}``.

    Raises:
        ValueError: If the threshold is out of range, or the turn negative.
    """
    if not 0 <= threshold <= 2:
        raise ValueError(f"threshold is a cosine distance, so in 0..2, got {threshold}")
    if turn < 0:
        raise ValueError(f"turn is the number of the call, so not negative, got {turn}")
    if memory.is_sharded:
        raise ValueError("this bank is sharded over several processes: gather it before it is consolidated")
    n_used = int(state.n_used.tensor.max())
    if n_used == 0:
        return state, {"merged": 0}
    bank, gone, survivor = similar.joins(
        state.key[:, :n_used],
        state.value[:, :n_used],
        state.priority[:, :n_used],
        state.priority[:, :n_used] > USED,
        threshold,
        turn,
    )
    if not len(bank):
        return state, {"merged": 0}
    new = join(state, bank, gone, survivor, given and not torch.is_grad_enabled())
    rows = torch.ones(len(new.key), dtype=torch.bool)
    lists = memory.search_index().assign_again(new.lists, new.key, memory.filled(new), rows)
    return new._replace(lists=lists), {"merged": len(bank)}


def join(state: LongTermState, bank: Tensor, joined: Tensor, survivor: Tensor, in_place: bool = False) -> LongTermState:
    """The bank with slots ``joined`` (J,) of rows ``bank`` (J,) joined to the slots ``survivor`` (J,)."""
    n_slot = state.key.shape[1]
    group, member = torch.unique(bank * n_slot + survivor, return_inverse=True)  # (G,), (J,)
    gone = bank * n_slot + joined
    slots = torch.cat([group, gone])  # all that is joined, by its place in all rows
    member = torch.cat([torch.arange(len(group), device=group.device), member])
    log_gate = state.log_gate.reshape(-1)[slots]
    heaviest = torch.full_like(log_gate[: len(group)], -torch.inf).scatter_reduce(0, member, log_gate, "amax")
    weight = (log_gate - heaviest[member]).exp()  # relative: gates may be tiny
    total = torch.zeros_like(heaviest).index_add(0, member, weight)

    def mean(part: Tensor) -> Tensor:
        flat = part.reshape(-1, part.shape[-1])[slots] * weight[:, None]
        return torch.zeros_like(flat[: len(group)]).index_add(0, member, flat) / total[:, None]

    def put(part: Tensor, empty: Any, merged: Tensor | None = None) -> Tensor:
        new = owned(part, True) if in_place else part.clone(memory_format=torch.contiguous_format)
        flat = new.view(-1, *part.shape[2:])
        if merged is not None:
            flat[group] = merged.to(flat.dtype)
        flat[gone] = empty
        return new

    origins = _origins(state, slots, member, len(group))  # before records are others
    return state._replace(
        key=put(state.key, 0.0, F.normalize(mean(state.key), dim=-1)),
        value=put(state.value, 0.0, mean(state.value)),
        log_gate=put(state.log_gate, 0.0),
        priority=put(state.priority, EMPTY + joined.to(state.priority.dtype)),
        record=put(state.record, -1),
        document=put(state.document, -1),
        position=put(state.position, -1),
        tokens=put(state.tokens, -1),
        origins=put(state.origins, -1, origins),
    )


def _origins(state: LongTermState, slots: Tensor, member: Tensor, n_group: int) -> Tensor:
    """Origins (n_group, 8) of slots that others are merged into.

    Args:
        state: The bank before.
        slots: All that is merged, by its place in all rows, (J,); the first ``n_group`` are those merged into.
        member: Group of each, (J,).
        n_group: Number of groups.
    """
    record, listed = state.record.reshape(-1)[slots], state.origins.reshape(-1, ORIGINS)[slots].long()
    ids = torch.cat([record[:, None], listed], dim=1)  # (J, 9)
    many = torch.zeros(n_group, device=ids.device).index_add(0, member, (ids == MANY).any(dim=1).float()) > 0
    other = (ids >= 0) & (ids != record[:n_group][member][:, None])
    pair = torch.stack([member[:, None].expand_as(ids)[other], ids[other]], dim=1).unique(dim=0)  # in order, (P, 2)
    begin = torch.searchsorted(pair[:, 0].contiguous(), pair[:, 0].contiguous())
    number = torch.arange(len(pair), device=ids.device) - begin
    fits = number < ORIGINS
    many[pair[~fits, 0]] = True
    origins = torch.full((n_group, ORIGINS), -1, device=ids.device)
    origins[pair[fits, 0], number[fits]] = pair[fits, 1]
    origins[:, -1] = torch.where(many, MANY, origins[:, -1])
    return origins.to(state.origins.dtype)


def admit(memory: LongTermMemory, state: LongTermState, other: LongTermState) -> LongTermState:
    """See `RecordKeeper.admit`."""
    first = state.n_record[:, None]

    def shift(part: Tensor, by: Tensor) -> Tensor:
        return torch.where(part >= 0, part + by.to(part.dtype), part)

    came = other._replace(
        priority=other.priority.masked_fill(~memory.filled(other), -torch.inf),
        record=shift(other.record, first),
        document=shift(other.document, first),
        origins=shift(other.origins, first[..., None]),
    )
    victim, order, accept = replace(state.priority, came.priority)
    slots = (*Candidates._fields, "record", "origins")
    stored: dict[str, Any] = {
        name: put(getattr(state, name), victim, accept, take(getattr(came, name), order)) for name in slots
    }
    new = state._replace(
        **stored,
        n_record=state.n_record + other.n_record,
        n_used=Host((state.n_used.tensor + other.n_used.tensor).clamp(max=memory.n_slot)),
    )
    rows = torch.ones(len(accept), dtype=torch.bool)
    return new._replace(lists=memory.search_index().assign(new.lists, new.key, memory.filled(new), rows))
