"""The contract of a memory: it stands around a mixer.

Text flows in segments. A mixer is what a layer, or the whole stack of layers, does with a segment where no memory
stands: attention, an LSTM. A memory reads what earlier segments wrote and writes a segment once it is complete.

- In the easy case it adds something to the stream behind the mixer: `Memory.read` and `Memory.write` are all it needs.
- In the general case it decides what happens around the mixer: `Memory.mix`. It may give the mixer more keys and values
  (`Context`), mix by itself from queries, keys and values (`Heads`), replace the mixer, or put cells before a segment.

What else a memory may have is asked for by name: `memlm.memory.slots.Slots` (slots that can be looked into),
`memlm.memory.records.RecordKeeper` (text that can be shown, edited and forgotten), `memlm.memory.sharding.SharedBank`
(one bank that several processes write). Its persistent bank is a `memlm.memory.bank.Bank`.

Shapes: B rows, S consecutive segments, R = B * S, T tokens per segment, C tokens of lookback, N = S * T cells,
Q tokens that are mixed, D model width, H heads, E width of a head, M keys of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.bank import Bank, Scope
from memlm.memory.state import State, map_tensors, named_tensors, renewed, tensors, where_rows

Trace = dict[str, Tensor]
"""Numbers of one step by name, each a scalar or one per row, (B,): for the log, and for the memory's own losses."""


class Needs(NamedTuple):
    """What a memory asks of the model. A model that cannot give it refuses the memory.

    Attributes:
        lookback: Tokens before a segment that a write needs; at most the segment's length.
        tail: Cells that the model runs behind each segment once it is complete: see `Memory.tail`.
        surprise: Whether a write needs to know how well the model predicts each token.
        heads: Whether `Memory.mix` or a write uses queries, keys and values of the layer.
        context: Whether `Memory.mix` gives the mixer a `Context`, or puts cells before a segment.
        output: Whether a write needs what comes out of the layer (or of the stack).
        each_layer: Whether a memory around the stack stands before each layer too: see `Memory.enter` and
            `Memory.beside`. A write then gets what comes out of the cells behind the segment from each layer.
        nll: Whether a write needs to run the model: see `Segment.nll`. Of memories around the stack.
        signals: Implicit signals of the text that it uses, by name, and how many numbers each has.
    """

    lookback: int = 0
    tail: int = 0
    surprise: bool = False
    heads: bool = False
    context: bool = False
    output: bool = False
    each_layer: bool = False
    nll: bool = False
    signals: Mapping[str, int] = MappingProxyType({})


class Sizes(NamedTuple):
    """Sizes of a model, given to the constructor of a memory that has a parameter ``sizes``.

    Attributes:
        d_model: Width of the stream.
        n_head: Heads of a layer; 1 if it has no attention.
        n_layer: Layers of the model.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that a mixer still sees.
        n_vocab: Size of the vocabulary.
    """

    d_model: int
    n_head: int
    n_layer: int
    segment_len: int
    overlap: int
    n_vocab: int


class Heads(NamedTuple):
    """Queries, keys and values of a layer before any position is encoded, (B, H, T, E) each."""

    q: Tensor
    k: Tensor
    v: Tensor


class Context(NamedTuple):
    """Keys and values that a mixer attends to beside the segment, in one softmax.

    Attributes:
        key: Per row (B, H, M, E), or per query (B, H, T, M, E).
        value: As ``key``.
        mask: Which of them may be seen, (B, M), or per query (B, T, M); None for all.
        bias: Added to the scores, of any shape that broadcasts to (B, H, T, M); None for nothing.
        place: Where each key stands, (M,) or per row (B, M), in tokens from the first cell of the segment (-1 is right
            before it); None if keys have no place: scores then are those of queries and keys before positions are
            encoded.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def of(cls, mixer: Mixer, hidden: Tensor, mask: Tensor | None = None, place: Tensor | None = None) -> Context:
        """Keys and values of ``hidden`` (B, M, D) by the layer's own maps."""
        heads = mixer.heads(hidden)
        return cls(heads.k, heads.v, mask, None, place)


class Mixer(Protocol):
    """What a layer, or the stack, does with the cells of segments where no memory stands, residual stream included."""

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The stream behind the mixer, shaped as ``x`` (B, Q, D); what the mixer adds is that less ``x``."""

    def heads(self, x: Tensor) -> Heads:
        """Queries, keys and values of any hidden states (B, L, D). Of attention alone."""

    def attend(self, heads: Heads, context: Context | None = None) -> Tensor:
        """What each head finds in the segment, the overlap and the context, (B, H, Q, E). Of attention alone."""

    def out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The stream ``x`` (B, Q, D) with what heads found, (B, H, Q, E), mapped and added. Of attention alone."""

    def at(self, s: int) -> Mixer:
        """The mixer of segment ``s`` of a window; one segment is mixed after the other."""


class Flags(NamedTuple):
    """What is known of S segments as a whole, (B, S) each.

    Attributes:
        complete: Segments that end now and are to be written; true ones come first in a row.
        continues: Segments whose context goes on from the segment before.
        closes: Segments after which the context ends.
        reset: Segments that begin a new document; None if none does.
        position: Place of the segment's first token in its document.
        document: Number of the document within its row.
    """

    complete: Tensor
    continues: Tensor
    closes: Tensor
    reset: Tensor | None
    position: Tensor
    document: Tensor

    def of(self, begin: int, end: int) -> Flags:
        """Those of segments ``begin`` to ``end``, the last not included."""
        return Flags(*(None if part is None else part[:, begin:end] for part in self))  # type: ignore[arg-type]


class Segment(NamedTuple):
    """What a memory may use when it writes ``S`` consecutive segments (``S`` is 1 outside a window).

    Token fields hold the ``C`` tokens before the window (the memory's ``needs.lookback``), then N = S * T cells.

    Attributes:
        ids: Token ids, (B, C + N).
        embeddings: Token embeddings, (B, C + N, D).
        hidden: The stream where the memory stands, (B, C + N, D): behind the mixer if it has only `Memory.read`, before
            it if it has a `Memory.mix` of its own, where the layers begin if it stands around the stack. If one module
            serves all attached layers: that of each, (B, C + N, n_layer, D).
        valid: Cells that hold a token, (B, C + N). Valid cells of a segment come first. The ``C`` tokens before are
            valid only where the first segment continues their context.
        flags: What is known of the segments as a whole.
        signals: Implicit signals of the text by name, each (B, n), those that the memory uses; None if there are none.
        lookback: ``C``.
        columns: Which cells of each segment are mixed in this call; all of them if ``S`` is not 1.
        surprise: How badly the model's head predicts the token after each cell from ``hidden``, in nats, (B, C + N),
            without gradients; None unless the memory needs it.
        output: What comes out of the layer, or of the stack, (B, C + N, D), or of each layer (B, C + N, n_layer, D);
            None unless the memory needs it.
        heads: Queries, keys and values of all cells, (B, H, C + N, E); None unless the memory needs them.
        maps: What makes queries, keys and values of any hidden states (B, L, D), as `Mixer.heads` does; None unless
            the memory needs heads.
        tail: What comes out of the cells behind the segment, (B, m, D), or of each layer, (B, m, n_layer, D); None
            unless the memory needs them.
        nll: Mean next-token loss of each row's segment, (B,), in nats, as a function of cells (B, m, D) before it; by
            the layers alone, without the overlap and what memories read. It can be differentiated twice, in inference
            too (``torch.inference_mode(False)``), but not by the head. None unless the memory needs it.
        owned: Whether the state that comes with it is given away, so that a write may change it in place instead of
            copying what it does not change. Only without gradients.
        told: Cells whose successor is worth to be remembered, (B, C + N), as a task of training says; not known of the
            ``C`` before the window. For losses alone: nothing that is read or written may depend on it. None if nobody
            says.
    """

    ids: Tensor
    embeddings: Tensor
    hidden: Tensor
    valid: Tensor
    flags: Flags
    signals: dict[str, Tensor] | None
    lookback: int
    columns: slice
    surprise: Tensor | None = None
    output: Tensor | None = None
    heads: Heads | None = None
    maps: Callable[[Tensor], Heads] | None = None
    tail: Tensor | None = None
    nll: Callable[[Tensor], Tensor] | None = None
    owned: bool = False
    told: Tensor | None = None

    @property
    def complete(self) -> Tensor:
        """See `Flags`."""
        return self.flags.complete

    @property
    def continues(self) -> Tensor:
        """See `Flags`."""
        return self.flags.continues

    @property
    def closes(self) -> Tensor:
        """See `Flags`."""
        return self.flags.closes

    @property
    def reset(self) -> Tensor | None:
        """See `Flags`."""
        return self.flags.reset

    @property
    def position(self) -> Tensor:
        """See `Flags`."""
        return self.flags.position

    @property
    def document(self) -> Tensor:
        """See `Flags`."""
        return self.flags.document

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

        def cut(part: Tensor | None) -> Any:
            return None if part is None else part[:, cells]

        segment = self._replace(
            ids=cut(self.ids),
            embeddings=cut(self.embeddings),
            hidden=cut(self.hidden),
            valid=cut(self.valid),
            flags=self.flags.of(s, s + 1),
            surprise=cut(self.surprise),
            told=cut(self.told),
            output=cut(self.output),
            heads=None if self.heads is None else Heads(*(part[:, :, cells] for part in self.heads)),
        )
        if s == 0 or not self.lookback:
            return segment
        before = segment.valid[:, : self.lookback] & segment.continues
        return segment._replace(valid=torch.cat([before, segment.valid[:, self.lookback :]], dim=1))


class Read(NamedTuple):
    """What was read, for the stream and for whoever wants to see it. What a memory cannot tell is None.

    Attributes:
        value: What is added to the stream behind the mixer, gated, (B, N, D); None if the read goes in another way.
        slots: Slots that were read, (B, N, k); -1 where none.
        weights: Read weight of each, (B, N, k). What is missing to 1 was read from nothing.
        gate: How far the read is let in, (B, N), in 0..1.
    """

    value: Tensor | None = None
    slots: Tensor | None = None
    weights: Tensor | None = None
    gate: Tensor | None = None


class Scanned(NamedTuple):
    """What `Memory.scan` gives.

    Attributes:
        output: The stream behind mixer and memory, (B, N, D); None where the model is to add `Read.value` to what the
            mixer gives.
        read: What was read; None if reads are off.
        state: The state after the window.
        trace: Numbers about the writes.
    """

    output: Tensor | None
    read: Read | None
    state: State
    trace: Trace


class Memory(nn.Module):
    """A memory mechanism: parameters live in the module, what is remembered lives in the state.

    The easy case defines `init_state`, `read` and `write`; the general one `init_state`, `mix` and `write`. The rest
    has defaults.

    Attributes:
        around: Where it stands. ``layer``: a module and a state for each attached layer. ``layers``: one module and one
            state for all attached layers. ``stack``: one around all layers of the model.
        needs: What it asks of the model.
        scope: ``sequence``, one bank per row that is reset at document starts; ``shared``, one bank for all rows.
        within: Whether a token reads what earlier tokens of its own segment wrote. `scan` is then the rule itself, and
            no faster way to what the loop over `mix` gives.
        technical: Names of settings that say how it is computed, not what: a run may go on with other ones.
        sized: Names of the settings that its size is made of, which grow together where a run has ``state_bytes``.
        bank: What outlives the text; see `Bank`.
    """

    around: Literal["layer", "layers", "stack"] = "layer"
    needs: Needs = Needs()
    scope: Scope = "sequence"
    within: bool = False
    technical: frozenset[str] = frozenset()
    sized: tuple[str, ...] = ()
    bank: Bank

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank(self)

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

    def holds(self, state: State) -> Tensor:
        """Which rows of a state hold anything, (B,). Default: those that are not as `init_state` makes them."""
        parts = tensors(state)
        pairs = zip(parts, tensors(self.init_state(len(parts[0]))), strict=True)
        return torch.stack([(part != fresh).reshape(len(part), -1).any(dim=1) for part, fresh in pairs]).any(dim=0)

    def prepare(self, state: State) -> Any:
        """What reads need of the state, worked out once per segment, differentiable. Default: the state itself."""
        return state

    def prepare_steps(self, state: State, rows: Tensor | None = None, before: Any = None) -> Any:
        """`prepare`, without gradients, for a segment whose tokens are read one by one. Default: the same.

        Args:
            state: The state.
            rows: Rows (N,) that have changed since; None for all.
            before: What the last call gave, given away; needed with ``rows``.
        """
        return self.prepare(state)

    def read(self, y: Tensor, prepared: Any) -> Read:
        """The easy case: what is added to the stream behind the mixer.

        Args:
            y: The stream behind the mixer, (B, T, D), for any part of one segment.
            prepared: Result of `prepare`.
        """
        raise NotImplementedError

    def mix(self, x: Tensor, prepared: Any, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The general case: the stream behind mixer and memory. By default a read is added to what the mixer gives.

        Args:
            x: The stream before the mixer, (B, T, D), for any part of one segment.
            prepared: Result of `prepare`.
            mixer: What the layer or the stack does. A memory around the stack may put m cells before those of ``x``:
                the result then has m cells more too.

        Returns:
            The stream behind mixer and memory, shaped as ``x``; and what was read, to be looked at.
        """
        y = mixer(x)
        found = self.read(y, prepared)
        assert found.value is not None
        return y + found.value, found

    def off(self, x: Tensor, mixer: Mixer) -> Tensor:
        """What happens in place of `mix` where reads are off: by default the mixer alone.

        A memory that leaves the mixer out of `mix` leaves it out here too.
        """
        return mixer(x)

    def enter(self, x: Tensor, prepared: Any, layer: int) -> Tensor:
        """What enters a layer, of a memory around the stack that ``needs.each_layer``; not called where reads are off.

        Args:
            x: The stream before the layer, (B, L, D): cells of one segment, or those before or behind it.
            prepared: Result of `prepare`.
            layer: Number of the layer.
        """
        return x

    def beside(self, prepared: Any, layer: int, maps: Callable[[Tensor], Heads]) -> Context | None:
        """What a layer's attention sees beside the segment, of a memory around the stack that ``needs.each_layer``.

        Cells behind the segment see it too. Not called where reads are off.

        Args:
            prepared: Result of `prepare`.
            layer: Number of the layer.
            maps: What makes queries, keys and values of any hidden states (B, L, D), as `Mixer.heads` does.
        """
        return None

    def tail(self, prepared: Any) -> Tensor:
        """The ``needs.tail`` cells behind a segment, (B, m, D), as they enter the layers.

        They see all of the segment and each other; no token sees them. They run once the segment is complete, and what
        comes out of them is `Segment.tail`.
        """
        raise NotImplementedError

    def write(self, segment: Segment, state: State) -> tuple[State, Trace]:
        """The state after one segment (``S`` = 1). Rows whose segment is not complete keep their state.

        Args:
            segment: The segment; with no valid cell a write only settles what an earlier segment left open.
            state: State before the segment; never changed in place, unless it is ``segment.owned``.

        Returns:
            The new state and numbers about the write. Without gradients what later writes may change in place of it is
            no part of ``state``, unless that is ``segment.owned``.
        """
        raise NotImplementedError

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: State,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        """Mix and write the ``S`` segments of a window in order. This loop is the definition.

        A mechanism may override it with something faster that gives the same outputs and gradients (see `at_once`),
        or, if it reads `within` segments, with its rule. Not used by memories whose write needs what comes out of the
        layer, or that do not stand around one: the model then calls `mix` and `write` itself.

        Args:
            x: What is mixed, (B, S * Q, D). For a memory that has only `read` the stream behind the mixer, which has
                run already: ``mixer`` then gives back what it gets.
            window: The segments, to be written where complete.
            state: State before the window.
            mixer: What stands here without the memory.
            read: Whether to read.
            write: Whether to write.
            keep_state: Whether the state after the window is needed; if not, any state may be returned.
        """
        outputs: list[Tensor] = []
        reads: list[Read | None] = []
        traces: list[Trace] = []
        for s, part in enumerate(x.chunk(window.n_segment, dim=1)):
            segment = window.at(s)
            state = self.start_documents(segment.reset, state, segment.owned)
            if not read:
                outputs.append(self.off(part, mixer.at(s)))
            elif self.reads_beside:
                reads.append(self.read(part, self.prepare(state)))
            else:
                output, found = self.mix(part, self.prepare(state), mixer.at(s))
                outputs.append(output)
                reads.append(found)
            if write:
                state, trace = self.write(segment, state)
                window = window._replace(owned=not torch.is_grad_enabled())
                traces.append(trace)
        return Scanned(joined(outputs) if outputs else None, join_reads(reads), state, mean_trace(traces))

    @property
    def reads_beside(self) -> bool:
        """Whether all it does is to add a read to the stream behind the mixer: `mix` is the default."""
        return type(self).mix is Memory.mix

    def start_documents(self, reset: Tensor | None, state: State, owned: bool = False) -> State:
        """The state with the rows that ``reset`` (B, S) names fresh, if the bank belongs to a document.

        Args:
            reset: Segments that begin a document; None if none does.
            state: The state; not changed in place unless it is ``owned``, and then only rows that begin a document.
            owned: As `Segment.owned`.
        """
        if reset is None or self.scope == "shared":
            return state
        rows, fresh = reset.any(dim=1), self.bank.first(reset.shape[0])
        return renewed(state, fresh, rows) if owned else where_rows(rows, fresh, state)

    def restored(self, state: State, missing: set[str]) -> State:
        """A state of the bank with what it lacked, as fields of the state depend on settings that have changed since.

        Args:
            state: The state; fields that the bank does not hold are as in a fresh state.
            missing: Paths of these fields.
        """
        return state

    def losses(self, trace: Trace, nll: Tensor) -> dict[str, Tensor]:
        """Losses of the mechanism beside next-token prediction, by name.

        Args:
            trace: What `scan` or `write` said of this step's writes, averaged over segments and layers.
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

    def check(self, state: State) -> None:
        """Refuse a state that no text can have led to, such as one of a damaged or forged file.

        Default: a real number that is not finite.

        Raises:
            ValueError: If there is anything; the message names the field.
        """
        for name, part in named_tensors(state).items():
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise ValueError(f"{name} is not finite everywhere")

    def flops_per_token(self) -> int:
        """Multiply-adds times two of one token's read and write."""
        return 2 * sum(parameter.numel() for parameter in self.parameters())


def at_once(
    memory: Memory,
    x: Tensor,
    window: Segment,
    state: State,
    mixer: Mixer,
    read: bool = True,
    write: bool = True,
    keep_state: bool = True,
) -> Scanned:
    """A `Memory.scan` that writes all segments of a window first, then mixes or reads them in one call, each as a row.

    For a memory of scope ``sequence`` with a small state, of which one copy per segment is made: ``scan = at_once``.
    """
    if window.n_segment == 1 or memory.scope == "shared":
        return Memory.scan(memory, x, window, state, mixer, read, write, keep_state)
    before, traces = [], []
    for s in range(window.n_segment):
        segment = window.at(s)
        if read:  # all states are
            segment = segment._replace(owned=False)
        state = memory.start_documents(segment.reset, state, segment.owned)
        before += [state] if read else []
        if write:
            state, trace = memory.write(segment, state)
            window = window._replace(owned=not torch.is_grad_enabled())
            traces.append(trace)
    rows = x.reshape(len(x) * window.n_segment, -1, x.shape[2])  # (R, Q, D)
    y: Tensor | None = None
    found: Read | None = None
    if read:
        each = map_tensors(lambda *parts: torch.stack(parts, dim=1).flatten(0, 1), before[0], *before[1:])
        if memory.reads_beside:
            found = memory.read(rows, memory.prepare(each))
        else:
            y, found = memory.mix(rows, memory.prepare(each), mixer)
    elif not memory.reads_beside:
        y = memory.off(rows, mixer)
    if found is not None:
        found = Read(*(None if part is None else part.reshape(*x.shape[:2], *part.shape[2:]) for part in found))
    return Scanned(None if y is None else y.reshape(x.shape), found, state, mean_trace(traces))


def joined(parts: list[Tensor]) -> Tensor:
    """Segments (B, Q, ...) one after the other, (B, S * Q, ...)."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def join_reads(reads: list[Read | None]) -> Read | None:
    """One read over S segments from S reads of one segment; those of fewer slots are filled up with slot -1."""
    known = [read for read in reads if read is not None]
    if len(known) < 2:
        return known[0] if known else None
    k = max(0 if read.slots is None else read.slots.shape[2] for read in known)

    def fill(part: Tensor | None, value: float) -> Tensor | None:
        return None if part is None else F.pad(part, (0, k - part.shape[2]), value=value)

    filled = [read._replace(slots=fill(read.slots, -1), weights=fill(read.weights, 0)) for read in known]
    return Read(*(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*filled, strict=True)))


def mean_trace(traces: list[Trace]) -> Trace:
    """Mean of each number over the segments that have it."""
    names = dict.fromkeys(name for trace in traces for name in trace)
    return {name: torch.stack([trace[name] for trace in traces if name in trace]).mean(dim=0) for name in names}
