"""The contract that every memory mechanism keeps.

Text flows in segments. For segment s a memory reads what the segments before s wrote, and writes s afterwards.

Shapes: B rows, S consecutive segments, T tokens per segment, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory import ranks
from memlm.memory.state import State, map_tensors, named_tensors, select_rows, tensors, where_rows, with_tensors

Scope = Literal["sequence", "shared"]

_BANK = "bank_"  # how the buffers of the persistent bank begin
_USES = "slot_uses"


class Segment(NamedTuple):
    """What a memory may use when it reads and writes ``S`` consecutive segments (``S`` is 1 outside a window).

    Token fields hold the ``C`` tokens before the window (the memory's ``lookback``), then N = S * T cells.

    Attributes:
        ids: Token ids, (B, C + N).
        embeddings: Token embeddings, (B, C + N, D).
        hidden: What the memory's layer would read with (after its self-attention), (B, C + N, D). If the
            memory is not layerwise: those of all attached layers, (B, C + N, n_layer, D).
        valid: Cells that hold a token, (B, C + N). Valid cells of a segment come first. The ``C`` tokens before are
            valid only where the first segment continues their context.
        complete: Segments that end now and are to be written, (B, S); true ones come first in a row.
        continues: Segments whose context goes on from the segment before, (B, S).
        closes: Segments after which the context ends, (B, S).
        reset: Segments that begin a new document, (B, S); None if there is none.
        position: Place of the segment's first token in its document, (B, S).
        document: Number of the document within its row, (B, S).
        signals: Implicit signals of the text by name, each (B, n), those that the memory uses; None if there are none.
        lookback: ``C``.
        surprise: How badly the model's head predicts the token after each cell from ``hidden``, in nats, (B, C + N),
            without gradients; None unless the memory sets ``wants_surprise``.
    """

    ids: Tensor
    embeddings: Tensor
    hidden: Tensor
    valid: Tensor
    complete: Tensor
    continues: Tensor
    closes: Tensor
    reset: Tensor | None
    position: Tensor
    document: Tensor
    signals: dict[str, Tensor] | None
    lookback: int
    surprise: Tensor | None = None

    @property
    def n_segment(self) -> int:
        """``S``."""
        return self.complete.shape[1]

    @property
    def segment_len(self) -> int:
        """``T``."""
        return (self.ids.shape[1] - self.lookback) // self.n_segment

    def at(self, s: int) -> Segment:
        """Segment ``s`` alone with the tokens before it, ``S`` = 1."""
        cells = slice(s * self.segment_len, (s + 1) * self.segment_len + self.lookback)
        tokens = [part[:, cells] for part in self[:4]]
        segments = [None if part is None else part[:, s : s + 1] for part in self[4:10]]
        surprise = None if self.surprise is None else self.surprise[:, cells]
        segment = Segment._make([*tokens, *segments, *self[10:12], surprise])
        if s == 0 or not self.lookback:
            return segment
        before = segment.valid[:, : self.lookback] & segment.continues
        return segment._replace(valid=torch.cat([before, segment.valid[:, self.lookback :]], dim=1))


class Residual(NamedTuple):
    """A read that is added to the residual stream.

    Attributes:
        values: Gated contribution, (B, N, D).
        slots: Slots that were read, (B, N, k); -1 where none.
        weights: Read weight of each, (B, N, k). What is missing to 1 was read from nothing.
        gate: How far the read is let in, (B, N), in 0..1.
    """

    values: Tensor
    slots: Tensor
    weights: Tensor
    gate: Tensor


class Records(NamedTuple):
    """Where the slots of a memory come from. A record is what was stored together: the slots of one segment's write.

    Attributes:
        record: Id of the record of each slot, (B, n_slot); -1 if empty.
        document: Number of the document it came from, (B, n_slot); -1 if empty.
        origins: Other records that were merged into it, (B, n_slot, R); -1 for none. The last is `MANY` where there
            are more than fit.
        importance: What the memory gives on it, (B, n_slot), in 0..1.
        n_record: Records written so far, (B,): ids are below, and none is given twice.
    """

    record: Tensor
    document: Tensor
    origins: Tensor
    importance: Tensor
    n_record: Tensor


MANY = -2
"""In place of an origin: more records were merged than are listed."""

MOST_RECORDS = 2**30
"""Records that were written to a memory which is read from a file, at most: a sum of two ids fits 32 bits."""

_FURTHEST = 2**32 - 1  # place in a document, or number of one, in what is read from a file

Trace = dict[str, Tensor]
"""Numbers of one step by name, each a scalar or one per row, (B,): for the log, and for the memory's own losses."""


class Memory(nn.Module):
    """A memory mechanism: parameters live in the module, what is remembered lives in the state.

    Subclasses define `init_state`, `read` and `write`; the rest has defaults. ``layerwise`` memories have one module
    and one state per attached layer, and their write needs nothing but the input of that layer: the model may then run
    all segments of a window through one layer before the next. Others have one state for all attached layers.

    Attributes:
        n_slot: Slots of a bank; a memory that can be dealt out has it.
        scope: ``sequence``, one bank per row that is reset at document starts; ``shared``, one bank for all rows.
        layerwise: See above.
        lookback: How many tokens before the segment a write needs; at most the segment's length.
        wants_surprise: Whether writes need to know how well the model predicts each token.
        signals: Implicit signals of the text that it uses, by name, and how many numbers each has.
        keeps_records: Whether the state tells of each slot which record it belongs to, so that a model can store, show,
            edit and forget text (`memlm.models.experience`). It then has `records`, `relabel`, `merge`, `similarity`,
            `places` and `tokens`, its `consolidate` takes a ``threshold``, and every complete segment makes one more.
        over_ranks: Whether the rows of all processes write a shared bank, each time together; set while training. A
            write then takes what it needs of each row through `rows_of_all`.
        shard: Whether training in several processes deals the slots of a shared bank out to them (`deal`).
        share: Rank and number of processes among which the bank is dealt out now; (0, 1) if it is whole.
    """

    n_slot: int
    scope: Scope = "sequence"
    over_ranks: bool = False
    shard: bool = False
    share: tuple[int, int] = (0, 1)
    layerwise: bool = True
    lookback: int = 0
    wants_surprise: bool = False
    signals: Mapping[str, int] = MappingProxyType({})
    keeps_records: bool = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Memory:
        """Move to another device. Types stay: slots are compared and ranked by their numbers, which takes 32 bits.

        So of a model in half or double precision (``model.half()``) the memories, and what they hold, stay as they are.
        """

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def init_linears(self) -> None:
        """Initial values of all linear maps of the module: weights of variance 1 / fan-in, biases of zero."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def init_state(self, n_row: int) -> State:
        """A fresh state of ``n_row`` rows on the module's device."""
        raise NotImplementedError

    def recall(self, state: State) -> Any:
        """What `read` needs of the state, computed once per segment, differentiable. Default: the state itself."""
        return state

    def read(self, x: Tensor, recalled: Any, layer: int) -> Residual:
        """Read for one segment.

        Args:
            x: Hidden states, (B, T, D).
            recalled: Result of `recall`.
            layer: Index of the reading layer.
        """
        raise NotImplementedError

    def write(self, segment: Segment, state: State, reads: list[Residual]) -> tuple[State, Trace]:
        """The state after one segment (``S`` = 1). Rows whose segment is not complete keep their state.

        Args:
            segment: The segment; with no valid cell a write only settles what an earlier segment left open.
            state: State before the segment; never changed in place.
            reads: What the attached layers read in the call that completed the segment: only for the cells of that
                call, and nothing if reads are off or the context is closed. ``segment.hidden`` holds all cells.

        Returns:
            The new state and scalars about the write.
        """
        raise NotImplementedError

    def process(
        self, x: Tensor, segment: Segment, state: State, layer: int, read: bool, write: bool, carry: bool = True
    ) -> tuple[Residual | None, State, Trace]:
        """Read and write the ``S`` segments of a window in order. This loop is the definition.

        A mechanism may override it with something faster that gives the same outputs and gradients.

        Args:
            x: Hidden states that read, (B, N, D); for one segment any part of it.
            segment: The window, to be written where complete.
            state: State before the window.
            layer: Index of the layer.
            read: Whether to read.
            write: Whether to write.
            carry: Whether the state after the window is needed; if not, any state may be returned.

        Returns:
            The reads (None if ``read`` is off), the state after the window, scalars about the writes.
        """
        reads: list[Residual] = []
        traces: list[Trace] = []
        for s, queries in enumerate(x.chunk(segment.n_segment, dim=1)):
            part = segment.at(s)
            state = self.start_documents(part.reset, state)
            if read:
                reads.append(self.read(queries, self.recall(state), layer))
            if write:
                state, trace = self.write(part, state, reads[-1:])
                traces.append(trace)
        return (join_reads(reads) if reads else None), state, mean_trace(traces)

    def start_documents(self, reset: Tensor | None, state: State) -> State:
        """The state with the rows that ``reset`` (B, S) names fresh, if the bank belongs to a document."""
        if reset is None or self.scope == "shared":
            return state
        return where_rows(reset.any(dim=1), self.first_state(reset.shape[0]), state)

    def rows_of_all(self, part: Tensor) -> Tensor:
        """``part`` (B, ...) of the rows that write one bank together: with ``over_ranks`` those of all processes."""
        return ranks.rows_of_all(part) if self.over_ranks else part

    def keep_bank(self) -> None:
        """Hold a persistent bank in buffers ``bank_<path of a field>``, to be saved and moved with the module."""
        for name, tensor in named_tensors(self.init_state(1)).items():
            self.register_buffer(f"{_BANK}{name}", tensor.clone(memory_format=torch.contiguous_format))

    @property
    def has_bank(self) -> bool:
        """Whether there is a persistent bank: always if it is shared, else once something was stored in it."""
        return any(name.startswith(_BANK) for name in self._buffers)

    def bank(self) -> State:
        """The persistent bank itself, one row, to be read; a fresh state if there is none."""
        fresh = self.init_state(1)
        if not self.has_bank:
            return fresh
        bank = {name: getattr(self, f"{_BANK}{name}") for name in named_tensors(fresh)}
        # (A model that was built without its numbers has none to bring there.)
        host = {name: t.cpu() for name, t in bank.items() if "host_" in name and not t.is_meta}
        return with_tensors(fresh, bank | host)

    def first_state(self, n_row: int) -> State:
        """State before any text: copies of the persistent bank if there is one, else a fresh state."""
        if not self.has_bank:
            return self.init_state(n_row)
        n_bank = 1 if self.scope == "shared" else n_row
        return select_rows(self.bank(), torch.zeros(n_bank, dtype=torch.long))

    def commit(self, state: State) -> None:
        """Make ``state``, of one row, the persistent bank."""
        if not self.has_bank:
            self.keep_bank()
        for name, tensor in named_tensors(state).items():
            getattr(self, f"{_BANK}{name}").copy_(tensor.detach())

    def uses(self) -> Tensor:
        """How often each slot of the persistent bank was shown to have been read, (n_slot,), to be changed in place."""
        if _USES not in self._buffers:
            filled = self.filled(self.init_state(1))
            self.register_buffer(_USES, torch.zeros_like(filled[0], dtype=torch.long))
        return self.get_buffer(_USES)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A checkpoint tells whether the model had stored something; it may be older than a field of the bank."""
        saved = any(name.startswith(f"{prefix}{_BANK}") for name in state_dict)
        if self.scope == "sequence":
            for name in [name for name in self._buffers if name.startswith(_BANK)]:
                delattr(self, name)
            if saved:
                self.keep_bank()
        if f"{prefix}{_USES}" in state_dict:
            self.uses()
        elif _USES in self._buffers:
            delattr(self, _USES)
        if saved:
            fresh = named_tensors(self.init_state(1))
            for name in fresh:
                state_dict.setdefault(f"{prefix}{_BANK}{name}", fresh[name])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if saved:
            try:
                self.check(self.bank())
            except ValueError as error:
                errors: list[str] = rest[-1]
                errors.append(f"the bank {prefix.removesuffix('.')} holds what no text can have written: {error}")

    @property
    def dealt(self) -> bool:
        """Whether this process holds a share of the bank only; then states are shares too, numbered within it."""
        return self.share[1] > 1

    def deal(self, rank: int, n_rank: int) -> None:
        """Keep of the persistent bank slots ``rank``, ``rank + n_rank``, ... alone: the share of one process."""
        for name, part in self.by_slot().items():
            setattr(self, name, part[:, rank::n_rank].clone())
        self.share = (rank, n_rank)

    def gather(self, device: torch.device | str) -> None:
        """Hold the whole bank again, its slots on ``device``. All processes have to ask."""
        for name, part in self.by_slot().items():
            setattr(self, name, ranks.whole(part, self.n_slot, device))
        self.share = (0, 1)

    def whole_bank(self, keep: bool) -> dict[str, Tensor | None]:
        """All slots of a bank that is dealt out, by name of the buffer, on the CPU; the bank stays dealt out.

        All processes have to ask; those that do not ``keep`` it get None for each.
        """
        return {name: ranks.whole(part, self.n_slot, "cpu", keep) for name, part in self.by_slot().items()}

    def by_slot(self) -> dict[str, Tensor]:
        """The buffers of the persistent bank that have a slot in each column, by name: those that are dealt out."""
        state = self.init_state(1)
        shape = self.filled(state).shape
        names = [f"{_BANK}{name}" for name, part in named_tensors(state).items() if part.shape[:2] == shape]
        return {name: getattr(self, name) for name in names}

    def losses(self, trace: dict[str, Tensor], nll: Tensor) -> dict[str, Tensor]:
        """Losses of the mechanism beside next-token prediction, by name.

        Args:
            trace: What `process` or `write` said of this step's writes, averaged over segments and layers.
            nll: Weighted mean next-token loss of each row in this step, (B,), without gradients.
        """
        return {}

    def consolidate(self, state: State, *, turn: int = 0) -> tuple[State, dict[str, int]]:
        """Merge, decay, promote, evict. Default: nothing to do.

        Args:
            state: The state; never changed in place.
            turn: Number of the call. What is too large to be looked at in one call may be looked at in turns.

        Returns:
            The new state and exact counts of what was done, by name.
        """
        return state, {}

    @property
    def n_turn(self) -> int:
        """Turns of `consolidate` in a row that look at every slot of a full bank, beginning with a multiple of them."""
        return 1

    def filled(self, state: State) -> Tensor:
        """Which slots hold something, (B, n_slot)."""
        raise NotImplementedError

    def places(self, state: State) -> Tensor | None:
        """Place in its document of the token that each slot was made from, (B, n_slot), -1 for empty slots.

        None (the default) if slots are not made from single tokens.
        """
        return None

    def tokens(self, state: State) -> Tensor | None:
        """Ids of the consecutive tokens that each slot was made from, (B, n_slot, L), -1 where there is none.

        None (the default) if the state does not keep them. If the memory keeps records, the last one stands right after
        the slot's place.
        """
        return None

    def records(self, state: State) -> Records:
        """Where each slot comes from, if the memory keeps records."""
        raise NotImplementedError

    def relabel(self, state: State, record: Tensor, document: Tensor) -> State:
        """The state with other ids of records and numbers of documents, (B, n_slot) each."""
        raise NotImplementedError

    def merge(self, state: State, other: State) -> State:
        """The state with the slots of ``other`` admitted by the rule of replacement.

        Their records and documents are numbered on from ``n_record`` of ``state``.
        """
        raise NotImplementedError

    def similarity(self, x: Tensor, state: State, slots: Tensor) -> Tensor:
        """How similar slots are to what is read with, (B, N, k), in -1..1.

        Args:
            x: Hidden states that read, (B, N, D).
            state: Any state.
            slots: Numbers of slots, (B, N, k), none below 0.
        """
        raise NotImplementedError

    def contents(self, state: State) -> Tensor:
        """What each slot holds as a vector, for analysis, (B, n_slot, d).

        Default: the real numbers that the state keeps for each slot, in fields of shape (B, n_slot, ...), side by side.
        Contents as wide as the model are compared with hidden states; a mechanism that stores something else gives
        what a slot would add to the residual stream.
        """
        shape = self.filled(state).shape
        parts = [tensor for tensor in tensors(state) if tensor.is_floating_point() and tensor.dim() > 2]
        return torch.cat([tensor.flatten(2) for tensor in parts if tensor.shape[:2] == shape], dim=2)

    def forget(self, state: State, slots: Tensor) -> State:
        """The state without what some slots hold: they add nothing to a read, the others stay as they are.

        Default: fields of shape (B, n_slot, ...) are as in a fresh state at these slots.

        Args:
            state: Any state; never changed in place.
            slots: Slots to forget, (B, n_slot), bool.
        """

        def empty(tensor: Tensor, fresh: Tensor) -> Tensor:
            if tensor.shape[:2] != slots.shape:
                return tensor
            return torch.where(slots.view(*slots.shape, *[1] * (tensor.dim() - 2)), fresh, tensor)

        return map_tensors(empty, state, self.init_state(len(slots)))

    def check(self, state: State) -> None:
        """Refuse a state that no text can have led to, such as one of a damaged or forged file.

        Default: a real number that is not finite; if the memory keeps records, also ids, numbers of documents, places,
        tokens and importances out of range, and anything in a slot that is empty.

        Raises:
            ValueError: If there is anything; the message names the field.
        """
        named = named_tensors(state)
        for name, part in named.items():
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise ValueError(f"{name} is not finite everywhere")
        if not self.keeps_records:
            return
        records, filled, places, tokens = (
            self.records(state),
            self.filled(state),
            self.places(state),
            self.tokens(state),
        )
        n_record = records.n_record[:, None]
        assert places is not None
        assert tokens is not None
        origins, listed = records.origins, records.origins.clone()
        listed[..., -1] = listed[..., -1].where(listed[..., -1] != MANY, -1)
        wrong = {
            f"the number of records written is not in 0..{MOST_RECORDS}": (n_record < 0) | (n_record > MOST_RECORDS),
            "the id of a record is not below their number": (records.record < 0) | (records.record >= n_record),
            "an origin is no id of a record": ((listed < -1) | (origins >= n_record[..., None])).any(dim=2),
            "the number of a document is out of range": (records.document < 0) | (records.document > _FURTHEST),
            "the place of a token is out of range": (places < 0) | (places > _FURTHEST),
            "the id of a token is negative": (tokens < -1).any(dim=2) | (tokens[..., -1] < 0),
            "the importance of a slot is not in 0..1": (records.importance < 0) | (records.importance > 1),
        }
        for what, where in wrong.items():
            if bool((where if where.shape[1] == 1 else where & filled).any()):
                raise ValueError(what)
        fresh = named_tensors(self.init_state(len(filled)))
        for name, part in named.items():
            if part.shape[:2] == filled.shape:
                other = part != fresh[name]
                if bool((other.flatten(2).any(dim=2) if part.dim() > 2 else other)[~filled].any()):
                    raise ValueError(f"{name} holds something where no record is")

    def flops_per_token(self) -> int:
        """Multiply-adds times two of one token's read and write."""
        return 2 * sum(parameter.numel() for parameter in self.parameters())


def join_reads(reads: list[Residual]) -> Residual:
    """One read over S segments from S reads of one segment; those of fewer slots are filled up with slot -1."""
    k = max(read.slots.shape[2] for read in reads)
    filled = [
        read._replace(
            slots=F.pad(read.slots, (0, k - read.slots.shape[2]), value=-1),
            weights=F.pad(read.weights, (0, k - read.weights.shape[2])),
        )
        for read in reads
    ]
    return Residual(*(torch.cat(parts, dim=1) for parts in zip(*filled, strict=True)))


def mean_trace(traces: list[Trace]) -> Trace:
    """Mean of each number over the segments that have it."""
    names = dict.fromkeys(name for trace in traces for name in trace)
    return {name: torch.stack([trace[name] for trace in traces if name in trace]).mean(dim=0) for name in names}
