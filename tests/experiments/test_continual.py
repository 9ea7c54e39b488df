"""Tasks learned in turn: scores by hand, data against what it must not hold, and tiny runs."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.continual import experiment
from experiments.continual.experiment import matrix, run, saving, scores
from experiments.continual.figures import plot
from experiments.continual.settings import Continual
from experiments.continual.tasks import measure, streams, vocabulary
from memlm.assemble import build_corpus, build_data, build_model, build_tokenizer
from memlm.config import ConfigError
from memlm.evaluation.headline import headline
from memlm.evaluation.result import Result
from memlm.statistics import mean_interval
from tests.training.small import config

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "n_step": 6, "n_row": 2, "n_segment": 4, "n_check": 3, "n_batch": 2, "n_word": 230, "ratio": 0.5, "capacity": 8,
    "consolidate_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with a shared memory, and its data."""
    settings = config(tmp_path_factory.mktemp("made"), "run", "memory.ltm.scope=shared")
    corpus = build_corpus(settings)
    data = build_data(settings, build_tokenizer(settings, corpus), corpus)
    return build_model(settings, data.tokenizer), data


@pytest.fixture(scope="module")
def result(made: tuple[Any, Any]) -> Result:
    cfg = Continual(**SMALL, tasks=("facts", "prose"), replay=("none", "retrieved"), seeds=(0, 3))
    return run(*made, cfg)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    r = np.array([[0.0, 0.1, 0.2], [0.8, 0.3, 0.2], [0.9, 0.7, 0.1], [0.5, 0.4, 0.6]])
    found = scores(r, r / 10)
    assert found == pytest.approx({
        "final": 0.5, "learned": (0.8 + 0.7 + 0.6) / 3, "final_off": 0.05,
        "forgetting": ((0.9 - 0.5) + (0.7 - 0.4)) / 2,  # the first was best after the second
        "backward": ((0.5 - 0.8) + (0.4 - 0.7)) / 2,
        "forward": ((0.3 - 0.1) + (0.1 - 0.2)) / 2,
    })  # fmt: skip
    alone = scores(np.array([[0.1], [0.6]]), np.array([[0.1], [0.2]]))
    assert (alone["final"], alone["final_off"]) == (0.6, 0.2)
    assert math.isnan(alone["forgetting"])


def test_savings_by_hand() -> None:
    plain = [[10, 20, 5.0], [20, 40, 3.0], [30, 60, 2.0]]
    # it reaches 2.0 half-way between 20 and 30 steps; rows count half more
    assert saving(plain, [[10, 30, 4.0], [20, 60, 3.0], [30, 90, 1.0]]) == pytest.approx((1 - 25 / 30, 1 - 75 / 60))
    # it ends at 3.0, which the plain run has reached after 20 steps
    assert saving(plain, [[10, 30, 6.0], [20, 60, 4.0], [30, 90, 3.0]]) == pytest.approx((1 - 30 / 20, 1 - 90 / 40))
    assert saving(plain, plain) == (0, 0)


# --- data ------------------------------------------------------------------------------------------------------------


def test_tasks_share_a_vocabulary_and_nothing_else(made: tuple[Any, Any]) -> None:
    model, data = made
    cfg = Continual(**SMALL)
    tokenizer, texts = vocabulary(data, cfg)
    tasks = streams(tokenizer, texts, cfg, model.segment_len, seed=0)
    assert list(tasks) == ["prose", "facts", "symbols", "stories"]

    def words(batch: Any) -> list[str]:
        return tokenizer.decode(batch.ids.flatten().tolist()).split()

    def is_symbol(word: str) -> bool:
        return word[:1] == "s" and word[1:].isdigit()

    said = {name: [word for i in range(6) for word in words(stream.train[i])] for name, stream in tasks.items()}
    assert not any(map(is_symbol, said["prose"]))
    assert all(map(is_symbol, said["symbols"]))
    for name in ("facts", "stories"):
        share = sum(map(is_symbol, said[name])) / len(said[name])
        assert 0.02 < share < 0.8
    assert {"is", "."} & set(said["facts"]) or "<unk>" in said["facts"]
    for name, stream in tasks.items():
        assert len(stream.held_out) == 2
        trained = {row.tobytes() for i in range(6) for row in stream.train[i].ids.numpy()}
        assert not trained & {row.tobytes() for batch in stream.held_out for row in batch.ids.numpy()}
        assert name == "prose" or all(batch.answer.any() for batch in stream.held_out)
    line = tasks["prose"].held_out[0].ids[0, : model.segment_len // 2].numpy()
    places = np.lib.stride_tricks.sliding_window_view(np.asarray(texts["val"].tokens), len(line))
    assert (places == line).all(axis=1).any(), "prose is asked on held-out text"
    again = streams(tokenizer, texts, cfg, model.segment_len, seed=1)
    assert not torch.equal(again["facts"].train[0].ids, tasks["facts"].train[0].ids)


def test_what_is_measured_is_that_of_the_tokens_asked(made: tuple[Any, Any]) -> None:
    model, data = made
    cfg = Continual(**SMALL)
    tokenizer, texts = vocabulary(data, cfg)
    own = build_model(model.config, tokenizer)
    for name in ("facts", "prose"):
        held = streams(tokenizer, texts, cfg, model.segment_len, seed=0)[name].held_out
        right, nll, n, state = 0, 0.0, 0, None
        for batch in held:
            if batch.fresh:
                state = None
            with torch.no_grad():
                out = own.eval()(batch.ids, state=state, reset=batch.reset, breaks=batch.breaks, mask=batch.mask)
            state = out.state
            for row in range(len(batch.ids)):
                for t in range(batch.ids.shape[1]):
                    if batch.answer[row, t] if name == "facts" else batch.weight[row, t] > 0:
                        target = int(batch.targets[row, t])
                        right += int(out.logits[row, t].argmax()) == target
                        nll -= float(out.logits[row, t].log_softmax(dim=0)[target])
                        n += 1
        own.train()
        found = measure(own, held)
        assert found == (right / n, pytest.approx(nll / n, rel=1e-5), n)
        assert own.training
        assert measure(own, held, read=False) != found


# --- runs ------------------------------------------------------------------------------------------------------------


def test_every_task_is_asked_after_every_task(result: Result) -> None:
    conditions = ["none", "retrieved", "none+consolidation", "retrieved+consolidation"]
    keys = [(row["condition"], row["seed"], row["after"], row["task"]) for row in result.rows]
    assert sorted(keys) == sorted(
        (c, s, i, t) for c in conditions for s in (0, 3) for i in range(3) for t in ("facts", "prose")
    )
    for seed in (0, 3):
        start = [matrix(result.rows, c, seed, "nll")[0].tolist() for c in conditions]
        assert all(row == start[0] for row in start), "all begin with the same weights"
        none, merged = (matrix(result.rows, c, seed, "nll") for c in ("none", "none+consolidation"))
        assert none[2, 1] < none[0, 1] - 0.1, "prose was not learned"
        assert not np.array_equal(none[1:], matrix(result.rows, "retrieved", seed, "nll")[1:])
        assert np.array_equal(none[1:], merged[1:]) == (result.metrics["merged/none+consolidation"] == 0)
    final = [scores(matrix(result.rows, "none", s), matrix(result.rows, "none", s, "accuracy_off")) for s in (0, 3)]
    for name in experiment.SCORES:
        mean, half = mean_interval([each[name] for each in final])
        assert result.metrics[f"{name}/none"] == pytest.approx(mean)
        assert result.metrics[f"high_{name}/none"] == pytest.approx(mean + half)
        assert result.metrics[f"n_{name}/none"] == 2


def test_replayed_rows_count(result: Result) -> None:
    for seed in ("0", "3"):
        curves = result.metadata["curves"]
        for task in ("facts", "prose"):
            assert [point[:2] for point in curves["none"][seed][task]] == [[2, 4], [4, 8], [6, 12]]
            replayed = [row - 2 * step for step, row, _ in curves["retrieved"][seed][task]]
            assert replayed == sorted(replayed)
            assert 0 < replayed[-1] <= 6, "one row at most for two new ones"
    last = curves["none"]["3"]["prose"][-1][2]
    assert last == matrix(result.rows, "none", 3, "nll")[2, 1], "the last point of a curve is that of the matrix"
    assert result.metrics["saved_rows/retrieved"] < result.metrics["saved_steps/retrieved"]


def test_a_run_leaves_no_trace_and_repeats_itself(made: tuple[Any, Any]) -> None:
    model, data = made
    before, mode = copy.deepcopy(model.state_dict()), model.training
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    cfg = Continual(**SMALL, tasks=("symbols",), replay=("none", "reservoir"), consolidate=(False,), seeds=(1,))
    first = run(model, data, cfg)
    assert torch.equal(torch.rand(1), expected)
    assert model.training == mode
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert run(model, data, cfg) == first
    assert set(plot(first)) == {"efficiency"}
    assert "forgetting/none" not in [number.metric for number in headline(first)]


def test_figures_and_headline(result: Result) -> None:
    figures = plot(result)
    assert set(figures) == {"matrices", "scores", "efficiency"}
    heat = [panel for panel in figures["matrices"].axes if panel.images]
    assert [panel.get_title(loc="left") for panel in heat] == list(Continual(**result.metadata["settings"]).conditions)
    mean = np.mean([matrix(result.rows, "retrieved", seed) for seed in (0, 3)], axis=0)
    np.testing.assert_allclose(heat[1].images[0].get_array(), mean)
    numbers = headline(result)
    assert next(number.metric for number in numbers if not number.control) == "final/retrieved"
    assert "final/none" in [number.metric for number in numbers if number.control]


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_models_without_a_shared_memory_are_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, "run")
    data = build_data(settings, build_tokenizer(settings))
    with pytest.raises(ConfigError, match="continual needs a model with a memory that outlives documents"):
        run(build_model(settings, data.tokenizer), data, Continual(**SMALL))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tasks": ["prose", "verse"]}, "continual.tasks must be a list of different ones among prose"),
        ({"replay": []}, "continual.replay"),
        ({"seeds": [1, 1]}, r"continual.seeds must be a list of different ones, got \[1, 1\]"),
        ({"seeds": [-1]}, "continual.seeds must not be negative"),
        ({"ratio": 0.0}, r"continual.ratio must be in \(0, 1\]"),
        ({"n_segment": 1}, "continual.n_segment must be at least 2, got 1"),
        ({"n_check": 200}, r"continual.n_check must be at most continual.n_step \(120\), got 200"),
        ({"lr": 0.0}, "continual.lr"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Continual(**settings)
