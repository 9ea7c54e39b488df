"""Retention, with memories of known half-life."""

import math
import random
from dataclasses import replace

import pytest
import torch

from experiments.retention import Retention, draw, half_life, plot, run, summarise
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
from tests.experiments.test_needle import SEGMENT_LEN, Cheat, Data, Fake

pytestmark = pytest.mark.slow

SMALL = Retention(n_document=3, n_fact=4, n_write=[0, 1, 3, 7, 15], n_row=2)


@pytest.fixture(scope="module")
def data():
    return Data()


class Segments(Fake):
    """Holds what the last `n_held` segments told, and all that the one before told last."""

    def __init__(self, data, n_held):
        super().__init__(data.tokenizer.vocab_size)
        self.n_held = n_held

    def next_token(self, text, memory):
        n_segment = len(memory) // SEGMENT_LEN
        for place in range(len(memory) - 5):
            last = (place + 5) // SEGMENT_LEN  # where the fact ends
            if memory[place : place + 2] == text[:2] and n_segment - 1 - last < self.n_held:
                return memory[place + len(text)]
        return 0


@pytest.mark.parametrize("filler", ["text", "facts"])
@pytest.mark.parametrize(
    ("n_held", "expected"),
    # By hand: recall is 1 as long as fewer segments than n_held follow. Between 3 and 7 writes log(1 + writes) is log 4
    # to log 8, in whose middle lies the square root of 32.
    [
        (4, 32**0.5 - 1),
        (7, 32**0.5 - 1),
        (8, 128**0.5 - 1),
        (1, 2**0.5 - 1),
        (15, 128**0.5 - 1),
        (16, math.inf),
        (0, math.nan),
    ],
)
def test_a_memory_of_known_half_life(data, filler, n_held, expected):
    settings = replace(SMALL, n_document=4, n_fact=1, filler=filler)  # one fact: all is told in the last segment
    result = run(Segments(data, n_held), data, settings)
    metrics = result.metrics
    recalled = [float(n < n_held) for n in settings.n_write]
    assert [metrics[f"exact_match/on/{n}"] for n in settings.n_write] == recalled
    assert metrics["half_life"] == pytest.approx(expected, nan_ok=True)
    assert metrics["half_life_low"] == metrics["half_life_high"] == pytest.approx(expected, nan_ok=True) or n_held == 0
    censored = {0: math.nan, 16: 1.0}.get(n_held, 0.0)
    assert metrics["half_life_censored"] == pytest.approx(censored, nan_ok=True)
    assert (metrics["most_writes"], metrics["n_document"]) == (15, 4)
    assert metrics["exact_match/on"] == recalled[-1]
    for condition in CONDITIONS[1:]:
        assert [metrics[f"exact_match/{condition}/{n}"] for n in settings.n_write] == [0.0] * 5
    numbers = headline(result)
    assert (numbers[0].metric, numbers[0].n) == ("half_life", 4)
    assert "writes" in summary([result])


def test_older_facts_are_forgotten_first(data):
    result = run(Segments(data, 5), data, SMALL)
    on = [row for row in result.rows if row["condition"] == "on"]
    assert all(row["correct"] == (row["writes"] < 5) for row in on)
    assert {row["writes"] - row["n_write"] for row in on if row["fact"] == 3} == {0}  # the last is as old as it is said
    assert len({row["writes"] - row["n_write"] for row in on}) > 1


def test_a_model_that_knows_the_answers_anyway_has_no_half_life(data):
    documents, unseen, _ = draw(data, SMALL, SEGMENT_LEN, "text")
    facts = [fact for part in [*unseen, *(document.facts for document in documents)] for fact in part]
    metrics = run(Cheat(data.tokenizer.vocab_size, facts), data, SMALL).metrics
    assert metrics["exact_match/on/0"] == metrics["exact_match/on/15"] == metrics["exact_match/off/0"] == 1.0
    assert math.isnan(metrics["half_life"])


@pytest.mark.parametrize(
    ("recall", "expected"),
    [
        ([1.0, 0.5, 0.5], 1.0),
        ([0.8, 0.8, 0.0], math.exp((math.log(2) + math.log(4)) / 2) - 1),  # 0.4 is half-way from 0.8 to 0
        ([0.8, 0.6, 0.2], math.exp((math.log(2) + math.log(4)) / 2) - 1),
        ([1.0, 0.4, 1.0], math.exp(math.log(2) * 5 / 6) - 1),  # first
        ([1.0, 0.9, 0.6], math.inf),
        ([0.0, 0.0, 0.5], math.nan),
    ],
)
def test_half_life_by_hand(recall, expected):
    assert half_life([0, 1, 3], recall) == pytest.approx(expected, nan_ok=True)


def by_hand(life):
    """Rows of documents that recall all until some number of writes and then nothing; controls recall nothing."""
    return [
        {"filler": "text", "n_write": n, "document": i, "fact": k, "condition": condition, "straddles": False,
         "nll": 1.0, "stored": n == 0, "correct": condition == "on" and n < until}
        for condition in CONDITIONS for i, until in enumerate(life) for n in (0, 1, 3) for k in range(20)
    ]  # fmt: skip


def test_interval_over_documents():
    # Of two documents a resample has twice the first (1 in 4), both (half), or twice the second (1 in 4).
    metrics = summarise(by_hand([1, 4]))
    assert metrics["half_life"] == pytest.approx(1.0)  # half are lost at 1
    assert metrics["half_life_low"] == pytest.approx(2**0.5 - 1)
    assert metrics["half_life_high"] == math.inf
    assert metrics["half_life_censored"] == 0.0
    assert (metrics["stored/0"], metrics["stored/3"], metrics["stored"]) == (1.0, 0.0, 0.0)
    many = summarise(by_hand([1, 4] * 50))
    assert many["half_life_low"] > metrics["half_life_low"]
    assert many == summarise(by_hand([1, 4] * 50))


def test_what_is_told_read_back_from_the_tokens_fed(data):
    settings = replace(SMALL, n_document=5, n_row=5, filler=["text", "facts"], seed=3)
    model = Segments(data, 100)
    result = run(model, data, settings)
    (between,) = data.tokenizer.encode(" is")
    first = [i for i, (state, _) in enumerate(model.told) if not any(state)]
    assert len(first) == 2
    text, facts = (
        torch.cat([ids for _, ids in part], dim=1).tolist() for part in (model.told[: first[1]], model.told[first[1] :])
    )
    own = set(data.splits["val"].tokens.tolist())
    (length,) = {len(document) for document in text + facts}
    told = length - 15 * SEGMENT_LEN  # tokens in which the facts are told
    n_other = []
    for i, (plain, full) in enumerate(zip(text, facts, strict=True)):
        assert plain[:told][: told - SEGMENT_LEN] == full[: told - SEGMENT_LEN]  # the same until the last segment
        begins = [p - 2 for p, token in enumerate(plain) if token == between]
        assert len(begins) == 4
        assert told - SEGMENT_LEN < begins[-1] + 6 <= told
        rows = [row for row in result.rows if (row["document"], row["condition"], row["n_write"]) == (i, "on", 7)]
        tokens = [data.tokenizer.encode(f" {row['text']}") for row in rows if row["filler"] == "text"]
        assert [plain[p : p + 6] for p in begins] == [full[p : p + 6] for p in begins] == tokens
        assert {token for p, token in enumerate(plain) if not any(b <= p < b + 6 for b in begins)} <= own
        names = [tuple(full[p - 2 : p]) for p, token in enumerate(full) if token == between]
        assert len(names) == len(set(names))  # no fact is told twice
        n_other.append(len(names) - 4)
    assert 25 <= sum(n_other) / 5 <= 31  # two per segment, for 15 segments
    for name in ("exact_match/on", "n/on", "half_life"):
        assert result.metrics[name] == result.metrics[f"{name}/text" + ("" if name == "half_life" else "/15")]
    asked = {row["text"] for row in result.rows if row["condition"] == "unseen"}
    assert len(asked) == 20
    for fact in asked:
        name = data.tokenizer.encode(f" {fact}")[:2]
        assert not any(document[p : p + 2] == name for document in text + facts for p in range(length))


def test_result_depends_on_nothing_but_seed_and_settings(data):
    model, settings = Segments(data, 5), replace(SMALL, n_write=[0, 2])
    before = torch.get_rng_state(), random.getstate()
    first = run(model, data, settings)
    assert first.rows == run(model, data, replace(settings, n_row=3)).rows
    assert first.rows != run(model, data, replace(settings, seed=1)).rows
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize("scope", ["sequence", "shared", None])
def test_runs_with_real_models_and_leaves_them_as_they_were(data, scope):
    memories = {} if scope is None else {"ltm": lambda d: LongTermMemory(d, 100, 8, 8, scope=scope, importance="fifo")}
    torch.manual_seed(0)
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=2, d_model=16, segment_len=32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    result = run(model, data, replace(SMALL, n_fact=2, n_write=[0, 8], filler=["text", "facts"]), done.append)
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Result.from_dict(result.to_dict()) == result
    assert set(plot(result)) == {"retention_text", "retention_facts"}
    if scope != "sequence":  # a shared bank also holds other text
        assert not any(name.startswith("stored") for name in result.metrics)
    else:  # 100 slots are those of the last segments
        assert result.metrics["stored/text/8"] == 0.0 < result.metrics["stored/text/0"]


def test_figures(data):
    (figure,) = plot(run(Segments(data, 4), data, replace(SMALL, n_document=4, n_fact=1))).values()
    (axes,) = figure.axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    (star,) = (line for label, line in drawn.items() if label.startswith("half-life 5 "))
    assert star.get_xdata()[0] == pytest.approx(32**0.5 - 1)
    assert star.get_ydata()[0] == 0.5
    assert list(drawn["memory on"].get_ydata()) == [1, 1, 1, 0, 0]
    assert not any("held" in label for label in drawn)  # this memory does not tell
    (held,) = (line for line in plot(Result("retention", {}, by_hand([4, 4])))["retention"].axes[0].get_lines()
               if "still held" in line.get_label())  # fmt: skip
    assert list(held.get_ydata()) == [1, 0, 0]
    for n_held, words in ((0, "nothing recalled"), (20, "over 15 writes")):
        (figure,) = plot(run(Segments(data, n_held), data, replace(SMALL, n_document=4, n_fact=1))).values()
        assert words in figure.axes[0].get_title("left")
    assert plot(Result("retention", {})) == {}
    assert summarise([]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"n_write": [0]}, "n_write must be two or more"),
        ({"n_write": [1, 2]}, "from 0"),
        ({"n_write": [0, 4, 2]}, "ascending"),
        ({"filler": "noise"}, "filler must be one or several of text, facts"),
        ({"filler": []}, "filler must be"),
        ({"facts_per_segment": 0.0}, "facts_per_segment"),
        ({"split": "train"}, "never saw"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Retention(**settings)


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=retention"], "evaluate").retention)
    assert node.pop("_target_") == "experiments.retention.Retention"
    assert Retention(**node) == Retention()
    assert set(node) == set(Retention.__dataclass_fields__)


def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Segments(data, 5), data, SMALL, share=share)

    check_shares(measure, measure())
