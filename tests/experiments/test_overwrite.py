"""Overwrite, with hand-made models of known behaviour."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import overwrite
from experiments.overwrite import Overwrite, draw, plot, run, summarise
from memlm.config import ConfigError
from memlm.data.tasks.overwrite import Overwrite as Task
from memlm.evaluation.headline import headline
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from tests.experiments.shares import check_shares
from tests.experiments.test_needle import Data, Fake

SMALL = Overwrite(n_document=3, n_fact=3, updates=[0, 2, 4], distance=50, n_row=2)


@pytest.fixture(scope="module")
def data():
    data = Data()
    data.task = Task(data.tokenizer, data.splits["train"])
    return data


class Latest(Fake):
    """Goes on as the text did when it was last met."""

    def tried(self, text, memory):
        return range(len(memory) - len(text) - 1, -1, -1)

    def next_token(self, text, memory):
        return next((memory[p + len(text)] for p in self.tried(text, memory) if memory[p : p + len(text)] == text), 0)


class First(Latest):
    """Goes on as the text did when it was first met."""

    def tried(self, text, memory):
        return range(len(memory) - len(text))


def test_a_memory_of_the_latest_is_always_right_and_its_controls_never(data):
    result = run(Latest(data.tokenizer.vocab_size), data, SMALL)
    for n_update in SMALL.updates:
        assert result.metrics[f"exact_match/on/{n_update}"] == 1.0
        assert result.metrics[f"stale/on/{n_update}"] == 0.0
        assert result.metrics[f"n/on/{n_update}"] == 9
        for condition in CONDITIONS[1:]:
            assert result.metrics[f"exact_match/{condition}/{n_update}"] == 0.0
    assert result.metrics["exact_match/on"] == result.metrics["exact_match/on/4"]
    assert [result.metrics[f"chance/{n}"] for n in SMALL.updates] == [1, 1 / 3, 1 / 5]
    numbers = headline(result)
    assert (numbers[0].value, numbers[0].control) == (1.0, False)
    assert {number.value for number in numbers if number.control} == {0.0, result.metrics["chance"]}


def test_a_memory_of_the_first_is_stale_wherever_there_was_an_update(data):
    result = run(First(data.tokenizer.vocab_size), data, SMALL)
    assert result.metrics["exact_match/on/0"] == 1.0
    assert result.metrics["stale/on/0"] == 0.0
    assert result.metrics["exact_match/on/4"] == 0.0
    assert result.metrics["stale/on/4"] == 1.0
    assert {row["stale"] for row in result.rows if row["condition"] == "on" and row["n_update"] == 4} == {4}
    assert {row["stale"] for row in result.rows if row["condition"] != "on"} == {None}


def test_what_is_told_read_back_from_the_tokens_fed(data):
    settings = replace(SMALL, seed=3)
    model = Latest(data.tokenizer.vocab_size)
    result = run(model, data, settings)
    fed = [torch.cat([ids for _, ids in model.told if len(ids) == n], dim=1) for n in (2, 1)]  # two documents, then one
    rows = [row for row in result.rows if row["condition"] == "on"]
    texts = [text for part in fed for text in part.tolist()]
    assert len({len(text) for text in texts}) == 1
    for row in rows:
        fact = data.tokenizer.encode(f" {row['text']}")
        text = texts[row["document"]]
        places = [p for p in range(len(text) - 5) if text[p : p + 3] == fact[:3]]  # the name, and "is"
        assert len(places) == row["n_update"] + 1
        assert len({tuple(text[p : p + 6]) for p in places}) == row["n_update"] + 1  # all values differ
        assert text[places[-1] : places[-1] + 6] == fact
        assert row["since"] == len(text) - places[-1] - 6 >= settings.distance
    asked = {row["text"] for row in result.rows if row["condition"] == "unseen"}
    assert len(asked) == len(rows)
    for text in asked:
        name = data.tokenizer.encode(f" {text}")[:2]
        assert not any(own[p : p + 2] == name for own in texts for p in range(len(own)))


def test_result_depends_on_nothing_but_seed_and_settings(data):
    model = Latest(data.tokenizer.vocab_size)
    torch.manual_seed(1)
    random.seed(1)
    state = torch.get_rng_state(), random.getstate()
    first = run(model, data, SMALL)
    second = run(model, data, replace(SMALL, n_row=3))
    assert first.rows == second.rows
    assert run(model, data, replace(SMALL, seed=1)).rows != first.rows
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()


@pytest.mark.parametrize("scope", ["sequence", "shared", None])
def test_runs_with_real_models_and_leaves_them_as_they_were(data, scope):
    memories = {} if scope is None else {"ltm": lambda d: LongTermMemory(d, 50, 8, 8, scope=scope, recency=4.0)}
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=2, d_model=16, segment_len=32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    result = run(model, data, replace(SMALL, n_fact=1), done.append)
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Result.from_dict(result.to_dict()) == result
    assert set(plot(result)) == {"overwrite"}


def test_older_values_are_found_out_only_where_the_latest_is_not_given(monkeypatch, data):
    _, older, unseen = draw(data, SMALL, 32)
    rows = [
        {"condition": "on", "document": 1, "fact": 4, "correct": False},
        {"condition": "on", "document": 1, "fact": 5, "correct": True},
        {"condition": "off", "document": 0, "fact": 8, "correct": False},
    ]
    given = older[1][4][0]  # first told, two updates ago

    def answer(model, state, facts):
        return [(fact == given or fact in older[0][4], 0.0) for fact in facts]

    monkeypatch.setattr(overwrite, "answer", answer)
    assert overwrite._stale(None, None, [0, 1], older, rows) == {(1, 4): 2}
    assert len({fact.name for own in unseen for fact in own}) == 27


def test_nothing_to_summarise_gives_nothing():
    assert summarise([]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"updates": []}, "updates must be"),
        ({"updates": [2, 1]}, "ascending"),
        ({"updates": [-1]}, "updates must be"),
        ({"facts_per_segment": 0.0}, "facts_per_segment"),
        ({"split": "train"}, "never saw"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Overwrite(**settings)


@pytest.mark.slow
def test_chance_is_met_by_a_memory_that_recalls_any_version(data):
    """A memory that keeps all versions and takes one at random is right as often as chance says."""

    class Any(Latest):
        def next_token(self, text, memory):  # one version for all tokens of the answer
            if not memory:
                return 0
            starts = [p for p in range(len(memory) - 5) if memory[p : p + 2] == text[:2]]
            draw = np.random.default_rng([len(memory), *text[:2]])
            return memory[starts[int(draw.integers(len(starts)))] + len(text)] if starts else 0

    result = run(Any(data.tokenizer.vocab_size), data, replace(SMALL, n_fact=40, updates=[4], n_document=4))
    assert result.metrics["low/on"] < 0.2 < result.metrics["high/on"]
    assert result.metrics["stale/on"] == pytest.approx(1 - result.metrics["exact_match/on"])


def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Latest(data.tokenizer.vocab_size), data, SMALL, share=share)

    check_shares(measure, measure())
