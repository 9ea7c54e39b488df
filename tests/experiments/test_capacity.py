"""Capacity, with memories that hold a known number of facts."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.capacity import Capacity, plot, run, summarise
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.evaluation.headline import headline
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.evaluation.summary import summary
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from tests.experiments.shares import check_shares
from tests.experiments.test_needle import Cheat, Data, Fake

SMALL = Capacity(n_fact=[4, 8, 16], n_ask=8, n_document=10, facts_per_segment=4.0)


@pytest.fixture(scope="module")
def data():
    return Data()


class Bounded(Fake):
    """Holds the last `n_held` facts in a state of ``n_number`` numbers of 4 bytes."""

    def __init__(self, data, n_held, n_number=64):
        super().__init__(data.tokenizer.vocab_size)
        self.n_held, self.n_number = n_held, n_number
        (self.between,) = data.tokenizer.encode(" is")  # which stands in no text of `Data`

    def init_state(self, n_row):
        return SimpleNamespace(memory={"fake": (torch.zeros(n_row, self.n_number),)})

    def next_token(self, text, memory):
        begins = [i - 2 for i, token in enumerate(memory) if token == self.between]
        for place in begins[-self.n_held :] if self.n_held else []:
            if memory[place : place + 2] == text[:2]:
                return memory[place + len(text)]
        return 0


class CheatOfSize(Cheat):
    init_state = Bounded.init_state
    n_number = 64


@pytest.mark.parametrize(
    ("n_held", "capacity", "strict", "censored"),
    # By hand: 10 documents are asked for 40, 80 and 80 facts, and the interval of 40 of 40 begins at 91 %.
    [(9, 8, 8, 0.0), (7, 4, 0, 0.0), (3, 0, 0, 0.0), (0, 0, 0, 0.0), (16, 16, 16, 1.0)],
)
def test_a_memory_of_known_size(data, n_held, capacity, strict, censored):
    result = run(Bounded(data, n_held), data, SMALL)
    metrics = result.metrics
    assert metrics["capacity/on"] == capacity
    assert metrics["capacity_strict/on"] == strict
    assert metrics["censored/on"] == censored
    assert metrics["state_bytes"] == 256
    assert metrics["facts_per_kb/on"] == 4 * capacity  # of a quarter of 1,024 bytes
    for n_fact in SMALL.n_fact:
        assert metrics[f"n/on/{n_fact}"] == 10 * min(n_fact, 8)
        assert metrics[f"chance/{n_fact}"] == 1 / n_fact
        if n_held >= n_fact or n_held == 0:
            assert metrics[f"exact_match/on/{n_fact}"] == (n_held > 0)
        else:  # those asked for are drawn at random from all places
            assert metrics[f"low/on/{n_fact}"] < n_held / n_fact < metrics[f"high/on/{n_fact}"]
        for condition in CONDITIONS[1:]:
            assert metrics[f"exact_match/{condition}/{n_fact}"] == 0.0
            assert metrics[f"capacity/{condition}"] == 0
    assert metrics["exact_match/on"] == metrics["exact_match/on/16"]
    numbers = headline(result)
    assert (numbers[0].value, numbers[0].control) == (capacity, False)
    assert "facts told" in summary([result])


def test_a_model_that_knows_the_answers_anyway_holds_nothing(data):
    facts = []

    class Spy(Bounded):
        def next_token(self, text, memory):
            return 0

    told = run(Spy(data, 0), data, replace(SMALL, n_document=3))
    for text in {row["text"] for row in told.rows}:
        name, value = text.split(" is ")
        cue, answer = (tuple(data.tokenizer.encode(f" {part}")) for part in (name, f"is {value}"))
        facts.append(SimpleNamespace(cue=cue, tokens=cue + answer))
    metrics = run(CheatOfSize(data.tokenizer.vocab_size, facts), data, replace(SMALL, n_document=3)).metrics
    assert metrics["exact_match/on"] == metrics["exact_match/off"] == 1.0
    assert metrics["capacity/on"] == metrics["capacity_strict/on"] == metrics["facts_per_kb/on"] == 0
    assert [metrics[f"capacity/{condition}"] for condition in CONDITIONS[1:]] == [16] * 4  # exposed


def test_documents_tell_as_many_facts_as_they_should_and_ask_for_some(data):
    model = Bounded(data, 9)
    result = run(model, data, replace(SMALL, n_row=10))
    texts = [[], [], []]
    for state, ids in model.told:
        if not any(state):
            number = sum(bool(part) for part in texts)
            texts[number] = [[] for _ in ids]
        for text, row in zip(texts[number], ids.tolist(), strict=True):
            text += row
    for n_fact, documents in zip(SMALL.n_fact, texts, strict=True):
        rows = [row for row in result.rows if row["n_fact"] == n_fact and row["condition"] == "on"]
        asked = {
            i: [data.tokenizer.encode(f" {row['text']}") for row in rows if row["document"] == i] for i in range(10)
        }
        for i, text in enumerate(documents):
            assert text.count(model.between) == n_fact
            assert len(asked[i]) == min(n_fact, 8)
            assert all(sum(text[p : p + 6] == fact for p in range(len(text))) == 1 for fact in asked[i])
        assert 0 <= min(row["since"] for row in rows) < 32  # no more text than the last segment needs


@pytest.mark.parametrize("scope", ["sequence", "shared", None])
def test_real_models_without_memory_and_with(data, scope):
    memories = {} if scope is None else {"ltm": functools.partial(LongTermMemory, n_slot=32, scope=scope)}
    torch.manual_seed(0)
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=1, n_head=2, d_model=16, segment_len=32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings, shares = replace(SMALL, n_fact=[2, 6], n_ask=3, n_document=2), []
    first = run(model, data, settings, shares.append)
    assert first == run(model, data, settings)
    assert first == Result.from_dict(first.to_dict())
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.metrics["capacity/on"] == 0
    if memories:
        assert first.metrics["state_bytes"] > 32 * 4 * (128 + 128)  # keys and values
        assert first.metrics["facts_per_kb/on"] == 0
    else:
        assert first.metrics["state_bytes"] == 0
        assert first.to_dict()["metrics"]["facts_per_kb/on"] == "NaN"


def test_the_largest_number_counts_even_where_a_smaller_one_fell_short():
    def rows(n_fact, k):
        base = {"n_fact": n_fact, "straddles": False, "nll": 1.0, "stored": None, "document": 0}
        given = [base | {"condition": "on", "fact": i, "correct": i < k} for i in range(100)]
        return given + [base | {"condition": "off", "fact": i, "correct": False} for i in range(100)]

    metrics = summarise([*rows(10, 94), *rows(20, 95), *rows(40, 94)], n_byte=2048)
    assert metrics["capacity/on"] == 20
    assert metrics["capacity_strict/on"] == 0  # 95 of 100: from 89 %
    assert metrics["facts_per_kb/on"] == 10
    assert summarise([], 1) == {}


def test_figure(data):
    result = run(Bounded(data, 9), data, SMALL)
    (axes,) = plot(result)["capacity"].axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert drawn["capacity: 8"] == [8, 8]
    assert drawn["memory on"] == SMALL.n_fact
    assert "8 facts at 95 %" in axes.get_title("left")
    assert "32 per KB" in axes.get_title("left")
    full = plot(run(Bounded(data, 16), data, replace(SMALL, n_document=2)))["capacity"].axes[0]
    assert "at least 16 facts" in full.get_title("left")
    assert plot(Result("capacity", {})) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"n_ask": 0}, "n_ask must be at least 1"),
        ({"n_fact": []}, "n_fact must be"),
        ({"n_fact": [0, 2]}, "n_fact must be"),
        ({"n_fact": [4, 2]}, "ascending"),
        ({"facts_per_segment": 0.0}, "facts_per_segment"),
        ({"split": "train"}, "never saw"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Capacity(**settings)


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=capacity"], "evaluate").capacity)
    assert node.pop("_target_") == "experiments.capacity.Capacity"
    assert Capacity(**node) == Capacity()
    assert set(node) == set(Capacity.__dataclass_fields__)


def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Bounded(data, 9), data, replace(SMALL, n_document=3), share=share)

    check_shares(measure, measure())
