"""BABILong, with a hand-made model that answers from the last sentence about a person in its memory."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.babilong import Babilong, length_name, plot, run
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.data.tasks.babilong import BabiLong
from memlm.evaluation.headline import headline
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.memory.ltm import LongTermMemory
from memlm.memory.rmt import RecurrentMemory
from memlm.models.lmcode import LMCode
from tests.data.tasks.test_babilong import PLACES, TRAIN, Text, write_table
from tests.experiments.shares import check_shares
from tests.experiments.test_needle import Fake

SMALL = Babilong(lengths=[0, 200], n_question=None, n_row=2)


class Data(Text):
    """A task whose test questions tell four different people apart."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        table = write_table(folder)
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        people = ["Mary", "John", "Mary", "John"]
        places = [PLACES[i] for i in (0, 1, 2, 0)]
        rows[1]["text"] = "".join(
            f"1 {who} went to the {old}.\n2 {who} moved to the {new}.\n3 Where is {who}? \t{new}\t2\n"
            for who, old, new in zip(people, PLACES[1:] + PLACES[:2], places, strict=True)
        )
        table.write_text("\n".join(map(json.dumps, rows)))
        self.task = BabiLong(self.tokenizer, self.train, str(table))

    def tokens(self, split):
        return self.train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("babi"))


class Reader(Fake):
    """Says where the latest sentence about a person says that they are; text that is masked never reaches it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer.vocab_size)
        self.tokenizer = tokenizer

    def absorb(self, ids, state=None, donate=False, mask=None):
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        state = [[] for _ in ids] if state is None else state
        self.told.append((state, ids.clone()))
        return [[*memory, *row[there].tolist()] for memory, row, there in zip(state, ids, mask, strict=True)]

    def next_token(self, text, memory):
        asked = self.tokenizer.decode(text)
        who = re.search(r"Where is (\w+)\?", asked)
        told = re.findall(rf"{who[1]} (?:went|moved) to the (\w+)", self.tokenizer.decode(memory)) if who else []
        if not told or asked.endswith("."):
            return 0
        return self.tokenizer.encode("." if asked.split()[-1] == told[-1] else f" {told[-1]}")[0]


def test_a_reader_answers_every_question_at_every_length(data):
    model = Reader(data.tokenizer)
    result = run(model, data, SMALL)
    for length in SMALL.lengths:
        assert result.metrics[f"exact_match/on/{length}"] == 1.0
        assert result.metrics[f"n/on/{length}"] == 4
        for condition in ("off", "wiped"):
            assert result.metrics[f"exact_match/{condition}/{length}"] == 0.0
        assert result.metrics[f"chance/{length}"] == pytest.approx(1 / 3)
    assert result.metrics["n/on"] == 4
    numbers = headline(result)
    assert [(n.label, n.value) for n in numbers if not n.control] == [("qa1, 0k", 1.0), ("qa1, 200 tokens", 1.0)]
    assert numbers[1].value == max(result.metrics[f"exact_match/{name}/0"] for name in CONDITIONS[1:])
    assert {row["said"] for row in result.rows if row["condition"] == "on"} == {f" {place}." for place in PLACES}
    assert result.metadata["haystack_repetition"] == 200 / data.train.n_token
    assert list(plot(result)) == ["babilong"]


def test_texts_are_as_long_as_was_asked_and_nothing_stands_twice(data):
    class Long(Reader):
        def new_context(self, state, donate=False):
            ends.append([len(memory) for memory in state])
            assert all(
                len(memory) == len(set(numbers(memory))) + len(memory) - len(numbers(memory)) for memory in state
            )
            return super().new_context(state)

    def numbers(memory):
        return re.findall(r"b\d+", data.tokenizer.decode(memory))

    ends = []
    run(Long(data.tokenizer), data, replace(SMALL, lengths=[0, 5, 200, 900], n_row=4))
    story = sum(map(len, data.task.test()[0].facts))
    assert ends == [[story] * 4, [story] * 4, [200] * 4, [900] * 4]


def test_rows_say_where_the_answer_was_told(data):
    result = run(Reader(data.tokenizer), data, replace(SMALL, lengths=[300]))
    by_depth = [row for row in result.rows if row["condition"] == "on"]
    assert len({row["since"] for row in by_depth}) > 1
    for row in by_depth:
        assert 0 <= row["depth"] <= 1 - row["since"] / 300


def test_questions_are_taken_evenly_from_the_published_ones(data):
    result = run(Reader(data.tokenizer), data, replace(SMALL, n_question=2))
    texts = [row["text"] for row in result.rows if row["condition"] == "on" and row["length"] == 0]
    published = [f"{words.sample.question} {words.sample.answer}" for words in data.task.test()]
    assert texts == published[::2]


def test_result_depends_on_nothing_but_seed_and_settings(data):
    result, before = run(Reader(data.tokenizer), data, SMALL), torch.get_rng_state()
    assert run(Reader(data.tokenizer), data, replace(SMALL, n_row=3)).rows == result.rows
    assert run(Reader(data.tokenizer), data, replace(SMALL, seed=1)).rows != result.rows
    assert torch.equal(before, torch.get_rng_state())
    check_shares(lambda share: run(Reader(data.tokenizer), data, SMALL, share=share), result)


@pytest.mark.parametrize("kind", ["ltm", "rmt", None])
def test_runs_with_real_models_whose_stories_differ_in_length(data, kind):
    memories = {
        "ltm": {"ltm": lambda d: LongTermMemory(d, 50, 8, 8)},
        "rmt": {"rmt": lambda d, sizes: RecurrentMemory(d, sizes, 2)},
        None: {},
    }
    torch.manual_seed(0)
    model = LMCode(data.tokenizer.vocab_size, memories[kind], n_layer=2, d_model=16, segment_len=16).train()
    shifted = SimpleNamespace(**vars(data))
    shifted.tokens = data.tokens
    tests = data.task.test()
    tests[1] = tests[1]._replace(facts=tests[1].facts * 5)
    shifted.task = type("Uneven", (BabiLong,), {"__init__": lambda self: None, "test": lambda self: tests})()
    vars(shifted.task).update(vars(data.task))
    together = run(model, shifted, replace(SMALL, n_row=4))
    alone = run(model, shifted, replace(SMALL, n_row=1))
    assert model.training
    for a, b in zip(together.rows, alone.rows, strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-4)
        assert {**a, "nll": 0} == {**b, "nll": 0}


def test_other_models_and_labels_that_hide_in_others_are_refused(data):
    model = Reader(data.tokenizer)
    with pytest.raises(ConfigError, match="train one with recipe=babilong"):
        run(model, SimpleNamespace(task=None), SMALL)
    none = SimpleNamespace(task=BabiLong.__new__(BabiLong))
    none.task.task, none.task.labels = 7, ["none", "one"]
    with pytest.raises(ConfigError, match="'one' is a part of another one: choose one of tasks 1 to 5"):
        run(model, none, SMALL)
    for wrong in ([], [5, 1], [-1]):
        with pytest.raises(ConfigError, match="lengths in tokens in ascending order"):
            replace(SMALL, lengths=wrong)


def test_lengths_have_the_names_of_the_benchmark():
    assert [length_name(n) for n in (0, 4000, 128_000, 10_000_000, 200)] == ["0k", "4k", "128k", "10M", "200 tokens"]


def test_the_recipe_reads_the_users_files_in_any_directory(tmp_path):
    config = to_dict(compose(["recipe=babilong", f"data.path={tmp_path}/books.txt", f"data.babi={tmp_path}"]))
    assert config["curriculum"]["task"]["path"] == str(tmp_path)
    assert config["model"]["memory_layers"] == [1]
    assert TRAIN.count("Where") == 3
    assert list(config["experiment"]) == ["babilong"] if "experiment" in config else True
    assert [phase["n_segment"] for phase in config["curriculum"]["phases"]] == [3, 5, 8, 16, 32]
    two = to_dict(compose(["recipe=babilong_two", f"data.path={tmp_path}/books.txt", f"data.babi={tmp_path}"]))
    assert two["model"]["memory_layers"] == [2, 3]
    assert two["curriculum"]["task"] == config["curriculum"]["task"] | {"task": 2}
    assert set(CONDITIONS) == {"on", "off", "wiped", "swapped", "unseen"}
    assert np.array(config["babilong"]["lengths"]).tolist() == [0, 1000, 4000, 16000]
