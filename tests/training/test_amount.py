"""How much a configuration trains, held to what is planned and dealt out when it is trained."""

from __future__ import annotations

import pytest

from memlm.compose import compose, to_dict
from memlm.data.curriculum import build_curriculum
from memlm.training.amount import n_step, n_token
from memlm.training.settings import plan_steps

CASES = (
    [],
    ["trainer.max_steps=7"],
    ["trainer.accumulate_grad_batches=3"],
    ["n_token=3000000"],
    ["recipe=needle"],
    ["recipe=mqar_zoology"],
)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_steps_and_tokens_are_those_that_are_planned(overrides: list[str]) -> None:
    config = to_dict(compose(overrides))
    planned = plan_steps(config)
    steps = planned["trainer"]["max_steps"]
    assert n_step(config) == n_step(planned) == steps
    every = config["trainer"]["accumulate_grad_batches"]
    made = min(steps, 2000 // every)
    curriculum = build_curriculum(planned)
    phases = [curriculum.at(i)[1] for i in range(made * every)]
    total = sum(phase.n_row * phase.n_segment for phase in phases) * config["model"]["segment_len"]
    assert n_token(config, made) == n_token(planned, made) == total
