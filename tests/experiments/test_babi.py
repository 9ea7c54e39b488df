"""bAbI inside noise, with a hand-made model that reads its memory like a person."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.babi import Babi, plot, run, summarise
from memlm.config import ConfigError
from memlm.data.tasks.babi import Babi as Task
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.headline import headline
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from tests.data.tasks.test_babi import TEMPLATES, answer
from tests.experiments.shares import check_shares
from tests.experiments.test_needle import Fake

pytestmark = pytest.mark.slow

SMALL = Babi(noise=[200, 900], n_document=3, n_story=1, n_row=2)
SENTENCE = re.compile(
    r"(\w+ (?:went|moved|journeyed|travelled) to the \w+|\w+ gave the \w+ to \w+|the \w+ is \w+ of the \w+"
    r"|\w+ (?:took|got|grabbed|picked up|dropped|left|discarded|put down) the \w+)\."
)


class Data:
    """Words of stories in the training text, other words in the text of the noise."""

    def __init__(self):
        rng = np.random.default_rng(0)
        words = sorted({"".join(rng.choice(list("jklmnpqx"), size=5)) for _ in range(900)})
        noise = sorted({"".join(rng.choice(list("uvyz"), size=5)) for _ in range(100)})
        texts = {"train": " " + " ".join(np.repeat(words, 2)) + 2 * TEMPLATES, "val": " " + " ".join(noise)}
        self.tokenizer = train_tokenizer("word", list(texts.values()), 3000)
        self.splits = {}
        for split, text in texts.items():
            tokens = np.array(self.tokenizer.encode(text), dtype=np.int32)
            self.splits[split] = TokenizedCorpus(tokens, np.array([0, len(tokens)]))
        self.task = Task(self.tokenizer, self.splits["train"])
        self.noise = set(self.splits["val"].tokens.tolist())

    def tokens(self, split):
        return self.splits[split]


@pytest.fixture(scope="module")
def data():
    return Data()


@pytest.fixture(scope="module")
def result(data):
    """What a reader of all small documents answers."""
    return run(Reader(data.tokenizer), data, SMALL)


class Reader(Fake):
    """Answers from the sentences in its memory; where they say nothing, with any word."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer.vocab_size)
        self.tokenizer = tokenizer

    def next_token(self, text, memory):
        try:
            found = answer(SENTENCE.findall(self.tokenizer.decode(memory)), self.tokenizer.decode(text).strip())
        except (KeyError, IndexError, AssertionError):
            return 0
        return self.tokenizer.encode(f" {found}")[0]


def test_a_reader_answers_every_question_and_its_controls_none(data, result):
    for task in SMALL.tasks:
        for vocabulary in SMALL.vocabularies:
            for noise in SMALL.noise:
                suffix = f"qa{task}/{vocabulary}/{noise}"
                assert result.metrics[f"exact_match/on/{suffix}"] == 1.0
                assert result.metrics[f"n/on/{suffix}"] == 9
                for condition in CONDITIONS[1:]:
                    assert result.metrics[f"exact_match/{condition}/{suffix}"] == 0.0
    assert result.metrics["chance/qa1/open/900"] == pytest.approx(1 / 6)
    assert 1 / 4 <= result.metrics["chance/qa5/open/900"] <= 1 / 3
    assert result.metrics["n/on"] == result.metrics["n/on/qa1/open/900"]
    *numbers, repeated = headline(result)  # the noise is read nine times
    assert (repeated.metric, repeated.value) == ("repetition", 900 / len(data.splits["val"].tokens))
    assert (numbers[0].value, numbers[0].control) == (1.0, False)
    rates = [number.metric for number in numbers if not number.control]
    assert rates[0] == "exact_match/on/qa1/open/900"
    assert len(rates) == len(set(rates)) == len(SMALL.tasks) * len(SMALL.vocabularies)
    for i, number in enumerate(numbers):  # each beside controls of its own task and vocabulary
        assert number.control == (i % 6 > 0)
        assert number.metric.split("/")[-3:] == numbers[i - i % 6].metric.split("/")[-3:]
        assert not number.control or number.value == (result.metrics[number.metric] if i % 6 == 5 else 0.0)
    assert [row["n_support"] for row in result.rows if row["task"] == 2] == [2] * 180


def test_rows_say_where_the_answer_was_told(data):
    model = Reader(data.tokenizer)
    result = run(model, data, replace(SMALL, n_row=3, vocabularies=["open"], noise=[900]))
    text = torch.cat([ids for _, ids in model.told], dim=1).tolist()
    for row in result.rows:
        if row["condition"] == "on":
            document, (word,) = text[row["document"]], data.tokenizer.encode(" " + row["text"].split()[-1])
            assert document[len(document) - row["since"] - 1] == word


def test_documents_hold_the_noise_asked_for_and_stories_of_their_own_words(data):
    model = Reader(data.tokenizer)
    result = run(model, data, replace(SMALL, n_row=3, vocabularies=["open"], noise=[900]))
    text = torch.cat([ids for _, ids in model.told], dim=1).tolist()
    for document in text:
        assert 900 <= sum(token in data.noise for token in document) < 1300
    kept = set(data.task.words(np.random.default_rng(0), 200, "evaluation"))
    trained = set(data.task.words(np.random.default_rng(0), 400, "train"))
    told = set(data.tokenizer.decode([t for t in text[0] if t not in data.noise]).replace(".", " ").split())
    assert told & kept
    assert not told & trained
    asked = {row["text"] for row in result.rows if row["condition"] == "unseen" and row["document"] == 0}
    assert not {word for q in asked for word in q.replace("?", "").split()} & (told & kept)


def test_closed_vocabulary_is_that_of_training(data):
    model = Reader(data.tokenizer)
    run(model, data, replace(SMALL, vocabularies=["closed"]))
    words = set(data.tokenizer.decode([t for t in model.told[0][1][0].tolist() if t not in data.noise]).split())
    assert not words & set(data.task.words(np.random.default_rng(0), 200, "evaluation"))


def test_result_depends_on_nothing_but_seed_and_settings(data, result):
    before = torch.get_rng_state()
    assert run(Reader(data.tokenizer), data, replace(SMALL, n_row=1)).rows == result.rows
    assert run(Reader(data.tokenizer), data, replace(SMALL, seed=1)).rows != result.rows
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scope", ["sequence", "shared", None])
def test_runs_with_real_models_and_leaves_them_as_they_were(data, scope):
    memories = {} if scope is None else {"ltm": lambda d: LongTermMemory(d, 50, 8, 8, scope=scope, recency=4.0)}
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=2, d_model=16, segment_len=32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    settings = replace(SMALL, n_document=2, n_question=1, tasks=[1, 3], vocabularies=["open"])
    result = run(model, data, settings, done.append)
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Result.from_dict(result.to_dict()) == result
    assert set(plot(result)) == {"babi"}


def test_a_model_that_was_not_trained_on_stories_is_refused(data):
    with pytest.raises(ConfigError, match="recipe=babi"):
        run(Reader(data.tokenizer), SimpleNamespace(task=None, tokens=data.tokens), SMALL)


def test_nothing_to_summarise_gives_nothing():
    assert summarise([]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"tasks": [6]}, "tasks must be some of 1, 2, 3, 4, 5"),
        ({"vocabularies": ["half"]}, "vocabularies must be some of open, closed"),
        ({"noise": [100, 10]}, "ascending"),
        ({"n_question": 4}, "at most 3"),
        ({"split": "train"}, "never saw"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Babi(**settings)


def test_several_processes_find_what_one_does(data, result):
    def measure(share: Share = ALONE) -> Result:
        return run(Reader(data.tokenizer), data, SMALL, share=share)

    check_shares(measure, result)
