"""Modern facts, with hand-made models that remember, cheat or forget, and the file of facts read on its own."""

import csv
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from experiments import modern_facts
from experiments.modern_facts import experiment
from experiments.modern_facts.experiment import CONDITIONS, HEADLINE, ModernFacts, look, run, summarise
from experiments.modern_facts.facts import CUES, FACTS, check, lay_out, load
from experiments.modern_facts.figures import plot
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.memory.delta import DeltaMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.ltm import LongTermMemory
from memlm.memory.slots import Slots
from memlm.memory.stm import ShortTermMemory
from memlm.models.lmcode import LMCode
from tests.experiments.shares import check_shares

pytestmark = pytest.mark.slow

SEGMENT_LEN = 32
SMALL = ModernFacts(n_document=3, distance=60, n_row=2)


def file_rows():
    with open(FACTS, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Data:
    """A text with some of the values, near a word of their cue and far from any."""

    def __init__(self, kind="word", with_facts=True):
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("bcdfgh"), size=6)) for _ in range(60)]
        filler = {split: " " + " ".join(rng.choice(words, size=600)) for split in ("train", "val", "test")}
        known = " Guido van Rossum made Python." + filler["train"] + " In 2007, something else." + filler["train"]
        vocabulary = " ".join(f" {text}" for row in file_rows() for text in row.values()) * with_facts
        self.tokenizer = train_tokenizer(kind, [filler["val"] + filler["test"] + known + vocabulary + ". ? '"], 3000)
        self.splits = {}
        for split, text in {**filler, "train": known}.items():
            tokens = np.array(self.tokenizer.encode(text), dtype=np.int32)
            self.splits[split] = TokenizedCorpus(tokens, np.array([0, len(tokens)]))

    def tokens(self, split):
        return self.splits[split]


@pytest.fixture(scope="module")
def data():
    return Data()


@pytest.fixture
def few(monkeypatch):
    """A fifth of the facts, which is faster; the first two of them stand in the training text."""
    rows = file_rows()[:30]
    for module in (modern_facts.facts, experiment):
        monkeypatch.setattr(module, "rows_of_file", lambda: rows)
    return len(rows)


class Remembered(Slots):
    """Stands for what `Fake` remembers, which has slots."""

    def __init__(self, scope):
        super().__init__()
        self.scope = scope


class Fake(nn.Module):
    """Remembers all tokens of a row; knows which cues ask for the same, and recalls what followed one of them."""

    def __init__(self, data, scope="sequence", cues=tuple(CUES)):
        super().__init__()
        self.n_vocab, self.segment_len = data.tokenizer.vocab_size, SEGMENT_LEN
        self.memory = {"fake": [Remembered(scope)]}
        items = load(data.tokenizer)
        self.same = {item.true[cue].cue: item.true[""].cue for item in items for cue in cues}
        self.texts = []

    def absorb(self, ids, state=None, donate=False):
        assert not torch.is_grad_enabled()
        assert not self.training
        rows = [[] for _ in ids] if state is None else state
        return [row + more for row, more in zip(rows, ids.tolist(), strict=True)]

    def new_context(self, state, donate=False):
        return [tuple(row) for row in state]

    def wipe(self, state):
        return [() for _ in state]

    def forward(self, ids, state=None, read=True, write=True, logits=True, donate=False):
        assert not write
        assert all(isinstance(row, tuple) for row in state)  # a fresh context
        out = torch.zeros(*ids.shape, self.n_vocab)
        weights = torch.zeros(*ids.shape, 2)
        for i, (row, memory) in enumerate(zip(ids.tolist(), state, strict=True)):
            told = None
            for t in range(1, len(row) + 1):
                if tuple(row[:t]) in self.same:
                    cue = self.same[tuple(row[:t])]
                    told = self.recall(cue, memory if read else ()), t
                    weights[i, t - 1] = torch.tensor([0.5, 0.25]) * bool(told[0])
                if told is not None and t - told[1] < len(told[0]):
                    out[i, t - 1, told[0][t - told[1]]] = 5.0
        return SimpleNamespace(logits=out, reads={"fake/0": SimpleNamespace(weights=weights)})

    def recall(self, cue, memory):
        """What follows the cue in memory."""
        for place in range(len(memory) - len(cue)):
            if memory[place : place + len(cue)] == cue:
                return memory[place + len(cue) : place + len(cue) + 12]
        return ()


class Cheat(Fake):
    """Has learned some of the true values by heart."""

    def __init__(self, data, numbers):
        super().__init__(data)
        items = load(data.tokenizer)
        self.answers = {item.true[""].cue: item.true[""].answer for item in items if item.number in numbers}

    def recall(self, cue, memory):
        return self.answers.get(cue) or super().recall(cue, memory)


def rates(result, kind=""):
    return {condition: result.metrics[f"exact_match{kind}/{condition}"] for condition in CONDITIONS}


MEMORY = dict.fromkeys(CONDITIONS, 0.0) | {"on": 1.0, "counterfactual": 1.0}


# --- the facts --------------------------------------------------------------------------------------------------------


def test_the_file_has_a_hundred_facts_with_all_that_is_needed():
    rows = file_rows()
    assert len(rows) >= 100
    told = {f"{row['cue']} {row['value']}" for row in rows}
    assert {"The first iPhone was released in 2007", "Python was created by Guido van Rossum"} <= told
    values = [row[column] for row in rows for column in ("value", "counterfactual")]
    assert len(set(values)) == len(values)  # no answer is right for two questions, and no false one for any
    cues = [row[column] for row in rows for column in ("cue", "paraphrase", "question")]
    assert len(set(cues)) == len(cues)
    for row in rows:
        assert all(text and text == text.strip() and "  " not in text for text in row.values())
        for name in ("value", "counterfactual"):
            asked = f"{row['cue']} {row['paraphrase']} {row['question']}"
            assert not re.search(rf"\b{re.escape(row[name])}\b", asked)
            # false values look like true ones: a rate that differs is no matter of form
            assert row["value"].isdigit() == row[name].isdigit()
            assert abs(len(row["value"].split()) - len(row[name].split())) <= 1
        assert "?" in row["question"]
        assert "?" not in row["cue"] + row["paraphrase"]


@pytest.mark.parametrize("kind", ["word", "bpe", "char", "byte"])
def test_tokens_of_cue_and_answer_are_those_of_the_sentence(kind):
    data = Data(kind)
    items = load(data.tokenizer)
    assert len(items) == len(file_rows())
    for item, row in zip(items, file_rows(), strict=True):
        for name, facts in (("value", item.true), ("counterfactual", item.false)):
            for cue, column in zip(CUES, ("cue", "paraphrase", "question"), strict=True):
                assert data.tokenizer.encode(f" {row[column]} {row[name]}.") == list(facts[cue].tokens)
                assert data.tokenizer.decode(facts[cue].answer) == f" {row[name]}."
            assert facts[""].text == f"{row['cue']} {row[name]}."


def test_values_near_a_word_of_their_cue_are_found_in_the_training_text(data):
    in_text, near = check(load(data.tokenizer), data)
    texts = [row["cue"] for row in file_rows()]
    assert {texts[i] for i in in_text} == {"Python was created by", "The first iPhone was released in"}
    assert {texts[i] for i in near} == {"Python was created by"}  # "In 2007, something else" says nothing of it


def test_part_of_a_word_is_no_value():
    data = Data("bpe")
    for text, n_in_text, n_near in [
        (" The iPhone came in 20071.", 0, 0), (" The iPhone-2007 came.", 1, 1), (" iPhones and 2007", 1, 0),
        (" 2007" + " x" * 150 + " iPhone", 1, 0), (" 2007 first" + " x" * 150 + " nothing", 1, 1),
    ]:  # fmt: skip
        tokens = np.array(data.tokenizer.encode(text), dtype=np.int32)
        data.splits["train"] = TokenizedCorpus(tokens, np.array([0, len(tokens)]))
        in_text, near = check(load(data.tokenizer), data)
        assert (len(in_text), len(near)) == (n_in_text, n_near), text


def test_levels_of_cues():
    assert experiment.level("Python was created by") == "trained"
    assert experiment.level("Who created Python?") == "trained"
    assert experiment.level("The one who created Python is") == "new_phrasing"  # held out from training
    assert experiment.level("Chemists write gold as") == "new_phrasing"


# --- documents and controls -------------------------------------------------------------------------------------------


def test_twins_differ_in_the_values_alone(data):
    items = load(data.tokenizer)[:9]
    passage = data.tokens("val").tokens
    twins = lay_out([0], items, Haystack(passage, [0]), SEGMENT_LEN, 1.0)
    gaps = []
    for document, facts in ((twins.true, [i.true[""] for i in items]), (twins.false, [i.false[""] for i in items])):
        text = document.tokens(0, 500).tolist()
        rest, gap, at = [], [], 0
        for i, fact in enumerate(facts):
            begin = document.begins[i]
            assert tuple(text[begin : document.end(i)]) == fact.tokens
            rest += text[at:begin]
            gap.append(begin - at)
            at = document.end(i)
        gaps.append(gap)
        haystack = [*rest, *text[at:]]
        assert haystack == twins.none.tokens(0, 500).tolist()[: len(haystack)]
        start = next(i for i in range(len(passage)) if passage[i : i + 20].tolist() == haystack[:20])
        assert haystack == passage[(start + np.arange(len(haystack))) % len(passage)].tolist()
    assert gaps[0] == gaps[1]
    assert len(set(gaps[0])) > 3


@pytest.mark.parametrize(("scope", "n_row"), [("sequence", 1), ("sequence", 3), ("shared", 3)])
def test_a_memory_recalls_what_was_told_true_or_false_and_nothing_else(few, data, scope, n_row):
    result = run(Fake(data, scope), data, ModernFacts(n_document=3, distance=60, n_row=n_row))
    for kind in CUES:
        assert rates(result, kind) == MEMORY
    assert result.metrics["n/on"] == few - 1  # one is flagged
    assert result.metrics["n_all/on"] == few
    assert (result.metrics["n_flagged_text"], result.metrics["n_flagged_known"]) == (1, 0)
    assert result.metrics["n_value_in_text"] == 2
    assert 0.85 < result.metrics["low/on"] < 1.0 == result.metrics["high/on"]
    assert result.metrics["chance"] == pytest.approx(3 / few)
    assert {row["flag"] for row in result.rows if row["text"] == "Python was created by"} == {"text"}
    assert len(result.rows) == few * len(CONDITIONS) * len(CUES)
    again = run(Fake(data), data, SMALL)
    assert again.rows == result.rows
    assert again.metadata["similarity"] == result.metadata["similarity"]


def test_what_a_model_knows_by_heart_is_flagged_and_left_out(few, data):
    result = run(Cheat(data, {3, 5, 8}), data, SMALL)
    assert result.metrics["n_flagged_known"] == 3
    assert {row["fact"] for row in result.rows if row["flag"] == "known"} == {3, 5, 8}
    assert rates(result) == MEMORY
    assert result.metrics["exact_match_all/off"] == pytest.approx(3 / few)
    # what it holds to against what it was told
    assert result.metrics["exact_match_all/true_after_false"] == pytest.approx(3 / few)


def test_controls_expose_what_any_text_in_memory_brings_about(few, data):
    class Primed(Cheat):
        """Says what it knows by heart once it remembers anything at all."""

        def recall(self, cue, memory):
            return self.answers[cue] if memory else ()

    result = run(Primed(data, range(few)), data, SMALL)
    everything = {"on": 1.0, "swapped": 1.0, "unseen": 1.0, "true_after_false": 1.0}
    assert rates(result) == dict.fromkeys(CONDITIONS, 0.0) | everything
    assert result.metrics["exact_match/control"] == 1.0


def test_a_model_that_knows_all_facts_has_nothing_to_show(few, data):
    result = run(Cheat(data, range(few)), data, SMALL)
    assert result.metrics["n_flagged_known"] == few - 1
    assert result.metadata["headline"] == []
    assert "recall" not in plot(result)


def test_a_memory_without_paraphrases_fails_them_alone(few, data):
    result = run(Fake(data, cues=("",)), data, SMALL)
    assert rates(result) == MEMORY
    assert not any(rates(result, "_paraphrase").values())
    assert not any(rates(result, "_question").values())


def test_questions_find_something_from_the_moment_the_fact_is_told(few, data):
    result = run(Fake(data), data, ModernFacts(n_document=3, distance=60, facts_per_segment=1.0))
    points = result.metadata["similarity"]
    assert {point["model"] for point in points} == {"trained"}  # this one cannot be built anew
    for point in points:
        assert (point["top"], point["mass"]) == ((0.5, 0.75) if point["told"] else (0.0, 0.0))
    places = sorted({point["place"] for point in points})
    for place in places:
        n = sum(point["n"] for point in points if point["place"] == place)
        assert few - 3 <= n <= few  # all but one that each document is about to tell
    assert places[-1] == result.metadata["length"]
    assert [p["n"] for p in points if p["place"] == places[-1]] == [few]  # all told
    told = [point["n"] for point in sorted(points, key=lambda p: p["place"]) if point["told"]]
    assert told == sorted(told)
    assert len(set(told)) > 1


def test_look_takes_the_end_of_each_cue_and_means_over_memories():
    first = torch.zeros(2, 3, 2)
    first[0, 1], first[1, 2] = torch.tensor([0.1, 0.3]), torch.tensor([0.5, 0.0])
    second = torch.zeros(2, 3, 1)
    second[0, 1], second[1, 2] = 0.7, 0.1

    def model(ids, **_):
        assert ids.shape == (2, 3)
        reads = {"a/0": SimpleNamespace(weights=first), "b/0": SimpleNamespace(weights=second)}
        return SimpleNamespace(reads=reads)

    model.parameters = lambda: iter([torch.empty(0)])
    facts = [SimpleNamespace(cue=(1, 2)), SimpleNamespace(cue=(1, 2, 3))]
    (top, mass), (other_top, other_mass) = look(model, None, facts)
    assert (top, mass) == pytest.approx((0.5, 0.55))
    assert (other_top, other_mass) == pytest.approx((0.3, 0.3))


def test_rates_by_hand():
    def row(condition, fact, correct, cue="", flag=""):
        return {
            "condition": condition, "cue": cue, "fact": fact, "document": fact // 2, "correct": correct,
            "nll": float(fact), "flag": flag, "value_in_text": fact == 1,
            "level": "trained" if fact else "new_phrasing",
        }  # fmt: skip

    rows = [row("on", i, i != 1) for i in range(3)] + [row("on", 3, False, flag="known")]
    rows += [row("off", 0, False), row("swapped", 0, True), row("on", 0, True, cue="_question")]
    metrics = summarise(rows)
    assert metrics["exact_match/on"] == pytest.approx(2 / 3)
    assert (metrics["low/on"], metrics["high/on"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert metrics["nll/on"] == 1.0
    assert metrics["exact_match_all/on"] == 0.5
    assert metrics["exact_match_question/on"] == metrics["exact_match_new_phrasing/on"] == 1.0
    assert metrics["n_new_phrasing/on"] == 1  # only other cues than the sentence itself
    assert "exact_match_trained/on" not in metrics
    assert metrics["exact_match/control"] == metrics["exact_match/swapped"] == 1.0
    assert metrics["chance"] == 0.5
    assert (metrics["n_flagged_text"], metrics["n_flagged_known"], metrics["n_value_in_text"]) == (0, 1, 1)


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["none", "ltm", "stm", "apart", "delta", "knn"])
def test_any_memory_runs_and_the_model_is_left_as_it_was(data, memory, monkeypatch):
    class Apart(ShortTermMemory):
        """One state for all layers."""

        around = "layers"

        def write(self, segment, state):
            hidden = segment.hidden
            return super().write(segment._replace(hidden=hidden.mean(dim=2)), state)

    memories = {
        "none": {}, "ltm": {"ltm": lambda d: LongTermMemory(d, n_slot=32, d_key=8, d_value=8, top_k=4)},
        "stm": {"stm": lambda d: ShortTermMemory(d, n_slot=4, n_head=2)},
        "apart": {"apart": lambda d: Apart(d, n_slot=4, n_head=2)},
        "delta": {"delta": lambda d: DeltaMemory(d, d_key=4, d_value=4)},
        # in the softmax of attention, so that it does not tell what it reads
        "knn": {"knn": lambda d, sizes: KnnMemory(d, sizes, n_token=32, top_k=4, norm_keys=False, gate=None)},
    }[memory]  # fmt: skip
    rows = file_rows()[:8]
    for module in (modern_facts.facts, experiment):
        monkeypatch.setattr(module, "rows_of_file", lambda: rows)

    def make(seed):
        torch.manual_seed(seed)
        return LMCode(
            data.tokenizer.vocab_size, memories, n_layer=2, n_head=2, d_model=16, segment_len=SEGMENT_LEN, overlap=4
        )

    model = make(0)
    model.config, model.tokenizer = {"seed": 0}, data.tokenizer
    monkeypatch.setattr(experiment, "untrained", lambda model: make(1).eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    settings = ModernFacts(n_document=2, distance=40)
    done = []
    result = run(model, data, settings, done.append)
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert run(model, data, settings).to_dict() == result.to_dict()
    if memory != "none":
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert states[:2] == after[:2]
    else:
        assert rates(result)["on"] == rates(result)["off"]
    slots = memory not in ("none", "delta", "knn")  # and tells what is read of them
    assert {point["model"] for point in result.metadata["similarity"]} == ({"trained", "untrained"} if slots else set())
    figures = plot(result)
    assert set(figures) == ({"recall", "similarity"} if slots else {"recall"})
    assert {line["metric"] for line in HEADLINE} <= set(result.metrics)
    for line in result.metadata["headline"]:
        assert {line[key] for key in ("low", "high", "n")} <= set(result.metrics)
    json_rows = [{key: value for key, value in row.items() if isinstance(value, dict | list)} for row in result.rows]
    assert not any(json_rows)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"distance": -1}, "distance must be at least 0"),
        ({"facts_per_segment": 0.0}, "facts_per_segment must be positive"),
        ({"split": "train"}, "split must be 'val' or 'test'"),
        ({"n_row": 0}, "n_row must be at least 1"),
    ],
)
def test_impossible_settings_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModernFacts(**settings)


def test_a_tokenizer_that_cannot_write_the_facts_is_refused():
    data = Data(with_facts=False)
    with pytest.raises(ConfigError, match=re.escape("the tokenizer can write 0 of the modern facts")):
        run(Fake(data), data, SMALL)


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=modern_facts"], "evaluate").modern_facts)
    assert node.pop("_target_") == "experiments.modern_facts.ModernFacts"
    assert ModernFacts(**node) == ModernFacts()
    assert set(node) == set(ModernFacts.__dataclass_fields__)


@pytest.mark.slow
def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Fake(data), data, SMALL, share=share)

    check_shares(measure, measure())
