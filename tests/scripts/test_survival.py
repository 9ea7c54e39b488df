import random
from pathlib import Path

import pytest
import torch

from memlm.checkpoint import checkpoints, read, write
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from scripts.survival import Moment, differences, survive
from tests.training.small import overrides

pytestmark = pytest.mark.slow

FACTS = "curriculum.phases=[{steps:9,n_row:2,n_segment:2,task:{items:2},n_window:3}]"


def settings(folder: Path) -> list[str]:
    more = [
        "trainer.max_steps=6",
        "checkpoint.every=2",
        "checkpoint.keep=null",
        "replay=reservoir",
        "replay.capacity=3",
        FACTS,
    ]
    return [
        *overrides(folder, "dual"),
        *more,
        "memory.ltm.scope=shared",
        "experiment=perplexity",
        "perplexity.limit=50",
    ]


def test_killed_again_and_again_it_is_the_same_run(tmp_path: Path) -> None:
    found = survive(settings(tmp_path), 3, [0, 1], seed=1, out=tmp_path / "out")
    assert found.metrics["n_kill"] == sum(row["code"] == -9 for row in found.rows) == 3
    assert found.metrics["n_divergent"] == 0
    assert [row["differs"] for row in found.rows] == [""] * len(found.rows)
    # and it would be told: one bit of a weight, of the replay buffer, one logged number
    whole, other = tmp_path / "out" / "whole" / "run", sorted((tmp_path / "out" / "killed-0").glob("start-*/"))[-1]
    path = checkpoints(other)[-1]
    content = read(path)
    content["state_dict"]["model.embedding.weight"].view(torch.int32)[3, 3] ^= 1
    content["replay"][0]["n_seen"] += 1
    write(content, path)
    log = other / "csv" / "metrics.csv"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, lines[-1]]) + "\n")
    told = differences(whole, other)
    assert told[:2] == ["checkpoint.replay[0].n_seen", "checkpoint.state_dict.model.embedding.weight"]
    assert len(told) > 2
    assert all(name.startswith("logged.") for name in told[2:])


def test_moments_are_spread_and_come_with_the_checkpoints(tmp_path: Path) -> None:
    drawn = [Moment.draw(random.Random(seed)) for seed in range(200)]
    assert {moment.n_checkpoint for moment in drawn} == {0, 1, 2, 3}
    assert 60 < sum(moment.in_write for moment in drawn) < 140
    one, writing = Moment(1, False, 0.0), Moment(1, True, 0.0)
    folder = tmp_path / "checkpoints"
    assert Moment(0, False, 0.0).has_come(folder)
    assert not one.has_come(folder)
    folder.mkdir()
    (folder / "step=2.ckpt").touch()
    assert one.has_come(folder)
    assert not writing.has_come(folder)
    (folder / ".step=4.ckpt.host.1.tmp").touch()
    assert writing.has_come(folder)


def test_the_shipped_settings_compose_and_mistakes_are_told(tmp_path: Path) -> None:
    shipped = to_dict(compose([], "survival"))
    assert compose([*shipped["overrides"], "resume=auto"]).memory.ltm.scope == "shared"
    with pytest.raises(ConfigError, match="n_kill must be at least 1, got 0"):
        survive([], 0, [0], 0, tmp_path)
    with pytest.raises(ConfigError, match="workers must be numbers of loader processes"):
        survive([], 1, [-1], 0, tmp_path)
