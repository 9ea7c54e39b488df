"""Long-term memory by hand-worked examples and naive references."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.config import ConfigError
from memlm.memory import ltm_window, ltm_write
from memlm.memory.contract import Flags, Segment
from memlm.memory.ltm import LongTermMemory, LongTermState
from memlm.memory.state import map_tensors, n_byte, named_tensors, tensors
from memlm.models.lmcode import LMCode
from memlm.models.state import ModelState
from memlm.retrieval import coarse, similar
from tests.retrieval import naive

D, T = 8, 12
SETTINGS: dict[str, Any] = {"n_slot": 30, "d_key": 8, "top_k": 4, "write_budget": 6, "span": 3}


class ByHand(LongTermMemory):
    """A long-term memory whose write gates are given."""

    def __init__(self, d_model: int, **settings: Any) -> None:
        super().__init__(d_model, **(SETTINGS | settings))
        self.logit = torch.empty(0)  # (B, C + T), set by `segment_of`


GATE_LOGIT = ltm_write.gate_logit


@pytest.fixture(autouse=True)
def gates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(memory: LongTermMemory, normed: Tensor, embedding: Tensor) -> Tensor:
        return memory.logit if isinstance(memory, ByHand) else GATE_LOGIT(memory, normed, embedding)

    monkeypatch.setattr(ltm_write, "gate_logit", given)


def segment_of(
    memory: ByHand,
    log_gate: list[list[float]],
    before: list[list[float]] | None = None,
    continues: bool = False,
    closes: bool = False,
    position: int = 0,
    valid: list[int] | None = None,
    seed: int = 0,
) -> Segment:
    """One segment per row with given log-gates of its tokens, and of the ``lookback`` tokens before."""
    rows, n_token, n_before = len(log_gate), len(log_gate[0]), memory.needs.lookback
    gates = torch.tensor([b + g for b, g in zip(before or [[-1.0] * n_before] * rows, log_gate, strict=True)])
    memory.logit = gates - torch.log1p(-gates.exp())  # logsigmoid(logit) = log-gate
    draw = torch.Generator().manual_seed(seed)
    n_cell = n_before + n_token
    here = torch.arange(n_token) < torch.tensor(valid or [n_token] * rows)[:, None]
    return Segment(
        ids=torch.arange(position - n_before, position + n_token).expand(rows, -1),  # the id of a token is its position
        embeddings=torch.randn(rows, n_cell, D, generator=draw),
        hidden=torch.randn(rows, n_cell, D, generator=draw),
        valid=torch.cat([torch.full((rows, n_before), continues), here], dim=1),
        flags=Flags(
            complete=torch.ones(rows, 1, dtype=torch.bool),
            continues=torch.full((rows, 1), continues),
            closes=torch.full((rows, 1), closes),
            reset=None,
            position=torch.full((rows, 1), position),
            document=torch.full((rows, 1), 7),
        ),
        signals=None,
        lookback=n_before,
        columns=slice(0, n_token),
    )


def held(state: LongTermState, row: int = 0) -> dict[int, float]:
    """Priority by position of what a row holds."""
    return {int(p): float(w) for p, w in zip(state.position[row], state.priority[row], strict=True) if p >= 0}


# --- importance ------------------------------------------------------------------------------------------------------


def test_span_importance_by_hand() -> None:
    """Spans of 3: the best mean of the spans that cover a token; two tokens of a span are enough at the ends."""
    memory = ByHand(D, write_budget=None)
    gates = [-4.0, -1.0, -1.0, -1.0, -6.0, -2.0, -2.0, -8.0, -8.0]  # the last has no successor
    state, _ = memory.write(segment_of(memory, [gates], closes=True), memory.init_state(1))
    expected = {
        0: -2.0,  # (-4 -1 -1) / 3; the half span (-4 -1) / 2 is worse
        1: -1.0,  # (-1 -1 -1) / 3
        2: -1.0,
        3: -1.0,
        4: -8 / 3,  # (-1 -1 -6) / 3
        5: -3.0,  # (-1 -6 -2) / 3
        6: -10 / 3,  # (-6 -2 -2) / 3; (-2 -2 -8) / 3 = -4
        7: -4.0,  # (-2 -2 -8) / 3; the half span (-2 -8) / 2 = -5
    }
    assert held(state) == pytest.approx({i: v + 1e-3 * gates[i] for i, v in expected.items()}, abs=1e-5)


def test_within_a_span_the_tokens_with_the_widest_gates_stay() -> None:
    memory = ByHand(D, write_budget=2)
    gates = [-9.0, -1.2, -1.0, -1.1, -9.0, -9.0, -9.0, -9.0, -9.0]
    state, _ = memory.write(segment_of(memory, [gates], closes=True), memory.init_state(1))
    assert sorted(held(state)) == [2, 3]


def test_a_token_of_a_text_shorter_than_half_a_span_counts_for_itself() -> None:
    memory = ByHand(D, span=5, write_budget=None)
    state, _ = memory.write(
        segment_of(memory, [[-3.0, -1.0] + [-1.0] * 8], closes=True, valid=[2]), memory.init_state(1)
    )
    assert held(state) == pytest.approx({0: -3.003})


def test_tokens_at_the_end_wait_for_the_next_segment() -> None:
    memory = ByHand(D, write_budget=None)
    gates = [-0.1 * (i + 1) for i in range(2 * T)]
    state, _ = memory.write(segment_of(memory, [gates[:T]]), memory.init_state(1))
    assert sorted(held(state)) == list(range(T - 3))
    after, _ = memory.write(
        segment_of(memory, [gates[T:]], before=[gates[T - 6 : T]], continues=True, position=T), state
    )
    assert sorted(held(after)) == list(range(2 * T - 3))
    whole = ByHand(D, write_budget=None)
    expected, _ = whole.write(segment_of(whole, [gates], closes=True), whole.init_state(1))
    for position in range(2 * T - 3):  # the segments' edge is not felt
        assert held(after)[position] == pytest.approx(held(expected)[position]), position


def test_a_context_that_does_not_continue_sees_nothing_before_it() -> None:
    memory = ByHand(D, write_budget=None)
    gates, better = [-5.0] * T, [-0.1] * 6
    alone, _ = memory.write(segment_of(memory, [gates], position=T), memory.init_state(1))
    other, _ = memory.write(segment_of(memory, [gates], before=[better], position=T), memory.init_state(1))
    assert held(other) == pytest.approx(held(alone))
    assert min(held(other)) == T
    joined, _ = memory.write(
        segment_of(memory, [gates], before=[better], continues=True, position=T), memory.init_state(1)
    )
    assert min(held(joined)) == T - 3


@pytest.mark.parametrize("budget", [1, 4, None])
def test_write_budget_keeps_the_best_of_a_segment(budget: int | None) -> None:
    memory = ByHand(D, write_budget=budget, importance="token")
    gates = [-3.0, -1.0, -7.0, -2.0, -9.0, -4.0, -0.5, -6.0, -5.0, -8.0, -0.1, -0.2]
    state, trace = memory.write(segment_of(memory, [gates]), memory.init_state(1))
    final = sorted(gates[: T - 3], reverse=True)[:budget]  # the mean gate is that of all
    assert sorted(held(state).values(), reverse=True) == pytest.approx(final)
    assert all(gates[position] == pytest.approx(worth) for position, worth in held(state).items())
    assert float(trace["write_gate"]) == pytest.approx(sum(map(math.exp, gates[: T - 3])) / (T - 3))


def test_the_write_gate_sees_a_state_the_next_one_and_the_next_token() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    normed, embedding = torch.randn(2, 2, 5, D).unbind()
    side_by_side = torch.cat([normed[:, :-1], normed[:, 1:], embedding[:, 1:]], dim=-1)
    torch.testing.assert_close(
        ltm_write.gate_logit(memory, normed, embedding)[:, :-1], memory.write_gate(side_by_side)[..., 0]
    )


def test_a_contextual_value_holds_the_hidden_state_too() -> None:
    plain, both = ByHand(D, write_budget=None), ByHand(D, write_budget=None, contextual=True)
    assert both.from_hidden is not None
    both.load_state_dict(plain.state_dict() | {"from_hidden.weight": torch.randn(128, D)}, strict=False)
    segment = segment_of(plain, [[-1.0] * T], closes=True)
    both.logit = plain.logit
    of_next, of_both = (memory.write(segment, memory.init_state(1))[0] for memory in (plain, both))
    at = of_both.position[0, : T - 1]
    hidden = plain.norm(segment.hidden[0, plain.needs.lookback + at])
    expected = of_next.value[0, : T - 1] + hidden @ both.from_hidden.weight.T
    assert torch.equal(of_both.position, of_next.position)
    torch.testing.assert_close(of_both.value[0, : T - 1], expected)
    torch.testing.assert_close(of_both.key, of_next.key)


def test_surprise_keeps_what_is_predicted_worst() -> None:
    memory = ByHand(D, write_budget=3, importance="surprise")
    nats = [4.0, 9.0, 1.0, 7.0, 2.0, 8.0, 3.0, 0.5, 6.0, 99.0, 99.0, 99.0]  # the last ones wait for the next segment
    segment = segment_of(memory, [[-1.0] * T])._replace(surprise=torch.tensor([[0.0] * memory.needs.lookback + nats]))
    state, _ = memory.write(segment, memory.init_state(1))
    assert held(state) == {1: 9.0, 5: 8.0, 3: 7.0}


def test_random_importance_depends_on_token_and_place_alone() -> None:
    memory = ByHand(D, write_budget=None, importance="random", n_slot=64)
    worth: dict[int, float] = {}
    for seed, gate in ((0, -1.0), (1, -5.0)):
        part = segment_of(memory, [[gate] * T], position=3 * T, seed=seed)
        state, _ = memory.write(part, memory.init_state(1))
        worth = worth or held(state)
        assert held(state) == worth
    assert len(set(worth.values())) == len(worth)
    assert all(0 <= value < 1 for value in worth.values())


def test_fifo_keeps_the_newest() -> None:
    memory = ByHand(D, importance="fifo", n_slot=8, write_budget=None)
    state = memory.init_state(1)
    for s in range(4):
        before = [[-1.0] * 6] if s else None
        part = segment_of(memory, [[-1.0] * T], before=before, continues=s > 0, position=s * T)
        state, _ = memory.write(part, state)
        newest = (s + 1) * T - 3
        assert sorted(held(state)) == list(range(newest - 8, newest))


# --- replacement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slot", [5, 17, 40])
def test_replacement_keeps_the_best_of_all_as_sorting_does(n_slot: int) -> None:
    memory = ByHand(D, importance="token", n_slot=n_slot, write_budget=min(n_slot, 7))
    draw = torch.Generator().manual_seed(1)
    state, naive = memory.init_state(2), [[], []]  # type: ignore[var-annotated]
    for s in range(9):
        gates = (-10 * torch.rand(2, T, generator=draw) - 0.01).tolist()
        state, _ = memory.write(segment_of(memory, gates, position=s * T, seed=s), state)
        for row in range(2):
            written = sorted(((g, s * T + i) for i, g in enumerate(gates[row][: T - 3])), reverse=True)[:7][:n_slot]
            naive[row] = sorted(naive[row] + written, reverse=True)[:n_slot]
            assert held(state, row) == pytest.approx({position: worth for worth, position in naive[row]})
    assert state.n_record.tolist() == [9, 9]


def test_rows_that_are_not_complete_keep_their_state() -> None:
    memory = ByHand(D)
    state, _ = memory.write(segment_of(memory, [[-1.0] * T] * 2), memory.init_state(2))
    part = segment_of(memory, [[-0.5] * T] * 2, position=T, seed=1)
    after, _ = memory.write(part._replace(flags=part.flags._replace(complete=torch.tensor([[True], [False]]))), state)
    for (name, old), new in zip(named_tensors(state).items(), tensors(after), strict=True):
        if name != "n_used":
            assert torch.equal(old[1], new[1]), name
    assert not torch.equal(state.position[0], after.position[0])


def test_banks_fill_from_the_front() -> None:
    memory = ByHand(D)
    state, _ = memory.write(segment_of(memory, [[-1.0] * T]), memory.init_state(1))
    assert (state.record[0] >= 0).nonzero()[:, 0].tolist() == list(range(6))
    assert (state.priority[0, 6:] < -(2**22)).all()


# --- reading ---------------------------------------------------------------------------------------------------------


def naive_read(memory: LongTermMemory, state: LongTermState, x: Tensor) -> tuple[Tensor, list[list[dict[int, float]]]]:
    """The read of the class docstring, slot by slot: values (B, T, D), and weights by slot."""
    out, weights = torch.zeros_like(x), []
    temperature = float(memory.log_temperature.exp()) * float(memory.temperature_scale)
    for b in range(x.shape[0]):
        bank, row = min(b, state.key.shape[0] - 1), []
        for t in range(x.shape[1]):
            query = F.normalize(memory.to_key(memory.norm(x[b, t])), dim=0)
            scores = {}
            for slot in range(memory.n_slot):
                if state.record[bank, slot] < 0:
                    continue
                cosine = float(query @ state.key[bank, slot])
                if cosine < memory.retrieval_threshold:
                    continue
                gate = math.exp(float(state.log_gate[bank, slot]))
                bias = math.log(memory.gate_floor + (1 - memory.gate_floor) * gate)
                scores[slot] = temperature * cosine + bias
            best = dict(sorted(scores.items(), key=lambda item: -item[1])[: memory.top_k])
            null = temperature * float(memory.null_similarity)
            total = math.exp(null) + sum(math.exp(score) for score in best.values())
            row.append({slot: math.exp(score) / total for slot, score in best.items()})
            read = sum((w * state.value[bank, slot] for slot, w in row[-1].items()), torch.zeros(state.value.shape[2]))
            out[b, t] = memory.read_gate(x[b, t]).sigmoid() * memory.to_output(read)
        weights.append(row)
    return out, weights


@pytest.fixture
def bank() -> tuple[ByHand, LongTermState, Tensor]:
    """A memory with perturbed parameters, a bank with some empty slots, queries of which some match."""
    torch.manual_seed(0)
    memory = ByHand(D)
    state = memory.init_state(2)
    for s in range(3):
        gates = (-4 * torch.rand(2, T) - 0.01).tolist()
        part = segment_of(memory, gates, position=s * T, seed=s)
        if s == 2:
            part = part._replace(flags=part.flags._replace(complete=torch.tensor([[True], [False]])))
        state, _ = memory.write(part, state)
        x = part.hidden[:, memory.needs.lookback :]
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if name not in ("log_temperature", "norm.weight", "to_key.weight"):  # queries like the stored keys
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return memory, state, x


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.4, 0.99])
@pytest.mark.parametrize("top_k", [1, 4, 100])
@torch.no_grad()
def test_reading_equals_a_softmax_slot_by_slot(
    bank: tuple[ByHand, LongTermState, Tensor], threshold: float, top_k: int
) -> None:
    memory, state, x = bank
    memory.retrieval_threshold, memory.top_k = threshold, top_k
    read = memory.read(x, memory.prepare(state))
    values, weights = naive_read(memory, state, x)
    torch.testing.assert_close(read.value, values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read.gate, memory.read_gate(x).sigmoid()[..., 0])
    for b in range(2):
        for t in range(T):
            pairs = zip(read.slots[b, t].tolist(), read.weights[b, t].tolist(), strict=True)
            got = {slot: weight for slot, weight in pairs if weight > 0}
            assert got == pytest.approx({s: w for s, w in weights[b][t].items() if w > 0}, rel=1e-3, abs=1e-6)
    if threshold == 0.99:
        assert any(not row for row in weights[0]), "the threshold hides nothing"
    assert any(row for row in weights[0])


def test_slots_in_whole_numbers_follow_the_rows_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(coarse, "_LEAST", 100)
    memory = LongTermMemory(8, n_slot=120, d_key=8, d_value=8, top_k=5)
    before, other = random_bank(memory, 120, seed=1, n_row=3), random_bank(memory, 120, seed=2, n_row=3)
    rows = torch.tensor([2, 0])
    state = map_tensors(lambda old, new: old.index_copy(0, rows, new[rows]), before, other)
    with torch.no_grad():
        steps = memory.prepare_steps(state, rows, memory.prepare_steps(before))
        assert steps.bank is not None
        assert steps.bank.coarse is not None
        for got, expected in zip(steps.bank.coarse, memory.prepare_steps(state).bank.coarse, strict=True):  # type: ignore[union-attr,arg-type]
            assert torch.equal(got, expected)
        y = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
        one, all_at_once = memory.read(y, steps), memory.read(y, memory.prepare(state))
    torch.testing.assert_close(one.value, all_at_once.value, rtol=1e-5, atol=1e-6)
    assert one.slots is not None
    assert torch.equal(one.slots, all_at_once.slots)


@torch.no_grad()
def test_the_null_slot_takes_the_weight_when_nothing_fits(bank: tuple[ByHand, LongTermState, Tensor]) -> None:
    memory, state, x = bank
    memory.null_similarity.fill_(5.0)
    assert memory.read(x, memory.prepare(state)).weights.sum(dim=2).max() < 1e-6
    memory.null_similarity.fill_(-5.0)
    torch.testing.assert_close(memory.read(x, memory.prepare(state)).weights.sum(dim=2), torch.ones(2, T))


@torch.no_grad()
def test_an_empty_bank_reads_nothing() -> None:
    memory = ByHand(D)
    read = memory.read(torch.randn(2, T, D), memory.prepare(memory.init_state(2)))
    assert torch.equal(read.value, torch.zeros(2, T, D))
    assert read.weights.sum() == 0


@torch.no_grad()
def test_slots_that_were_not_read_are_numbered_minus_one(bank: tuple[ByHand, LongTermState, Tensor]) -> None:
    memory, state, x = bank
    memory.retrieval_threshold = 0.4
    read = memory.read(x, memory.prepare(state))
    assert (read.weights == 0).any()
    assert (read.slots[read.weights == 0] == -1).all()


def test_gradients_reach_the_gates_that_were_written_and_read() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    reference = ByHand(D)
    part = segment_of(reference, [[-1.0] * T])
    state, _ = memory.write(part, memory.init_state(1))
    memory.read(part.hidden[:, memory.needs.lookback :], memory.prepare(state)).value.square().sum().backward()
    missing = [name for name, p in memory.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not missing


# --- consolidation ---------------------------------------------------------------------------------------------------


def bank_of(memory: LongTermMemory, slots: list[tuple[list[float], list[float], float, float]]) -> LongTermState:
    """A bank of one row with (key, value, priority, gate) in its first slots."""
    state = map_tensors(torch.clone, memory.init_state(1))
    for i, (key, value, priority, gate) in enumerate(slots):
        state.key[0, i, : len(key)] = F.normalize(torch.tensor(key, dtype=torch.float32), dim=0)
        state.value[0, i, : len(value)] = torch.tensor(value)
        state.priority[0, i], state.log_gate[0, i] = priority, math.log(gate)
        state.record[0, i], state.document[0, i], state.position[0, i], state.tokens[0, i] = i, 10 + i, 20 + i, 30 + i
    state.n_used.tensor.fill_(len(slots))
    return state


def test_consolidation_merges_duplicates_by_hand() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    state = bank_of(
        memory,
        [
            ([1, 0, 0], [2, 0], -2.0, 0.2),  # joins slot 2, which is more important
            ([0, 1, 0], [0, 3], -1.0, 0.5),  # like none
            ([1, 0.1, 0], [4, 0], -0.5, 0.6),
            ([1, 0, 0], [0, 5], -0.1, 0.9),  # the same key as slot 0, with another value
            ([0, 1, 0], [3, 0], -3.0, 0.1),  # the same key as slot 1, with another value
        ],
    )
    before = [part.clone() for part in tensors(state)]
    new, report = memory.consolidate(state, threshold=0.05)
    assert report == {"merged": 1}
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True)), (
        "the state passed in was changed"
    )
    assert new.record[0, :6].tolist() == [-1, 1, 2, 3, 4, -1]
    assert new.document[0, :5].tolist() == [-1, 11, 12, 13, 14]
    assert new.position[0, :5].tolist() == [-1, 21, 22, 23, 24]
    assert new.tokens[0, 0].tolist() == [-1] * 4
    # the mean of values 2 and 4 and of their keys, weighted with the gates 0.2 and 0.6
    torch.testing.assert_close(new.value[0, 2, :2], torch.tensor([(0.2 * 2 + 0.6 * 4) / 0.8, 0.0]))
    other = F.normalize(torch.tensor([1, 0.1, 0]), dim=0)
    key = F.normalize(0.2 * torch.tensor([1.0, 0, 0]) + 0.6 * other, dim=0)
    torch.testing.assert_close(new.key[0, 2, :3], key)
    assert new.priority[0, 2] == -0.5
    for slot in (1, 3, 4):
        torch.testing.assert_close(new.key[0, slot], state.key[0, slot])
        torch.testing.assert_close(new.value[0, slot], state.value[0, slot])
        assert new.priority[0, slot] == state.priority[0, slot]
    assert memory.filled(new)[0, :6].tolist() == [False, True, True, True, True, False]


def test_consolidation_joins_the_most_important_and_builds_no_chains() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    angle = [0.0, 0.3, 0.6]  # neighbours are similar (cosine 0.955), the ends are not (0.825)
    state = bank_of(memory, [([math.cos(a), math.sin(a)], [1.0], -1.0 - i, 0.5) for i, a in enumerate(angle)])
    new, report = memory.consolidate(state, threshold=0.1)
    assert report == {"merged": 1}  # 1 joins 0; 2 would join 1, which has joined another itself
    assert new.record[0, :3].tolist() == [0, -1, 2]
    new, report = memory.consolidate(state, threshold=0.2)
    assert report == {"merged": 2}
    assert new.record[0, :3].tolist() == [0, -1, -1]


def test_consolidation_leaves_slots_alone_that_join_nothing() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    state = bank_of(memory, [([1, 2], [1, 3], -1.0, 0.3), ([2, -1], [2, 7], -40.0, 1e-17)])
    new, report = memory.consolidate(state, threshold=0.1)
    assert report == {"merged": 0}
    for (name, old), now in zip(named_tensors(state).items(), tensors(new), strict=True):
        assert torch.equal(old, now), name


def test_consolidated_slots_are_free_again() -> None:
    memory = ByHand(D, importance="token", n_slot=6, write_budget=6)
    state = bank_of(memory, [([1.0], [1.0], -0.001 * (i + 1), 0.9) for i in range(6)])
    full, _ = memory.write(segment_of(memory, [[-5.0] * T]), state)
    assert torch.equal(full.record, state.record), "a full bank admits what is worth less"
    merged, report = memory.consolidate(state, threshold=0.1)
    assert report == {"merged": 5}
    after, _ = memory.write(segment_of(memory, [[-5.0] * T]), merged)
    assert memory.filled(after).all()
    assert int((after.position[0] < 20).sum()) == 5


@pytest.mark.parametrize("threshold", [-0.1, 2.1])
def test_consolidation_refuses_what_is_no_cosine_distance(threshold: float) -> None:
    memory = LongTermMemory(D, **SETTINGS)
    with pytest.raises(ValueError, match="threshold"):
        memory.consolidate(memory.init_state(1), threshold)


def test_consolidation_of_an_empty_bank() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    assert memory.consolidate(memory.init_state(2))[1] == {"merged": 0}


def test_consolidation_by_rows() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    one = bank_of(memory, [([1, 0], [1.0], -1.0, 0.5), ([1, 0], [1.0], -2.0, 0.5)])
    two = bank_of(memory, [([1, 0], [1.0], -1.0, 0.5), ([0, 1], [1.0], -2.0, 0.5)])
    both = map_tensors(lambda *parts: torch.cat(parts), one, two)
    new, report = memory.consolidate(both)
    assert report == {"merged": 1}
    assert new.record[:, :2].tolist() == [[0, -1], [0, 1]]


def random_bank(memory: LongTermMemory, n: int, seed: int, n_row: int = 1, pairs: int | None = None) -> LongTermState:
    """Banks of ``n`` slots, of which about one in six is empty.

    One in four is near another one; with ``pairs`` the first so many are near those in the second half, each to one.
    """
    generator = torch.Generator().manual_seed(seed)
    state = map_tensors(Tensor.clone, memory.init_state(n_row))

    def unit(d: int) -> Tensor:
        return F.normalize(torch.randn(n_row, n, d, generator=generator), dim=-1)

    number = torch.arange(n).expand(n_row, -1)
    twin = torch.where(torch.rand(n_row, n, generator=generator) < 0.25,
                       torch.randint(n // 8, (n_row, n), generator=generator), number)  # fmt: skip
    if pairs is not None:
        twin = torch.where(number < pairs, number + n // 2, number)
    key, value = (
        F.normalize(part.gather(1, twin[..., None].expand_as(part)) + 0.15 * unit(part.shape[2]), dim=-1)
        for part in (unit(memory.d_key), unit(memory.d_value))
    )
    used = torch.rand(n_row, n, generator=generator) > 1 / 6
    state.key[:, :n], state.value[:, :n] = key * used[..., None], 3 * value * used[..., None]
    state.priority[:, :n] = torch.where(used, -torch.rand(n_row, n, generator=generator), state.priority[:, :n])
    state.log_gate[:, :n] = -4 * torch.rand(n_row, n, generator=generator) * used
    for part in (state.record, state.document, state.position):
        part[:, :n] = torch.where(used, number, -1)
    state.tokens[:, :n] = torch.where(used, number, -1)[..., None].int()
    state.n_used.tensor.fill_(n)
    return state


def naive_merge(state: LongTermState, row: int, threshold: float) -> dict[int, list[int]]:
    """What joins what by the rule: survivors and those that join them."""
    used = state.priority[row] > -(2.0**22)
    return naive.joins(state.key[row], state.value[row], state.priority[row], used, threshold)


def check_merged(state: LongTermState, new: LongTermState, row: int, groups: dict[int, list[int]]) -> None:
    """``new`` is ``state`` with these slots merged and nothing else changed."""
    gone = [i for members in groups.values() for i in members]
    for survivor, members in groups.items():
        every = [survivor, *members]
        weight = state.log_gate[row, every].double().exp()
        weight = weight / weight.sum()
        mean = (weight[:, None] * state.value[row, every].double()).sum(dim=0)
        torch.testing.assert_close(new.value[row, survivor].double(), mean, rtol=1e-5, atol=1e-6)
        mean = F.normalize((weight[:, None] * state.key[row, every].double()).sum(dim=0), dim=0)
        torch.testing.assert_close(new.key[row, survivor].double(), mean, rtol=1e-5, atol=1e-6)
    assert (new.priority[row, gone] < -(2.0**22)).all()
    assert (new.record[row, gone] == -1).all()
    assert not new.key[row, gone].any()
    alike = [i for i in range(state.key.shape[1]) if i not in groups and i not in gone]
    for name, old in named_tensors(state).items():
        if name not in ("n_record", "n_used"):
            assert torch.equal(old[row, alike], named_tensors(new)[name][row, alike]), name
    for name in ("priority", "log_gate", "record", "document", "position", "tokens"):
        old, now = getattr(state, name)[row], getattr(new, name)[row]
        assert torch.equal(old[list(groups)], now[list(groups)]), name


def test_consolidation_of_random_banks_is_that_of_the_rule() -> None:
    memory = LongTermMemory(D, **(SETTINGS | {"n_slot": 90}))
    state = random_bank(memory, 80, seed=3, n_row=2)
    new, report = memory.consolidate(state, threshold=0.3)
    groups = [naive_merge(state, row, 0.3) for row in range(2)]
    assert report == {"merged": sum(len(members) for group in groups for members in group.values())}
    assert report["merged"] > 10
    assert max(len(members) for members in groups[0].values()) > 1
    for row in range(2):
        check_merged(state, new, row, groups[row])


@torch.no_grad()
def test_a_bank_that_is_given_away_is_consolidated_in_place() -> None:
    memory = LongTermMemory(D, **(SETTINGS | {"n_slot": 90}))
    kept, given = random_bank(memory, 80, seed=3), random_bank(memory, 80, seed=3)
    before, places = tensors(map_tensors(Tensor.clone, kept)), [part.data_ptr() for part in given[:9]]
    new, report = memory.consolidate(kept, threshold=0.3)
    assert report["merged"] > 5
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept), before, strict=True)), "a state that is kept changed"
    after, _ = memory.consolidate(given, threshold=0.3, owned=True)
    assert [part.data_ptr() for part in after[:9]] == places
    assert all(torch.equal(a, b) for a, b in zip(tensors(after), tensors(new), strict=True))
    held, shared = random_bank(memory, 80, seed=3), random_bank(memory, 80, seed=3)
    shared = shared._replace(value=held.value[:])  # which somebody else has too
    memory.consolidate(shared, threshold=0.3, owned=True)
    assert torch.equal(held.value, kept.value)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 1,000 slots were too many to be looked at at once, or 100 to be compared with each other."""
    for name, value in {"_EXACT": 100, "_PART": 260, "_BLOCK": 16, "_CELLS": 5000}.items():
        monkeypatch.setattr(similar, name, value)


@pytest.mark.slow
def test_large_banks_are_consolidated_in_turns(small_blocks: None) -> None:
    memory = LongTermMemory(D, **(SETTINGS | {"n_slot": 1000, "d_key": 32}))
    assert memory.n_turn == 4
    state = random_bank(memory, 1000, seed=0, pairs=250)
    wanted = naive_merge(state, 0, 0.1)
    assert len(wanted) > 100
    assert all(len(members) == 1 for members in wanted.values())
    found = []
    for turn in range(40):
        new, report = memory.consolidate(state, turn=turn)
        again, _ = memory.consolidate(state, turn=turn)
        assert all(torch.equal(a, b) for a, b in zip(tensors(new), tensors(again), strict=True)), (
            "a turn depends on the state alone"
        )
        gone = (memory.filled(state) & ~memory.filled(new))[0].nonzero()[:, 0].tolist()
        assert report == {"merged": len(gone)}
        check_merged(state, new, 0, {i: members for i, members in wanted.items() if members[0] in gone})
        found.append(len(gone) + (found[-1] if found else 0))
        state = new
    assert found[0] < 0.4 * len(wanted) < found[3], "a quarter of the bank in each turn"
    assert found[-1] > 0.97 * len(wanted), found


def test_a_negative_turn_is_refused() -> None:
    memory = LongTermMemory(D, **SETTINGS)
    with pytest.raises(ValueError, match="turn is the number of the call"):
        memory.consolidate(memory.init_state(1), turn=-1)


# --- records ---------------------------------------------------------------------------------------------------------


def model_of(**settings: Any) -> LMCode:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "d_model": D, "segment_len": T, "overlap": 2}
    return LMCode(500, {"ltm": lambda d_model: LongTermMemory(d_model, **(SETTINGS | settings))}, **shape).eval()


def check_records(
    state: ModelState, documents: dict[int, list[int]], row: int = 0, contexts: tuple[int, ...] = ()
) -> int:
    """Slots of a row point at the right tokens of its documents (ids by number). Returns how many there are.

    ``contexts`` are positions at which a new context began.
    """
    bank, span, n = state.memory["ltm"][0], SETTINGS["span"], 0
    for slot in range(bank.key.shape[1]):
        position, document = int(bank.position[row, slot]), int(bank.document[row, slot])
        if position < 0:
            assert document == -1
            continue
        ids = documents[document]
        begin = max([0, *(c for c in contexts if c <= position)])
        expected = [ids[i] if i >= begin else -1 for i in range(position - span + 1, position + 2)]
        assert bank.tokens[row, slot].tolist() == expected, f"document {document}, position {position}"
        n += 1
    return n


@torch.no_grad()
def test_records_point_at_their_tokens_across_segments() -> None:
    model = model_of(write_budget=None, n_slot=100)
    ids = torch.randperm(400)[: 4 * T].view(1, -1)
    state = model(ids).state
    assert check_records(state, {0: ids[0].tolist()}) == 4 * T - 3
    split = None
    for part in ids.split([5, 9, 1, 20, 13], dim=1):
        split = model(part, state=split).state
    assert check_records(split, {0: ids[0].tolist()}) == 4 * T - 3
    bank = split.memory["ltm"][0]
    for position in range(4 * T - 3):
        slot = int((bank.position[0] == position).nonzero())
        assert bank.record[0, slot] == (position + 3) // T, "a record is what one segment wrote"
    assert bank.n_record.tolist() == [4]


@torch.no_grad()
def test_records_after_a_new_context() -> None:
    model = model_of(write_budget=None, n_slot=100)
    ids = torch.randperm(400)[: 3 * T].view(1, -1)
    cut = T + 5
    state = model.new_context(model(ids[:, :cut]).state)
    assert check_records(state, {0: ids[0].tolist()}) == cut - 1, "all but the last, which has no successor"
    state = model.new_context(model(ids[:, cut:], state=state).state)
    assert check_records(state, {0: ids[0].tolist()}, contexts=(cut,)) == 3 * T - 2
    bank = state.memory["ltm"][0]
    assert cut - 1 not in bank.position[0], "the last token of the old context has no successor in it"


@torch.no_grad()
def test_records_name_their_documents() -> None:
    """Of one bank that all rows share, with documents that begin in the middle of a window."""
    model = model_of(write_budget=None, n_slot=400, scope="shared")
    ids = torch.randperm(400)[: 8 * T].view(2, -1)
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[0, 2] = True
    mask = torch.ones(2, 4, T, dtype=torch.bool)
    mask[0, 1, 4:] = False
    state = model.new_context(model(ids, reset=reset, mask=mask.flatten(1)).state)
    bank = state.memory["ltm"][0]
    found = {
        (int(d), int(p), tuple(t.tolist()))
        for d, p, t in zip(bank.document[0], bank.position[0], bank.tokens[0], strict=True)
    }
    found.discard((-1, -1, (-1,) * 4))
    first, rows = ids.tolist(), []
    rows += [(0, first[0][: T + 4]), (1, first[0][2 * T :]), (0, first[1])]
    expected = set()
    for document, tokens in rows:
        padded = [-1, -1, *tokens]
        expected |= {(document, p, tuple(padded[p : p + 4])) for p in range(len(tokens) - 1)}
    assert found == expected


@torch.no_grad()
def test_sequence_banks_forget_at_document_starts_and_number_on() -> None:
    model = model_of(write_budget=None, n_slot=100)
    ids = torch.randperm(400)[: 4 * T].view(1, -1)
    state = model(ids[:, : 2 * T]).state
    state = model(ids[:, 2 * T :], state=state, reset=torch.tensor([True])).state
    assert check_records(state, {1: ids[0, 2 * T :].tolist()}) == 2 * T - 3
    assert int(state.local.position[0]) == 2 * T


# --- one bank for all ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_shared_bank_is_one_for_all_rows_in_row_order() -> None:
    model = model_of(write_budget=None, n_slot=200, scope="shared")
    ids = torch.randperm(400)[: 4 * T].view(2, -1)
    bank = model(ids).state.memory["ltm"][0]
    assert bank.key.shape[0] == 1
    assert bank.n_record.tolist() == [4]  # two rows, two segments
    for slot in range(200):
        if bank.position[0, slot] >= 0:
            own = int(bank.tokens[0, slot, -2])
            row, position = divmod((ids.flatten() == own).nonzero().item(), 2 * T)
            assert bank.position[0, slot] == position
            segment = (position + 3) // T
            assert bank.record[0, slot] == 2 * segment + row


@torch.no_grad()
def test_rows_read_what_other_rows_wrote_to_a_shared_bank() -> None:
    model = model_of(scope="shared", top_k=100)
    ids = torch.randint(500, (2, 2 * T), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, :T] = other[0, :T].flip(0)
    a, b = model(ids).logits[1], model(other).logits[1]
    assert torch.equal(a[:T], b[:T])
    assert not torch.equal(a[T:], b[T:])


@torch.no_grad()
def test_a_shared_bank_persists_when_it_is_committed_and_only_then() -> None:
    model = model_of(scope="shared")
    memory = model.memory["ltm"][0]
    ids = torch.randint(500, (2, 3 * T), generator=torch.Generator().manual_seed(1))
    fresh = model(ids)
    assert not memory.filled(model.init_state(2).memory["ltm"][0]).any(), "a call commits nothing"
    memory.bank.commit(fresh.state.memory["ltm"][0])
    start = model.init_state(5).memory["ltm"][0]
    stored = named_tensors(fresh.state.memory["ltm"][0])
    for (name, committed), now in zip(stored.items(), tensors(start), strict=True):
        assert torch.equal(committed, now), name
    kept = memory.bank.key.clone()
    model.load_state_dict(model_of(scope="shared").state_dict())
    assert torch.equal(start.key, kept), "a state stays what it is when the bank becomes another"
    memory.bank.commit(start)
    again = model(ids)
    assert not torch.equal(again.logits[:, :T], fresh.logits[:, :T]), "the first segment reads the persistent bank"
    assert torch.equal(model(ids, state=model.wipe(model.init_state(2))).logits, fresh.logits), "wiped is empty"
    other = model_of(scope="shared")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, again.logits), "the bank is in the checkpoint"


@torch.no_grad()
def test_a_shared_bank_outlives_documents() -> None:
    model = model_of(scope="shared", n_slot=200)
    ids = torch.randperm(400)[: 4 * T].view(2, -1)
    state = model(ids[:, : T + 5]).state
    first = set(state.memory["ltm"][0].position[0].tolist())
    state = model(ids[:, T + 5 : 2 * T], state=state, reset=torch.tensor([True, True])).state
    assert first <= set(state.memory["ltm"][0].position[0].tolist())


# --- a bank of 16 bits -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("index", ["exact", "inverted"])
def test_a_bank_of_16_bits_holds_the_same_slots_rounded_in_half_the_bytes(index: str) -> None:
    ids = torch.randint(500, (2, 9 * T), generator=torch.Generator().manual_seed(4))
    small, wide = (
        model_of(bank_dtype=dtype, index=index).absorb(ids, read=False).memory["ltm"][0]
        for dtype in ("bfloat16", "float32")
    )
    numbers = (name for name, part in named_tensors(small).items() if part.dtype == torch.bfloat16)
    assert set(numbers) == {"key", "value"} | ({"lists_key"} if index == "inverted" else set())
    for name in ("key", "value"):
        assert torch.equal(getattr(small, name), getattr(wide, name).bfloat16())
        assert getattr(wide, name).any()
    held = [small.key, small.value] + ([small.lists.key] if index == "inverted" else [])
    assert n_byte(wide) - n_byte(small) == sum(2 * part.numel() for part in held)


def test_gradients_of_what_a_window_writes_pass_as_if_nothing_was_rounded() -> None:
    """Of a linear function of what is rounded they are the same; and no number is off by more than half a step."""
    part = torch.randn(1000, requires_grad=True)
    found = ltm_write.rounded(part, torch.bfloat16)
    assert torch.equal(found, part.detach().bfloat16().float())
    assert torch.equal(torch.autograd.grad((3 * found).sum(), part)[0], torch.full((1000,), 3.0))
    assert ltm_write.rounded(part, torch.float32) is part


@torch.no_grad()
def test_reads_of_a_bank_of_16_bits_are_those_of_its_numbers() -> None:
    """Of two banks of the same numbers, whatever finds the slots: all at once, a token at a time, or lists."""
    ids = torch.randint(500, (2, 9 * T), generator=torch.Generator().manual_seed(4))
    for settings in ({}, {"index": "inverted", "n_list": 4, "n_probe": 2}):
        small, wide = (model_of(bank_dtype=dtype, **settings) for dtype in ("bfloat16", "float32"))
        state = small.new_context(small.absorb(ids))
        same = state._replace(
            memory={"ltm": tuple(map_tensors(lambda part: part.float() if part.is_floating_point() else part, bank)
                                 for bank in state.memory["ltm"])}
        )  # fmt: skip
        torch.testing.assert_close(small(ids, state=state).logits[:, :T], wide(ids, state=same).logits[:, :T])
        told = small.generate(ids[:, :3], max_new_tokens=8, temperature=0, state=state)
        assert torch.equal(told, wide.generate(ids[:, :3], max_new_tokens=8, temperature=0, state=same))


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_slot": 0}, "n_slot must be at least 1, got 0"),
        ({"d_key": 0}, "d_key"),
        ({"top_k": 0}, "top_k"),
        ({"span": 0}, "span"),
        ({"n_slot": 2**22}, "n_slot must be below"),
        ({"write_budget": 0}, "write_budget"),
        ({"retrieval_threshold": 1.5}, "retrieval_threshold"),
        ({"gate_floor": 0.0}, "gate_floor"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"gate_penalty": math.nan}, "gate_penalty"),
        ({"recency": math.inf}, "recency"),
        ({"bank_dtype": "float16"}, "bank_dtype must be one of float32, bfloat16, got 'float16'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongTermMemory(D, **(SETTINGS | settings))


def test_a_segment_shorter_than_the_lookback_is_refused() -> None:
    with pytest.raises(ValueError, match="segment_len to at least 14"):
        model_of(span=7)


def test_the_price_of_writing() -> None:
    memory = LongTermMemory(D, **SETTINGS, gate_penalty=0.5)
    losses = memory.losses({"write_gate": torch.tensor(0.25)}, torch.tensor(3.0))
    assert {name: float(loss) for name, loss in losses.items()} == {"gate_penalty": 0.125}
    assert memory.losses({}, torch.tensor(3.0)) == {}


def test_supervision_asks_the_gate_for_what_was_told() -> None:
    """Of cells whose successor is known; of those before the window nobody says."""
    memory = ByHand(D)
    gates = [-3.0, -0.1, -0.2, -2.0, -9.0, -4.0, -0.5, -6.0]
    segment = segment_of(memory, [gates], before=[[-0.01] * 6], continues=True, position=T, valid=[7])
    told = [False, True, True, False, False, True, True, True]  # the seventh is the last token
    told_here = segment._replace(told=torch.tensor([[False] * 6 + told]))
    state, trace = memory.write(told_here, memory.init_state(1))
    right = [gate if known else math.log(1 - math.exp(gate)) for gate, known in zip(gates[:6], told[:6], strict=True)]
    assert trace["gate_error"].item() == pytest.approx(-sum(right) / 6, rel=1e-4)
    unsaid, plain = memory.write(segment, memory.init_state(1))
    assert set(trace) - set(plain) == {"gate_error"}
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(unsaid), strict=True))

    memory.gate_supervision = 2.0
    losses = memory.losses(trace, torch.tensor(3.0))
    torch.testing.assert_close(losses["gate_supervision"], 2 * trace["gate_error"])
    with pytest.raises(ConfigError, match="gate_supervision needs a task that says what is worth"):
        memory.losses(plain, torch.tensor(3.0))


@pytest.mark.parametrize("by_segment", [False, True])
def test_what_was_told_is_asked_of_the_gates_of_its_own_segments(by_segment: bool, monkeypatch: Any) -> None:
    """Windows are worked out at once or segment by segment; what is told goes to the right cells, and into losses."""
    if by_segment:
        monkeypatch.setattr(ltm_window, "fits", lambda *_: False)
    torch.manual_seed(0)
    model = model_of(span=2)
    n = model.segment_len
    ids, told = torch.randint(20, (2, 3 * n)), torch.rand(2, 3 * n) < 0.3
    wide: list[Tensor] = []
    monkeypatch.setattr(ltm_write, "gate_logit", lambda *given: wide.append(GATE_LOGIT(*given)) or wide[-1])
    out = model(ids, told=told)
    memory = model.memory["ltm"][0]
    each = wide[::2]  # then once more, for the gate alone
    logits = torch.cat([part[:, memory.needs.lookback :] for part in each], dim=1).view(2, 3, n)[..., :-1]
    nats = F.binary_cross_entropy_with_logits(logits, told.view(2, 3, n)[..., :-1].float())
    torch.testing.assert_close(out.trace["ltm"]["gate_error"], nats)
    out.trace["ltm"]["gate_error"].backward()
    learns = {name for name, part in model.named_parameters() if part.grad is not None and part.grad.any()}
    assert learns == {name for name, _ in model.named_parameters() if ".write_gate." in name} != set()
    torch.testing.assert_close(model(ids).hidden, out.hidden)
    with pytest.raises(ConfigError, match=r"told must have the shape of ids"):
        model(ids, told=told[:, 1:])
    with pytest.raises(ConfigError, match="told needs rows with no open segment, and whole segments"):
        model(ids[:, 1:], told=told[:, 1:])
    with pytest.raises(ConfigError, match="told must be bool"):
        model(ids, told=told.long())


def test_flops_count_the_search() -> None:
    few, many = (LongTermMemory(D, **(SETTINGS | {"n_slot": n})).flops_per_token() for n in (1000, 3000))
    assert many - few == 2 * 2000 * SETTINGS["d_key"]


def test_distractors_share_the_read_with_what_other_rows_wrote_while_training() -> None:
    torch.manual_seed(0)
    settings = {"n_slot": 64, "d_key": 8, "top_k": 64, "write_budget": 4, "span": 2, "temperature": 3.0}
    model = LMCode(20, {"ltm": lambda d_model: LongTermMemory(d_model, **settings)}, n_layer=1, n_head=2, d_model=D,
                   segment_len=T, overlap=2)  # fmt: skip
    row = torch.randint(20, (1, 4 * T))
    ids = row.expand(2, -1)

    def read(distractors: bool) -> tuple[Tensor, Tensor]:
        model.memory["ltm"][0].distractors = distractors
        found = model(ids).reads["ltm/0"]
        assert (found.slots < 4 * T).all()
        return (found.weights * (found.slots >= 0)).sum(dim=2), found.weights.sum(dim=2)

    own, everything = read(False)
    torch.testing.assert_close(own, everything)
    assert float(own[:, -1].detach().min()) > 0
    shared, total = read(True)
    # Each slot has a twin in the other row: of e / (null + e) remains e / (null + 2 e).
    torch.testing.assert_close(shared, own / (1 + own))
    torch.testing.assert_close(total, 2 * own / (1 + own))
    model.eval()
    torch.testing.assert_close(read(True)[1], everything)  # rows are isolated when it counts
