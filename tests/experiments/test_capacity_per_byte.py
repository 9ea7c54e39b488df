"""Capacity in pairs of characters, with hand-made models of known memory."""

import dataclasses

import pytest

from experiments.capacity_per_byte import CapacityPerByte, plot, run
from memlm.assemble import build_corpus, build_data, build_tokenizer
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.data.tasks.kv import LETTERS, KeyValues
from memlm.data.tasks.mqar import MQAR
from memlm.training.settings import plan_steps
from tests.experiments.shares import check_shares
from tests.experiments.symbol_models import Fake, real_model, symbol_data
from tests.training import small

N_VOCAB = LETTERS + 7
SMALL = CapacityPerByte(n_pair=[2, 6], n_document=6, n_question=2, n_row=4)


@pytest.fixture(scope="module")
def data():
    return symbol_data(LETTERS + 5, KeyValues)


class Remembers(Fake):
    """Continues a question by what stood behind its key in the first ``span`` tokens of its memory."""

    span = 999

    def next_token(self, text, memory):
        memory, key = memory[: self.span], text[1:5]  # ! k k :
        for place in range(len(memory) - 3):
            if len(text) >= 5 and memory[place : place + 4] == key:
                answer = [*memory[place + 4 : place + 7], self.end]
                return answer[len(text) - 5]
        return 0


class RemembersTwo(Remembers):
    span = 14


def test_who_remembers_all_holds_all_and_controls_hold_nothing(data):
    model = Remembers(N_VOCAB, 16)
    model.end = data.task.end
    result = run(model, data, SMALL)
    for n_pair in (2, 6):
        rates = {
            name: result.metrics[f"accuracy/{name}/{n_pair}"] for name in ("on", "off", "wiped", "swapped", "unseen")
        }
        assert rates == {"on": 1, "off": 0, "wiped": 0, "swapped": 0, "unseen": 0}
    assert result.metrics["held/on"] == 6
    assert result.metrics["state_bytes"] == 256
    assert result.metrics["pairs_per_kb/on"] == 24
    assert result.metrics["n/on/6"] == 12
    assert "accuracy_by_pairs" in plot(result)


def test_who_remembers_the_first_pairs_holds_few(data):
    model = RemembersTwo(N_VOCAB, 16)
    model.end = data.task.end
    result = run(model, data, dataclasses.replace(SMALL, n_question=6, n_document=20))
    assert result.metrics["accuracy/on/2"] == 1
    assert result.metrics["accuracy/on/6"] == pytest.approx(2 / 6)
    assert result.metrics["held/on"] == 2


def test_a_real_model_is_left_as_it_was_and_read_alike_in_any_grouping(data):
    model = real_model(N_VOCAB, "ltm", 16).train()
    whole = run(model, data, SMALL)
    assert model.training
    again = run(model, data, dataclasses.replace(SMALL, n_row=1))
    assert [row["correct"] for row in again.rows] == [row["correct"] for row in whole.rows]
    check_shares(lambda share: run(model, data, SMALL, share=share), whole)


def test_bad_settings_and_other_models_are_refused(data):
    for wrong in ([], [0], [4, 2]):
        with pytest.raises(ConfigError, match="ascending order"):
            CapacityPerByte(n_pair=wrong)
    with pytest.raises(ConfigError, match="recipe=kv_capacity"):
        run(Remembers(N_VOCAB, 16), symbol_data(60, MQAR), SMALL)


@pytest.mark.parametrize("memory", ["rmt", "gradmem"])
def test_the_recipe_trains_and_is_measured(memory, tmp_path):
    cfg = compose(["recipe=kv_capacity", f"memory={memory}", "trainer=cpu", "logger=csv"])
    places = [f"paths.root={tmp_path}", f"paths.run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path}"]
    tiny = ["model.d_model=8", "model.n_layer=2", "model.n_head=2", f"memory.{memory}.n_cell=2"]
    cfg.merge_with_dotlist([*tiny, "trainer.enable_progress_bar=false", "trainer.max_steps=2", *places])
    cfg.curriculum.phases[0].n_row = 2
    settings = plan_steps(to_dict(cfg))
    trainer, module, _ = small.fit(settings)
    assert trainer.global_step == 2
    corpus = build_corpus(settings)
    measured = build_data(settings, build_tokenizer(settings, corpus), corpus)
    result = run(module.model, measured, CapacityPerByte(n_document=2, n_question=1))
    assert 0 <= result.metrics["accuracy/on"] <= 1
