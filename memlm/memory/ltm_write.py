"""What `ltm` writes: the slots that a segment offers, what they are worth, and which old ones they replace.

Shapes: B rows, S segments, T tokens per segment, D model width, M slots, C tokens of lookback, K slots that a segment
offers, N = S * T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import distributed
from memlm.memory import state as states
from memlm.memory.contract import Segment, Trace
from memlm.tensors import Host, least, take

if TYPE_CHECKING:
    from memlm.memory.ltm import LongTermMemory, LongTermState

EMPTY = -(2.0**23)
"""Priority of the first empty slot; slot i has ``EMPTY`` + i, so that banks fill from the front."""
USED = -(2.0**22)
"""Every used slot has a priority above this."""
ORIGINS = 8
"""Records that a joined slot lists."""
_TIE = 1e-3  # weight of a token's own log gate in its worth, to tell the tokens of a span apart


class Candidates(NamedTuple):
    """Slots that the segments of a window would write: (B, S, K, ...)."""

    key: Tensor
    value: Tensor
    log_gate: Tensor
    priority: Tensor  # -inf where there is no slot
    position: Tensor
    document: Tensor
    tokens: Tensor


def store(memory: LongTermMemory, segment: Segment, state: LongTermState) -> tuple[LongTermState, Trace]:
    """The bank with the best slots of one segment; see `Memory.write`."""
    found, trace = candidates(memory, segment)
    new = Candidates(*(part[:, 0] for part in found))
    complete = segment.complete[:, 0].long()
    if memory.scope == "shared":  # rows write in order, as one row of B * K slots
        new, complete = of_all_rows(memory, new, complete)
        number = (complete.cumsum(0) - complete).repeat_interleave(new.priority.shape[1] // len(complete))
        record, complete = number[None], complete.sum(0, keepdim=True)
    else:
        record = torch.zeros_like(new.position)
    in_place = not torch.is_grad_enabled()
    if in_place:
        state = own(memory, state, segment.owned)
    start = age(memory, state.priority, complete)
    victim, order, accept = (
        replace_sharded(memory, start, new.priority) if memory.is_sharded else replace(start, new.priority)
    )
    # The record first: a slot whose write is cut short is then known by it.
    parts = {"record": state.n_record[:, None] + take(record, order)}
    parts |= {name: take(part, order) for name, part in new._asdict().items()}
    parts["origins"] = state.origins.new_full((*victim.shape, ORIGINS), -1)
    olds = {name: getattr(state, name) for name in parts} | {"priority": start}
    stored: dict[str, Any] = {name: put(olds[name], victim, accept, part, in_place) for name, part in parts.items()}
    after = state._replace(
        **stored,
        n_record=state.n_record + complete,
        n_used=Host((state.n_used.tensor + new.priority.shape[1]).clamp(max=memory.n_slot)),
    )
    lists = memory.search_index().written(
        state.lists, victim, parts["key"], accept, after.key, lambda: memory.filled(after), in_place
    )
    return after._replace(lists=lists), trace


def own(memory: LongTermMemory, state: LongTermState, given: bool) -> LongTermState:
    """``state``, to be changed in place: a copy, or itself if it was ``given`` away."""
    lists = memory.search_index().own(state.lists, given)
    return states.own(state._replace(lists=None), given)._replace(lists=lists)


def candidates(memory: LongTermMemory, segment: Segment) -> tuple[Candidates, Trace]:
    """The slots that each segment of a window would write, and the mean write gate."""
    span, n_segment, n_token = memory.span, segment.n_segment, segment.segment_len
    hidden, valid = segment.hidden.float(), segment.valid
    with torch.autocast(hidden.device.type, enabled=False):
        normed, embedding = memory.norm(hidden), memory.embedding_norm(segment.embeddings.float())  # (B, C + N, D)
        log_gate = F.logsigmoid(gate_logit(memory, normed, embedding))  # (B, C + N)
        # What was told teaches the gate alone: taught too, the layers below read other phrasings worse.
        apart = None if segment.told is None else gate_logit(memory, normed.detach(), embedding.detach())

    window_len = n_token + segment.lookback

    def windows(part: Tensor) -> Tensor:  # (B, C + N, ...) -> (B, S, C + T, ...)
        view = part.unfold(1, window_len, n_token)
        return view.movedim(-1, 2) if part.dim() > 2 else view

    # In each window: the tokens of the segment's own context, and which of them have a successor in it.
    place = torch.arange(window_len, device=valid.device)
    before = place < segment.lookback
    here = windows(valid) & (segment.continues[..., None] | ~before)  # (B, S, C + T)
    ids = windows(segment.ids).masked_fill(~here, -1)  # (B, S, C + T)
    has_next = F.pad(here[..., 1:], (0, 1))
    here = here & has_next
    position = segment.position[..., None] + place - segment.lookback  # (B, S, C + T)
    strength = span_mean(windows(log_gate), here, span)  # (B, S, C + T)
    worth = worth_of(memory, strength.detach(), windows(log_gate.detach()), ids, position, segment)
    # Tokens whose spans are all complete are final; those at the end wait for the next segment.
    final = (place >= segment.lookback - span) & ((place < window_len - span) | segment.closes[..., None])
    final = final & here & segment.complete[..., None]
    worth = worth.masked_fill(~final, -torch.inf)
    budget = window_len if memory.write_budget is None else memory.write_budget
    best = worth.topk(min(budget, window_len), dim=2)  # (B, S, K)

    def pick(part: Tensor, shift: int = 0) -> Tensor:  # (B, C + N, ...) -> (B, S, K, ...)
        start = torch.arange(n_segment, device=part.device)[:, None] * n_token
        cell = (best.indices + start + shift).clamp(max=part.shape[1] - 1)
        return take(part, cell.flatten(1)).unflatten(1, cell.shape[1:])

    with torch.autocast(hidden.device.type, enabled=False):  # of the chosen tokens alone
        own = pick(normed)
        key = rounded(F.normalize(memory.to_key(own), dim=-1), memory.bank_type)
        value = memory.to_value(pick(embedding, shift=1))
        if memory.from_hidden is not None:
            value = value + memory.from_hidden(own)
        value = rounded(value, memory.bank_type)

    snippet = F.pad(ids, (span - 1, 1), value=-1).unfold(2, span + 1, 1)  # (B, S, C + T, span + 1)
    found = Candidates(
        key=key,
        value=value,
        log_gate=strength.gather(2, best.indices),
        priority=best.values,
        position=position.gather(2, best.indices),
        document=segment.document[..., None].expand_as(best.indices),
        tokens=take(snippet.flatten(0, 1), best.indices.flatten(0, 1))
        .unflatten(0, best.indices.shape[:2])
        .to(torch.int32),
    )
    weight = final.float()
    gate = windows(log_gate).exp() * weight
    mean_gate = (gate.sum(dim=(0, 2)) / weight.sum(dim=(0, 2)).clamp(min=1)).mean()  # over segments
    trace = {"write_gate": mean_gate}
    if apart is not None and segment.told is not None:
        cells = slice(segment.lookback, None)
        trace["gate_error"] = gate_error(
            windows(apart)[..., cells], windows(segment.told)[..., cells], here[..., cells]
        )
    return found, trace


def gate_error(logit: Tensor, told: Tensor, here: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the write gates (B, S, T) and what was worth to be remembered, (B, S, T).

    Only cells ``here`` (B, S, T) count: those whose successor is known.
    """
    error = F.binary_cross_entropy_with_logits(logit, told.float(), reduction="none")
    return (error * here).sum() / here.sum().clamp(min=1)


def rounded(part: Tensor, dtype: torch.dtype) -> Tensor:
    """``part`` as numbers that ``dtype`` can tell, its type and gradients as they are.

    What is read of a slot so does not depend on whether it was stored before.
    """
    if part.dtype == dtype:
        return part
    exact = part.detach()
    return part + (exact.to(dtype).to(part.dtype) - exact)


def gate_logit(memory: LongTermMemory, normed: Tensor, embedding: Tensor) -> Tensor:
    """The write gate's MLP of a hidden state, the one after it and the embedding of the token after it, (B, L).

    The first layer is applied to each of the three by itself, which saves to put them side by side.
    """
    layers: Any = memory.write_gate
    first, *rest = layers
    here, after, token = first.weight.chunk(3, dim=1)
    following = F.linear(normed, after) + F.linear(embedding, token)
    x = F.linear(normed, here, first.bias) + torch.cat([following[:, 1:], following[:, -1:]], dim=1)
    for layer in rest:
        x = layer(x)
    return x[..., 0]


def worth_of(
    memory: LongTermMemory, strength: Tensor, log_gate: Tensor, ids: Tensor, position: Tensor, segment: Segment
) -> Tensor:
    """What each token is worth when one must go (B, S, C + T), by the rule that ``importance`` names."""
    if memory.importance == "span":
        return strength + _TIE * log_gate
    if memory.importance == "token":
        return log_gate
    if memory.importance == "fifo":
        n = log_gate.shape[-1]
        return torch.arange(n, device=log_gate.device).expand_as(log_gate) / n
    if memory.importance == "random":
        return (ids * 40_503 + position * 30_011) % 65_521 / 65_521
    assert segment.surprise is not None
    return segment.surprise.unfold(1, log_gate.shape[-1], segment.segment_len)


def span_mean(log_gate: Tensor, here: Tensor, span: int) -> Tensor:
    """For each token of a window the best mean log-gate of the spans that cover it (B, S, W).

    A span that goes beyond the context counts its tokens inside, if they are at least half of it.
    """
    edge = (span - 1, span - 1)
    total = F.pad(log_gate * here, edge).unfold(-1, span, 1).sum(dim=-1)  # (B, S, W + span - 1)
    count = F.pad(here.float(), edge).unfold(-1, span, 1).sum(dim=-1)
    mean = torch.where(count >= (span + 1) // 2, total / count.clamp(min=1), -torch.inf)
    best = mean.unfold(-1, span, 1).amax(dim=-1)  # (B, S, W)
    return torch.where(best.isinf(), log_gate, best)


def age(memory: LongTermMemory, priority: Tensor, n_written: Tensor) -> Tensor:
    """Priorities before the next write: under ``fifo`` what is stored gets older, else they stay."""
    if memory.importance != "fifo":
        return priority
    return priority - (priority > USED).float() * (n_written > 0).float()[:, None]


def replace(bank: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots of ``bank`` (B, M) the ``new`` ones (B, K) replace, by priority.

    The best new slot meets the worst old one, the second best the second worst, and so on; it is accepted if it is
    worth more. The bank so holds the best M of both. Of old slots that are worth the same, the first goes.

    Returns:
        Old slots (B, K), all different; new slots in the order of their meeting (B, K); whether each is accepted.
    """
    n_new = min(new.shape[1], bank.shape[1])
    best = new.topk(n_new, dim=1)
    worst = least(bank, n_new)
    return worst, best.indices, best.values > bank.gather(1, worst)


def replace_sharded(memory: LongTermMemory, bank: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`replace` where ``bank`` (1, M) is the shard of one process; ``new`` (1, K) is known to all.

    All tell the worst of their shards, so that each knows the worst of the whole, and which of those are its own.

    Returns:
        As many of its worst slots as can be replaced; which new slot each meets; whether that is accepted.
    """
    rank, n_rank = memory.rank
    n_new = min(new.shape[1], memory.n_slot)
    n_worst = min(n_new, -(-memory.n_slot // n_rank))
    own = least(bank, min(n_worst, bank.shape[1]))
    n_own = own.shape[1]
    worst = distributed.rows_of_all(F.pad(bank.gather(1, own), (0, n_worst - n_own), value=torch.inf)).view(1, -1)
    met = worst.topk(n_new, dim=1, largest=False)
    best = new.topk(n_new, dim=1)
    accept = best.values > met.values
    turn = torch.full_like(worst, -1, dtype=torch.long)  # of each of the worst, when it is met
    turn = turn.scatter(1, met.indices, torch.arange(n_new, device=bank.device)[None])
    turn = turn[:, rank * n_worst : rank * n_worst + n_own]
    index = turn.clamp(min=0)
    return own, best.indices.gather(1, index), accept.gather(1, index) & (turn >= 0)


def of_all_rows(memory: LongTermMemory, own: Candidates, complete: Tensor) -> tuple[Candidates, Tensor]:
    """Candidates (B, K, ...) of all rows that write the bank, as those of one, and which are ``complete``, (B,).

    What is sent to other processes is put side by side: each sending costs time by itself.
    """
    if memory.over_ranks:
        key, value, log_gate, priority, position, document, tokens = own
        ended = complete[:, None].expand_as(position)
        reals = torch.cat([key, value, torch.stack([log_gate, priority], dim=2)], dim=2)
        numbers = torch.cat([torch.stack([position, document, ended], dim=2), tokens.long()], dim=2)
        key, value, of_slot = memory.rows_of_all(reals).split([memory.d_key, memory.d_value, 2], dim=2)
        of_token, tokens = memory.rows_of_all(numbers).split([3, memory.span + 1], dim=2)
        (log_gate, priority), (position, document, ended) = of_slot.unbind(dim=2), of_token.unbind(dim=2)
        own = Candidates(key, value, log_gate, priority, position, document, tokens.int())
        complete = ended[:, 0]
    return Candidates(*(part.flatten(0, 1)[None] for part in own)), complete


def put(part: Tensor, index: Tensor, accept: Tensor, new: Tensor, in_place: bool = False) -> Tensor:
    """``part`` (B, M, ...) with ``new`` (B, K, ...) at ``index`` (B, K) where ``accept`` (B, K)."""
    shape = (*index.shape, *[1] * (part.dim() - 2))
    index = index.view(shape).expand_as(new)
    new = torch.where(accept.view(shape), new.to(part.dtype), part.gather(1, index))
    return part.scatter_(1, index, new) if in_place else part.scatter(1, index, new)
