"""Sorting, with hand-made models that count exactly, partly or not at all."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from experiments import sorting
from experiments.sorting import LABELS, Sorting, kendall, plot, run, summarise
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum
from memlm.data.stream import TrainingBatches
from memlm.data.tasks.mqar import MQAR
from memlm.data.tasks.sorting import Sorting as Task
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from tests.experiments.shares import check_shares
from tests.experiments.symbol_models import Fake, real_model, symbol_data

SEGMENT_LEN = 16
SMALL = Sorting(n_token=64, n_document=6, n_row=4)


@pytest.fixture(scope="module")
def data():
    return symbol_data(9, Task)  # eight to sort


class Counts(Fake):
    """Counts its memory exactly, and does not name a symbol twice."""

    reach = 10**9

    def __init__(self, task, segment_len, scope="sequence"):
        super().__init__(11, segment_len, scope)
        self.symbols = task.symbols.tolist()

    def next_token(self, text, memory):
        counts = {symbol: memory[-self.reach :].count(symbol) for symbol in self.symbols if symbol not in text}
        return max(counts, key=lambda symbol: (counts[symbol], -self.symbols.index(symbol)), default=0)


class Repeats(Fake):
    """Likes the same two symbols always."""

    def next_token(self, text, memory):
        return 3


def test_exact_counts_sort_exactly_and_controls_do_not(data):
    result = run(Counts(data.task, SEGMENT_LEN), data, SMALL)
    metrics = result.metrics
    assert metrics["accuracy/on"] == metrics["tau/on"] == metrics["exact/on"] == 1.0
    assert [metrics[f"n/{name}"] for name in LABELS] == [6] * 4
    assert metrics["exact_low/on"] < 1 == metrics["exact_high/on"]
    chance = sum(1 / k for k in range(1, 9)) / 8
    assert metrics["accuracy/chance"] == pytest.approx(chance)
    many = run(Counts(data.task, SEGMENT_LEN), data, Sorting(n_token=64, n_document=60)).metrics
    for name in ("off", "wiped"):  # always the symbol of the smallest number that is left
        assert many[f"accuracy/{name}"] == pytest.approx(chance, abs=0.08)
    for name in ("off", "wiped", "swapped"):
        assert abs(many[f"tau/{name}"]) < 0.2
        assert many[f"tau_low/{name}"] <= many[f"tau/{name}"] <= many[f"tau_high/{name}"]
        assert many[f"exact/{name}"] < 0.1


def test_counts_of_the_last_segment_alone_are_the_line_of_that_name(data):
    model = Counts(data.task, SEGMENT_LEN)
    model.reach = SEGMENT_LEN
    result = run(model, data, SMALL)
    assert result.metrics["accuracy/on"] == result.metrics["accuracy/last_segment"] < 1
    assert result.metrics["accuracy_low/on"] == result.metrics["accuracy_low/last_segment"]
    for row in result.rows:
        if row["condition"] == "on":
            assert row["correct"] == row["last_segment"]


@pytest.mark.parametrize(("n_row", "scope"), [(1, "sequence"), (4, "sequence"), (8, "shared")])
def test_what_is_told_recomputed_from_the_tokens_fed(data, n_row, scope):
    settings = Sorting(n_token=[20, 100], n_document=5, n_row=n_row, seed=3)
    model = Counts(data.task, SEGMENT_LEN, scope)
    result = run(model, data, settings)
    texts = []
    for state, ids in model.told:
        assert ids.shape[0] <= (1 if scope == "shared" else n_row)
        assert ids.shape[1] <= 4 * SEGMENT_LEN
        if not state[0][0] and not state[0][1]:
            batch = [[] for _ in ids]
            texts += batch
        for text, row, (memory, opened) in zip(batch, ids.tolist(), state, strict=True):
            assert memory + opened == text
            text += row
    assert [len(text) for text in texts] == [32] * 5 + [112] * 5  # whole segments
    assert result.metadata["lengths"] == [32, 112]
    symbols = data.task.symbols.tolist()
    for i, text in enumerate(texts):
        n_token, document = settings.n_tokens[i // 5], i % 5
        rows = [r for r in result.rows if (r["n_token"], r["document"], r["condition"]) == (n_token, document, "on")]
        expected = sorted(symbols, key=lambda s: (-text.count(s), symbols.index(s)))
        assert [row["count"] for row in rows] == [text.count(symbol) for symbol in expected]
        assert [row["tied"] for row in rows] == [[*map(text.count, symbols)].count(row["count"]) > 1 for row in rows]
        assert [row["place"] for row in rows] == list(range(8))
        assert [row["named"] for row in rows] == list(range(8))
    again = run(Counts(data.task, SEGMENT_LEN), data, Sorting([20, 100], 5, 3, n_row=3))
    assert again.rows == result.rows


def test_swapped_asks_for_the_order_of_another_sequence(data):
    result = run(Counts(data.task, SEGMENT_LEN), data, SMALL)
    own = {r["document"]: [] for r in result.rows}
    for row in result.rows:
        if row["condition"] == "swapped":
            own[row["document"]].append(row["named"])
    stream = sorting._STREAM
    orders = [data.task.draw(np.random.default_rng([0, stream, 64, d]), 64).order.tolist() for d in range(6)]
    for document, named in own.items():
        memory = orders[(document + 1) % 6]
        assert [orders[document][place] for place in named] == memory


def test_a_model_that_repeats_itself_still_names_every_symbol_once(data):
    result = run(Repeats(11, SEGMENT_LEN), data, SMALL)
    for document in range(6):
        named = [r["named"] for r in result.rows if (r["document"], r["condition"]) == (document, "on")]
        assert sorted(named) == list(range(8))
    assert result.metrics["accuracy/on"] == pytest.approx(1 / 8)  # its symbol is right at one place of eight
    assert result.metrics["exact/on"] == 0


def test_kendall_by_pairs():
    assert kendall([0, 1, 2, 3]) == 1
    assert kendall([3, 2, 1, 0]) == -1
    assert kendall([0, 2, 1]) == pytest.approx(1 / 3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = rng.permutation(9).tolist()
        pairs = [math.copysign(1, b - a) for a, b in combinations(places, 2)]
        assert kendall(places) == pytest.approx(sum(pairs) / len(pairs))


def test_means_and_intervals_by_hand():
    def rows(document, correct, named):
        fixed = {"condition": "on", "n_token": 10, "document": document, "count": 1, "nll": 1.0}
        return [
            fixed | {"place": k, "tied": k == 1, "correct": correct[k], "named": named[k], "last_segment": k == 0}
            for k in range(2)
        ]

    metrics = summarise(rows(0, [True, True], [0, 1]) + rows(1, [True, False], [1, 0]))
    assert metrics["accuracy/on"] == 0.75
    assert (metrics["accuracy_low/on"], metrics["accuracy_high/on"]) == (0, 1)  # of two documents: all or nothing
    four = summarise([row for d in range(4) for row in rows(d, [True, d > 0], [0, 1])])
    half = 3.182 * 0.125  # Student's t with three degrees of freedom, standard error 0.25 / 2
    assert four["accuracy/on"] == 0.875
    assert (four["accuracy_low/on"], four["accuracy_high/on"]) == pytest.approx((0.875 - half, 1))
    assert (metrics["tau/on"], metrics["exact/on"], metrics["n/on"]) == (0, 0.5, 2)
    assert metrics["accuracy_untied/on"] == 1.0  # the first places
    assert metrics["accuracy/last_segment"] == 0.5
    assert metrics["accuracy/chance"] == 0.75
    assert summarise([]) == {}


def test_documents_of_evaluation_are_none_of_training(data):
    phases = [{"steps": 3, "n_row": 2, "n_segment": 5, "task": {}}] * 2
    curriculum = Curriculum(phases, {"_target_": "memlm.data.tasks.sorting.Sorting"})
    batches = TrainingBatches(data.train, SEGMENT_LEN, 0, curriculum, data.task, 6, seed=0)
    trained = {tuple(row[:64]) for step in range(6) for row in batches[step].ids.tolist()}
    model = Counts(data.task, SEGMENT_LEN)
    run(model, data, SMALL)
    evaluated = {tuple(row) for state, ids in model.told if not state[0][1] for row in ids.tolist()}
    assert len(evaluated) == 6
    assert not trained & evaluated


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["none", "stm", "ltm", "shared"])
def test_a_real_model_is_left_as_it_was_and_answers_as_in_training(data, memory):
    model = real_model(11, memory, SEGMENT_LEN)
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    shares = []
    first, second = run(model, data, SMALL, progress=shares.append), run(model, data, SMALL)
    assert first == second == Result.from_dict(first.to_dict())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    nll = [first.metrics[f"nll/{name}"] for name in ("on", "off", "swapped")]
    assert len(set(nll)) == (1 if memory == "none" else 3)
    # the same as in a document of training, in one call
    model.eval()
    drawn = data.task.draw(np.random.default_rng([0, sorting._STREAM, 64, 1]), 64)
    last = np.concatenate([[data.task.question], drawn.order, np.full(7, data.task.question)])
    ids = torch.from_numpy(np.concatenate([drawn.tokens, last]))[None]
    with torch.no_grad():
        logits = model(ids, breaks=torch.tensor([[False] * 4 + [True]])).logits[0, 64:72]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(drawn.order), reduction="none")
    found = [row["nll"] for row in first.rows if (row["condition"], row["document"]) == ("on", 1)]
    assert found == pytest.approx(expected.tolist(), rel=1e-3)


def test_headline_and_figures(data):
    result = run(Counts(data.task, SEGMENT_LEN), data, Sorting([32, 64, 320], 5))
    headline = result.metadata["headline"]
    assert headline[0]["metric"] == "accuracy/on"
    assert {"accuracy/off", "accuracy/swapped", "accuracy/chance", "accuracy/last_segment", "tau/wiped"} <= {
        entry["metric"] for entry in headline if entry["control"]
    }
    for entry in headline:
        assert all(entry[key] is None or entry[key] in result.metrics for key in ("metric", "low", "high", "n"))
    figures = plot(result)
    assert set(figures) == {"accuracy_by_place", "accuracy_by_length"}
    place, length = (figures[name].axes[0] for name in ("accuracy_by_place", "accuracy_by_length"))
    for axes, x in ((place, list(range(1, 9))), (length, [32, 64, 320])):
        drawn = {bar.get_label(): bar[0] for bar in axes.containers}
        assert set(drawn) == set(LABELS.values())
        assert list(drawn["memory on"].get_xdata()) == x
        assert set(drawn["memory on"].get_ydata()) == {1.0}
        others = {line.get_label() for line in axes.get_lines()}
        assert {"counts of the last segment", "a guess among symbols not yet named"} <= others
    assert set(plot(run(Counts(data.task, SEGMENT_LEN), data, SMALL))) == {"accuracy_by_place"}
    assert plot(Result("sorting", {})) == {}


def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Counts(data.task, SEGMENT_LEN), data, SMALL, share=share)

    check_shares(measure, measure())


def test_models_and_settings_that_cannot_work_are_refused_in_a_sentence(data):
    for other in (symbol_data(400, MQAR), object()):
        with pytest.raises(ConfigError, match="recipe=sorting"):
            run(Counts(data.task, SEGMENT_LEN), other, SMALL)
    with pytest.raises(ConfigError, match="must fit into a segment"):
        run(Counts(data.task, 8), data, SMALL)
    for settings, told in (
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"n_token": []}, "n_token must be"),
        ({"n_token": 0}, "n_token must be"),
        ({"n_row": 0}, "n_row must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            Sorting(**settings)


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=sorting"], "evaluate").sorting)
    assert node.pop("_target_") == "experiments.sorting.Sorting"
    assert Sorting(**node) == Sorting()
    assert set(node) == set(Sorting.__dataclass_fields__)
