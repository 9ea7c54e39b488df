"""Adaptive memory against a plain-Python bank, by hand-worked examples, and inside a model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import memlm
from memlm import laws
from memlm.memory import strengths
from memlm.memory.adaptive import AdaptiveMemory, AdaptiveState, policy_gradient
from memlm.memory.contract import Flags, Segment
from memlm.models.lmcode import LMCode
from tests.laws.oracles import adaptive_store, items_of, same_items

pytestmark = pytest.mark.slow

D = 8
SMALL: dict[str, Any] = {"n_slot": 5, "n_short": 4, "d_key": 6, "d_value": 7, "top_k": 3, "write_budget": 4}


def memory_of(**settings: Any) -> AdaptiveMemory:
    torch.manual_seed(0)
    return AdaptiveMemory(D, **(SMALL | settings)).eval()


def offer(kinds: list[list[int]], strength: list[list[float]], first: int, noise: float = 0.0) -> AdaptiveState:
    """Items of one segment: equal kinds have nearly equal keys and values; places begin at ``first``."""
    draw = torch.Generator().manual_seed(7)
    keys, values = torch.randn(50, 6, generator=draw), torch.randn(50, 7, generator=draw)
    index = torch.tensor(kinds)
    jitter = torch.Generator().manual_seed(first)
    key = keys[index] + noise * torch.randn(*index.shape, 6, generator=jitter)
    value = values[index] + noise * torch.randn(*index.shape, 7, generator=jitter)
    position = first + torch.arange(index.shape[1]).expand(index.shape)
    return AdaptiveState(F.normalize(key, dim=-1), value, torch.tensor(strength), position)


def held(memory: AdaptiveMemory, state: AdaptiveState, row: int = 0) -> list[tuple[int, float, bool]]:
    """Place, strength and whether it is long-term, of each slot in use."""
    return [(each.position, round(each.strength, 4), each.long) for each in items_of(state, row, memory.n_short)]


@torch.no_grad()
def test_store_equals_the_plain_bank() -> None:
    memory = memory_of(match_threshold=0.85, decay=0.9, promote_at=0.75)
    draw = torch.Generator().manual_seed(1)
    state, naive, n_repeat, n_lost = memory.init_state(3), [[], [], []], 0, 0  # type: ignore[var-annotated]
    for s in range(25):
        kinds = torch.randint(14, (3, 4), generator=draw).tolist()
        strength = torch.rand(3, 4, generator=draw) * (torch.rand(3, 4, generator=draw) < 0.8)
        rows = torch.tensor([True, s % 3 > 0, True])
        items = offer(kinds, strength.tolist(), first=4 * s, noise=0.05)
        state = memory.store(state, items, rows)
        for b in range(3):
            if rows[b]:
                offered, before = items_of(items, b, 0), len(naive[b])
                naive[b] = adaptive_store(memory, naive[b], offered)
                n_repeat += len(offered) > len({kinds[b][item.position - 4 * s] for item in offered})
                n_lost += before + len(offered) > len(naive[b])
            same_items(items_of(state, b, memory.n_short), naive[b], f"segment {s}, row {b}")
    assert n_repeat > 5, "no segment repeats itself"
    assert n_lost > 5, "nothing was evicted or reinforced"
    assert any(item.long for item in naive[0])


@torch.no_grad()
def test_what_moved_is_counted() -> None:
    memory = memory_of(match_threshold=0.85, decay=0.8, promote_at=0.75, retrieval_threshold=0.3)
    draw = torch.Generator().manual_seed(2)
    state, rows, total = memory.init_state(1), torch.ones(1, dtype=torch.bool), dict.fromkeys(
        ("promoted", "decayed", "evicted"), 0)  # fmt: skip
    kind_of = offer([list(range(14))], [[1.0] * 14], first=0).key[0]

    def kinds(state: AdaptiveState) -> dict[int, tuple[float, bool]]:
        """By kind of item, of which a bank holds one at most: its strength, and whether it is long-term."""
        found = [(int((kind_of @ state.key[0, slot]).argmax()), float(state.strength[0, slot]), slot >= memory.n_short)
                 for slot in memory.filled(state)[0].nonzero()[:, 0].tolist()]  # fmt: skip
        assert len({kind for kind, _, _ in found}) == len(found)
        return {kind: (strength, long) for kind, strength, long in found}

    for s in range(25):
        offered = torch.randint(14, (1, 4), generator=draw).tolist()
        items = offer(offered, torch.rand(1, 4, generator=draw).clamp(min=0.1).tolist(), first=4 * s, noise=0.02)
        settled = strengths.settle(memory, state, items)
        counts = memory._moved(state, settled, rows)
        old, new = kinds(state), kinds(memory.store(state, items, rows))
        expected = {
            "promoted": sum(not old[kind][1] and new[kind][1] for kind in old.keys() & new.keys()),
            "decayed": sum(0.3 <= old[kind][0] < 0.3 / 0.8 for kind in old.keys() - set(offered[0])),
            "evicted": len((old.keys() | set(offered[0])) - new.keys()),
        }
        assert {name: int(count) for name, count in counts.items()} == expected, s
        state = memory.store(state, items, rows)
        total = {name: total[name] + count for name, count in expected.items()}
    assert min(total.values()) > 3, total
    nothing = memory._moved(state, settled, ~rows)
    assert not any(float(count) for count in nothing.values())


@torch.no_grad()
def test_strengths_by_hand() -> None:
    """Met once, it decays; met again, it is reinforced and promoted, not stored twice; one slot is the newest."""
    memory = memory_of(decay=0.5, promote_at=0.7)
    yes = torch.ones(1, dtype=torch.bool)
    state = memory.store(memory.init_state(1), offer([[3]], [[0.6]], first=10), yes)
    assert held(memory, state) == [(10, 0.6, False)]
    state = memory.store(state, offer([[4]], [[0.5]], first=20), yes)
    assert held(memory, state) == [(10, 0.3, False), (20, 0.5, False)]
    state = memory.store(state, offer([[3]], [[0.6]], first=30), yes)  # 0.15 + 0.6 - 0.15 * 0.6 = 0.66
    assert held(memory, state) == [(30, 0.66, False), (20, 0.25, False)]
    state = memory.store(state, offer([[3]], [[0.6]], first=40), yes)  # 0.33 + 0.6 - 0.198 = 0.732: promoted
    assert held(memory, state) == [(20, 0.125, False), (40, 0.732, True)]
    state = memory.store(state, offer([[9]], [[0.9]], first=50), yes)  # at once
    assert held(memory, state) == [(20, 0.0625, False), (40, 0.366, True), (50, 0.9, True)]


@torch.no_grad()
def test_a_slot_keeps_its_place_while_others_come_and_go() -> None:
    memory = memory_of(decay=1.0, promote_at=0.8)
    yes = torch.ones(1, dtype=torch.bool)
    state = memory.store(memory.init_state(1), offer([[0]], [[0.9]], first=0), yes)
    place = int(state.strength[0].argmax())
    for s in range(1, 9):
        state = memory.store(state, offer([[2 * s, 2 * s + 1]], [[0.3, 0.85]], first=2 * s), yes)
        assert int(state.position[0, place]) == 0
        assert place >= memory.n_short


@torch.no_grad()
def test_retrieval_is_by_cosine_times_strength_over_a_threshold() -> None:
    memory = memory_of(retrieval_threshold=0.2, top_k=2)
    memory.to_key.weight.copy_(torch.eye(6, D))
    cosines, strengths = [0.9, 0.5, 1.0, 0.8, -0.5], [0.5, 0.95, 0.19, 0.0, 1.0]
    state = memory.init_state(1)
    for i, (cosine, strength) in enumerate(zip(cosines, strengths, strict=True)):
        state.key[0, i, :2] = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
        state.strength[0, i] = strength
    query = F.one_hot(torch.tensor([[0]]), D).float()
    score, slots = memory.retrieve(query, state)
    assert slots.tolist() == [[[1, 0]]]  # 0.475, 0.45
    torch.testing.assert_close(score[0, 0, :2], torch.tensor([0.45, 0.475]))
    assert score[0, 0, 2:].isneginf().all()
    memory.top_k = 5
    assert memory.retrieve(query, state)[1].tolist() == [[[1, 0, 4, -1, -1]]]  # slot 2 is faded, 3 empty


def test_the_policy_gradient_by_hand() -> None:
    """Choices that earned more than expected become likelier; the baseline moves to the reward."""
    logit, baseline = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)
    losses = policy_gradient(torch.tensor([3.0, 0.0]), F.logsigmoid(logit), baseline)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    # d(-(advantage * log sigmoid).mean()) = -advantage * (1 - 0.5) / 2; d((b - r)^2).mean() = b - r
    torch.testing.assert_close(logit.grad, torch.tensor([-2.0 * 0.25, 1.0 * 0.25]))
    torch.testing.assert_close(baseline.grad, torch.tensor([-2.0, 1.0]))


def segment_of(hidden: Tensor, embeddings: Tensor) -> Segment:
    """One segment per row, with one token before it."""
    n_row, n_token = hidden.shape[:2]
    yes, zero = torch.ones(n_row, 1, dtype=torch.bool), torch.zeros(n_row, 1, dtype=torch.long)
    ids, valid = torch.zeros(n_row, n_token, dtype=torch.long), torch.ones(n_row, n_token, dtype=torch.bool)
    flags = Flags(yes, yes, ~yes, None, zero + 1, zero)
    return Segment(ids, embeddings, hidden, valid, flags, None, 1, slice(0, n_token - 1))


@pytest.mark.parametrize("controller", ["policy", "straight_through"])
def test_what_teaches_the_controller(controller: str) -> None:
    """Reward of each row under ``policy`` and nothing that is read; what is read under ``straight_through``."""
    memory = memory_of(controller=controller, exploration=0.0, gate_penalty=0.0).train()
    draw = torch.Generator().manual_seed(3)
    hidden, embeddings = (torch.randn(2, 5, D, generator=draw) for _ in range(2))
    state, trace = memory.write(segment_of(hidden, embeddings), memory.init_state(2))
    memory.read(hidden, memory.prepare(state)).value.square().sum().backward(retain_graph=True)
    assert memory.to_importance is not None
    taught = memory.to_importance[-1].weight.grad is not None  # by what is read
    assert taught == (controller == "straight_through")
    memory.zero_grad()
    losses = memory.losses(trace, torch.tensor([1.0, 0.0]))
    if controller == "policy":
        assert trace["log_prob"].shape == (2,)
        expected = float(trace["log_prob"][0].detach() / 2)  # advantages -1 and 0
        assert float(losses["policy"].detach()) == pytest.approx(expected)
        losses["policy"].backward()
        assert memory.to_importance[-1].weight.grad.abs().max() > 0
        assert float(losses["baseline"].detach()) == pytest.approx(0.5)
    else:
        assert set(losses) == {"gate_penalty"}


@torch.no_grad()
def test_always_writes_everything_and_never_nothing() -> None:
    draw = torch.Generator().manual_seed(3)
    segment = segment_of(torch.randn(2, 5, D, generator=draw), torch.randn(2, 5, D, generator=draw))
    for controller, expected in (("always", [0, 1, 2, 3]), ("never", [])):
        memory = memory_of(controller=controller)
        state, trace = memory.write(segment, memory.init_state(2))
        assert sorted(state.position[0][state.strength[0] > 0].tolist()) == expected
        assert float(trace["written"]) == float(trace["write_gate"]) == (controller == "always")
        assert memory.losses(trace, torch.zeros(2)) == {}


@torch.no_grad()
def test_the_budget_takes_the_most_important() -> None:
    memory = memory_of(write_budget=2, promote_at=1.0)
    draw = torch.Generator().manual_seed(3)
    hidden, embeddings = (torch.randn(1, 5, D, generator=draw) for _ in range(2))
    importance = [float(memory.encode(hidden[:, i : i + 1], embeddings[:, i + 1 : i + 2], None)[2]) for i in range(4)]
    state, _ = memory.write(segment_of(hidden, embeddings), memory.init_state(1))
    best = sorted(range(4), key=lambda i: -importance[i])[:2]
    assert min(importance[i] for i in best) > 0
    assert sorted(state.position[0][state.strength[0] > 0].tolist()) == sorted(best)
    for i in best:
        slot = int((state.position[0] == i).nonzero())
        assert float(state.strength[0, slot]) == pytest.approx(1 / (1 + math.exp(-importance[i])))


def model_of(**settings: Any) -> LMCode:
    torch.manual_seed(0)
    make = lambda d_model: AdaptiveMemory(d_model, **(SMALL | settings))  # noqa: E731
    return LMCode(20, {"adaptive": make}, n_layer=1, n_head=2, d_model=D, segment_len=4, overlap=0).eval()


@torch.no_grad()
def test_signals_reach_what_is_stored_through_the_model() -> None:
    model = model_of(signals={"tone": 1, "hour": 2})
    torch.nn.init.normal_(model.memory["adaptive"][0].to_signal.weight)  # 0 at first
    ids = torch.arange(8)[None].expand(2, -1) % 20
    tone = torch.tensor([[3.0], [-3.0]])
    plain = model(ids).state.memory["adaptive"][0]
    said = model(ids, signals={"tone": tone}).state.memory["adaptive"][0]
    both = model(ids, signals={"tone": tone, "hour": torch.zeros(2, 2)}).state.memory["adaptive"][0]
    assert torch.equal(plain.value[0], plain.value[1])
    assert not torch.equal(said.value[0], said.value[1])
    assert torch.equal(said.value, both.value)  # what is not given is 0


@torch.no_grad()
def test_signals_that_are_unknown_are_refused() -> None:
    ids = torch.zeros(1, 8, dtype=torch.long)
    model = model_of(signals={"tone": 1})
    for given, told in (
        (
            {"mood": torch.zeros(1, 3)},
            r"'mood' is used by no memory of this model, which know tone: .*signals=.mood: 3",
        ),
        ({"tone": torch.zeros(1, 2)}, r"signals.tone must be \(rows, numbers\) = \(1, 1\), got shape \(1, 2\)"),
        ({"tone": torch.zeros(2, 1)}, r"signals.tone must be \(rows, numbers\) = \(1, 1\), got shape \(2, 1\)"),
        ({"tone": torch.tensor(0.5)}, r"signals.tone must be .* got shape \(\)"),
        ({"tone": torch.full((1, 1), torch.nan)}, "signals.tone holds NaN: give 0 where it is unknown"),
    ):
        with pytest.raises(ValueError, match=told):
            model(ids, signals=given)
    with pytest.raises(ValueError, match="used by no memory of this model, which know none"):
        model_of()(ids, signals={"tone": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="used by no memory of this model, which know none"):
        memlm.build("memory=stm", "model.d_model=8", "model.n_head=1")(ids, signals={"tone": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"'mood' is unknown to this memory, which knows tone"):
        memory_of(signals={"tone": 1}).encode(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), {"mood": torch.zeros(1, 3)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_slot": 0}, "n_slot must be at least 1, got 0"),
        ({"n_short": 3}, r"n_short must hold what one segment writes, at least write_budget \(4\), got 3"),
        ({"controller": "sometimes"}, "controller must be one of policy, straight_through, always, never"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
        ({"decay": 1.01}, "decay"),
        ({"match_threshold": 1.5}, r"match_threshold must be in 0..1, got 1.5"),
        ({"promote_at": -0.1}, "promote_at"),
        ({"retrieval_threshold": 2.0}, "retrieval_threshold"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"gate_penalty": -1.0}, "gate_penalty must not be negative"),
        ({"exploration": -1.0}, "exploration must not be negative"),
        ({"temperature": math.nan}, "temperature"),
        ({"gate_penalty": math.nan}, "gate_penalty"),
        ({"exploration": math.inf}, "exploration"),
        ({"signals": {"tone": 0}}, r"signals.tone must be how many numbers it has, at least 1, got 0"),
        ({"signals": {"tone": "high"}}, r"signals.tone must be .* got 'high'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_of(**settings)


@pytest.mark.parametrize("controller", ["policy", "straight_through"])
def test_the_controller_learns_what_to_keep(controller: str) -> None:
    """Of 64 tokens 16 find a place; a controller that is not trained, or writes always, is left at chance."""
    make = laws.builder(laws.nodes_of("adaptive"), shrink=False)
    sizes = {"controller": controller, "n_slot": 8, "n_short": 8}
    model, _ = laws.learn_recall(make, n_segment=8, n_filler=55, **sizes)
    scores = laws.recall_scores(model, n_segment=8, n_filler=55)
    assert scores["memory"][1] > 0.6
    assert scores["wiped"][1] < 0.3
