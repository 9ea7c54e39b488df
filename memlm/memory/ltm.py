"""Long-term memory: many key-value slots per layer, read by top-k attention.

Source: LMCODE's LongTermMemory (importance-weighted top-k read, soft attention over what was retrieved, a gate, FIFO
storage with intelligent replacement, consolidation of similar slots).

A token at position t makes a slot: its key is a projection of the hidden state h_t (queries use the same projection),
its value a projection of the embedding of the token that follows, and of h_t too where it is ``contextual``. A learned
write gate says what matters: the best mean log-gate of a span that covers a token weighs its slot when it is read, and
decides whether it is kept, so that a fact survives, and is found, as a whole.

How it is read: `memlm.memory.ltm_read`; what a segment writes: `memlm.memory.ltm_write`; all segments of a window at
once: `memlm.memory.ltm_window`; slots that are joined or come from another bank: `memlm.memory.ltm_join`.

Shapes: B rows, S segments, T tokens per segment, D model width, M slots, N = S * T, k slots read per token.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.config import ConfigError
from memlm.memory import ltm_join, ltm_read, ltm_window, ltm_write
from memlm.memory.bank import Scope
from memlm.memory.contract import Mixer, Needs, Read, Scanned, Segment, Trace
from memlm.memory.ltm_write import EMPTY, ORIGINS, USED
from memlm.memory.records import RecordKeeper, Records
from memlm.memory.sharding import SharedBank
from memlm.memory.state import renewed
from memlm.retrieval import similar
from memlm.retrieval.index import Index, make_index
from memlm.retrieval.lists import Lists
from memlm.tensors import Host, take

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST = 2.0**15  # values and priorities of what is read from a file; what a model writes is far below


class LongTermState(NamedTuple):
    """Bank of one layer: ``B`` rows (1 if shared) of ``M`` slots.

    Attributes:
        key: Unit keys, (B, M, d_key), in the type that ``bank_dtype`` names.
        value: Values, (B, M, d_value), likewise.
        log_gate: Best mean log-gate of a span that covers the token, a bias of the read, (B, M).
        priority: What a slot is worth when one must go, (B, M); below -2**22 for an empty slot.
        record: Id of the record (the span of one segment) a slot belongs to, (B, M); -1 if empty.
        document: Number of the document it came from, (B, M).
        position: Place of its token in that document, (B, M).
        tokens: Ids of the tokens up to its own and the one after, (B, M, span + 1); -1 where there is none.
        origins: Other records that were merged into it, (B, M, 8); see `Records`.
        n_record: Records written so far, (B,).
        n_used: An upper bound on the used slots of a row, (B,).
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
    n_used: Host
    lists: Lists | None = None


class LongTermMemory(RecordKeeper, SharedBank):
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
        shard: Whether training in several processes shards a shared bank over them, so that it may be larger than what
            one device holds. Reads and writes are those of the whole bank, but ties may be broken differently.
        index: How a read finds its slots: ``exact`` (all are scored) or ``inverted`` (those in the lists nearest to the
            query, see `memlm.retrieval.inverted`), for banks of many slots.
        n_list: Lists of a full bank; None for four times the square root of ``n_slot``.
        n_probe: Lists that a token searches; None for 48.
        bank_dtype: Type of the keys and values that are held: ``float32``, or ``bfloat16``, which takes half the room.
            All that is worked out of them has 32 bits.
        contextual: Whether a value also holds a projection of the hidden state, so that the end of a sentence can tell
            what stood at its beginning.

    Attributes:
        distractors: While training, a row also reads what the other rows' segments of the window write: slots that can
            never help, so that look-alike keys are told apart. For curricula; off unless they set it.
        gate_supervision: Weight in the loss of the cross-entropy between the write gate and what the task says is worth
            to be remembered (the strong supervision of Memory Networks, 1410.3916). What is read teaches the gate to
            rank only slots that are read together; this teaches it to rank what was told above all text, so that it
            stays when a bank has overflowed a thousand times. It learns the forms in which the task tells. For
            curricula; 0 unless they set it.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)
    temperature_scale: Tensor
    distractors: bool = False
    gate_supervision: float = 0.0

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
        bank_dtype: Literal["float32", "bfloat16"] = "float32",
        contextual: bool = False,
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
            ("bank_dtype", bank_dtype, tuple(_DTYPES)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        self.n_slot, self.d_key, self.d_value, self.top_k = n_slot, d_key, d_value, top_k
        self.write_budget, self.span, self.importance = write_budget, span, importance
        self.retrieval_threshold, self.gate_floor, self.gate_penalty = retrieval_threshold, gate_floor, gate_penalty
        if shard and scope != "shared":
            raise ValueError(f"shard needs a bank that all rows share: set scope=shared, got {scope!r}")
        self.scope, self.shard = scope, shard
        if shard and index != "exact":
            raise ValueError(
                f"the lists of an index cannot be sharded over processes: shard needs index=exact, got {index!r}"
            )
        self.index, self.n_list, self.n_probe, self.bank_dtype = index, n_list, n_probe, bank_dtype
        self.search_index()  # refuses what cannot work

        self.norm = nn.RMSNorm(d_model)
        self.to_key = nn.Linear(d_model, d_key, bias=False)
        self.embedding_norm = nn.RMSNorm(d_model)
        self.to_value = nn.Linear(d_model, d_value, bias=False)
        self.from_hidden = nn.Linear(d_model, d_value, bias=False) if contextual else None
        self.to_output = nn.Linear(d_value, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        self.write_gate = nn.Sequential(nn.Linear(3 * d_model, d_value), nn.GELU(), nn.Linear(d_value, 1))
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        self.null_similarity = nn.Parameter(torch.tensor(0.5))
        self.log_recency = None if recency is None else nn.Parameter(torch.tensor(float(recency)).log())
        self.register_buffer("temperature_scale", torch.tensor(1.0))
        initialise(self)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Surprise only where it decides what is kept: ``importance`` may be changed at any time."""
        return Needs(lookback=2 * self.span, surprise=self.importance == "surprise")

    @property
    def bank_type(self) -> torch.dtype:
        """Type of the keys and values that are held."""
        return _DTYPES[self.bank_dtype]

    def search_index(self) -> Index:
        """The index of the settings as they are now: an evaluation may change them."""
        return make_index(self.index, self.n_slot, self.d_key, self.n_list, self.n_probe, self.bank_type)

    def init_state(self, n_row: int) -> LongTermState:
        """An empty bank for ``n_row`` rows of text."""
        weight = self.to_key.weight
        n_bank = 1 if self.scope == "shared" else n_row
        first, n_rank = self.rank
        number = torch.arange(first, self.n_slot, n_rank, device=weight.device, dtype=torch.float32)
        n_slot = len(number)

        def full(*shape: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
            # A view of one number: an empty bank takes no memory before its first write.
            return torch.full((), value, dtype=dtype, device=weight.device).expand(shape)

        return LongTermState(
            key=full(n_bank, n_slot, self.d_key, dtype=self.bank_type),
            value=full(n_bank, n_slot, self.d_value, dtype=self.bank_type),
            log_gate=full(n_bank, n_slot),
            priority=(EMPTY + number).expand(n_bank, -1).clone(),
            record=full(n_bank, n_slot, value=-1, dtype=torch.long),
            document=full(n_bank, n_slot, value=-1, dtype=torch.long),
            position=full(n_bank, n_slot, value=-1, dtype=torch.long),
            tokens=full(n_bank, n_slot, self.span + 1, value=-1, dtype=torch.int32),
            origins=full(n_bank, n_slot, ORIGINS, value=-1, dtype=torch.int32),
            n_record=full(n_bank, dtype=torch.long),
            n_used=Host(torch.zeros(n_bank, dtype=torch.long)),
            lists=self.search_index().empty(n_bank, weight.device),
        )

    def restored(self, state: LongTermState, missing: set[str]) -> LongTermState:
        """See `Memory.restored`. Slots that were kept without lists are assigned to some."""
        rows = torch.ones(len(state.key), dtype=torch.bool)
        return state._replace(lists=self.search_index().assign(state.lists, state.key, self.filled(state), rows))

    def start_documents(self, reset: Tensor | None, state: LongTermState, owned: bool = False) -> LongTermState:
        """See `Memory.start_documents`."""
        if reset is None or self.scope == "shared" or not owned:
            return super().start_documents(reset, state, owned)
        rows = reset.any(dim=1)
        if not bool(rows.any()):
            return state
        fresh: LongTermState = self.bank.first(len(rows))
        lists = self.search_index().start(state.lists, fresh.lists, rows)
        return renewed(state._replace(lists=None), fresh._replace(lists=None), rows)._replace(lists=lists)

    # --- reading -------------------------------------------------------------------------------------------------

    def prepare(self, state: LongTermState) -> ltm_read.Prepared:
        """The slots that may be read; see `Memory.prepare`."""
        return ltm_read.Prepared(ltm_read.pool(self, state), state.lists)

    def prepare_steps(
        self, state: LongTermState, rows: Tensor | None = None, before: ltm_read.Prepared | None = None
    ) -> ltm_read.Prepared:
        """See `Memory.prepare_steps`. Slots are given in whole numbers too, by which they are found faster."""
        prepared = self.prepare(state)
        if prepared.bank is None or self.is_sharded or self.search_index().find(prepared.lists) is not None:
            return prepared
        old = None if rows is None or before is None or before.bank is None else before.bank.coarse
        return prepared._replace(bank=ltm_read.coarsened(self, prepared.bank, rows, old))

    def read(self, y: Tensor, prepared: ltm_read.Prepared) -> Read:
        """Top-k attention of one segment's tokens over the bank; see `Memory.read`."""
        return ltm_read.read(self, y, prepared.bank, None, prepared.lists)

    def bias(self, log_gate: Tensor) -> Tensor:
        """Read bias of a slot: its log gate, with a floor that keeps every slot within reach."""
        return (self.gate_floor + (1 - self.gate_floor) * log_gate.exp()).log()

    # --- writing -------------------------------------------------------------------------------------------------

    def write(self, segment: Segment, state: LongTermState) -> tuple[LongTermState, Trace]:
        """Store the best slots of one segment; see `Memory.write`."""
        return ltm_write.store(self, segment, state)

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: LongTermState,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        """All segments of a window at once where that can be; see `Memory.scan`."""
        if not write or not ltm_window.fits(self, window, state):
            return super().scan(x, window, state, mixer, read, write, keep_state)
        return ltm_window.scan(self, x, window, state, mixer, read, keep_state)

    def losses(self, trace: Trace, nll: Tensor) -> dict[str, Tensor]:
        """The price of writing, ``gate_penalty`` times the mean write gate, and what `gate_supervision` asks for.

        Raises:
            ConfigError: If there is to be supervision, but nothing says what is worth to be remembered.
        """
        losses = {"gate_penalty": self.gate_penalty * trace["write_gate"]} if "write_gate" in trace else {}
        if self.gate_supervision:
            if "gate_error" not in trace:
                raise ConfigError(
                    "gate_supervision needs a task that says what is worth to be remembered, as facts do: leave it out "
                    "of the memory settings of phases without one"
                )
            losses["gate_supervision"] = self.gate_supervision * trace["gate_error"]
        return losses

    # --- what it holds -------------------------------------------------------------------------------------------

    def filled(self, state: LongTermState) -> Tensor:
        """Which slots hold something, (B, M)."""
        return state.priority > USED

    def contents(self, state: LongTermState) -> Tensor:
        """What each slot adds to the residual stream if it alone is read through an open gate, (B, M, D)."""
        n_used = ltm_read.n_used(self, state)
        value = state.value[:, :n_used].to(self.to_output.weight.dtype)
        return F.pad(self.to_output(value), (0, 0, 0, state.value.shape[1] - n_used))

    def forget(self, state: LongTermState, slots: Tensor, owned: bool = False) -> LongTermState:
        """See `RecordKeeper.forget`. What is left is assigned to lists anew, as their centres come from all keys."""
        new = super().forget(state._replace(lists=None), slots, owned and state.lists is None)
        lists = self.search_index().assign_again(state.lists, new.key, self.filled(new), slots.any(dim=1).cpu())
        return new._replace(lists=lists)

    def records(self, state: LongTermState) -> Records:
        """See `RecordKeeper.records`; importance is the geometric mean of the write gates of a slot's best span."""
        return Records(state.record, state.document, state.origins, state.log_gate.exp(), state.n_record)

    def admit(self, state: LongTermState, other: LongTermState) -> LongTermState:
        """See `RecordKeeper.admit`."""
        return ltm_join.admit(self, state, other)

    def similarity(self, x: Tensor, state: LongTermState, slots: Tensor) -> Tensor:
        """Cosine of queries and keys; see `RecordKeeper.similarity`."""
        query = F.normalize(self.to_key(self.norm(x.float())), dim=-1)  # (B, N, d_key)
        key = take(state.key, slots.flatten(1)).unflatten(1, slots.shape[1:])  # (B, N, k, d_key)
        return (key.to(query.dtype) @ query[..., None])[..., 0]

    def consolidate(
        self, state: LongTermState, threshold: float = 0.1, *, turn: int = 0, owned: bool = False
    ) -> tuple[LongTermState, dict[str, int]]:
        """Join similar slots: see `memlm.memory.ltm_join.consolidate`."""
        return ltm_join.consolidate(self, state, threshold, turn, owned)

    @property
    def n_turn(self) -> int:
        """Turns of `consolidate` in a row that look at every slot of a full bank, beginning with a multiple of them."""
        return similar.n_turn(self.n_slot)

    def flops_per_token(self) -> int:
        """Projections of read and write, and the search of a full bank."""
        search = 2 * self.search_index().n_scored * self.d_key + 2 * self.top_k * (self.d_key + self.d_value)
        return super().flops_per_token() + search

    def check(self, state: LongTermState) -> None:
        """See `Memory.check`; also lengths and priorities that no write gives, and lists of other slots."""
        super().check(state._replace(lists=None))
        filled = self.filled(state)
        most = {"surprise": _MOST, "fifo": 1.0, "random": 1.0}.get(self.importance, 0.0)
        first, n_rank = self.rank
        number = torch.arange(first, self.n_slot, n_rank, device=filled.device) + 1  # of all slots, from 1
        n_used = state.n_used.tensor
        least = (filled * number).amax(dim=1).to(n_used.device)
        wrong = {
            "a key is longer than 1": state.key.norm(dim=2, dtype=torch.float32) > 1.01,
            f"a value is beyond {_MOST:.0f}": state.value.abs().amax(dim=2) > _MOST,
            f"the priority of a slot is above {most:.0f}, the most under importance={self.importance}": filled
            & (state.priority > most),
            "n_used is not a bound on the slots that are used": (n_used < least) | (n_used > self.n_slot),
        }
        for what, where in wrong.items():
            if bool(where.any()):
                raise ValueError(what)
        self.search_index().check(state.lists, state.key, filled)


def initialise(memory: LongTermMemory) -> None:
    """Initial values: a read begins as the embedding of the token that followed, let in by half."""
    nn.init.normal_(memory.to_key.weight, std=memory.to_key.in_features**-0.5)
    if memory.to_value.in_features == memory.d_value:
        nn.init.eye_(memory.to_value.weight)
    else:
        nn.init.orthogonal_(memory.to_value.weight)
    memory.to_output.weight.data.copy_(memory.to_value.weight.T)
    if memory.from_hidden is not None:
        nn.init.zeros_(memory.from_hidden.weight)
    nn.init.zeros_(memory.read_gate.weight)
    nn.init.zeros_(memory.read_gate.bias)
    for linear in memory.write_gate:
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
