"""Associative recall, with hand-made models of known memory and a recomputation of what they were told."""

import random

import numpy as np
import pytest
import torch

from experiments import associative_recall
from experiments.associative_recall import LABELS, AssociativeRecall, plot, run, summarise
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum
from memlm.data.stream import TrainingBatches
from memlm.data.tasks.mqar import MQAR
from memlm.data.tasks.pairs import Pairs
from memlm.data.tasks.sorting import Sorting
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from tests.experiments.shares import check_shares
from tests.experiments.symbol_models import Fake, real_model, symbol_data

SEGMENT_LEN = 16
SMALL = AssociativeRecall(n_pair=12, n_token=64, n_document=4, n_row=3)  # pairs end in the middle of a segment


@pytest.fixture(scope="module")
def data():
    return symbol_data(400, MQAR)


class Remembers(Fake):
    """Recalls the first pair of its memory, at an even place, whose key is the last token; cannot look around."""

    def next_token(self, text, memory):
        return self.find(text[-1], memory)

    def find(self, key, memory):
        for place in range(0, len(memory) - 1, 2):
            if memory[place] == key:
                return memory[place + 1]
        return 0


class Attends(Remembers):
    """Sees its segment and never looks into memory."""

    def next_token(self, text, memory):
        return self.find(text[-1], text)


class Cheat(Fake):
    """Knows all values beforehand."""

    def __init__(self, *args, documents):
        super().__init__(*args)
        self.values = {(int(k), int(v)) for d in documents for k, v in zip(d.key, d.value, strict=True)}
        self.answers = dict(self.values)

    def next_token(self, text, memory):
        return self.answers.get(text[-1], 0)


class Guesses(Fake):
    """Says a value that was told, whatever is asked."""

    def next_token(self, text, memory):
        return memory[1] if memory else 0


def documents_of(data, cfg, n_pair, n_token):
    stream = associative_recall._STREAM
    return [
        data.task.draw(np.random.default_rng([cfg.seed, stream, n_pair, d]), n_token, SEGMENT_LEN, n_pair)
        for d in range(cfg.n_document)
    ]


def rate(result, condition, kind=""):
    return result.metrics[f"accuracy{kind}/{condition}"]


def test_a_perfect_memory_answers_everything_across_and_its_controls_nothing(data):
    result = run(Remembers(402, SEGMENT_LEN), data, SMALL)
    assert rate(result, "on") == 1.0
    assert rate(result, "off") == rate(result, "wiped") == rate(result, "unseen") == 0.0
    assert rate(result, "swapped") < 0.1  # the same key may have the same value by chance alone
    assert rate(result, "on", "_inside") == 0.0
    n, n_inside = result.metrics["n/on"], result.metrics["n_inside/on"]
    assert n + n_inside == 48
    assert n_inside > 0
    assert [result.metrics[f"n/{name}"] for name in LABELS] == [n] * 5
    assert result.metrics["low/on"] < 1.0 == result.metrics["high/on"]
    assert result.metrics["chance"] == 1 / 200
    assert result.metrics["chance_told"] == 1 / 12
    nll = np.log(np.exp(5) + 401) - 5  # logit 5 at the right one of 402 tokens, 0 elsewhere
    assert result.metrics["nll/on"] == pytest.approx(nll, rel=1e-5)
    assert result.metrics["nll/off"] == pytest.approx(nll + 5, rel=1e-5)


def test_attention_alone_answers_inside_a_segment_only(data):
    result = run(Attends(402, SEGMENT_LEN), data, SMALL)
    assert rate(result, "on", "_inside") == rate(result, "off", "_inside") == 1.0
    assert rate(result, "unseen", "_inside") == 0.0
    assert [rate(result, name) for name in LABELS] == [0.0] * 5


def test_controls_expose_foreknowledge_and_guesses(data):
    documents = documents_of(data, SMALL, 12, 64)
    cheat = run(Cheat(402, SEGMENT_LEN, documents=documents), data, SMALL)
    assert min(rate(cheat, name) for name in ("on", "off", "wiped", "swapped")) > 0.8  # a key may have two values
    settings = AssociativeRecall(n_pair=8, n_token=64, n_document=40)
    guess = run(Guesses(402, SEGMENT_LEN), data, settings)
    expected = guess.metrics["chance_told"]
    for name in ("on", "unseen"):
        assert guess.metrics[f"low/{name}"] < expected < guess.metrics[f"high/{name}"]
    assert rate(guess, "off") == 0.0


@pytest.mark.parametrize(("n_row", "scope"), [(1, "sequence"), (3, "sequence"), (8, "shared")])
def test_what_is_told_recomputed_from_the_tokens_fed(data, n_row, scope):
    settings = AssociativeRecall(n_pair=[3, 12], n_token=60, n_document=5, n_row=n_row, seed=2)
    model = Remembers(402, SEGMENT_LEN, scope)
    result = run(model, data, settings)
    texts = []  # put together from the calls that write
    for state, ids in model.told:
        assert ids.shape[0] <= (1 if scope == "shared" else n_row)
        assert ids.shape[1] == SEGMENT_LEN
        if not state[0][0]:
            batch = [[] for _ in ids]
            texts += batch
        for text, row, (memory, opened) in zip(batch, ids.tolist(), state, strict=True):
            assert (memory, opened) == (text, [])  # one pass, and a fresh context at every segment
            text += row
    assert [len(text) for text in texts] == [64] * 10  # rounded up to whole segments
    assert result.metadata["n_token"] == 64
    for i, text in enumerate(texts):
        n_pair, document = settings.n_pairs[i // 5], i % 5
        rows = [row for row in result.rows if (row["n_pair"], row["document"]) == (n_pair, document)]
        assert len(rows) == 5 * n_pair
        for row in rows:
            told = 2 * row["pair"]
            place = told + row["gap"]
            assert text[place : place + 2] == text[told : told + 2]
            assert place >= 2 * n_pair
            assert row["across"] == (told // SEGMENT_LEN != place // SEGMENT_LEN)
            if row["condition"] == "on":
                assert row["correct"] == row["across"]
    again = run(Remembers(402, SEGMENT_LEN), data, AssociativeRecall([3, 12], 60, 5, 2, n_row=4))
    assert again.rows == result.rows


def test_rates_intervals_and_suffixes_by_hand():
    def row(condition, across, correct, n_pair=2):
        return {"condition": condition, "n_pair": n_pair, "document": 0, "pair": 0, "gap": 4, "n_value": 50,
                "across": across, "correct": correct, "nll": 2.0 * correct}  # fmt: skip

    rows = [row("on", True, True)] * 3 + [row("on", True, False), row("on", False, True), row("off", True, False)]
    metrics = summarise(rows, 512)
    assert (metrics["accuracy/on"], metrics["n/on"], metrics["nll/on"]) == (0.75, 4, 1.5)
    assert (metrics["low/on"], metrics["high/on"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert (metrics["accuracy_inside/on"], metrics["n_inside/on"]) == (1.0, 1)
    assert "accuracy_inside/off" not in metrics
    assert (metrics["chance"], metrics["chance_told"]) == (0.02, 0.5)
    two = summarise([*rows, row("on", True, False, n_pair=5)], 512)
    assert two["accuracy/on"] == two["accuracy/on/5"] == 0.0
    assert two["accuracy/on/2"] == 0.75
    assert two["chance_told"] == 0.2
    assert (metrics["state_bytes"], metrics["held/on"], metrics["pairs_per_kb/on"]) == (512, 0, 0)
    assert summarise([], 512) == {}


def answers(n_pair, on, **controls):
    """100 answers under each condition, of which so many are right."""
    right = {"on": on, **dict.fromkeys(("off", "wiped", "swapped", "unseen"), 0)} | controls
    return [
        {"condition": name, "n_pair": n_pair, "document": i, "pair": 0, "gap": 4, "n_value": 50, "across": True,
         "correct": i < k, "nll": 0.0}
        for name, k in right.items() for i in range(100)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "held", "strict"),
    # By hand: the interval of 90 of 100 begins at 83 %, that of 97 at 91.5 %.
    [
        (answers(1, 100, unseen=100) + answers(2, 97) + answers(4, 90) + answers(8, 89), 4, 2),
        (answers(1, 100) + answers(2, 80) + answers(4, 93), 4, 1),  # the largest, whatever lies below
        (answers(1, 100, off=97) + answers(2, 100, wiped=97) + answers(4, 100, swapped=97), 0, 0),  # it is not memory
        (answers(1, 89), 0, 0),
        (answers(1, 100, unseen=100) + answers(2, 60), 1, 1),  # the only value told is right whatever is asked
        (answers(16, 100), 16, 16),
    ],
)
def test_pairs_are_held_from_90_percent_on_and_above_the_controls(rows, held, strict):
    metrics = summarise(rows, 512)
    assert (metrics["held/on"], metrics["held_strict/on"]) == (held, strict)
    assert metrics["pairs_per_kb/on"] == 2 * held
    assert metrics["censored/on"] == (held == rows[-1]["n_pair"])
    assert np.isnan(summarise(rows, 0)["pairs_per_kb/on"])


@pytest.mark.parametrize("n_held", [0, 3, 8])
def test_a_memory_of_few_pairs_holds_so_many(n_held):
    class Holds(Remembers):
        def find(self, key, memory):
            told = [i for i in range(0, len(memory), 2) if memory[i] != task.blank][:n_held]
            return next((memory[i + 1] for i in told if memory[i] == key), 0)

    data = symbol_data(100, Pairs)
    task = data.task
    result = run(Holds(102, SEGMENT_LEN), data, AssociativeRecall(n_pair=[1, 2, 4, 8, 16], n_token=64, n_document=30))
    held = [n for n in (1, 2, 4, 8) if n <= n_held]
    assert result.metrics["held/on"] == max(held, default=0)
    assert result.metrics["state_bytes"] == 256
    assert all(row["across"] for row in result.rows)
    assert {row["gap"] // SEGMENT_LEN for row in result.rows} >= {0, 1, 2, 3}
    for n_pair in (1, 2, 4, 8, 16):
        assert result.metrics[f"n/on/{n_pair}"] == 30 * n_pair
        rate = result.metrics[f"accuracy/on/{n_pair}"]
        assert rate >= min(n_held / n_pair, 1) - 1e-9  # told keys may come again in later segments, with their values
    (entry, *_) = result.metadata["headline"]
    assert entry["metric"] == "held/on"
    assert "pairs held at 90 %" in plot(result)["accuracy_by_pairs"].axes[0].get_title(loc="left")


def test_documents_of_evaluation_are_none_of_training(data):
    node = {"_target_": "memlm.data.tasks.mqar.MQAR"}
    phases = [{"steps": 3, "n_row": 2, "n_segment": 4, "task": {"n_pair": 12}}] * 2
    batches = TrainingBatches(data.train, SEGMENT_LEN, 0, Curriculum(phases, node), data.task, 6, seed=0)
    trained = {tuple(row[:24]) for step in range(6) for row in batches[step].ids.tolist()}
    model = Remembers(402, SEGMENT_LEN)
    run(model, data, AssociativeRecall(n_pair=12, n_token=64, n_document=6, seed=0))
    evaluated = {tuple(row) for state, ids in model.told if not state[0][0] for row in ids.tolist()}
    assert len(trained) == 12
    assert not {pairs[:16] for pairs in trained} & evaluated


@pytest.mark.parametrize("memory", ["none", "stm", "ltm", "shared"])
def test_a_real_model_is_left_as_it_was_and_the_run_repeats(data, memory):
    model = real_model(402, memory, SEGMENT_LEN)
    model.train()
    model.layers[0].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    shares = []
    first, second = run(model, data, SMALL, progress=shares.append), run(model, data, SMALL)
    assert first == second == Result.from_dict(first.to_dict())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    nll = {name: first.metrics[f"nll/{name}"] for name in LABELS}
    if memory == "none":
        assert nll["on"] == nll["off"] == nll["wiped"] == nll["swapped"]
    else:
        assert len({nll["on"], nll["off"], nll["swapped"]}) == 3
    # the same as the model says of the whole document in one call with its contexts marked
    model.eval()
    document = documents_of(data, SMALL, 12, 64)[1]
    with torch.no_grad():
        breaks = torch.tensor([[False, True, True, True]])
        logits = model(torch.from_numpy(document.tokens)[None], breaks=breaks).logits[0]
    expected = torch.nn.functional.cross_entropy(
        logits[document.place], torch.from_numpy(document.value), reduction="none"
    )
    found = [row["nll"] for row in first.rows if (row["condition"], row["document"]) == ("on", 1)]
    assert found == pytest.approx(expected.tolist(), rel=1e-3)


def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Remembers(402, SEGMENT_LEN), data, SMALL, share=share)

    check_shares(measure, measure())


def test_headline_names_metrics_that_are_there_and_its_controls(data):
    result = run(Remembers(402, SEGMENT_LEN), data, AssociativeRecall([3, 12], 64, 4))
    headline = result.metadata["headline"]
    assert headline[0]["metric"] == "held/on"
    assert "accuracy/on" in {entry["metric"] for entry in headline if not entry["control"]}
    for entry in headline:
        assert all(entry[key] is None or entry[key] in result.metrics for key in ("metric", "low", "high", "n"))
    controls = {entry["metric"] for entry in headline if entry["control"]}
    assert controls == {f"accuracy/{name}" for name in LABELS if name != "on"} | {"chance", "chance_told"}
    assert "accuracy/on/3" in {entry["metric"] for entry in headline}


def test_figures(data):
    result = run(Remembers(402, SEGMENT_LEN), data, AssociativeRecall([4, 12], 64, 6))
    figures = plot(result)
    assert set(figures) == {"accuracy_by_pairs", "accuracy_by_gap"}
    for figure in figures.values():
        (axes,) = figure.axes
        drawn = {bar.get_label(): bar[0] for bar in axes.containers}
        assert set(drawn) == set(LABELS.values())
        assert set(drawn["memory on"].get_ydata()) == {1.0}
        assert set(drawn["reads off"].get_ydata()) == {0.0}
        assert "a guess among all values" in [line.get_label() for line in axes.get_lines()]
    assert list(figures["accuracy_by_pairs"].axes[0].containers[0][0].get_xdata()) == [4, 12]
    gaps = [row["gap"] for row in result.rows if row["across"] and row["n_pair"] == 12]
    x = figures["accuracy_by_gap"].axes[0].containers[0][0].get_xdata()
    assert min(gaps) <= min(x) < max(x) <= max(gaps)
    assert plot(Result("associative_recall", {})) == {}


def test_models_and_settings_that_cannot_work_are_refused_in_a_sentence(data):
    for other in (symbol_data(8, Sorting), object()):
        with pytest.raises(ConfigError, match="recipe=mqar"):
            run(Remembers(402, SEGMENT_LEN), other, SMALL)
    with pytest.raises(ConfigError, match="never told"):
        run(Remembers(42, SEGMENT_LEN), symbol_data(40, MQAR), SMALL)
    for settings, told in (
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"n_pair": []}, "n_pair must be"),
        ({"n_pair": [0, 4]}, "n_pair must be"),
        ({"n_pair": 64, "n_token": 255}, "at least 4 times"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            AssociativeRecall(**settings)


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=associative_recall"], "evaluate").associative_recall)
    assert node.pop("_target_") == "experiments.associative_recall.AssociativeRecall"
    assert AssociativeRecall(**node | {"n_pair": list(node["n_pair"])}) == AssociativeRecall()
    assert set(node) == set(AssociativeRecall.__dataclass_fields__)
