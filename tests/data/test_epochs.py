"""Epochs over mixed sets, by counting."""

from collections import Counter

import pytest
import torch

from memlm.config import ConfigError
from memlm.data.epochs import Epochs, scaled
from memlm.data.stream import TrainingBatches
from memlm.data.tasks.zoology import ZoologyMQAR
from memlm.evaluation.compare.groups import n_token
from memlm.evaluation.runs import Trained
from tests.experiments.symbol_models import symbol_data

TASK = {"_target_": "memlm.data.tasks.zoology.ZoologyMQAR"}
PHASES = [
    {"steps": 5, "n_row": 3, "n_segment": 1, "task": {"n_pair": 2}},
    {"steps": 3, "n_row": 2, "n_segment": 2, "task": {"n_pair": 4}},
]


def test_each_epoch_has_each_batch_once_in_another_order():
    curriculum = Epochs(PHASES, TASK, n_epoch=3)
    assert curriculum.steps == 24
    epochs = [[curriculum.at(8 * e + i)[::2] for i in range(8)] for e in range(3)]
    assert all(Counter(epoch) == {(i, k): 1 for i, n in enumerate((5, 3)) for k in range(n)} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(curriculum.at(step)[1] is curriculum.phases[curriculum.at(step)[0]] for step in range(24))
    firsts = [next(step for step in range(8) if curriculum.at(step)[0] == i) for i in range(2)]
    assert curriculum.starts == sorted(firsts)


def test_a_batch_comes_again_in_every_epoch():
    data = symbol_data(60, ZoologyMQAR)
    curriculum = Epochs(PHASES, TASK, n_epoch=2)
    batches = TrainingBatches(data.train, 8, 0, curriculum, data.task, 16, seed=0)
    seen = [{curriculum.at(step)[::2]: batches[step] for step in range(8 * e, 8 * e + 8)} for e in range(2)]
    for key, batch in seen[0].items():
        assert torch.equal(batch.ids, seen[1][key].ids)
        assert batch.ids.shape == ((3, 8) if key[0] == 0 else (2, 16))
        assert not torch.equal(batch.targets[:, :-1], batch.ids[:, 1:])  # labels, not the tokens that follow
        assert (batch.targets[batch.answer] >= min(data.task.values)).all()
    assert len({tuple(batch.ids[0].tolist()) for batch in seen[0].values()}) == 8


def test_scale_takes_epochs_first_then_documents():
    assert scaled([100, 40], 32, 1.0) == ([100, 40], 32)
    assert scaled([100, 40], 32, 0.25) == ([100, 40], 8)
    assert scaled([100, 40], 32, 1 / 64) == ([50, 20], 1)
    assert scaled([100, 1], 32, 1e-9) == ([1, 1], 1)
    assert Epochs(PHASES, TASK, n_epoch=4, scale=0.5).steps == 16
    assert Epochs(PHASES, TASK, n_epoch=4, scale=0.5).share == "2 of 4 epochs"
    assert Epochs(PHASES, TASK, n_epoch=4, scale=0.1).share == "1 of 4 epochs, of 38 % of the documents"


@pytest.mark.parametrize("step", [0, 3, 8, 13, 16])
def test_tokens_of_a_run_are_those_of_its_batches(step):
    curriculum = Epochs(PHASES, TASK, n_epoch=2)
    config = {
        "curriculum": {"phases": PHASES, "n_epoch": 2, "scale": 1.0},
        "model": {"segment_len": 8},
        "trainer": {"accumulate_grad_batches": 1},
    }
    trained = Trained("", step, config, None, None, None, "", None)
    phases = [curriculum.at(i)[1] for i in range(step)]
    assert n_token(trained) == sum(phase.n_row * phase.n_segment * 8 for phase in phases)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"n_window": 2}, {}, r"phases\[1\] is trained mixed"),
        ({"memory": {"ltm.span": 1}}, {}, r"phases\[1\] is trained mixed"),
        ({"task": None}, {}, r"phases\[1\] is trained mixed"),
        ({}, {"n_epoch": 0}, "n_epoch must be in 1"),
        ({}, {"scale": 0.0}, "scale must be above 0"),
        ({}, {"scale": 1.5}, "scale must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(change, settings, message):
    with pytest.raises(ConfigError, match=message):
        Epochs([PHASES[0], PHASES[1] | change], TASK, **settings)
