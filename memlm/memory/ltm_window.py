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
from memlm.tensors import Host, least, take

if TYPE_CHECKING:
    from memlm.memory.ltm import LongTermMemory, LongTermState


class _Plan(NamedTuple):
    """What becomes of the slots of a window."""

    slot: Tensor  # where each candidate went, (B, P); -1 if nowhere
    owner: Tensor  # the candidate that is in that slot after the window, (B, P); -1 if none is
    stays: Tensor  # whether it is there after the window, (B, P)
    priority: Tensor  # its priority then, (B, P)
    record: Tensor  # number of its record within the window, (B, P)
    n_record: Tensor  # records written since the window began, or since its last reset, (B,)
    list: Tensor  # list that it went to, (B, P); -1 if none
    visible: Tensor  # which candidates each segment may read, (B, S, P)
    gone: Tensor  # slot of the bank whose old contents it replaced, (B, P); -1 if none
    ends: Tensor  # last segment that sees the bank from before the window, (B,)
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
    return Scanned(None, reads, _settled(memory, state, flat, plan, window) if keep_state else state, trace)


def _read(memory: LongTermMemory, y: Tensor, state: LongTermState, flat: Candidates, plan: _Plan) -> Read:
    """What all segments read, of the bank from before the window and of the window's own slots."""
    time = ltm_read.time_of(memory, state.n_record[:, None] + plan.record, flat.position)
    own_slots = Pool(flat.key, flat.value, memory.bias(flat.log_gate), plan.visible, time)
    window_slot, window_list = plan.slot, plan.list
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
    bank = ltm_read.pool(memory, state, _bank_visible(state, plan))
    reads = ltm_read.read(memory, y, bank, own_slots, state.lists, window_list)
    assert reads.slots is not None
    n_bank = int(state.n_used.tensor.max())
    slot = torch.cat([torch.arange(n_bank, device=y.device).expand(len(y), -1), window_slot], dim=1)
    slot = F.pad(slot, (0, 1), value=-1)  # -1 stays -1
    index = reads.slots.flatten(1).remainder(slot.shape[1])
    return reads._replace(slots=slot.gather(1, index).view_as(reads.slots))


def _bank_visible(state: LongTermState, plan: _Plan) -> Tensor:
    """Which slots of the bank from before the window each segment may read, (B, S, M): until they are replaced."""
    n_segment, n_candidate = plan.visible.shape[1:]
    used = state.priority > USED
    until = plan.ends[:, None].repeat(1, used.shape[1] + 1)  # one more: writes to nowhere
    written = torch.arange(n_candidate, device=used.device) // (n_candidate // n_segment)
    nowhere = torch.where(plan.gone >= 0, plan.gone, used.shape[1])
    until.scatter_(1, nowhere, written.expand_as(nowhere))
    reader = torch.arange(n_segment, device=used.device)[:, None]  # (S, 1)
    return (reader <= until[:, None, :-1]) & used[:, None]


def _settled(
    memory: LongTermMemory, state: LongTermState, flat: Candidates, plan: _Plan, window: Segment
) -> LongTermState:
    """The bank after the window, of the ``state`` before it."""
    in_place = not torch.is_grad_enabled()
    if in_place:
        state = ltm_write.own(memory, state, window.owned)
    start = memory.start_documents(window.reset, state, in_place)
    # Every candidate writes to the slot it went to: itself if it is there at the end, else what is there at the
    # end, so that all writers of a slot agree. One of them has the gradient.
    number = torch.arange(plan.slot.shape[1], device=plan.slot.device)
    slot, stays = plan.slot.clamp(min=0), plan.stays  # (B, P)
    owner, refused = plan.owner, plan.slot < 0
    home = torch.where(stays.any(dim=1, keepdim=True), stays.long().argmax(dim=1, keepdim=True), 0)
    slot = torch.where(refused, slot.gather(1, home), slot)
    owner = torch.where(refused, owner.gather(1, home), owner)
    attached = stays | (~stays.any(dim=1, keepdim=True) & (number == 0))

    def settle(old: Tensor, new: Tensor) -> Tensor:
        shape, new = (*slot.shape, *[1] * (old.dim() - 2)), new.to(old.dtype)
        value = torch.where((owner >= 0).view(shape), take(new, owner.clamp(min=0)), take(old, slot))
        value = torch.where(attached.view(shape), value, value.detach())
        index = slot.view(shape).expand_as(value)
        return old.scatter_(1, index, value) if in_place else old.scatter(1, index, value)

    aged = start.priority
    for s in range(window.n_segment):
        aged = ltm_write.age(memory, aged, window.complete[:, s])
    n_new = flat.priority.shape[1]
    olds = start._replace(priority=aged)._asdict()
    news = {
        "record": start.n_record[:, None] + plan.record,  # the first, as in `ltm_write.store`
        **flat._replace(priority=plan.priority)._asdict(),
        "origins": start.origins.new_full((*slot.shape, ORIGINS), -1),
    }
    stored: dict[str, Any] = {name: settle(olds[name], part) for name, part in news.items()}
    after = start._replace(
        **stored,
        n_record=start.n_record + plan.n_record,
        n_used=Host((start.n_used.tensor + n_new).clamp(max=memory.n_slot)),
    )
    lists = memory.search_index().settle(
        plan.follower, start.lists, n_new, after.key, lambda: memory.filled(after), in_place
    )
    return after._replace(lists=lists)


def plan_window(memory: LongTermMemory, state: LongTermState, priority: Tensor, key: Tensor, segment: Segment) -> _Plan:
    """Replay the replacement of a whole window by priorities alone (B, S, K); keys only choose lists.

    Whatever is replaced in the window is among the P slots that are worth least before it.
    """
    n_row, n_segment, n_new = priority.shape
    device, n_candidate = priority.device, n_segment * n_new
    place = least(state.priority, min(n_candidate, state.priority.shape[1])).sort(dim=1).values  # (B, W)
    bank, first = state.priority.gather(1, place), torch.arange(place.shape[1], device=device)
    empty = EMPTY + first.to(bank.dtype)
    source = torch.full_like(place, -1)  # candidate that each of these slots holds; -1: what it held before
    until = torch.full((n_row, n_candidate + 1), -1, device=device)  # one column more: writes to nowhere
    slot = torch.full((n_row, n_candidate), -1, device=device)
    seat, in_list, gone = torch.zeros_like(slot), slot.clone(), slot.clone()
    ends = torch.full((n_row,), n_segment, device=device)
    counter = torch.zeros(n_row, dtype=torch.long, device=device)
    records = []
    follower = memory.search_index().follow(state.lists)
    for s in range(n_segment):
        complete = segment.complete[:, s].long()
        if segment.reset is not None:
            reset = segment.reset[:, s, None]
            place, bank = torch.where(reset, first, place), torch.where(reset, empty, bank)
            source = source.masked_fill(reset, -1)
            until = torch.where(reset, until.clamp(max=s - 1), until)
            ends = torch.where(reset[:, 0], ends.clamp(max=s - 1), ends)
            counter = counter.masked_fill(reset[:, 0], 0)
            follower.reset(reset[:, 0])
        bank = ltm_write.age(memory, bank, complete)
        victim, order, accept = ltm_write.replace(bank, priority[:, s])
        went = place.gather(1, victim)
        candidate = s * n_new + order  # (B, K)
        replaced = source.gather(1, victim)
        evicts = accept & (replaced < 0) & (ends == n_segment)[:, None]
        gone = gone.scatter(1, candidate, torch.where(evicts, went, -1))
        nowhere = torch.where(accept & (replaced >= 0), replaced, n_candidate)
        until = until.scatter(1, nowhere, s)
        until = until.scatter(1, candidate, torch.where(accept, n_segment, -1))
        slot = slot.scatter(1, candidate, torch.where(accept, went, -1))
        seat = seat.scatter(1, candidate, victim)
        source = ltm_write.put(source, victim, accept, candidate)
        bank = ltm_write.put(bank, victim, accept, priority[:, s].gather(1, order))
        if state.lists is not None:
            found = follower.put(went, take(key[:, s], order), accept)
            in_list = in_list.scatter(1, candidate, found)
        records.append(counter[:, None].expand(-1, n_new))
        counter = counter + complete
    reader = torch.arange(n_segment, device=device)[:, None]  # (S, 1)
    born = torch.arange(n_candidate, device=device) // n_new
    last = torch.searchsorted(place, slot).clamp(max=place.shape[1] - 1)  # among the places at the end, which differ
    return _Plan(
        slot=slot,
        owner=torch.where(place.gather(1, last) == slot, source.gather(1, last), -1),
        stays=until[:, :-1] == n_segment,
        priority=bank.gather(1, seat),
        record=torch.cat(records, dim=1),
        n_record=counter,
        list=in_list,
        visible=(reader > born) & (reader <= until[:, None, :-1]),
        gone=gone,
        ends=ends,
        follower=follower,
    )
