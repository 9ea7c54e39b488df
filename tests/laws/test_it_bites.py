"""The laws catch the faults that public implementations have: each faulty memory here fails the law it breaks.

All are a healthy memory, a ring of segment means, with one thing wrong.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from memlm import laws
from memlm.memory import ltm_write, strengths
from memlm.memory.adaptive import AdaptiveMemory, AdaptiveState
from memlm.memory.contract import Memory, Mixer, Read, Scanned, Segment, Trace
from memlm.memory.engrams import Engrams
from memlm.memory.ltm import LongTermMemory, LongTermState
from memlm.memory.memoria import MemoriaMemory
from memlm.memory.slots import Slots
from tests.laws.oracles import ORACLES
from tests.memory import guests

pytestmark = pytest.mark.slow


class RingState(NamedTuple):
    slot: Tensor  # (B, n, D)
    n_written: Tensor  # (B,)


class Ring(Slots):
    """The mean of each of the last ``n_slot`` segments, read by attention. Healthy."""

    def __init__(self, d_model: int, n_slot: int = 4) -> None:
        super().__init__()
        self.n_slot = n_slot
        self.to_slot = nn.Linear(2 * d_model, d_model)
        self.query = nn.Linear(d_model, d_model)
        self.to_output = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, n_row: int) -> RingState:
        d_model = self.to_output.in_features
        return RingState(torch.zeros(n_row, self.n_slot, d_model), torch.zeros(n_row, dtype=torch.long))

    def read(self, y: Tensor, prepared: RingState) -> Read:
        slot = prepared.slot
        n_slot = slot.shape[1]
        place = torch.arange(n_slot)
        filled = self.filled(prepared)
        score = self.query(y) @ slot.transpose(1, 2) / y.shape[-1] ** 0.5
        # Nothing is read with a little weight as well, so that rows that hold nothing read nothing.
        score = torch.cat([score.masked_fill(~filled[:, None], -torch.inf), torch.zeros_like(score[..., :1])], dim=2)
        weight = score.softmax(dim=2)[..., :-1]
        values = self.to_output(weight @ slot) * filled.any(dim=1)[:, None, None]
        return Read(values, place.expand(*y.shape[:2], -1), weight, torch.ones(y.shape[:2]))

    def content(self, segment: Segment) -> Tensor:
        """What a segment leaves behind, (B, D)."""
        return self.mean(torch.cat([segment.hidden, segment.embeddings], dim=2), segment.valid)

    def mean(self, x: Tensor, valid: Tensor) -> Tensor:
        weight = valid.to(x.dtype)[..., None]
        return self.to_slot(x).tanh().mul(weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def place(self, state: RingState) -> Tensor:
        """The slot to write, (B,)."""
        return state.n_written % self.n_slot

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        written = segment.complete[:, 0] & segment.valid.any(dim=1)
        here = (torch.arange(self.n_slot) == self.place(state)[:, None]) & written[:, None]
        slot = torch.where(here[..., None], self.content(segment)[:, None], state.slot)
        return RingState(slot, state.n_written + written), {}

    def filled(self, state: RingState) -> Tensor:
        return torch.arange(state.slot.shape[1]) < state.n_written[:, None]  # (B, n)


class Dead(Ring):
    """Reads nothing."""

    def read(self, y: Tensor, prepared: RingState) -> Read:
        read = super().read(y, prepared)
        return read._replace(value=0 * read.value)


class WritesFirst(Ring):
    """Writes a segment before reading it (IMM)."""

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: Any,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        written = super().scan(x, window, state, mixer, False, write)
        found = super().scan(x, window, written.state, mixer, read, False)
        return written._replace(output=found.output, read=found.read)


class Averages(Ring):
    """Its gate averages over the tokens of the segment, later ones included (LM2)."""

    def read(self, y: Tensor, prepared: RingState) -> Read:
        read = super().read(y, prepared)
        return read._replace(value=read.value * y.mean(dim=1, keepdim=True).sigmoid())


class MixesRows(Ring):
    """Each row gets what its neighbour wrote (LongMem)."""

    def content(self, segment: Segment) -> Tensor:
        return super().content(segment).roll(1, dims=0)


class BatchMean(Ring):
    """Centres what it writes over the batch."""

    def content(self, segment: Segment) -> Tensor:
        content = super().content(segment)
        return content - 0.5 * content.mean(dim=0)


class FirstRowOnly(Ring):
    """Writes what row 0 wrote for every row (MemoryLLM)."""

    def content(self, segment: Segment) -> Tensor:
        return super().content(segment)[:1].expand(len(segment.ids), -1)


class Padded(Ring):
    """Writes padding as well."""

    def mean(self, x: Tensor, valid: Tensor) -> Tensor:
        return super().mean(x, torch.ones_like(valid))


class EveryCall(Ring):
    """Writes at the end of a call, whether or not the segment ends there."""

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        flags = segment.flags._replace(complete=torch.ones_like(segment.complete))
        return super().write(segment._replace(flags=flags), state)


class ReadsOnce(Ring):
    """Its fast path reads the state from before the window, for all segments of the window."""

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: Any,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        written = super().scan(x, window, state, mixer, False, write)
        return written._replace(output=None, read=self.read(x, state) if read else None)


class ForgetsWindowGradient(Ring):
    """Its fast path has the right outputs and the wrong gradients."""

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: Any,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        return super().scan(x, window._replace(embeddings=window.embeddings.detach()), state, mixer, read, write)


class KeepsDocuments(Ring):
    """Goes on remembering when a new document begins."""

    def start_documents(self, reset: Tensor | None, state: Any, owned: bool = False) -> Any:
        return state


class ResetsAllRows(Ring):
    """Forgets every row when one begins a new document."""

    def start_documents(self, reset: Tensor | None, state: Any, owned: bool = False) -> Any:
        return super().start_documents(None if reset is None else reset | reset.any(), state, owned)


class Attribute(Ring):
    """Keeps what it remembers in the module."""

    last: Tensor | None = None

    def read(self, y: Tensor, prepared: RingState) -> Read:
        read = super().read(y, prepared)
        return read if self.last is None else read._replace(value=read.value + self.last)

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        self.last = self.content(segment).mean()
        return super().write(segment, state)


class InPlace(Ring):
    """Changes the state it was given."""

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        new, trace = super().write(segment, state)
        state.slot.copy_(new.slot.detach())
        return new, trace


class InPlaceForAll(Ring):
    """Changes a state that is given away, whoever else holds its numbers."""

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        new, trace = super().write(segment, state)
        return (new._replace(slot=state.slot.copy_(new.slot)) if segment.owned else new), trace


class LosesWhatIsGiven(Ring):
    """Writes nothing into a state that is given away."""

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        new, trace = super().write(segment, state)
        return (state if segment.owned else new), trace


class Learns(Ring):
    """Changes its own buffers, also in evaluation."""

    def __init__(self, d_model: int, n_slot: int = 4) -> None:
        super().__init__(d_model, n_slot)
        self.register_buffer("n_seen", torch.zeros(()))

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        self.n_seen += 1
        return super().write(segment, state)


class NoBackpropagation(Ring):
    """Cuts the graph at every write (truncated backpropagation without effect, RMT)."""

    def content(self, segment: Segment) -> Tensor:
        return super().content(segment).detach()


class NeverCuts(Ring):
    """Finds its way back to the graph that was cut at the edge of the window."""

    graph: Any = None

    def prepare(self, state: RingState) -> RingState:
        alive = self.graph is not None and self.graph.slot.shape == state.slot.shape
        return self.graph if alive and torch.equal(self.graph.slot, state.slot) else state

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        self.graph, trace = super().write(segment, self.prepare(state))
        return self.graph, trace


class Idle(Ring):
    """Has a parameter that nothing trains."""

    def __init__(self, d_model: int, n_slot: int = 4) -> None:
        super().__init__(d_model, n_slot)
        self.threshold = nn.Parameter(torch.zeros(1))

    def read(self, y: Tensor, prepared: RingState) -> Read:
        read = super().read(y, prepared)
        return read._replace(value=read.value * (self.threshold < 10))


class Grows(Ring):
    """Appends a slot for each segment."""

    def read(self, y: Tensor, prepared: RingState) -> Read:
        read = super().read(y, prepared)
        return read._replace(slots=read.slots[..., : self.n_slot], weights=read.weights[..., : self.n_slot])

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        slot = torch.cat([state.slot, self.content(segment)[:, None]], dim=1)
        return RingState(slot, state.n_written + segment.complete[:, 0]), {}


class Overflows(Ring):
    """Adds up without end."""

    factor = 2.0

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        new, trace = super().write(segment, state)
        return new._replace(slot=self.factor * state.slot + new.slot), trace


class Swells(Overflows):
    """Adds up slowly."""

    factor = 0.5


class Frozen(Ring):
    """Admits nothing once it is full (Memorizing Transformers after overflow)."""

    def place(self, state: RingState) -> Tensor:
        return state.n_written  # beyond the last slot: nowhere


class Unsaved(Ring):
    """A part of what it remembers is not in the state (ARMT)."""

    def __init__(self, d_model: int, n_slot: int = 4) -> None:
        super().__init__(d_model, n_slot)
        self.extra: dict[float, Tensor] = {}

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        new, trace = super().write(segment, state)
        self.extra[float(new.slot.detach().sum())] = new.slot.detach().mean()
        return new, trace

    def read(self, y: Tensor, prepared: RingState) -> Read:
        read = super().read(y, prepared)
        return read._replace(value=read.value + self.extra.get(float(prepared.slot.detach().sum()), 0.0))


class StillHolds(Ring):
    """Forgets that a slot is written, not what it holds."""

    def forget(self, state: RingState, slots: Tensor) -> RingState:
        return state


class ForgetsAll(Ring):
    """Forgets all slots when asked to forget one."""

    def forget(self, state: RingState, slots: Tensor) -> RingState:
        return super().forget(state, slots.any(dim=1, keepdim=True).expand_as(slots))


class Another(Ring):
    """Its contents are those of another slot."""

    def contents(self, state: RingState) -> Tensor:
        return super().contents(state).roll(1, dims=1)


def make_of(cls: type[Memory]) -> laws.Make:
    return laws.builder_of({"ring": (cls, {"n_slot": 4} if issubclass(cls, Ring) else {})}, shrink=False)


LAWS: dict[str, Callable[[laws.Make], None]] = {
    "0 alive": laws.alive,
    "1 causal": laws.causal,
    "2 isolated": laws.isolated,
    "3 chunks": laws.chunk_invariant,
    "3 ragged": laws.ragged,
    "3 generation": laws.generates_as_parallel,
    "3 schedules": laws.schedules_agree,
    "3 contexts": laws.contexts,
    "4 reset": laws.resets,
    "5 pure": laws.pure,
    "5 given away": laws.given_away,
    "6 reach": laws.reach,
    "6 parameters": laws.every_parameter_learns,
    "7 bounded": laws.bounded,
    "7 admits": laws.admits,
    "8 round trip": laws.round_trip,
    "9 useful": laws.useful,
    "11 inspectable": laws.inspectable,
}

# The law, the memory that breaks it, what the law says about it.
FAULTS: list[tuple[str, type[Ring], str]] = [
    ("0 alive", Dead, "no token of a segment changes"),
    ("1 causal", WritesFirst, "changes outputs before it"),
    ("1 causal", Averages, "changes outputs before it"),
    ("2 isolated", MixesRows, "rows"),
    ("2 isolated", BatchMean, "rows"),
    ("2 isolated", FirstRowOnly, "rows"),
    ("3 chunks", EveryCall, "calls of"),
    ("3 chunks", ReadsOnce, "calls of"),
    ("3 ragged", Padded, "closed before it was full"),
    ("3 generation", ReadsOnce, "logits of generation"),
    ("3 schedules", ReadsOnce, "outputs"),
    ("3 schedules", ForgetsWindowGradient, "gradient of"),
    ("3 contexts", Padded, "outputs"),
    ("4 reset", KeepsDocuments, "reset rows"),
    ("4 reset", ResetsAllRows, "was not reset"),
    ("5 pure", Attribute, "in between"),
    ("5 pure", InPlace, "in between"),
    ("5 pure", Learns, "evaluation changed"),
    ("5 given away", InPlaceForAll, "was changed"),
    ("5 given away", LosesWhatIsGiven, "depend on whether"),
    ("6 reach", NoBackpropagation, "no gradient"),
    ("6 reach", NeverCuts, "across the edge"),
    ("6 parameters", Idle, "gets no gradient"),
    ("6 parameters", Dead, "is zero"),
    ("7 bounded", Grows, "bytes became"),
    ("7 bounded", Overflows, "not finite"),
    ("7 bounded", Swells, "grows with each write"),
    ("7 admits", Frozen, "admits nothing new"),
    ("8 round trip", Unsaved, "continued otherwise"),
    ("8 round trip", Attribute, "continued otherwise"),
    ("11 inspectable", StillHolds, "all slots forgotten"),
    ("11 inspectable", ForgetsAll, "read no more"),
    ("11 inspectable", Another, "that was kept changed"),
]


@pytest.mark.parametrize("law", LAWS)
def test_a_healthy_memory_passes(law: str) -> None:
    LAWS[law](make_of(Ring))


@pytest.mark.parametrize(("law", "cls", "message"), FAULTS, ids=[f"{law} {cls.__name__}" for law, cls, _ in FAULTS])
def test_a_faulty_memory_is_caught(law: str, cls: type[Ring], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        LAWS[law](make_of(cls))


def test_a_useless_memory_is_caught() -> None:
    with pytest.raises(AssertionError, match="recalls"):
        laws.useful(make_of(Dead), n_step=50)


class BesideState(Ring):
    """Its state says that something was written; what was, it keeps in the module, by place in the batch."""

    held: Any = None

    def read(self, y: Tensor, prepared: RingState) -> Read:
        return super().read(y, prepared._replace(slot=self.held) if prepared.n_written.any() else prepared)

    def write(self, segment: Segment, state: RingState) -> tuple[RingState, Trace]:
        new, trace = super().write(segment, state)
        self.held = new.slot
        return new, trace


def test_a_memory_that_is_not_what_is_read_is_caught() -> None:
    with pytest.raises(AssertionError, match="with another row's memory"):
        laws.useful(make_of(BesideState))


class SeesItself(guests.TokenWise):
    """Token-wise, but every token reads what the last one of its segment wrote."""

    def after(self, state: Tensor, value: Tensor, valid: Tensor) -> Tensor:
        after = super().after(state, value, valid)
        return after[:, -1:].expand_as(after)


class ShowsItsCells(guests.Cells):
    """Text sees a cell that is made of all of its segment."""

    def mix(self, x: Tensor, prepared: guests.RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        m, cells = prepared.held.shape[1], prepared.held
        summary = mixer(torch.cat([cells, x], dim=1))[:, m:].mean(dim=1, keepdim=True)
        return mixer(torch.cat([cells, summary, x], dim=1))[:, m + 1 :], None


class MixesContexts(guests.CacheAtOnce):
    """Each row attends to what its neighbour holds."""

    def mix(self, x: Tensor, prepared: guests.RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        return super().mix(x, guests.RingState(*(part.roll(1, dims=0) for part in prepared)), mixer)


class NeverOff(guests.Cache):
    """Reads where reads are off, too."""

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: Any,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        return super().scan(x, window, state, mixer, True, write, keep_state)


class KeepsTooMuch(guests.CacheAtOnce):
    """What it keeps of a segment depends on the call in which the segment ended."""

    def write(self, segment: Segment, state: guests.RingState) -> tuple[guests.RingState, Trace]:
        here = torch.zeros_like(segment.valid)
        here[:, segment.columns] = True
        return super().write(segment._replace(valid=segment.valid & here), state)


@pytest.mark.parametrize(
    ("law", "cls", "message"),
    [
        (laws.causal, SeesItself, "changes outputs before it"),
        (laws.causal, ShowsItsCells, "changes outputs before it"),
        (laws.isolated, MixesContexts, "rows"),
        (laws.alive, NeverOff, "reads off changes nothing"),
        (laws.chunk_invariant, KeepsTooMuch, "calls of"),
    ],
)
def test_a_fault_of_a_memory_around_a_mixer_is_caught(
    law: Callable[[laws.Make], None], cls: type[Memory], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        law(make_of(cls))


def keeps_oldest(memory: LongTermMemory, priority: Tensor, n_written: Tensor) -> Tensor:
    """Under ``fifo`` nothing gets older, so that what came first may stay."""
    return priority


CANDIDATES = ltm_write.candidates


def admits_half(memory: LongTermMemory, segment: Segment) -> Any:
    """Fewer slots are written than may be."""
    found, trace = CANDIDATES(memory, segment)
    half = torch.arange(found.priority.shape[2]) % 2 == 0
    return found._replace(priority=found.priority.masked_fill(half, -torch.inf)), trace


@pytest.mark.parametrize(
    ("name", "wrong", "kind"),
    [
        ("age", None, "fifo"),
        ("age", keeps_oldest, "fifo"),
        ("candidates", None, "span"),
        ("candidates", admits_half, "span"),
    ],
)
def test_an_eviction_other_than_declared_is_caught(
    name: str, wrong: Callable[..., Any] | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = laws.builder_of({"ltm": (LongTermMemory, {})})
    law = partial(ORACLES["LongTermMemory"].evicts_as_declared, kind=kind, of="LongTermMemory")
    if wrong is None:
        law(make)
    else:
        monkeypatch.setattr(ltm_write, name, wrong)
        with pytest.raises(AssertionError):
            law(make)


class EvictsLongestLived(MemoriaMemory):
    """Takes the place of engrams that have the most life left."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        add = self.graph.add

        def wrong(engrams: Engrams, data: Tensor) -> Engrams:
            added = add(engrams._replace(lifespan=-engrams.lifespan), data)
            old = added.birth == engrams.birth
            return added._replace(lifespan=torch.where(old, engrams.lifespan, added.lifespan))

        self.graph.add = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("cls", [MemoriaMemory, EvictsLongestLived])
def test_an_eviction_of_engrams_other_than_declared_is_caught(cls: type[MemoriaMemory]) -> None:
    make, law = laws.builder_of({"memoria": (cls, {})}), ORACLES["MemoriaMemory"].evicts_as_declared
    if cls is MemoriaMemory:
        law(make)
    else:
        with pytest.raises(AssertionError, match="others than"):
            law(make)


class LeavesKeys(LongTermMemory):
    """Forgets all of a slot but its key, which nothing reads any more."""

    def forget(self, state: LongTermState, slots: Tensor, owned: bool = False) -> LongTermState:
        return super().forget(state, slots)._replace(key=state.key)


class LeavesCentres(LongTermMemory):
    """Forgets slots, not the centres of their lists."""

    def forget(self, state: LongTermState, slots: Tensor, owned: bool = False) -> LongTermState:
        new = super().forget(state, slots)
        assert new.lists is not None
        assert state.lists is not None
        return new._replace(lists=new.lists._replace(centroid=state.lists.centroid))


class KeepsOrigins(LongTermMemory):
    """Merges slots without a note of whom they came from."""

    def consolidate(
        self, state: LongTermState, threshold: float = 0.1, *, turn: int = 0, owned: bool = False
    ) -> tuple[LongTermState, dict[str, int]]:
        new, counts = super().consolidate(state, threshold, turn=turn)
        return new._replace(origins=torch.where(self.filled(new)[..., None], state.origins, new.origins)), counts


class KeepsTokens(LongTermMemory):
    """Forgets all of a slot but its text."""

    def forget(self, state: LongTermState, slots: Tensor, owned: bool = False) -> LongTermState:
        return super().forget(state, slots)._replace(tokens=state.tokens)


class ForgetsMore(LongTermMemory):
    """Forgets the slot before, too."""

    def forget(self, state: LongTermState, slots: Tensor, owned: bool = False) -> LongTermState:
        return super().forget(state, slots | slots.roll(-1, dims=1) if slots.any() else slots)


@pytest.mark.parametrize(
    ("cls", "memory", "message"),
    [
        (LeavesKeys, {}, "left in the memory file"),
        (LeavesCentres, {"index": "inverted", "n_slot": 24, "n_list": 20, "n_probe": 20}, "left in"),
        (KeepsOrigins, {}, "a text that was merged with another"),
        (KeepsTokens, {}, "left in the memory file"),
        (ForgetsMore, {}, "one of three texts"),
    ],
)
def test_a_memory_that_forgets_by_halves_is_caught(
    cls: type[LongTermMemory], memory: dict[str, Any], message: str
) -> None:
    laws.forgets(laws.builder_of({"ltm": (LongTermMemory, {})}), memory)
    with pytest.raises(AssertionError, match=message):
        laws.forgets(laws.builder_of({"ltm": (cls, {})}), memory)


def duplicates(memory: AdaptiveMemory, state: AdaptiveState, items: AdaptiveState) -> Tensor:
    """What repeats is stored again, where it should be reinforced."""
    n, n_item = state.strength.shape[1], items.strength.shape[1]
    return (n + torch.arange(n_item)).expand(len(items.strength), -1)


SETTLE = strengths.settle


def never_fades(memory: AdaptiveMemory, state: AdaptiveState, items: AdaptiveState) -> strengths.Settled:
    """Long-term slots do not decay."""
    long = torch.arange(state.strength.shape[1]) >= memory.n_short
    return SETTLE(memory, state._replace(strength=state.strength / torch.where(long, memory.decay, 1.0)), items)


@pytest.mark.parametrize(("name", "wrong"), [("", None), ("joins_of", duplicates), ("settle", never_fades)])
def test_strengths_other_than_declared_are_caught(
    name: str, wrong: Callable[..., Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = laws.builder_of({"adaptive": (AdaptiveMemory, {})})
    if wrong is None:
        ORACLES["AdaptiveMemory"].evicts_as_declared(make)
    else:
        monkeypatch.setattr(strengths, name, wrong)
        with pytest.raises(AssertionError):
            ORACLES["AdaptiveMemory"].evicts_as_declared(make)


@pytest.mark.parametrize("change", ["missing", "unknown", "other default"])
def test_a_yaml_that_does_not_fit_is_caught(change: str) -> None:
    node = dict(laws.nodes_of("stm")["stm"])
    laws.described({"stm": node})
    if change == "missing":
        del node["update_rate"]
    elif change == "unknown":
        node["lr"] = 0.1
    else:
        node["update_rate"] = 0.5
    with pytest.raises(AssertionError):
        laws.described({"stm": node})
