"""Long-term memory: many key-value slots per layer, read by top-k attention.

Source: LMCODE's LongTermMemory (importance-weighted top-k read, soft attention over what was retrieved, a gate, FIFO
storage with intelligent replacement, consolidation of similar slots).

A token at position t makes a slot: its key is a projection of the hidden state h_t (queries use the same projection),
its value a projection of the embedding of the token that follows. A learned write gate says what matters: the best mean
log-gate of a span that covers a token weighs its slot when it is read, and decides whether it is kept, so that a fact
survives, and is found, as a whole.

Shapes: B rows, S segments, T tokens per segment, D model width, M slots, C tokens of lookback, K slots a segment
writes, N = S * T, k slots read per token.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory import ranks
from memlm.memory.base import MANY, Memory, Records, Residual, Scope, Segment, Trace
from memlm.memory.state import named_tensors, take
from memlm.retrieval import similar
from memlm.retrieval.exact import Pool, attend, attend_dealt
from memlm.retrieval.inverted import InvertedFile, Lists, dealt

_EMPTY = -(2.0**23)  # priority of the first empty slot; slot i has _EMPTY + i, so that banks fill from the front
_USED = -(2.0**22)  # every used slot has a priority above this
_TIE = 1e-3  # weight of a token's own log gate in its worth, to tell the tokens of a span apart
_ORIGINS = 8  # records that a merged slot lists
_MOST = 2.0**15  # values and priorities of what is read from a file; what a model writes is far below


class LongTermState(NamedTuple):
    """Bank of one layer: ``B`` rows (1 if shared) of ``M`` slots.

    Attributes:
        key: Unit keys, (B, M, d_key).
        value: Values, (B, M, d_value).
        log_gate: Best mean log-gate of a span that covers the token, a bias of the read, (B, M).
        priority: What a slot is worth when one must go, (B, M); below -2**22 for an empty slot.
        record: Id of the record (the span of one segment) a slot belongs to, (B, M); -1 if empty.
        document: Number of the document it came from, (B, M).
        position: Place of its token in that document, (B, M).
        tokens: Ids of the tokens up to its own and the one after, (B, M, span + 1); -1 where there is none.
        origins: Other records that were merged into it, (B, M, 8); see `Records`.
        n_record: Records written so far, (B,).
        host_used: An upper bound on the used slots of a row, (B,), on the CPU.
        lists: Which list of the inverted file each slot is in; None if all slots are searched.
    """

    key: Tensor
    value: Tensor
    log_gate: Tensor
    priority: Tensor
    record: Tensor
    document: Tensor
    position: Tensor
    tokens: Tensor
    origins: Tensor
    n_record: Tensor
    host_used: Tensor
    lists: Lists | None = None


class _Candidates(NamedTuple):
    """Slots that the segments of a window would write: (B, S, K, ...)."""

    key: Tensor
    value: Tensor
    log_gate: Tensor
    priority: Tensor  # -inf where there is no slot
    position: Tensor
    document: Tensor
    tokens: Tensor


class LongTermMemory(Memory):
    """Key-value slots with learned importance.

    Args:
        d_model: Width of the hidden states.
        n_slot: Slots per row (or in all, if shared) and layer.
        d_key: Width of keys and queries.
        d_value: Width of values, and of the hidden layer of the write gate.
        top_k: Slots that a token reads.
        write_budget: Most slots that one segment may write; None for all its tokens.
        span: Length in tokens of the window whose mean log-gate says what a slot is worth.
        importance: What decides which slot stays: ``span`` (best mean log-gate of a span that covers it; within a span
            its own), ``token`` (its own log-gate), ``fifo`` (the oldest goes), ``surprise`` (how badly the model
            predicts the token that is its value from the hidden state at the memory) or ``random`` (a hash of its
            token and place).
        temperature: Initial inverse temperature of the read; learned.
        retrieval_threshold: Cosine similarity under which a slot is not read at all.
        recency: Initial discount, in units of the score, that a newer slot which matches the query perfectly puts on
            the older ones read with it, so that of equal keys the latest wins; learned. None for no discount.
        gate_floor: Least factor by which the write gate may weaken a slot in the read.
        gate_penalty: Weight of the mean write gate in the loss: what makes writing selective.
        scope: ``sequence`` (one bank per row) or ``shared`` (one bank for all).
        shard: Whether training in several processes deals the slots of a shared bank out to them, so that it may be
            larger than what one device holds. Reads and writes are those of the whole bank, but that of slots which
            are worth exactly the same another may go.
        index: How a read finds its slots: ``exact`` (all are scored) or ``inverted`` (those in the lists nearest to the
            query, see `memlm.retrieval.inverted`), for banks of many slots.
        n_list: Lists of a full bank; None for four times the square root of ``n_slot``.
        n_probe: Lists that a token searches; None for 48.

    Attributes:
        distractors: While training, a row also reads what the other rows' segments of the window write: slots that can
            never help, so that look-alike keys are told apart. For curricula; off unless they set it.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    keeps_records = True
    temperature_scale: Tensor
    distractors: bool = False

    @property
    def wants_surprise(self) -> bool:  # type: ignore[override]
        """Only where it decides what is kept: ``importance`` may be changed at any time."""
        return self.importance == "surprise"

    def __init__(
        self,
        d_model: int,
        n_slot: int = 10_000,
        d_key: int = 128,
        d_value: int = 128,
        top_k: int = 32,
        write_budget: int | None = 64,
        span: int = 5,
        importance: Literal["span", "token", "fifo", "surprise", "random"] = "span",
        temperature: float = 12.0,
        retrieval_threshold: float = -1.0,
        recency: float | None = None,
        gate_floor: float = 0.005,
        gate_penalty: float = 0.03,
        scope: Scope = "sequence",
        shard: bool = False,
        index: Literal["exact", "inverted"] = "exact",
        n_list: int | None = None,
        n_probe: int | None = None,
    ) -> None:
        super().__init__()
        for name, number in {
            "n_slot": n_slot,
            "d_key": d_key,
            "d_value": d_value,
            "top_k": top_k,
            "span": span,
        }.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if n_slot >= 2**22:
            raise ValueError(f"n_slot must be below {2**22}, got {n_slot}")
        if write_budget is not None and write_budget < 1:
            raise ValueError(f"write_budget must be at least 1, or null, got {write_budget}")
        if not -1 <= retrieval_threshold <= 1:
            raise ValueError(f"retrieval_threshold is a cosine, so in -1..1, got {retrieval_threshold}")
        if not 0 < gate_floor <= 1:
            raise ValueError(f"gate_floor must be in (0, 1], got {gate_floor}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 <= gate_penalty < math.inf:
            raise ValueError(f"gate_penalty must not be negative, got {gate_penalty}")
        if recency is not None and not 0 < recency < math.inf:
            raise ValueError(f"recency must be positive, or null for no discount, got {recency}")
        for name, choice, choices in (
            ("importance", importance, ("span", "token", "fifo", "surprise", "random")),
            ("scope", scope, ("sequence", "shared")),
            ("index", index, ("exact", "inverted")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        self.n_slot, self.d_key, self.d_value, self.top_k = n_slot, d_key, d_value, top_k
        self.write_budget, self.span, self.importance = write_budget, span, importance
        self.retrieval_threshold, self.gate_floor, self.gate_penalty = retrieval_threshold, gate_floor, gate_penalty
        if shard and scope != "shared":
            raise ValueError(f"shard deals out a bank that all rows share, so it needs scope=shared, got {scope!r}")
        self.scope, self.shard = scope, shard
        if shard and index != "exact":
            raise ValueError(
                f"the lists of an index cannot be dealt out to processes: shard needs index=exact, got {index!r}"
            )
        self.index, self.n_list, self.n_probe = index, n_list, n_probe
        self._file()  # refuses what cannot work
        self.lookback = 2 * span

        self.norm = nn.RMSNorm(d_model)
        self.to_key = nn.Linear(d_model, d_key, bias=False)
        self.embedding_norm = nn.RMSNorm(d_model)
        self.to_value = nn.Linear(d_model, d_value, bias=False)
        self.to_output = nn.Linear(d_value, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        self.write_gate = nn.Sequential(nn.Linear(3 * d_model, d_value), nn.GELU(), nn.Linear(d_value, 1))
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        self.null_similarity = nn.Parameter(torch.tensor(0.5))
        self.log_recency = None if recency is None else nn.Parameter(torch.tensor(float(recency)).log())
        self.register_buffer("temperature_scale", torch.tensor(1.0))
        self._initialise()

    def _file(self) -> InvertedFile:
        """The inverted file of the settings as they are now: an evaluation may change them."""
        return InvertedFile(self.n_slot, self.d_key, self.n_list, self.n_probe)

    def _initialise(self) -> None:
        """Initial values: a read begins as the embedding of the token that followed, let in by half."""
        nn.init.normal_(self.to_key.weight, std=self.to_key.in_features**-0.5)
        if self.to_value.in_features == self.d_value:
            nn.init.eye_(self.to_value.weight)
        else:
            nn.init.orthogonal_(self.to_value.weight)
        self.to_output.weight.data.copy_(self.to_value.weight.T)
        nn.init.zeros_(self.read_gate.weight)
        nn.init.zeros_(self.read_gate.bias)
        for linear in self.write_gate:
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)

    def init_state(self, n_row: int) -> LongTermState:
        """An empty bank for ``n_row`` rows of text."""
        weight = self.to_key.weight
        n_bank = 1 if self.scope == "shared" else n_row
        number = torch.arange(*self._slots, device=weight.device, dtype=torch.float32)
        n_slot = len(number)

        def full(*shape: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
            # A view of one number: an empty bank takes no memory before its first write.
            return torch.full((), value, dtype=dtype, device=weight.device).expand(shape)

        return LongTermState(
            key=full(n_bank, n_slot, self.d_key),
            value=full(n_bank, n_slot, self.d_value),
            log_gate=full(n_bank, n_slot),
            priority=(_EMPTY + number).expand(n_bank, -1).clone(),
            record=full(n_bank, n_slot, value=-1, dtype=torch.long),
            document=full(n_bank, n_slot, value=-1, dtype=torch.long),
            position=full(n_bank, n_slot, value=-1, dtype=torch.long),
            tokens=full(n_bank, n_slot, self.span + 1, value=-1, dtype=torch.int32),
            origins=full(n_bank, n_slot, _ORIGINS, value=-1, dtype=torch.int32),
            n_record=full(n_bank, dtype=torch.long),
            host_used=torch.zeros(n_bank, dtype=torch.long),
            lists=self._file().empty(n_bank, weight.device) if self.index == "inverted" else None,
        )

    def bank(self) -> LongTermState:
        """See `Memory.bank`. A bank that was kept without lists is dealt out."""
        if not self.has_bank or self.index == "exact" or hasattr(self, "bank_lists_left"):
            return super().bank()
        fresh = self.init_state(1)
        named = {name: getattr(self, f"bank_{name}") for name in named_tensors(fresh._replace(lists=None))}
        state = fresh._replace(**named | {"host_used": named["host_used"].cpu()})
        return state._replace(lists=self._deal_out(state, torch.ones(1, dtype=torch.bool)))

    def _deal_out(self, state: LongTermState, rows: Tensor) -> Lists | None:
        """Lists of ``state`` with the slots of ``rows`` (B,), on the CPU, dealt out anew."""
        return state.lists and self._file().rebuild(state.lists, state.key, self.filled(state), rows)

    def read(self, x: Tensor, recalled: LongTermState, layer: int) -> Residual:
        """Top-k attention of one segment's tokens over the bank; see `Memory.read`."""
        return self._attend(x, self._bank(recalled), None, recalled.lists)

    def write(self, segment: Segment, state: LongTermState, reads: list[Residual]) -> tuple[LongTermState, Trace]:
        """Store the best slots of one segment; see `Memory.write`."""
        candidates, trace = self._candidates(segment)
        complete = segment.complete[:, 0].long()
        if self.scope == "shared":  # rows write in order, as one row of B * K slots
            candidates, complete = self._of_all_rows(_Candidates(*(part[:, 0] for part in candidates)), complete)
            record = (complete.cumsum(0) - complete).repeat_interleave(candidates.priority.shape[1] // len(complete))[
                None
            ]
            complete = complete.sum(0, keepdim=True)
        else:
            candidates = _Candidates(*(part[:, 0] for part in candidates))
            record = torch.zeros_like(candidates.position)
        start = self._age(state.priority, complete)
        victim, order, accept = (self._replace_dealt if self.dealt else _replace)(start, candidates.priority)
        stored: dict[str, Any] = {
            name: _put(getattr(state, name), victim, accept, take(part, order))
            for name, part in candidates._asdict().items()
        }
        stored["priority"] = _put(start, victim, accept, take(candidates.priority, order))
        new = LongTermState(
            **stored,
            record=_put(state.record, victim, accept, state.n_record[:, None] + take(record, order)),
            origins=_put(state.origins, victim, accept, torch.full_like(take(state.origins, victim), -1)),
            n_record=state.n_record + complete,
            host_used=(state.host_used + candidates.priority.shape[1]).clamp(max=self.n_slot),
        )
        if state.lists is not None:
            file = self._file()
            lists = file.own(state.lists)
            file.replace(lists, victim, take(candidates.key, order), accept)
            new = new._replace(lists=file.settle(lists, victim.shape[1], new.key, self.filled(new)))
        return new, trace

    def process(
        self, x: Tensor, segment: Segment, state: LongTermState, layer: int, read: bool, write: bool, carry: bool = True
    ) -> tuple[Residual | None, LongTermState, Trace]:
        """All segments of a window at once; equal to the segment-wise definition in outputs and gradients.

        Which slots a segment finds is settled first, by priorities alone; then all segments read at once.
        """
        fresh = segment.reset is None or not self.has_bank  # documents do not begin with what was stored before
        one_by_one = self.scope == "shared" or segment.n_segment == 1 or self._deals_within(state, segment)
        if one_by_one or not write or not fresh:
            return super().process(x, segment, state, layer, read, write, carry)
        candidates, trace = self._candidates(segment)
        plan = self._plan(state, candidates.priority, candidates.key.detach(), segment)
        flat = _Candidates(*(part.flatten(1, 2) for part in candidates))
        reads = None
        if read:
            time = self._time(state.n_record[:, None] + plan.record, flat.position)
            window = Pool(flat.key, flat.value, self.bias(flat.log_gate), plan.window_visible, time)
            window_slot, window_list = plan.window_slot, plan.window_list
            if self.distractors and self.training:  # one pool of all rows' slots, numbered row after row
                window = Pool(
                    key=window.key.flatten(0, 1)[None],
                    value=window.value.flatten(0, 1)[None],
                    bias=window.bias.flatten()[None],
                    visible=window.visible.transpose(0, 1).flatten(1)[None],  # (1, S, B * P)
                    time=None if time is None else time.flatten()[None],
                )
                own = torch.eye(len(x), dtype=torch.bool, device=x.device)[..., None]
                window_slot = torch.where(own, window_slot, -1).flatten(1)  # (B, B * P)
                window_list = torch.where(own, window_list, -1).flatten(1)  # slots of other rows are always read
            reads = self._attend(x, self._bank(state, plan.bank_visible), window, state.lists, window_list)
            n_bank = int(state.host_used.max())
            slot = torch.cat([torch.arange(n_bank, device=x.device).expand(len(x), -1), window_slot], dim=1)
            slot = F.pad(slot, (0, 1), value=-1)  # -1 stays -1
            index = reads.slots.flatten(1).remainder(slot.shape[1])
            reads = reads._replace(slots=slot.gather(1, index).view_as(reads.slots))
        if not carry:
            return reads, state, trace
        start = self.start_documents(segment.reset, state)
        # Every candidate writes to the slot it went to: itself if it is there at the end, else what is there at the
        # end, so that all writers of a slot agree. One of them has the gradient.
        slot = plan.window_slot.clamp(min=0)  # (B, P)
        owner = plan.source.gather(1, slot)
        number = torch.arange(slot.shape[1], device=x.device)
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
        new = LongTermState(
            **stored | {"priority": plan.priority},
            record=settle(start.record, start.n_record[:, None] + plan.record),
            origins=settle(start.origins, start.origins.new_full((*slot.shape, _ORIGINS), -1)),
            n_record=start.n_record + plan.n_record,
            host_used=(start.host_used + flat.priority.shape[1]).clamp(max=self.n_slot),
        )
        if plan.lists is not None and start.lists is not None:
            host = {"host_n_list": start.lists.host_n_list, "host_left": start.lists.host_left}
            lists = plan.lists._replace(**host)
            lists = self._file().settle(lists, flat.priority.shape[1], new.key, self.filled(new))
            new = new._replace(lists=lists)
        return reads, new, trace

    def _deals_within(self, state: LongTermState, segment: Segment) -> bool:
        """Whether slots may be dealt out among lists anew before the last segment of a window."""
        n_token = segment.segment_len + self.lookback
        n_new = n_token if self.write_budget is None else min(self.write_budget, n_token)
        return state.lists is not None and self._file().is_due(state.lists, segment.n_segment * n_new)

    def _of_all_rows(self, candidates: _Candidates, complete: Tensor) -> tuple[_Candidates, Tensor]:
        """Candidates (B, K, ...) of all rows that write the bank, as those of one, and which are ``complete``, (B,).

        What is sent to other processes is put side by side: each sending costs time by itself.
        """
        if self.over_ranks:
            key, value, log_gate, priority, position, document, tokens = candidates
            ended = complete[:, None].expand_as(position)
            reals = torch.cat([key, value, torch.stack([log_gate, priority], dim=2)], dim=2)
            numbers = torch.cat([torch.stack([position, document, ended], dim=2), tokens.long()], dim=2)
            key, value, of_slot = self.rows_of_all(reals).split([self.d_key, self.d_value, 2], dim=2)
            of_token, tokens = self.rows_of_all(numbers).split([3, self.span + 1], dim=2)
            (log_gate, priority), (position, document, ended) = of_slot.unbind(dim=2), of_token.unbind(dim=2)
            candidates = _Candidates(key, value, log_gate, priority, position, document, tokens.int())
            complete = ended[:, 0]
        return _Candidates(*(part.flatten(0, 1)[None] for part in candidates)), complete

    @property
    def _slots(self) -> tuple[int, int, int]:
        """First, end and step of the numbers of the slots that this process holds."""
        rank, n_rank = self.share
        return rank, self.n_slot, n_rank

    def _replace_dealt(self, bank: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_replace` where ``bank`` (1, M) is the share of one process; ``new`` (1, K) is known to all.

        All tell the worst of their shares, so that each knows the worst of the whole, and which of those are its own.

        Returns:
            As many of its worst slots as can be replaced; which new slot each meets; whether that is accepted.
        """
        rank, n_rank = self.share
        n_new = min(new.shape[1], self.n_slot)
        n_worst = min(n_new, -(-self.n_slot // n_rank))
        own = bank.topk(min(n_worst, bank.shape[1]), dim=1, largest=False)
        n_own = own.values.shape[1]
        worst = ranks.rows_of_all(F.pad(own.values, (0, n_worst - n_own), value=torch.inf)).view(1, -1)
        met = worst.topk(n_new, dim=1, largest=False)
        best = new.topk(n_new, dim=1)
        accept = best.values > met.values
        turn = torch.full_like(worst, -1, dtype=torch.long)  # of each of the worst, when it is met
        turn = turn.scatter(1, met.indices, torch.arange(n_new, device=bank.device)[None])
        turn = turn[:, rank * n_worst : rank * n_worst + n_own]
        index = turn.clamp(min=0)
        return own.indices, best.indices.gather(1, index), accept.gather(1, index) & (turn >= 0)

    def _age(self, priority: Tensor, n_written: Tensor) -> Tensor:
        """Priorities before the next write: under ``fifo`` what is stored gets older, else they stay."""
        if self.importance != "fifo":
            return priority
        return priority - (priority > _USED).float() * (n_written > 0).float()[:, None]

    def _plan(self, state: LongTermState, priority: Tensor, key: Tensor, segment: Segment) -> _Plan:
        """Replay the replacement of a whole window by priorities alone (B, S, K); keys only choose lists."""
        n_row, n_segment, n_new = priority.shape
        device, n_candidate = priority.device, n_segment * n_new
        bank = state.priority
        used = bank > _USED
        source = torch.full_like(bank, -1, dtype=torch.long)
        bank_until = torch.full_like(source, n_segment)
        new_until = torch.full((n_row, n_candidate + 1), -1, device=device)  # one column more: writes to nowhere
        window_slot = torch.full((n_row, n_candidate), -1, device=device)
        counter = torch.zeros(n_row, dtype=torch.long, device=device)
        records = []
        file, lists = self._file(), state.lists
        window_list = torch.full_like(window_slot, -1)
        if lists is not None:
            lists = file.own(lists)
        empty = _EMPTY + torch.arange(bank.shape[1], device=device, dtype=bank.dtype)
        for s in range(n_segment):
            complete = segment.complete[:, s].long()
            if segment.reset is not None:
                reset = segment.reset[:, s, None]
                bank = torch.where(reset, empty, bank)
                source = source.masked_fill(reset, -1)
                bank_until = torch.where(reset, bank_until.clamp(max=s - 1), bank_until)
                new_until = torch.where(reset, new_until.clamp(max=s - 1), new_until)
                counter = counter.masked_fill(reset[:, 0], 0)
                if lists is not None:
                    file.start(lists, reset[:, 0])
            bank = self._age(bank, complete)
            victim, order, accept = _replace(bank, priority[:, s])
            candidate = s * n_new + order  # (B, K)
            replaced = source.gather(1, victim)
            bank_until = _put(bank_until, victim, accept & (replaced < 0), bank_until.gather(1, victim).clamp(max=s))
            nowhere = torch.where(accept & (replaced >= 0), replaced, n_candidate)
            new_until = new_until.scatter(1, nowhere, s)
            new_until = new_until.scatter(1, candidate, torch.where(accept, n_segment, -1))
            window_slot = window_slot.scatter(1, candidate, torch.where(accept, victim, -1))
            source = _put(source, victim, accept, candidate)
            bank = _put(bank, victim, accept, priority[:, s].gather(1, order))
            if lists is not None:
                file.replace(lists, victim, take(key[:, s], order), accept)
                found = file.list_of(lists, victim).masked_fill(~accept, -1)
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
            lists=lists,
        )

    def filled(self, state: LongTermState) -> Tensor:
        """Which slots hold something, (B, M)."""
        return state.priority > _USED

    def places(self, state: LongTermState) -> Tensor:
        """See `Memory.places`."""
        return state.position

    def tokens(self, state: LongTermState) -> Tensor:
        """See `Memory.tokens`: up to ``span`` tokens, and the one after them that is the slot's value."""
        return state.tokens

    def records(self, state: LongTermState) -> Records:
        """See `Memory.records`; importance is the geometric mean of the write gates of a slot's best span."""
        return Records(state.record, state.document, state.origins, state.log_gate.exp(), state.n_record)

    def relabel(self, state: LongTermState, record: Tensor, document: Tensor) -> LongTermState:
        """See `Memory.relabel`."""
        return state._replace(record=record, document=document)

    def merge(self, state: LongTermState, other: LongTermState) -> LongTermState:
        """See `Memory.merge`."""
        first = state.n_record[:, None]

        def shift(part: Tensor, by: Tensor) -> Tensor:
            return torch.where(part >= 0, part + by.to(part.dtype), part)

        came = other._replace(
            priority=other.priority.masked_fill(~self.filled(other), -torch.inf),
            record=shift(other.record, first),
            document=shift(other.document, first),
            origins=shift(other.origins, first[..., None]),
        )
        victim, order, accept = _replace(state.priority, came.priority)
        slots = (*_Candidates._fields, "record", "origins")
        stored: dict[str, Any] = {
            name: _put(getattr(state, name), victim, accept, take(getattr(came, name), order)) for name in slots
        }
        new = state._replace(
            **stored,
            n_record=state.n_record + other.n_record,
            host_used=(state.host_used + other.host_used).clamp(max=self.n_slot),
        )
        return new._replace(lists=self._deal_out(new, torch.ones(len(accept), dtype=torch.bool)))

    def similarity(self, x: Tensor, state: LongTermState, slots: Tensor) -> Tensor:
        """Cosine of queries and keys; see `Memory.similarity`."""
        query = F.normalize(self.to_key(self.norm(x.float())), dim=-1)  # (B, N, d_key)
        key = take(state.key, slots.flatten(1)).unflatten(1, slots.shape[1:])  # (B, N, k, d_key)
        return (key @ query[..., None])[..., 0]

    def contents(self, state: LongTermState) -> Tensor:
        """What each slot adds to the residual stream if it alone is read through an open gate, (B, M, D)."""
        n_used = self._n_used(state)
        return F.pad(self.to_output(state.value[:, :n_used]), (0, 0, 0, state.value.shape[1] - n_used))

    def flops_per_token(self) -> int:
        """Projections of read and write, and the search of a full bank."""
        n_scored = self.n_slot if self.index == "exact" else self._file().n_scored
        search = 2 * n_scored * self.d_key + 2 * self.top_k * (self.d_key + self.d_value)
        return super().flops_per_token() + search

    def losses(self, trace: Trace, nll: Tensor) -> dict[str, Tensor]:
        """The price of writing: ``gate_penalty`` times the mean write gate."""
        return {"gate_penalty": self.gate_penalty * trace["write_gate"]} if "write_gate" in trace else {}

    def bias(self, log_gate: Tensor) -> Tensor:
        """Read bias of a slot: its log gate, with a floor that keeps every slot within reach."""
        return (self.gate_floor + (1 - self.gate_floor) * log_gate.exp()).log()

    def _time(self, record: Tensor, position: Tensor) -> Tensor | None:
        """When slots were written: by record, then by place in the document. None if reads need not know."""
        return None if self.log_recency is None else record * 2**32 + position

    def _n_used(self, state: LongTermState) -> int:
        """How many slots from the first on may hold something; of a bank that is dealt out, of this process's share."""
        return min(-(-int(state.host_used.max()) // self.share[1]), state.key.shape[1])

    def _bank(self, state: LongTermState, visible: Tensor | None = None) -> Pool | None:
        """The part of the bank that may hold something; None if there is none."""
        n_used = self._n_used(state)
        if n_used == 0:
            return None
        if visible is None:
            visible = state.priority[:, None, :n_used] > _USED  # (B, 1, M)
        return Pool(
            state.key[:, :n_used],
            state.value[:, :n_used],
            self.bias(state.log_gate[:, :n_used]),
            visible[..., :n_used],
            self._time(state.record[:, :n_used], state.position[:, :n_used]),
        )

    def _attend(
        self,
        x: Tensor,
        bank: Pool | None,
        window: Pool | None,
        lists: Lists | None = None,
        window_list: Tensor | None = None,
    ) -> Residual:
        """Gated read of ``x`` (B, N, D); of a bank with ``lists`` by these, and of a window as if it were in them."""
        gate = self.read_gate(x).sigmoid()  # (B, N, 1)
        if bank is None and window is None:
            none = torch.zeros(*x.shape[:2], self.top_k, device=x.device)
            return Residual(torch.zeros_like(x), none.long() - 1, none, gate[..., 0])
        with torch.autocast(x.device.type, enabled=False):
            query = F.normalize(self.to_key(self.norm(x.float())), dim=-1)  # (B, N, d_key)
            temperature = self.log_temperature.exp() * self.temperature_scale
            null = temperature * self.null_similarity
            recency = None if self.log_recency is None else self.log_recency.exp()
            how = (query, temperature, null, self.retrieval_threshold, self.top_k)
            if self.dealt:
                assert bank is not None
                read, slots, weights = attend_dealt(*how, bank, recency)
            else:
                find = None
                if lists is not None and dealt(lists):
                    file = self._file()
                    find = partial(file.search, lists)
                    if window is not None and window_list is not None:
                        visible = window.visible.repeat_interleave(x.shape[1] // window.visible.shape[1], dim=1)
                        window = window._replace(visible=visible & file.reach(lists, query, window_list))
                read, slots, weights = attend(*how, bank, window, recency, find)
        return Residual(gate * self.to_output(read.to(x.dtype)), slots, weights, gate[..., 0])

    def _worth(self, strength: Tensor, log_gate: Tensor, ids: Tensor, position: Tensor, segment: Segment) -> Tensor:
        """What each token is worth when one must go (B, S, C + T), by the rule that ``importance`` names."""
        if self.importance == "span":
            return strength + _TIE * log_gate
        if self.importance == "token":
            return log_gate
        if self.importance == "fifo":
            n = log_gate.shape[-1]
            return torch.arange(n, device=log_gate.device).expand_as(log_gate) / n
        if self.importance == "random":
            return (ids * 40_503 + position * 30_011) % 65_521 / 65_521
        assert segment.surprise is not None
        return segment.surprise.unfold(1, log_gate.shape[-1], segment.segment_len)

    def _gate_logit(self, normed: Tensor, embedding: Tensor) -> Tensor:
        """The write gate's MLP of a hidden state, the one after it and the embedding of the token after it, (B, L).

        The first layer is applied to each of the three by itself, which saves to put them side by side.
        """
        layers: Any = self.write_gate
        first, *rest = layers
        here, after, token = first.weight.chunk(3, dim=1)
        following = F.linear(normed, after) + F.linear(embedding, token)
        x = F.linear(normed, here, first.bias) + torch.cat([following[:, 1:], following[:, -1:]], dim=1)
        for layer in rest:
            x = layer(x)
        return x[..., 0]

    def _candidates(self, segment: Segment) -> tuple[_Candidates, Trace]:
        """The slots that each segment of a window would write, and the mean write gate."""
        span, n_segment, n_token = self.span, segment.n_segment, segment.segment_len
        hidden, valid = segment.hidden.float(), segment.valid
        with torch.autocast(hidden.device.type, enabled=False):
            normed, embedding = self.norm(hidden), self.embedding_norm(segment.embeddings.float())  # (B, C + N, D)
            log_gate = F.logsigmoid(self._gate_logit(normed, embedding))  # (B, C + N)

        window_len = n_token + self.lookback

        def windows(part: Tensor) -> Tensor:  # (B, C + N, ...) -> (B, S, C + T, ...)
            view = part.unfold(1, window_len, n_token)
            return view.movedim(-1, 2) if part.dim() > 2 else view

        # In each window: the tokens of the segment's own context, and which of them have a successor in it.
        place = torch.arange(window_len, device=valid.device)
        before = place < self.lookback
        here = windows(valid) & (segment.continues[..., None] | ~before)  # (B, S, C + T)
        ids = windows(segment.ids).masked_fill(~here, -1)  # (B, S, C + T)
        has_next = F.pad(here[..., 1:], (0, 1))
        here = here & has_next
        position = segment.position[..., None] + place - self.lookback  # (B, S, C + T)
        strength = _span_mean(windows(log_gate), here, span)  # (B, S, C + T)
        worth = self._worth(strength.detach(), windows(log_gate.detach()), ids, position, segment)
        # Tokens whose spans are all complete are final; those at the end wait for the next segment.
        final = (place >= self.lookback - span) & ((place < window_len - span) | segment.closes[..., None])
        final = final & here & segment.complete[..., None]
        worth = worth.masked_fill(~final, -torch.inf)
        budget = window_len if self.write_budget is None else self.write_budget
        best = worth.topk(min(budget, window_len), dim=2)  # (B, S, K)

        def pick(part: Tensor, shift: int = 0) -> Tensor:  # (B, C + N, ...) -> (B, S, K, ...)
            start = torch.arange(n_segment, device=part.device)[:, None] * n_token
            cell = (best.indices + start + shift).clamp(max=part.shape[1] - 1)
            return take(part, cell.flatten(1)).unflatten(1, cell.shape[1:])

        with torch.autocast(hidden.device.type, enabled=False):  # of the chosen tokens alone
            key = F.normalize(self.to_key(pick(normed)), dim=-1)
            value = self.to_value(pick(embedding, shift=1))

        snippet = F.pad(ids, (span - 1, 1), value=-1).unfold(2, span + 1, 1)  # (B, S, C + T, span + 1)
        candidates = _Candidates(
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
        return candidates, {"write_gate": mean_gate}

    def consolidate(
        self, state: LongTermState, threshold: float = 0.1, *, turn: int = 0
    ) -> tuple[LongTermState, dict[str, int]]:
        """Merge similar slots: keys within ``threshold`` in cosine distance that hold similar values.

        Every slot joins its most important similar slot, unless that one joins another itself. The survivor keeps its
        place, id and origin, and lists the records of the others; its key and value become the importance-weighted
        means; the joined slots become empty.
        It needs the whole bank: one that is dealt out to processes has to be gathered first.

        Up to 16,384 slots all pairs are compared; in a larger bank some turns find nearly all that are similar, and of
        one of more than 65,536 slots each turn looks at a part: see `memlm.retrieval.similar`.

        Args:
            state: The bank.
            threshold: Largest cosine distance (1 - cosine) of both keys and values that is merged, in 0..2.
            turn: Number of the call; the result depends on it and the state alone.

        Returns:
            The new bank and ``{"merged": number of slots that were joined to another}``.

        Raises:
            ValueError: If the threshold is out of range, or the turn negative.
        """
        if not 0 <= threshold <= 2:
            raise ValueError(f"threshold is a cosine distance, so in 0..2, got {threshold}")
        if turn < 0:
            raise ValueError(f"turn is the number of the call, so not negative, got {turn}")
        if self.dealt:
            raise ValueError("this bank is dealt out to several processes: gather it before it is consolidated")
        n_used = int(state.host_used.max())
        if n_used == 0:
            return state, {"merged": 0}
        bank, joined, survivor = similar.joins(
            state.key[:, :n_used],
            state.value[:, :n_used],
            state.priority[:, :n_used],
            state.priority[:, :n_used] > _USED,
            threshold,
            turn,
        )
        if not len(bank):
            return state, {"merged": 0}
        new = self._merge(state, bank, joined, survivor)
        if new.lists is not None:
            new = new._replace(lists=self._deal_out(new, new.lists.host_n_list > 0))
        return new, {"merged": len(bank)}

    @property
    def n_turn(self) -> int:
        """Turns of `consolidate` in a row that look at every slot of a full bank, beginning with a multiple of them."""
        return similar.n_turn(self.n_slot)

    def _merge(self, state: LongTermState, bank: Tensor, joined: Tensor, survivor: Tensor) -> LongTermState:
        """The bank with slots ``joined`` (J,) of rows ``bank`` (J,) merged into the slots ``survivor`` (J,)."""
        group, member = torch.unique(bank * self.n_slot + survivor, return_inverse=True)  # (G,), (J,)
        gone = bank * self.n_slot + joined
        slots = torch.cat([group, gone])  # all that is merged, by its place in all rows
        member = torch.cat([torch.arange(len(group), device=group.device), member])
        log_gate = state.log_gate.reshape(-1)[slots]
        heaviest = torch.full_like(log_gate[: len(group)], -torch.inf).scatter_reduce(0, member, log_gate, "amax")
        weight = (log_gate - heaviest[member]).exp()  # relative: gates may be tiny
        total = torch.zeros_like(heaviest).index_add(0, member, weight)

        def mean(part: Tensor) -> Tensor:
            flat = part.reshape(-1, part.shape[-1])[slots] * weight[:, None]
            return torch.zeros_like(flat[: len(group)]).index_add(0, member, flat) / total[:, None]

        def put(part: Tensor, empty: Any, merged: Tensor | None = None) -> Tensor:
            new = part.clone(memory_format=torch.contiguous_format)
            flat = new.view(-1, *part.shape[2:])
            if merged is not None:
                flat[group] = merged
            flat[gone] = empty
            return new

        return state._replace(
            key=put(state.key, 0.0, F.normalize(mean(state.key), dim=-1)),
            value=put(state.value, 0.0, mean(state.value)),
            log_gate=put(state.log_gate, 0.0),
            priority=put(state.priority, _EMPTY + joined.to(state.priority.dtype)),
            record=put(state.record, -1),
            document=put(state.document, -1),
            position=put(state.position, -1),
            tokens=put(state.tokens, -1),
            origins=put(state.origins, -1, _origins(state, slots, member, len(group))),
        )

    def forget(self, state: LongTermState, slots: Tensor) -> LongTermState:
        """See `Memory.forget`. What is left is dealt out among lists anew, as their centres come from all keys."""
        new = super().forget(state._replace(lists=None), slots)
        if state.lists is None:
            return new
        new = new._replace(lists=state.lists)
        changed = slots.any(dim=1).cpu() & (state.lists.host_n_list > 0)
        return new._replace(lists=self._deal_out(new, changed))

    def check(self, state: LongTermState) -> None:
        """See `Memory.check`; also lengths and priorities that no write gives, and lists of other slots."""
        super().check(state._replace(lists=None))
        filled = self.filled(state)
        most = {"surprise": _MOST, "fifo": 1.0, "random": 1.0}.get(self.importance, 0.0)
        number = torch.arange(*self._slots, device=filled.device) + 1  # of all slots, from 1
        n_used = (filled * number).amax(dim=1).to(state.host_used.device)
        wrong = {
            "a key is longer than 1": state.key.norm(dim=2) > 1.01,
            f"a value is beyond {_MOST:.0f}": state.value.abs().amax(dim=2) > _MOST,
            f"the priority of a slot is above {most:.0f}, the most under importance={self.importance}": filled
            & (state.priority > most),
            "host_used is not a bound on the slots that are used": (state.host_used < n_used)
            | (state.host_used > self.n_slot),
        }
        for what, where in wrong.items():
            if bool(where.any()):
                raise ValueError(what)
        if state.lists is not None:
            self._file().check(state.lists, state.key, filled)


def _origins(state: LongTermState, slots: Tensor, member: Tensor, n_group: int) -> Tensor:
    """Origins (n_group, 8) of slots that others are merged into.

    Args:
        state: The bank before.
        slots: All that is merged, by its place in all rows, (J,); the first ``n_group`` are those merged into.
        member: Group of each, (J,).
        n_group: Number of groups.
    """
    record, listed = state.record.reshape(-1)[slots], state.origins.reshape(-1, _ORIGINS)[slots].long()
    ids = torch.cat([record[:, None], listed], dim=1)  # (J, 9)
    many = torch.zeros(n_group, device=ids.device).index_add(0, member, (ids == MANY).any(dim=1).float()) > 0
    other = (ids >= 0) & (ids != record[:n_group][member][:, None])
    pair = torch.stack([member[:, None].expand_as(ids)[other], ids[other]], dim=1).unique(dim=0)  # in order, (P, 2)
    begin = torch.searchsorted(pair[:, 0].contiguous(), pair[:, 0].contiguous())
    number = torch.arange(len(pair), device=ids.device) - begin
    fits = number < _ORIGINS
    many[pair[~fits, 0]] = True
    origins = torch.full((n_group, _ORIGINS), -1, device=ids.device)
    origins[pair[fits, 0], number[fits]] = pair[fits, 1]
    origins[:, -1] = torch.where(many, MANY, origins[:, -1])
    return origins.to(state.origins.dtype)


class _Plan(NamedTuple):
    """What becomes of the slots of a window; P = S * K candidates."""

    priority: Tensor  # of the bank after the window, (B, M)
    source: Tensor  # candidate that each slot of the bank holds after the window, (B, M); -1: what it held before
    record: Tensor  # number of the record of each candidate within the window, (B, P)
    n_record: Tensor  # records written since the window began, or since its last reset, (B,)
    window_slot: Tensor  # slot that each candidate went to, (B, P); -1 if none
    bank_visible: Tensor  # which old slots each segment may read, (B, S, M)
    window_visible: Tensor  # which candidates each segment may read, (B, S, P)
    window_list: Tensor  # list that each candidate went to, (B, P); -1 if none
    lists: Lists | None  # after the window, but for what is on the CPU


def _span_mean(log_gate: Tensor, here: Tensor, span: int) -> Tensor:
    """For each token of a window the best mean log-gate of the spans that cover it (B, S, W).

    A span that goes beyond the context counts its tokens inside, if they are at least half of it.
    """
    edge = (span - 1, span - 1)
    total = F.pad(log_gate * here, edge).unfold(-1, span, 1).sum(dim=-1)  # (B, S, W + span - 1)
    count = F.pad(here.float(), edge).unfold(-1, span, 1).sum(dim=-1)
    mean = torch.where(count >= (span + 1) // 2, total / count.clamp(min=1), -torch.inf)
    best = mean.unfold(-1, span, 1).amax(dim=-1)  # (B, S, W)
    return torch.where(best.isinf(), log_gate, best)


def _replace(bank: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots of ``bank`` (B, M) the ``new`` ones (B, K) replace, by priority.

    The best new slot meets the worst old one, the second best the second worst, and so on; it is accepted if it is
    worth more. The bank so holds the best M of both.

    Returns:
        Old slots (B, K), all different; new slots in the order of their meeting (B, K); whether each is accepted.
    """
    n_new = min(new.shape[1], bank.shape[1])
    best = new.topk(n_new, dim=1)
    worst = bank.topk(n_new, dim=1, largest=False)
    return worst.indices, best.indices, best.values > worst.values


def _put(part: Tensor, index: Tensor, accept: Tensor, new: Tensor) -> Tensor:
    """``part`` (B, M, ...) with ``new`` (B, K, ...) at ``index`` (B, K) where ``accept`` (B, K)."""
    shape = (*index.shape, *[1] * (part.dim() - 2))
    index = index.view(shape).expand_as(new)
    return part.scatter(1, index, torch.where(accept.view(shape), new.to(part.dtype), part.gather(1, index)))
