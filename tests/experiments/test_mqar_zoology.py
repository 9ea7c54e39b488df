"""Recall in one context, with hand-made models that look keys up in the text."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.mqar_zoology import MQARZoology, plot, run
from memlm.assemble import build_corpus, build_data, build_tokenizer
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.data.tasks.mqar import MQAR
from memlm.data.tasks.zoology import ZoologyMQAR
from memlm.training.settings import plan_steps
from tests.experiments.shares import check_shares
from tests.experiments.symbol_models import Fake, real_model, symbol_data
from tests.training import small

SMALL = MQARZoology(sizes=[[16, 2], [24, 6]], n_document=5, n_token=32)


@pytest.fixture(scope="module")
def data():
    return symbol_data(400, ZoologyMQAR)


class Looks(Fake):
    """Finds the value of a key among the first ``span`` pairs of its text, where memory may be read."""

    span = 99

    def forward(self, ids, read=True, logits=True, keep_state=True):
        assert not logits
        assert not keep_state
        said = [[self.say(row[: t + 1]) if read else 0 for t in range(len(row))] for row in ids.tolist()]
        return SimpleNamespace(hidden=F.one_hot(torch.tensor(said), self.n_vocab).float())

    def head(self, hidden):
        return hidden

    def say(self, text):
        pairs = dict(zip(text[0 : 2 * self.span : 2], text[1 : 2 * self.span : 2], strict=False))
        return pairs.get(text[-1], 0) if len(text) > 2 else 0


class LooksAtFirst(Looks):
    span = 1


def test_who_looks_keys_up_is_right_only_where_they_were_told(data):
    result = run(Looks(402, 8), data, SMALL)
    rates = {name: result.metrics[f"accuracy/{name}"] for name in ("on", "off", "wiped", "swapped")}
    assert rates == {"on": 1.0, "off": 0.0, "wiped": 0.0, "swapped": 0.0}
    assert result.metrics["n/on"] == 10
    assert result.metrics["low/on"] == pytest.approx(0.7225, abs=1e-4)  # Wilson, 10 of 10
    assert result.metrics["accuracy/on/24_6"] == 1.0
    assert result.metrics["chance_told"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert result.metrics["state_bytes"] == 256
    assert set(plot(result)) == {"accuracy_by_pairs"}


def test_the_accuracy_is_a_mean_over_documents_of_all_sizes(data):
    result = run(LooksAtFirst(402, 8), data, SMALL)
    assert result.metrics["accuracy/on/16_2"] == 0.5
    assert result.metrics["accuracy/on/24_6"] == pytest.approx(1 / 6)
    assert result.metrics["accuracy/on"] == pytest.approx(1 / 3)
    rates = np.array([0.5] * 5 + [1 / 6] * 5)
    half = 2.262 * rates.std(ddof=1) / 10**0.5
    assert result.metrics["high/on"] == pytest.approx(1 / 3 + half)


def test_a_real_model_is_left_as_it_was_and_read_alike_in_any_grouping(data):
    model = real_model(402, "ltm", 8).train()
    whole = run(model, data, SMALL)
    assert model.training
    assert all("accuracy/" + name in whole.metrics for name in ("on", "off", "wiped", "swapped"))
    again = run(model, data, dataclasses.replace(SMALL, n_token=1))
    assert [row["nll"] for row in again.rows] == pytest.approx([row["nll"] for row in whole.rows], rel=1e-4)
    assert len({row["nll"] for row in whole.rows}) > 30  # so that this tells them apart
    assert "accuracy/off" not in run(real_model(402, "none", 32), data, SMALL).metrics
    check_shares(lambda share: run(model, data, SMALL, share=share), whole)


def test_bad_settings_and_other_models_are_refused(data):
    with pytest.raises(ConfigError, match="at least 4 tokens per pair"):
        MQARZoology(sizes=[[7, 2]])
    with pytest.raises(ConfigError, match="at least 4 tokens per pair"):
        MQARZoology(sizes=[])
    with pytest.raises(ConfigError, match="n_document must be at least 2"):
        MQARZoology(n_document=1)
    with pytest.raises(ConfigError, match="recipe=mqar_zoology"):
        run(Looks(402, 8), symbol_data(400, MQAR), SMALL)


TINY = ["model.d_model=8", "data.corpus.n_symbol=400", "trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("choice", "tiny", "metric"),
    [
        ("recipe=mqar_zoology memory=delta", ["memory.delta.d_key=4", "memory.delta.d_value=4"], "off"),
        ("recipe=mqar_zoology_figure2 memory=delta", ["memory.delta.d_key=4", "memory.delta.d_value=4"], "off"),
        ("recipe=mqar_zoology_figure2 model=lmcode memory=none", [], "wiped"),
    ],
)
def test_the_recipes_train_and_are_measured(choice, tiny, metric, tmp_path):
    cfg = compose([*choice.split(), "trainer=cpu", "logger=csv"])
    places = [f"paths.root={tmp_path}", f"paths.run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path}"]
    cfg.merge_with_dotlist([*TINY, *tiny, *places])
    for phase in cfg.curriculum.phases:
        phase.steps, phase.n_row = 1, 2
    cfg.curriculum.n_epoch = 2
    settings = plan_steps(to_dict(cfg))
    assert settings["trainer"]["max_steps"] == 2 * len(cfg.curriculum.phases)
    settings["trainer"]["max_steps"] = 2
    trainer, module, _ = small.fit(settings)
    assert trainer.global_step == 2
    corpus = build_corpus(settings)
    result = run(module.model, build_data(settings, build_tokenizer(settings, corpus), corpus), SMALL_ONE)
    assert 0 <= result.metrics[f"accuracy/{metric}"] <= 1
    assert result.metadata["headline"][0]["label"] == "as it is (2 of 2 epochs)"


SMALL_ONE = MQARZoology(sizes=[[64, 4]], n_document=2)
