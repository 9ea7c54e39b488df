"""Layers dealt out to processes (``trainer=fsdp``), against the run of one process."""

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

import memlm
from memlm.analysis.run_log import read_history
from memlm.checkpoint import FOLDER
from memlm.compose import compose, to_dict
from memlm.training.logged import history_files
from tests.training.small import FACTS, SHORT, config, curve, fit

pytestmark = pytest.mark.slow

# Without the price of writing, which is a mean over the tokens of each process.
SAME = ["model.dropout=0", "memory.ltm.gate_penalty=0", "training.min_lr_ratio=1", "trainer.max_steps=20"]
SAME += ["checkpoint.every=10", "checkpoint.keep=null"]


def fit_dealt(settings: dict[str, Any], n_rank: int = 2, watch: Any = None) -> None:
    """Train in processes as torchrun starts them; the first writes the outputs of its model after training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings["trainer"] |= {"devices": n_rank, "strategy": to_dict(compose(["trainer=fsdp"]))["trainer"]["strategy"]}
    children = []
    for rank in range(n_rank):
        children.append(os.fork())
        if children[-1]:
            continue
        try:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_rank, "LOCAL_WORLD_SIZE": n_rank}
            places |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
            os.environ |= {name: str(value) for name, value in places.items()}
            rank_zero_only.rank = rank
            model = fit(settings, watch)[1].model
            if rank == 0:  # alone, as the experiments are run
                torch.save(outputs(model), Path(settings["paths"]["run_dir"]) / "outputs.pt")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * n_rank


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(64)[None] % model.n_vocab).logits


@pytest.mark.parametrize("model", ["lmcode", "lstm"])
def test_sharding_layers_are_the_run_of_one_process(model: str, tmp_path: Path) -> None:
    """Losses over 20 steps and weights to rounding; from either's checkpoint the other goes on."""

    def settings(run: str, *more: str) -> dict[str, Any]:
        made = config(tmp_path, run, *SAME, *more, phases=[FACTS | {"n_row": 4}])
        if model == "lstm":
            node = to_dict(compose(["model=lstm"]))["model"]
            made["model"] = node | {k: v for k, v in made["model"].items() if k in node and k != "_target_"}
        return made

    fit(settings("one"))
    fit_dealt(settings("two"))
    half = {run: f"resume={tmp_path / run / FOLDER / 'step=10.ckpt'}" for run in ("one", "two")}
    if model == "lmcode":
        fit(settings("two then one", half["two"]))
        fit_dealt(settings("two then two", half["two"]))
        fit_dealt(settings("one then two", half["one"]))
    curves = {}
    for run in tmp_path.glob("*/csv"):
        rows = [row for file in history_files(run.parent) for row in read_history(file)]
        curves[run.parent.name] = curve(rows)
    assert len(curves) == (5 if model == "lmcode" else 2)
    expected = memlm.load(tmp_path / "one")
    for run, found in curves.items():
        assert len(found) == 20
        assert found == pytest.approx(curves["one"], abs=1e-4), run
        loaded = memlm.load(tmp_path / run)
        for (name, a), b in zip(expected.named_parameters(), loaded.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=f"{run}: {name}")
        if (tmp_path / run / "outputs.pt").exists():
            assert torch.equal(torch.load(tmp_path / run / "outputs.pt"), outputs(loaded))


def test_a_process_that_replays_nothing_waits_for_no_other(tmp_path: Path) -> None:
    """Each process replays a row or none by chance: the run of copies (``trainer=ddp``), to rounding."""
    more = [*SAME[:3], "trainer.max_steps=8", "replay.ratio=0.25", "checkpoint.every=4"]
    phases = [SHORT | {"n_row": 4}]
    copies = config(tmp_path, "copies", *more, replay="reservoir", phases=phases)
    copies["trainer"] |= {"devices": 2, "strategy": "ddp_fork"}
    expected = fit(copies)[2]
    fit_dealt(config(tmp_path, "dealt", *more, replay="reservoir", phases=phases))
    found = [row for file in history_files(tmp_path / "dealt") for row in read_history(file)]
    replayed = [sorted(curve(rows, "train/replay_nll")) for rows in (expected, found)]
    assert replayed[0] == replayed[1]
    assert 0 < len(replayed[0]) < 7  # of the first process
    assert curve(found) == pytest.approx(curve(expected), abs=1e-4)
    for a, b in zip(*(memlm.load(tmp_path / run).parameters() for run in ("copies", "dealt")), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_what_is_watched_need_not_be_the_same_in_all_processes(tmp_path: Path) -> None:
    def watch(model: Any) -> dict[str, float]:
        n = int(os.environ.get("RANK", 0)) + 1
        return {"watched": [float(outputs(model).square().mean()) for _ in range(n)][-1]}

    more = [*SAME[:3], "trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.limit_val_batches=0"]
    expected = curve(fit(config(tmp_path, "one", *more), watch)[2], "watched")
    fit_dealt(config(tmp_path, "two", *more), watch=watch)
    found = [row for file in history_files(tmp_path / "two") for row in read_history(file)]
    assert sorted(expected) == [1, 3, 5]
    assert curve(found, "watched") == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("value", "algorithm"), [(0.0, None), (0.001, "value"), (0.01, "norm")])
def test_gradients_of_dealt_layers_are_clipped_as_those_of_one_process(
    value: float, algorithm: str | None, tmp_path: Path
) -> None:
    more = [*SAME[:3], "trainer.max_steps=4"]
    plain = config(tmp_path, "plain", *more)
    plain["trainer"]["gradient_clip_val"] = 1e9
    curves = [curve(fit(plain)[2])]
    for run, train in (("one", fit), ("two", fit_dealt)):
        settings = config(tmp_path, run, *more)
        settings["trainer"] |= {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}
        train(settings)
        curves.append(curve([row for file in history_files(tmp_path / run) for row in read_history(file)]))
    assert curves[2] == pytest.approx(curves[1], abs=1e-4)
    weights = [memlm.load(tmp_path / run).state_dict() for run in ("one", "two", "plain")]
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-3, atol=1e-4, msg=name)
    if value == 0:  # no clipping at all
        assert curves[1] == pytest.approx(curves[0], abs=1e-6)
