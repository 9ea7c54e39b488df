"""Memoria: equal to its source where that is asked for, and to a naive reference where it is corrected."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.compat.memoria import MemoriaOfSource, SourceGraph
from memlm.memory.engrams import EMPTY, LONG_TERM, SHORT_TERM, WORKING, EngramGraph, Engrams
from memlm.memory.memoria import MemoriaMemory, MemoriaState
from memlm.memory.state import tensors
from tests.memory import memoria_source
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow


class Source:
    """memoria-pytorch beside our `EngramGraph`, step by step."""

    def __init__(self, version: str, n_slot: int, double: bool = True, **settings: int) -> None:
        package = memoria_source.load(version, double=double)
        package.memoria.draw = self.draw
        self.theirs = package.Memoria(
            num_reminded_stm=settings["n_reminded_stm"],
            stm_capacity=settings["n_stm"],
            ltm_search_depth=settings["search_depth"],
            initial_lifespan=settings["lifespan"],
            num_final_ltms=settings["n_reminded_ltm"],
        )
        self.graph = SourceGraph(version, n_slot, **settings)  # type: ignore[arg-type]
        self.ours: Engrams | None = None
        self.dtype = torch.float64 if double else torch.float32
        self.noise = torch.zeros(0)
        self.generator = torch.Generator().manual_seed(0)
        self.n_tie = 0  # rows in which the source decided a tie of null engrams otherwise

    def draw(self, mask: Tensor) -> Tensor:
        """What the source breaks ties with; kept for our turn."""
        self.noise = torch.rand(mask.shape, generator=self.generator).half()
        return self.noise

    def aligned(self) -> Tensor:
        _, n_column, n_engram = self.noise.shape
        graph = self.graph
        return F.pad(self.noise, (graph.n_slot - n_engram, 0, graph.n_stm - n_column, 0))

    def by_age(self) -> Tensor:
        """Our slots in the order of the source, (B, its length)."""
        assert self.ours is not None
        return self.ours.birth.argsort(dim=1, stable=True)[:, -self.theirs.engrams.memory_length :]

    def add(self, data: Tensor) -> None:
        if self.ours is None:
            self.ours = self.graph.empty(len(data), data.shape[2], dtype=self.dtype)
        self.theirs.add_working_memory(data)
        self.ours = self.graph.add(self.ours, data)

    def remind(self) -> Tensor:
        """Remind both; what the source gave.

        Among null engrams, all equally near, the source leaves to `topk` which take the last places: it is followed.
        """
        assert self.ours is not None
        before = self.by_age()
        _, theirs = self.theirs.remind()
        self.ours, reminded = self.graph.remind(self.ours, self.aligned())
        self.reminded = torch.full_like(reminded, -1)
        for row in range(len(theirs)):
            slots = {int(before[row, i]) for i in theirs[row] if i >= 0}
            mine = [int(slot) for slot in reminded[row] if slot >= 0]
            assert len(set(mine)) == len(mine)
            differ = set(mine) ^ slots
            assert all(self.ours.kind[row, slot] == EMPTY for slot in differ)
            self.n_tie += bool(differ)
            self.reminded[row, : len(slots)] = torch.tensor(sorted(slots), dtype=torch.long)
        self.compare()
        return theirs

    def adjust(self, indices: Tensor, gain: Tensor) -> None:
        """Pass a segment in both; ``gain`` (B, R) belongs to the source's ``indices``."""
        assert self.ours is not None
        by_slot = torch.zeros(len(indices), self.graph.n_slot + 1, dtype=self.dtype)
        slots = torch.where(indices >= 0, self.by_age().gather(1, indices.clamp(min=0)), self.graph.n_slot)
        by_slot.scatter_(1, slots, gain.to(self.dtype))
        self.theirs.adjust_lifespan_and_memories(indices, gain)
        self.ours = self.graph.adjust(self.ours, self.reminded, by_slot.gather(1, self.reminded.clamp(min=0)))
        self.compare()

    def compare(self) -> None:
        assert self.ours is not None
        theirs, order = self.theirs.engrams, self.by_age()
        n = theirs.memory_length
        assert int((self.ours.kind != EMPTY).sum(dim=1).max()) <= n <= self.graph.n_slot
        kind = self.ours.kind.gather(1, order)
        assert torch.equal(kind, theirs.engrams_types.long())
        assert torch.equal(self.ours.lifespan.gather(1, order), theirs.lifespan)
        assert torch.equal(self.ours.data.gather(1, order[..., None].expand_as(theirs.data)), theirs.data)
        cofire = self.ours.cofire.gather(1, order[..., None].expand(-1, -1, self.graph.n_slot))
        cofire = cofire.gather(2, order[:, None].expand(-1, n, -1))
        held = (kind != EMPTY)[:, :, None] & (kind != EMPTY)[:, None]
        assert torch.equal(cofire[held], theirs.induce_counts[held])


GEOMETRIES = [
    {"n_working": 4, "n_stm": 14, "n_reminded_stm": 5, "n_reminded_ltm": 8, "search_depth": 3, "lifespan": 5},
    {"n_working": 3, "n_stm": 9, "n_reminded_stm": 3, "n_reminded_ltm": 2, "search_depth": 5, "lifespan": 3},
    {"n_working": 5, "n_stm": 20, "n_reminded_stm": 4, "n_reminded_ltm": 6, "search_depth": 2, "lifespan": 4},
]


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_every_step_equals_that_of_the_source(version: str) -> None:
    n_row, n_step, width = 3, 100, 6
    seen = dict.fromkeys(("ragged", "long", "died", "null reminded", "short reminded as long", "null alive"), 0)
    n_tie = 0
    for seed, settings in enumerate(GEOMETRIES):
        draw = torch.Generator().manual_seed(seed)
        pair = Source(version, n_slot=150, **settings)
        for _ in range(n_step):
            data = torch.randn(n_row, settings["n_working"], width, dtype=torch.float64, generator=draw)
            pair.add(data + 0.5 * (seed > 0))  # null engrams are zeros: first near, then far
            kind = pair.theirs.engrams.engrams_types
            indices = pair.remind()
            gain = 6 * torch.rand(kind.shape, dtype=torch.float64, generator=draw)
            pair.adjust(indices, gain.gather(1, indices.clamp(min=0)))
            assert pair.ours is not None
            of = kind.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, LONG_TERM)
            seen["ragged"] += int((kind == EMPTY).any())
            seen["long"] += int((kind == LONG_TERM).any())
            seen["died"] += int((pair.ours.kind != EMPTY).sum() < (kind != EMPTY).sum())
            seen["null reminded"] += int((of == EMPTY).any())
            seen["short reminded as long"] += int((of == SHORT_TERM).sum(dim=1).max() > settings["n_reminded_stm"])
            seen["null alive"] += int(((pair.ours.kind == EMPTY) & (pair.ours.lifespan > 0)).any())
        n_tie += pair.n_tie
    assert min(seen.values()) > 2, f"the source's faults hardly show: {seen}"
    assert n_tie < 0.1 * n_row * n_step * len(GEOMETRIES)


def former_half(mask: Tensor) -> Tensor:
    """`torch.rand` in half precision as PyTorch once drew it on the CPU: the last 11 of the 24 bits of a float32."""
    return ((torch.rand(mask.shape) * 2**24).long() % 2**11 / 2**11).half()


def test_the_tutorial_of_the_source() -> None:
    """Its printed numbers come out of the source as we made it, version 1.0.0, and of ours beside it."""
    settings = {"n_reminded_stm": 4, "n_stm": 16, "search_depth": 5, "lifespan": 3, "n_reminded_ltm": 4}
    pair = Source("1.0.0", n_slot=64, double=False, n_working=8, **settings)

    def draw(mask: Tensor) -> Tensor:
        pair.noise = former_half(mask)
        return pair.noise

    memoria_source.load("1.0.0", double=False).memoria.draw = draw
    torch.manual_seed(42)
    pair.add(torch.rand(2, 8, 64))
    assert pair.theirs.engrams.lifespan.tolist() == [[3.0] * 8] * 2
    indices = pair.remind()
    assert indices.shape == (2, 0)
    pair.adjust(indices, torch.zeros_like(indices))
    assert pair.theirs.engrams.lifespan.tolist() == [[2.0] * 8] * 2
    pair.add(torch.rand(2, 8, 64))
    indices = pair.remind()
    assert [sorted(row) for row in indices.tolist()] == [[-1, 0, 2, 3, 4, 6], [-1, 0, 4, 5, 6, 7]]
    pair.adjust(indices, torch.full_like(indices, 5))
    assert pair.theirs.engrams.lifespan.tolist() == [
        [6, 1, 6, 6, 6, 1, 6, 1, *[2] * 8],
        [6, 1, 1, 1, 6, 6, 6, 6, *[2] * 8],
    ]
    for _ in range(10):
        pair.add(torch.rand(2, 8, 64))
        indices = pair.remind()
        pair.adjust(indices, torch.randint_like(indices, 0, 6).float())
    assert pair.theirs.engrams.engrams_types.tolist() == [[3] * 20 + [2] * 16, [0, 0] + [3] * 18 + [2] * 16]
    assert pair.theirs.engrams.lifespan.tolist() == [
        [9, 1, 8, 2, 16, 5, 13, 7, 7, 3, 3, 4, 3, 3, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 2, 6, 1, 1, *[2] * 8],
        [-1, -1, 3, 2, 19, 21, 11, 6, 14, 1, 5, 1, 5, 1, 5, 1, 1, 8, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, *[2] * 8],
    ]
    assert pair.n_tie == 0


# --------------------------------------------------------------------------------------------- the corrected algorithm


@dataclass
class Engram:
    number: int
    data: list[float]
    kind: int
    life: float


class Naive:
    """One row of engrams, one at a time."""

    def __init__(self, n_slot: int, **settings: int) -> None:
        self.n_slot, self.settings = n_slot, settings
        self.slots: dict[int, Engram] = {}
        self.together: dict[tuple[int, int], int] = {}  # by numbers of engrams
        self.n_born = 0

    def of(self, kind: int) -> list[int]:
        return [slot for slot in sorted(self.slots) if self.slots[slot].kind == kind]

    def count(self, a: int, b: int) -> int:
        return self.together.get((self.slots[a].number, self.slots[b].number), 0)

    def add(self, data: list[list[float]]) -> None:
        free = [slot for slot in range(self.n_slot) if slot not in self.slots]
        doomed = sorted(self.of(LONG_TERM), key=lambda slot: (self.slots[slot].life, self.slots[slot].number))
        for slot, content in zip((free + doomed)[: len(data)], data, strict=True):
            self.slots[slot] = Engram(self.n_born, content, WORKING, self.settings["lifespan"])
            self.n_born += 1

    def nearness(self, slot: int) -> float:
        distances = [
            sum((a - b) ** 2 for a, b in zip(self.slots[slot].data, self.slots[other].data, strict=True))
            for other in self.of(WORKING)
        ]
        return -sum(distances) / len(distances)

    def nearest(self, slots: list[int], k: int) -> list[int]:
        return sorted(slots, key=self.nearness, reverse=True)[:k]

    def remind(self) -> list[int]:
        short = self.nearest(self.of(SHORT_TERM), self.settings["n_reminded_stm"])
        found: list[int] = []
        ends = list(short)
        for _ in range(self.settings["search_depth"] + 1):
            left = [slot for slot in self.of(LONG_TERM) if slot not in found]
            strongest = [max(left, key=lambda slot: self.count(end, slot), default=None) for end in ends]
            ends = [to for end, to in zip(ends, strongest, strict=True) if to is not None and self.count(end, to) > 0]
            found += list(dict.fromkeys(ends))
        reminded = short + self.nearest(found, self.settings["n_reminded_ltm"])
        for a, b in itertools.product(self.of(WORKING) + reminded, repeat=2):
            pair = (self.slots[a].number, self.slots[b].number)
            self.together[pair] = self.together.get(pair, 0) + 1
        return reminded

    def adjust(self, gain: dict[int, float]) -> None:
        for slot, engram in self.slots.items():
            engram.life += gain.get(slot, 0.0) - 1
            engram.kind = SHORT_TERM if engram.kind == WORKING else engram.kind
        by_age = sorted(self.of(SHORT_TERM), key=lambda slot: self.slots[slot].number)
        for slot in by_age[: max(0, len(by_age) - self.settings["n_stm"])]:
            self.slots[slot].kind = LONG_TERM
        self.slots = {slot: engram for slot, engram in self.slots.items() if engram.life > 0}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("settings", GEOMETRIES)
def test_every_step_equals_the_naive_reference(full: bool, settings: dict[str, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    n_row, width = 2, 4
    n_slot = settings["n_working"] + settings["n_stm"] + 3 if full else 150
    graph = EngramGraph(n_slot, **settings)
    rows = [Naive(n_slot, **settings) for _ in range(n_row)]
    engrams = graph.empty(n_row, width, dtype=torch.float64)
    n_long_reminded = n_evicted = 0
    for _ in range(60):
        data = torch.randn(n_row, settings["n_working"], width, generator=draw, dtype=torch.float64)
        free = (engrams.kind == EMPTY).sum(dim=1).min()
        n_evicted += max(0, settings["n_working"] - int(free))
        engrams = graph.add(engrams, data)
        engrams, reminded = graph.remind(engrams)
        gain = torch.randint(0, 4, (n_row, n_slot), generator=draw).double()
        n_long_reminded += int((engrams.kind.gather(1, reminded.clamp(min=0))[reminded >= 0] == LONG_TERM).sum())
        for row, naive in enumerate(rows):
            naive.add(data[row].tolist())
            expected = naive.remind()
            assert [slot for slot in reminded[row].tolist() if slot >= 0] == expected
            for a, b in itertools.product(naive.slots, repeat=2):
                assert engrams.cofire[row, a, b] == naive.count(a, b)
            naive.adjust({slot: float(gain[row, slot]) for slot in expected})
        engrams = graph.adjust(engrams, reminded, gain.gather(1, reminded.clamp(min=0)))
        for row, naive in enumerate(rows):
            kinds = [naive.slots[slot].kind if slot in naive.slots else EMPTY for slot in range(n_slot)]
            assert engrams.kind[row].tolist() == kinds
            for slot, engram in naive.slots.items():
                assert engrams.lifespan[row, slot] == engram.life
                assert engrams.birth[row, slot] == engram.number
                assert engrams.data[row, slot].tolist() == engram.data
    assert n_long_reminded > 20
    assert (n_evicted > 0) == full


# ------------------------------------------------------------------------------------------------------- the memory

D, T = 8, 5


def memory_of(**settings: Any) -> MemoriaMemory:
    torch.manual_seed(0)
    small = {"n_slot": 20, "n_working": 2, "n_stm": 6, "n_reminded_stm": 3, "n_reminded_ltm": 3, "search_depth": 2}
    return MemoriaMemory(D, **(small | {"n_head": 2, "lifespan": 3} | settings))


def hidden_of(n_row: int, seed: int, n_layer: int = 2) -> Tensor:
    return torch.randn(n_row, T, n_layer, D, generator=torch.Generator().manual_seed(seed))


def state_after(memory: MemoriaMemory, n_segment: int, n_row: int = 2) -> MemoriaState:
    state = memory.init_state(n_row)
    for seed in range(n_segment):
        state, _ = memory.write(segment_of(hidden_of(n_row, seed)), state)
    return state


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt() * weight


def attention_by_hand(memory: MemoriaMemory, token: Tensor, contents: list[Tensor]) -> Tensor:
    """Weight of each engram, by head, (H, A): a softmax with a null engram of score 0."""
    query, width = memory.read_query(rms(token, memory.norm.weight)), D // memory.n_head
    weights = []
    for h in range(memory.n_head):
        part = slice(h * width, (h + 1) * width)
        keys = [memory.read_key(rms(content, memory.engram_norm.weight)) for content in contents]
        scores = [math.exp(float(query[part] @ key[part]) / math.sqrt(width)) for key in keys]
        weights.append([score / (1 + sum(scores)) for score in scores])
    return torch.tensor(weights)


@torch.no_grad()
def test_a_read_equals_attention_by_hand() -> None:
    memory = memory_of()
    state = state_after(memory, 6)
    x = hidden_of(2, seed=9)[:, :, 0]
    read = memory.read(x, memory.prepare(state))
    for row, t in itertools.product(range(2), range(T)):
        slots = [int(slot) for slot in state.active[row] if slot >= 0]
        contents = [state.engrams.data[row, slot] for slot in slots]
        weights = attention_by_hand(memory, x[row, t], contents)
        values = [memory.read_value(rms(content, memory.engram_norm.weight)) for content in contents]
        width = D // memory.n_head
        found = torch.cat(
            [
                sum(w * value[h * width : (h + 1) * width] for w, value in zip(weights[h], values, strict=True))
                for h in range(memory.n_head)
            ]
        )
        gate = memory.read_gate(x[row, t]).sigmoid()
        torch.testing.assert_close(read.value[row, t], gate * memory.to_output(found), atol=1e-5, rtol=1e-4)
        kept = read.slots[row, t] >= 0
        assert read.slots[row, t][kept].tolist() == slots
        torch.testing.assert_close(read.weights[row, t][kept], weights.mean(dim=0), atol=1e-5, rtol=1e-4)
        assert read.weights[row, t][~kept].abs().sum() == 0
        torch.testing.assert_close(read.gate[row, t], gate[0])


@torch.no_grad()
def test_lives_are_extended_by_the_attention_of_all_tokens_layers_and_heads() -> None:
    memory = memory_of(extension=5.0)
    state = state_after(memory, 5)
    hidden, n_valid = hidden_of(2, seed=9), [3, 5]
    new, _ = memory.write(segment_of(hidden, n_valid), state)
    n_working = memory.graph.n_working
    for row in range(2):
        slots = [int(slot) for slot in state.active[row] if slot >= 0]
        contents = [state.engrams.data[row, slot] for slot in slots]
        attention = torch.zeros(len(slots))
        for t, layer in itertools.product(range(n_valid[row]), range(2)):
            attention += attention_by_hand(memory, hidden[row, t, layer], contents).sum(dim=0)
        reminded = slots[n_working:]
        share = attention[n_working:] / attention[n_working:].sum()
        assert reminded
        for slot, part in zip(reminded, share, strict=True):
            life = float(state.engrams.lifespan[row, slot]) + 5.0 * len(reminded) * float(part) - 1
            if life > 0 and new.engrams.birth[row, slot] == state.engrams.birth[row, slot]:
                assert float(new.engrams.lifespan[row, slot]) == pytest.approx(life, abs=1e-4)
        for slot in slots[:n_working]:
            assert new.engrams.lifespan[row, slot] == state.engrams.lifespan[row, slot] - 1


@torch.no_grad()
def test_the_abstractor_pools_the_last_layer_by_hand() -> None:
    memory = memory_of()
    hidden = hidden_of(1, seed=1)
    state, trace = memory.write(segment_of(hidden, [4]), memory.init_state(1))
    x = [rms(hidden[0, t, -1], memory.norm.weight) for t in range(4)]
    for number, query in enumerate(memory.abstract_query):
        scores = torch.stack([query @ memory.abstract_key(token) / math.sqrt(D) for token in x]).exp()
        expected = sum(s / scores.sum() * memory.abstract_value(token) for s, token in zip(scores, x, strict=True))
        slot = state.engrams.birth[0].tolist().index(number)
        torch.testing.assert_close(state.engrams.data[0, slot], expected, atol=1e-5, rtol=1e-4)
    assert state.engrams.kind[0].tolist().count(WORKING) == 2
    assert float(trace["engrams"]) == 2
    assert float(trace["reminded"]) == 0


@torch.no_grad()
def test_rows_without_a_complete_segment_keep_their_state() -> None:
    memory = memory_of()
    state = state_after(memory, 4, n_row=3)
    new, _ = memory.write(segment_of(hidden_of(3, seed=9), [T, T, 0], [True, False, True]), state)
    assert new.engrams.n_born.tolist() == [10, 8, 8]
    for before, after in zip(tensors(state), tensors(new), strict=True):
        assert torch.equal(before[1:], after[1:])
        assert after.isfinite().all()


@torch.no_grad()
@torch.no_grad()
def test_what_became_long_term_or_went_is_counted() -> None:
    memory = memory_of(lifespan=5)
    state, total = memory.init_state(2), {"promoted": 0, "evicted": 0}
    for s in range(12):
        new, trace = memory.write(segment_of(hidden_of(2, seed=s)), state)
        expected = dict.fromkeys(total, 0)
        for row in range(2):
            old, now = (
                {int(b): int(k) for b, k in zip(part.birth[row], part.kind[row], strict=True) if k != EMPTY}
                for part in (state.engrams, new.engrams)
            )
            expected["evicted"] += len(old.keys() - now.keys())
            expected["promoted"] += sum(old[b] != LONG_TERM and now[b] == LONG_TERM for b in old.keys() & now.keys())
        assert {name: 2 * float(trace[name]) for name in total} == expected
        state, total = new, {name: total[name] + expected[name] for name in total}
    assert min(total.values()) > 3, total


def test_what_is_never_attended_to_dies_on_its_day() -> None:
    memory = memory_of(extension=0.0, lifespan=3)
    state = state_after(memory, 8, n_row=1)
    born = state.engrams.birth[0][memory.filled(state)[0]].tolist()
    assert sorted(born) == [10, 11, 12, 13, 14, 15]  # of the last three segments


@torch.no_grad()
def test_what_was_told_is_recalled_from_long_term_memory() -> None:
    """Trained on questions one segment later, with short-term memory of two segments; asked 16 segments later."""
    make = laws.builder(laws.nodes_of("memoria"), shrink=False)
    with torch.enable_grad():
        model, _ = laws.learn_recall(make, n_slot=256)
    draw = torch.Generator().manual_seed(1)
    told, value = laws.recall_batch(128, draw)
    between = torch.randint(9, 16, (128, 8 * 16), generator=draw)
    state = model(torch.cat([told[:, :8], between], dim=1), logits=False).state
    engrams = state.memory["memoria"][0].engrams
    assert bool((engrams.kind[engrams.birth < 4] != SHORT_TERM).all())  # the first segment's are long-term, or dead
    right = {}
    for name, start in (("memory", state), ("wiped", model.wipe(state))):
        right[name] = float((model(told[:, -8:], state=start).logits[:, -1].argmax(dim=1) == value).float().mean())
    assert right["memory"] > 0.8
    assert right["wiped"] < 0.3


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_as_the_source_a_row_depends_on_its_batch_mates_and_on_nothing_later(version: str) -> None:
    (node,) = laws.nodes_of("memoria").values()
    target = "memlm.compat.memoria.MemoriaOfSource"
    make = laws.builder({"memoria": {**node, "_target_": target, "version": version}})
    laws.causal(make)
    laws.chunk_invariant(make)
    with pytest.raises(AssertionError, match=r"rows .* differ"):
        laws.isolated(make)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_working": 0}, "n_working must be at least 1"),
        ({"n_stm": 0}, "n_stm must be at least 1"),
        ({"n_reminded_ltm": -1}, "n_reminded_ltm must be at least 0"),
        ({"lifespan": 1}, "lifespan must be at least 2"),
        ({"search_depth": -1}, "search_depth must be at least 0"),
        ({"n_slot": 7}, "n_slot must hold working and short-term memory, n_working . n_stm = 8, got 7"),
        ({"extension": -1.0}, "extension must be at least 0"),
        ({"extension": math.inf}, "extension"),
        ({"n_head": 3}, "n_head must divide d_model"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_of(**settings)


def test_an_unknown_version_of_the_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version must be one of 1\.0\.0, 1\.1\.0, got '2\.0\.0'"):
        MemoriaOfSource(8, version="2.0.0", n_slot=16, n_working=2, n_stm=4)  # type: ignore[arg-type]
