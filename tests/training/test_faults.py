"""Runs that lose a process, a worker, a disk, a network: what is told, what is left, and that they go on exactly."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memlm.checkpoint import checkpoints, read
from memlm.config import ConfigError
from memlm.data.stream import TrainingBatches
from memlm.memory.state import tensors
from memlm.training import fit as fit_module
from memlm.training import logged, loggers
from memlm.training.module import LanguageModeling
from memlm.training.resume import find_origin
from scripts.survival import differences
from tests.training.small import FACTS, SHORT, config, curve, fit, fit_until_it_kills_itself, fit_until_killed

pytestmark = pytest.mark.slow

# Everything that a checkpoint may have to keep: rows that go on, a bank that all share, a replay buffer that is full.
ALL: dict[str, Any] = {"memory": "dual", "phases": [FACTS], "replay": "reservoir"}
MORE = ["memory.ltm.scope=shared", "replay.ratio=0.5", "replay.capacity=3"]
RANKS = ["trainer.devices=2", "trainer.strategy=ddp_fork"]


def kill_self(step: int, rank: int = 0) -> Any:
    def kill(module: LanguageModeling, batch: Any) -> None:
        if batch.step == step and module.global_rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("two")
    fit(config(folder, "whole", *MORE, *RANKS, **ALL))
    return folder / "whole"


@pytest.mark.parametrize("n_worker", [0, 1, 2])
def test_a_killed_process_ends_the_run_which_goes_on_bit_for_bit(n_worker: int, of_two: Path, tmp_path: Path) -> None:
    settings = [*MORE, *RANKS, f"data.n_worker={n_worker}", "data.path=" + str(of_two.parent / "text.txt")]
    begin, others = time.monotonic(), multiprocessing.active_children()  # of tests before
    with pytest.raises(ConfigError, match=r"process of this run .*killed.*go on with resume=auto") as caught:
        fit(config(tmp_path, "killed", *settings, **ALL), before_step=kill_self(8, rank=1))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 60
    assert not [child for child in multiprocessing.active_children() if child not in others]
    assert names(tmp_path / "killed") == ["step=3.ckpt", "step=6.ckpt"]
    fit(config(tmp_path, "on", *settings, "resume=auto", **ALL))
    assert differences(of_two, tmp_path / "on") == []


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_other_processes_than_before_have_all_rows_and_windows(before: int, after: int, tmp_path: Path) -> None:
    of = {1: [], 2: RANKS}
    settings = ["memory.ltm.scope=shared", "replay.ratio=1.0", "training.min_lr_ratio=1"]
    fit(config(tmp_path, "a", *settings, *of[before], "trainer.max_steps=4", **ALL))

    def look(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 4:
            content = {"rows": list(tensors(module.carried.state)), "ids": batch.ids, "bank": module.model.state_dict()}
            content["windows"] = [window.ids for window in module.replay.windows]  # type: ignore[union-attr]
            torch.save(content, tmp_path / f"{module.global_rank}.pt")

    _, _, rows = fit(config(tmp_path, "b", *settings, *of[after], f"resume={tmp_path / 'a'}", **ALL), before_step=look)
    assert sorted(curve(rows)) == list(range(9))
    content = read(checkpoints(tmp_path / "a")[-1])
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(after)]
    expected = sorted(bytes(w["ids"].numpy().tobytes()) for part in content["replay"] for w in part["windows"])
    assert sorted(bytes(ids.numpy().tobytes()) for part in parts for ids in part["windows"]) == expected
    assert len(expected) == 4  # the first windows of two documents of two rows
    saved = [value for value in _leaves(content["carried"]) if value.numel()]
    taken = [torch.cat(row) for row in zip(*(part["rows"] for part in parts), strict=True) if row[0].numel()]
    assert len(saved) == len(taken) > 5
    assert {_bits(value) for value in saved} == {_bits(value) for value in taken}
    for part in parts:
        assert all(torch.equal(value, content["state_dict"][f"model.{name}"]) for name, value in part["bank"].items())


def _leaves(content: Any) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else []
    return [leaf for part in parts for leaf in _leaves(part)]


def _bits(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.numpy().tobytes()


def test_rows_that_cannot_be_dealt_out_are_refused(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "trainer.max_steps=4"))
    three = ["trainer.devices=3", "trainer.strategy=ddp_fork", f"resume={tmp_path / 'a'}", "training.min_lr_ratio=0.05"]
    with pytest.raises(ConfigError, match=r"must be a multiple of 3 devices|cannot be dealt out evenly to 3") as caught:
        fit(config(tmp_path, "b", *three))
    assert "\n" not in str(caught.value)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_killed_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    def cut(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 5:

            def save(content: Any, file: Any) -> None:
                file.write(b"half of a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = save  # type: ignore[assignment]

    fit_until_it_kills_itself(config(tmp_path, "killed", *MORE, **ALL), cut)
    assert names(tmp_path / "killed") == ["step=3.ckpt"]
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2
    fit(config(tmp_path, "on", *MORE, "resume=auto", **ALL))
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 1  # the half is gone
    fit(config(tmp_path / "b", "whole", *MORE, **ALL))
    assert differences(tmp_path / "b" / "whole", tmp_path / "on") == []


def test_a_checkpoint_appears_when_its_step_is_logged_and_validated(tmp_path: Path) -> None:
    """A run that is killed while it validates goes on from before: no number of that step is lost."""

    def while_validating(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 5:
            module.validation_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    settings = ["trainer.val_check_interval=3"]
    fit_until_it_kills_itself(config(tmp_path, "killed", *settings), while_validating)
    assert names(tmp_path / "killed") == ["step=3.ckpt"]
    _, _, rows = fit(config(tmp_path, "on", *settings, "resume=auto"))
    _, _, whole = fit(config(tmp_path / "b", "whole", *settings))
    for name in ("val/nll", "train/loss"):
        assert curve(rows, name) == curve(whole, name)
    assert sorted(curve(rows, "val/nll")) == [2, 5, 8]


def test_a_flipped_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch reads a file with one wrong bit in a weight as if nothing was."""
    fit_until_killed(config(tmp_path, "a"), step=8)
    newest = checkpoints(tmp_path / "a")[-1]
    weight = read(newest)["state_dict"]["model.embedding.weight"].numpy().tobytes()
    content = bytearray(newest.read_bytes())
    content[content.index(weight) + len(weight) // 2] ^= 1
    newest.write_bytes(content)
    torch.load(newest, weights_only=True)
    with pytest.raises(ConfigError, match=r"step=6\.ckpt was refused: it is damaged .*use an earlier checkpoint"):
        find_origin(str(tmp_path / "a"), config(tmp_path, "b"), [])
    origin = find_origin("auto", config(tmp_path, "b"), [tmp_path])
    assert origin is not None
    assert origin.path.name == "step=3.ckpt"
    assert "step=6.ckpt was refused: it is damaged" in capsys.readouterr().err


def test_columns_are_added_to_the_log_without_emptying_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = loggers._Rows(str(tmp_path))
    rows.log_metrics({"a": 1.0}, step=0)
    rows.save()
    before = Path(rows.metrics_file_path).read_text()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    rows.log_metrics({"a": 2.0, "b": 3.0}, step=1)
    with pytest.raises(KeyboardInterrupt):
        rows.save()
    assert Path(rows.metrics_file_path).read_text() == before
    monkeypatch.undo()
    again = loggers._Rows(str(tmp_path / "again"))
    for step, row in enumerate(({"a": 1.0}, {"a": 2.0, "b": 3.0})):
        again.log_metrics(row, step=step)
        again.save()
    assert Path(again.metrics_file_path).read_text().split() == ["a,b,step", "1.0,,0", "2.0,3.0,1"]


def test_a_run_killed_while_it_takes_over_its_own_log_logs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_until_killed(config(tmp_path, "a"), step=8)
    settings = config(tmp_path, "a", f"resume={tmp_path / 'a'}")  # in its own directory
    original = logged.keep_earlier_history

    def killed(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "keep_earlier_history", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(settings)
    monkeypatch.undo()
    _, _, rows = fit(settings)
    assert sorted(curve(rows)) == list(range(9))  # each once


# --- loader processes ------------------------------------------------------------------------------------------------


def test_a_killed_loader_process_is_told_and_no_batch_is_lost(tmp_path: Path) -> None:
    def kill(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 7:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"a loader process was killed.*lower data\.n_worker.*resume=auto"):
        fit(config(tmp_path, "a", *MORE, "data.n_worker=2", **ALL), before_step=kill)
    fit(config(tmp_path, "on", *MORE, "data.n_worker=1", "resume=auto", **ALL))
    fit(config(tmp_path / "b", "whole", *MORE, **ALL))
    assert differences(tmp_path / "b" / "whole", tmp_path / "on") == []


def test_what_a_loader_process_refuses_is_told_without_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingBatches.__getitem__

    def refuse(self: TrainingBatches, step: int) -> Any:
        if step == 4:
            raise ConfigError("the text is gone")
        return original(self, step)

    monkeypatch.setattr(TrainingBatches, "__getitem__", refuse)
    with pytest.raises(ConfigError) as caught:
        fit(config(tmp_path, "a", "data.n_worker=1", phases=[SHORT]))
    assert str(caught.value) == "the text is gone"


# --- the network -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_offline_if_wandb_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(loggers, "_WANDB_PATIENCE", 1.0)
    wandb.teardown()  # which read the environment before
    try:
        begin = time.monotonic()
        settings = config(tmp_path, "a", "logger.wandb.offline=false", "trainer.max_steps=3", logger="default")
        _, _, rows = fit(settings)
        assert time.monotonic() - begin < 60
    finally:
        wandb.teardown()
    assert sorted(curve(rows)) == [0, 1, 2]
    told = capfd.readouterr().err
    assert "W&B cannot be reached" in told
    assert f"wandb sync {tmp_path}/a/wandb/offline-run-*" in told
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
