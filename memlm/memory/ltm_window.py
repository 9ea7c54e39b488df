"""`ltm` over a whole window: which slots each segment finds is settled first, then all segments read at once.

Priorities alone decide that. Equal to the segment-wise definition in outputs and gradients.

Shapes: B rows, S segments, M slots, K slots that a segment offers, P = S * K candidates, N = S * T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory import ltm_read, ltm_write
from memlm.memory.contract import Mixer, Read, Scanned, Segment
from memlm.memory.ltm_write import EMPTY, ORIGINS, USED, Candidates
from memlm.retrieval.exact import Pool
from memlm.retrieval.index import Follower
from memlm.tensors import Host, take

if TYPE_CHECKING:
    from memlm.memory.ltm import LongTermMemory, LongTermState


class _Plan(NamedTuple):
    """What becomes of the slots of a window."""

    priority: Tensor  # of the bank after the window, (B, M)
    source: Tensor  # candidate that each slot of the bank holds after the window, (B, M); -1: what it held before
    record: Tensor  # number of the record of each candidate within the window, (B, P)
    n_record: Tensor  # records written since the window began, or since its last reset, (B,)
    window_slot: Tensor  # slot that each candidate went to, (B, P); -1 if none
    bank_visible: Tensor  # which old slots each segment may read, (B, S, M)
    window_visible: Tensor  # which candidates each segment may read, (B, S, P)
    window_list: Tensor  # list that each candidate went to, (B, P); -1 if none
    follower: Follower  # what the index noted of the window


def fits(memory: LongTermMemory, window: Segment, state: LongTermState) -> bool:
    """Whether the window can be read at once.

    Rows must have banks of their own, documents that begin in it must begin with an empty bank, and slots must not be
    assigned to lists anew before its end.
    """
    if memory.scope == "shared" or window.n_segment == 1 or (window.reset is not None and memory.bank.exists):
        return False
    n_token = window.segment_len + window.lookback
    n_new = n_token if memory.write_budget is None else min(memory.write_budget, n_token)
    return not memory.search_index().is_due(state.lists, window.n_segment * n_new)


def scan(
    memory: LongTermMemory, x: Tensor, window: Segment, state: LongTermState, mixer: Mixer, read: bool, keep_state: bool
) -> Scanned:
    """See `Memory.scan`."""
    found, trace = ltm_write.candidates(memory, window)
    plan = plan_window(memory, state, found.priority, found.key.detach(), window)
    flat = Candidates(*(part.flatten(1, 2) for part in found))
    reads = _read(memory, mixer(x), state, flat, plan) if read else None
    after = _settled(memory, memory.start_documents(window.reset, state), flat, plan) if keep_state else state
    return Scanned(None, reads, after, trace)


def _read(memory: LongTermMemory, y: Tensor, state: LongTermState, flat: Candidates, plan: _Plan) -> Read:
    """What all segments read, of the bank from before the window and of the window's own slots."""
    time = ltm_read.time_of(memory, state.n_record[:, None] + plan.record, flat.position)
    own_slots = Pool(flat.key, flat.value, memory.bias(flat.log_gate), plan.window_visible, time)
    window_slot, window_list = plan.window_slot, plan.window_list
    if memory.distractors and memory.training:  # one pool of all rows' slots, numbered row after row
        own_slots = Pool(
            key=own_slots.key.flatten(0, 1)[None],
            value=own_slots.value.flatten(0, 1)[None],
            bias=own_slots.bias.flatten()[None],
            visible=own_slots.visible.transpose(0, 1).flatten(1)[None],  # (1, S, B * P)
            time=None if time is None else time.flatten()[None],
        )
        own = torch.eye(len(y), dtype=torch.bool, device=y.device)[..., None]
        window_slot = torch.where(own, window_slot, -1).flatten(1)  # (B, B * P)
        window_list = torch.where(own, window_list, -1).flatten(1)  # slots of other rows are always read
    bank = ltm_read.pool(memory, state, plan.bank_visible)
    reads = ltm_read.read(memory, y, bank, own_slots, state.lists, window_list)
    assert reads.slots is not None
    n_bank = int(state.n_used.tensor.max())
    slot = torch.cat([torch.arange(n_bank, device=y.device).expand(len(y), -1), window_slot], dim=1)
    slot = F.pad(slot, (0, 1), value=-1)  # -1 stays -1
    index = reads.slots.flatten(1).remainder(slot.shape[1])
    return reads._replace(slots=slot.gather(1, index).view_as(reads.slots))


def _settled(memory: LongTermMemory, start: LongTermState, flat: Candidates, plan: _Plan) -> LongTermState:
    """The bank after the window, of the bank ``start`` before it in which rows that begin a document are fresh."""
    # Every candidate writes to the slot it went to: itself if it is there at the end, else what is there at the
    # end, so that all writers of a slot agree. One of them has the gradient.
    slot = plan.window_slot.clamp(min=0)  # (B, P)
    owner = plan.source.gather(1, slot)
    number = torch.arange(slot.shape[1], device=slot.device)
    stays = (owner == number) & (plan.window_slot >= 0)
    refused = plan.window_slot < 0
    home = torch.where(stays.any(dim=1, keepdim=True), stays.long().argmax(dim=1, keepdim=True), 0)
    slot = torch.where(refused, slot.gather(1, home), slot)
    owner = torch.where(refused, owner.gather(1, home), owner)
    attached = stays | (~stays.any(dim=1, keepdim=True) & (number == 0))

    def settle(old: Tensor, new: Tensor) -> Tensor:
        shape = (*slot.shape, *[1] * (old.dim() - 2))
        value = torch.where((owner >= 0).view(shape), take(new, owner.clamp(min=0)), take(old, slot))
        value = torch.where(attached.view(shape), value, value.detach())
        return old.scatter(1, slot.view(shape).expand_as(value), value)

    stored: dict[str, Any] = {name: settle(getattr(start, name), part) for name, part in flat._asdict().items()}
    n_new = flat.priority.shape[1]
    after = start._replace(
        **stored | {"priority": plan.priority},
        record=settle(start.record, start.n_record[:, None] + plan.record),
        origins=settle(start.origins, start.origins.new_full((*slot.shape, ORIGINS), -1)),
        n_record=start.n_record + plan.n_record,
        n_used=Host((start.n_used.tensor + n_new).clamp(max=memory.n_slot)),
    )
    index, used = memory.search_index(), memory.filled(after)
    return after._replace(lists=index.settle(plan.follower, start.lists, n_new, after.key, used))


def plan_window(memory: LongTermMemory, state: LongTermState, priority: Tensor, key: Tensor, segment: Segment) -> _Plan:
    """Replay the replacement of a whole window by priorities alone (B, S, K); keys only choose lists."""
    n_row, n_segment, n_new = priority.shape
    device, n_candidate = priority.device, n_segment * n_new
    bank = state.priority
    used = bank > USED
    source = torch.full_like(bank, -1, dtype=torch.long)
    bank_until = torch.full_like(source, n_segment)
    new_until = torch.full((n_row, n_candidate + 1), -1, device=device)  # one column more: writes to nowhere
    window_slot = torch.full((n_row, n_candidate), -1, device=device)
    counter = torch.zeros(n_row, dtype=torch.long, device=device)
    records = []
    follower = memory.search_index().follow(state.lists)
    window_list = torch.full_like(window_slot, -1)
    empty = EMPTY + torch.arange(bank.shape[1], device=device, dtype=bank.dtype)
    for s in range(n_segment):
        complete = segment.complete[:, s].long()
        if segment.reset is not None:
            reset = segment.reset[:, s, None]
            bank = torch.where(reset, empty, bank)
            source = source.masked_fill(reset, -1)
            bank_until = torch.where(reset, bank_until.clamp(max=s - 1), bank_until)
            new_until = torch.where(reset, new_until.clamp(max=s - 1), new_until)
            counter = counter.masked_fill(reset[:, 0], 0)
            follower.reset(reset[:, 0])
        bank = ltm_write.age(memory, bank, complete)
        victim, order, accept = ltm_write.replace(bank, priority[:, s])
        candidate = s * n_new + order  # (B, K)
        replaced = source.gather(1, victim)
        bank_until = ltm_write.put(
            bank_until, victim, accept & (replaced < 0), bank_until.gather(1, victim).clamp(max=s)
        )
        nowhere = torch.where(accept & (replaced >= 0), replaced, n_candidate)
        new_until = new_until.scatter(1, nowhere, s)
        new_until = new_until.scatter(1, candidate, torch.where(accept, n_segment, -1))
        window_slot = window_slot.scatter(1, candidate, torch.where(accept, victim, -1))
        source = ltm_write.put(source, victim, accept, candidate)
        bank = ltm_write.put(bank, victim, accept, priority[:, s].gather(1, order))
        if state.lists is not None:
            found = follower.put(victim, take(key[:, s], order), accept)
            window_list = window_list.scatter(1, candidate, found)
        records.append(counter[:, None].expand(-1, n_new))
        counter = counter + complete
    reader = torch.arange(n_segment, device=device)[:, None]  # (S, 1)
    born = torch.arange(n_candidate, device=device) // n_new
    return _Plan(
        priority=bank,
        source=source,
        record=torch.cat(records, dim=1),
        n_record=counter,
        window_slot=window_slot,
        bank_visible=(reader <= bank_until[:, None]) & used[:, None],
        window_visible=(reader > born) & (reader <= new_until[:, None, :-1]),
        window_list=window_list,
        follower=follower,
    )
