import errno
import inspect
import io
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger

import memlm
from memlm.analysis.run_log import read_history
from memlm.checkpoint import checkpoints
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.training import callbacks
from memlm.training import settings as settings_module
from memlm.training.callbacks import Progress, Throughput
from memlm.training.fit import make_trainer, save_last
from memlm.training.logged import history_files
from memlm.training.loggers import sync_hint, wandb_logger
from memlm.training.module import LanguageModeling
from memlm.training.resume import find_origin
from memlm.training.settings import check_device, check_trainer, plan_steps, seconds_of
from tests.training.small import FACTS, PLAIN, SHORT, config, curve, fit
from tests.training.wandb_file import history, records

pytestmark = pytest.mark.slow

WANDB = "lightning.pytorch.loggers.WandbLogger"

# --- plans -----------------------------------------------------------------------------------------------------------


def test_steps_come_from_the_curriculum(tmp_path: Path) -> None:
    phases = [SHORT | {"steps": 5}, FACTS | {"steps": 6}]
    for more, steps in (([], 11), (["trainer.accumulate_grad_batches=2"], 6), (["trainer.max_steps=7"], 7)):
        settings = config(tmp_path, "a", "trainer.max_steps=-1", *more, phases=phases)
        assert settings["trainer"]["max_steps"] == steps


@pytest.mark.parametrize(
    ("setting", "told"),
    {
        "trainer.accelerator=gpu": "asks for CUDA, but torch finds none",
        "trainer.max_steps=-2": "trainer.max_steps must be at least",
        "trainer.val_check_interval=0.5": "trainer.val_check_interval must be a whole number of at least 1",
        "checkpoint.every=0": "checkpoint.every must be at least 1",
        "checkpoint.keep=x": "checkpoint.keep must be an int or null, got 'x'",
        "seed=-1": "seed must be in",
        "training.lr=-1": "training.lr must be above 0",
    }.items(),
)
def test_impossible_plans_are_refused(setting: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=told):
        check_device(config(tmp_path, "a", setting))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_epochs", 1, "has no meaning in a run of memlm, leave it out; a run has steps and no epochs"),
        ("limit_train_batches", 2, "a batch is a function of its number"),
        ("fast_dev_run", True, r"trainer\.max_steps=1"),
        ("callbacks", [], "callbacks are those of memlm"),
        ("check_val_every_n_epoch", 1, "must be null"),
        ("gradient_clip_val", -1, r"must be a number of at least 0, got -1"),
        ("gradient_clip_algorithm", "x", "must be norm or value"),
        ("num_sanity_val_steps", -2, "must be a whole number of at least 0"),
        ("max_time", "10:00", r"must be a time above 0 as DD:HH:MM:SS"),
        ("max_time", {"hours": -1}, "must be a time above 0"),
        ("max_tim", 1, r"is not a setting of a run\. Did you mean 'max_time'"),
    ],
)
def test_settings_that_a_run_would_not_honour_are_refused(name: str, value: Any, told: str) -> None:
    trainer = to_dict(compose([]))["trainer"]
    check_trainer(trainer)
    with pytest.raises(ConfigError, match=rf"trainer\.{name} .*{told}|trainer\.{name} {told}") as caught:
        check_trainer(trainer | {name: value})
    assert "\n" not in str(caught.value)


def test_every_argument_of_the_trainer_is_honoured_or_refused() -> None:
    """A newer Lightning may have more."""
    known = {*settings_module._TRAINER, *settings_module._INSTEAD}
    assert known == set(inspect.signature(lightning.Trainer).parameters)


def test_time_is_read_as_lightning_reads_it() -> None:
    for given in ("00:00:01:30", "01:02:03:04", {"hours": 8, "minutes": 30}, {"seconds": 5}):
        assert seconds_of(given) == Timer(given).time_remaining("train")
    assert seconds_of(None) is None


def test_signals_that_no_data_has_are_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", memory="none")
    settings["memory"] = {"adaptive": {"signals": {"tone": 1, "hour": 2}}}
    with pytest.raises(ConfigError, match=r"adaptive\.signals names tone, hour, but .* has none: leave it null"):
        plan_steps(settings)


def test_training_of_a_number_of_tokens(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", phases=[SHORT | {"steps": 30, "n_row": 2}, SHORT | {"steps": 10, "n_row": 6}])
    batches = [2, 6]  # times n_segment and the length of a segment
    token = SHORT["n_segment"] * settings["model"]["segment_len"]
    settings["trainer"]["max_steps"] = -1
    planned = plan_steps(settings | {"n_token": 30 * token * 8})
    steps = [phase["steps"] for phase in planned["curriculum"]["phases"]]
    assert steps == [60, 20]
    assert sum(n * size for n, size in zip(steps, batches, strict=True)) == 30 * 8
    assert planned["trainer"]["max_steps"] == 80
    few = plan_steps(settings | {"n_token": 1})
    assert [phase["steps"] for phase in few["curriculum"]["phases"]] == [1, 1]
    assert [phase["steps"] for phase in settings["curriculum"]["phases"]] == [30, 10]
    with pytest.raises(ConfigError, match=r"n_token and trainer\.max_steps=7 both say how long it trains"):
        plan_steps(settings | {"n_token": 100, "trainer": settings["trainer"] | {"max_steps": 7}})
    epochs = settings["curriculum"] | {"n_epoch": 2}
    with pytest.raises(ConfigError, match="n_token cannot be set where a curriculum has epochs"):
        plan_steps(settings | {"n_token": 100, "curriculum": epochs})


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    more = [
        "trainer.devices=2",
        "trainer.strategy=ddp_spawn",
        "trainer.gradient_clip_val=0.5",
        "trainer.precision=bf16-mixed",
    ]
    settings = config(tmp_path, "a", *more)
    with make_trainer(settings, tmp_path / "a") as (trainer, _):
        assert (trainer.world_size, trainer.num_devices, trainer.gradient_clip_val) == (2, 2, 0.5)
        assert trainer.precision == "bf16-mixed"
        assert type(trainer.accelerator).__name__ == "CPUAccelerator"
    for more_, told in (
        ({"trainer.accelerator": "tpu"}, "trainer: "),
        ({"trainer.strategy": "no_such"}, "trainer: .*no_such"),
    ):
        node = settings["trainer"] | {key.partition(".")[2]: value for key, value in more_.items()}
        with pytest.raises(ConfigError, match=told), make_trainer(settings | {"trainer": node}, tmp_path / "b"):
            pass


def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """The rows of a batch are dealt out: same losses, same weights, and a resumed run goes on with all rows."""
    ranks = ["trainer.devices=2", "trainer.strategy=ddp_fork", "model.dropout=0", "training.min_lr_ratio=1"]
    alone = ["model.dropout=0", "training.min_lr_ratio=1"]
    whole = config(tmp_path, "whole", *alone, phases=[FACTS])
    expected = curve(fit(whole)[2])
    fit(config(tmp_path, "two", *ranks, "trainer.max_steps=4", phases=[FACTS]))  # ends within a document
    fit(config(tmp_path, "on", *ranks, f"resume={tmp_path / 'two'}", phases=[FACTS]))
    found = curve([row for file in history_files(tmp_path / "on") for row in read_history(file)])
    assert found == pytest.approx(expected, abs=2e-3)
    forgot = fit(config(tmp_path, "x", *alone, "memory.ltm.top_k=1", phases=[FACTS]))[2]
    assert curve(forgot) != pytest.approx(expected, abs=2e-3)  # the bound is tight enough to tell


def test_the_gate_learns_what_the_task_says_is_worth_to_be_remembered(tmp_path: Path) -> None:
    """Of a phase of facts; a phase of plain text, where nobody says so, is refused."""
    asked = {"memory": {"ltm.gate_supervision": 30.0}}
    errors = []
    for name, more in (("without", {}), ("with", asked)):
        rows = fit(config(tmp_path, name, "trainer.max_steps=40", phases=[FACTS | more]))[2]
        errors.append(sum(list(curve(rows, "memory/ltm/gate_error").values())[-10:]) / 10)
    assert errors[1] < 0.8 * errors[0], errors
    with pytest.raises(ConfigError, match="gate_supervision needs a task that says what is worth"):
        fit(config(tmp_path, "b", "trainer.max_steps=2", phases=[PLAIN | asked]))


def by_origin(bank: Any) -> list[torch.Tensor]:
    """What a bank holds in the order of where it came from: slots worth nearly the same may change places."""
    order = (bank.bank.record[0] * 10**6 + bank.bank.position[0]).argsort()
    return [part[0, order] for part in (bank.bank.record, bank.bank.position, bank.bank.tokens, bank.bank.key)]


@pytest.mark.parametrize("phase", [FACTS, SHORT, PLAIN])
def test_two_processes_write_one_shared_bank(phase: dict[str, Any], tmp_path: Path) -> None:
    """The rows of both write it as those of one process do, and its gradients reach the rows of both."""
    alone = ["memory.ltm.scope=shared", "model.dropout=0", "trainer.max_steps=6"]
    alone += ["memory.ltm.top_k=64"]  # all: of slots with equal keys any may be read
    expected = curve(fit(config(tmp_path, "whole", *alone, phases=[phase]))[2])
    two = config(tmp_path, "two", *alone, "trainer.devices=2", "trainer.strategy=ddp_fork", phases=[phase])
    assert curve(fit(two)[2]) == pytest.approx(expected, abs=1e-4)
    whole, shared = (memlm.load(tmp_path / name).memory["ltm"][0] for name in ("whole", "two"))
    assert whole.bank.n_record.item() == shared.bank.n_record.item() > 0
    found = [by_origin(bank) for bank in (whole, shared)]
    assert all(torch.equal(a, b) for a, b in zip(found[0][:3], found[1][:3], strict=True))
    torch.testing.assert_close(found[0][3], found[1][3], rtol=0, atol=5e-3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4)])
def test_a_dealt_bank_is_saved_whole_and_goes_on_with_any_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    """Losses, bank and what is measured on the way are those of one process that keeps it whole, from end to end."""
    same = ["memory.ltm.scope=shared", "memory.ltm.n_slot=63", "memory.ltm.importance=token", "model.dropout=0"]
    same += ["memory.ltm.top_k=63"]  # all: of slots with equal keys any may be read
    same += ["training.consolidate_every=3", "training.min_lr_ratio=1", "training.lr=1e-6"]  # steps multiply rounding
    phases = [FACTS | {"n_row": 4}]

    def watch(model: Any) -> dict[str, float]:
        bank = model.memory["ltm"][0]
        return {"filled": float(bank.filled(bank.bank.first(1)).sum()), "slots": float(bank.bank.key.shape[1])}

    whole = fit(config(tmp_path, "whole", *same, "trainer.max_steps=7", phases=phases), watch)
    for run, n_rank, more in (("a", before, "trainer.max_steps=3"), ("b", after, f"resume={tmp_path / 'a'}")):
        ranks = [f"trainer.devices={n_rank}", "trainer.strategy=ddp_fork"] if n_rank > 1 else []
        settings = config(
            tmp_path, run, *same, "memory.ltm.shard=true", *ranks, "trainer.max_steps=7", more, phases=phases
        )
        _, module, _ = fit(settings, watch)
        bank = module.model.memory["ltm"][0]
        assert bank.bank.key.shape[1] == 63  # after training as before
    found = [row for file in history_files(tmp_path / "b") for row in read_history(file)]
    for name in ("train/loss", "val/nll", "filled", "slots", "memory/ltm/merged"):
        assert curve(whole[2], name), name
        assert curve(found, name) == pytest.approx(curve(whole[2], name), abs=1e-4), name
    expected, loaded = (memlm.load(tmp_path / name).memory["ltm"][0] for name in ("whole", "b"))
    assert expected.filled(expected.bank.first(1)).sum() > 40
    assert loaded.bank.n_record.item() == expected.bank.n_record.item() > 20
    for a, b in zip(by_origin(loaded), by_origin(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.bank.key, bank.bank.key)  # what the program goes on with is what was saved


def test_what_cannot_be_dealt_out_is_refused(tmp_path: Path) -> None:
    dealt = ["memory.ltm.scope=shared", "memory.ltm.shard=true", "trainer.devices=2", "trainer.strategy=ddp_fork"]
    with pytest.raises(Exception, match=r"memory.ltm.n_slot .1. must be at least the number of processes .2."):
        fit(config(tmp_path, "a", *dealt, "memory.ltm.n_slot=1"))
    with pytest.raises(Exception, match=r"memory.ltm.shard=true cannot be had with replay"):
        fit(config(tmp_path, "b", *dealt, "replay.ratio=1.0", replay="reservoir"))
    with pytest.raises(ConfigError, match=r"memory.ltm.shard needs a bank .* set scope=shared, got 'sequence'"):
        fit(config(tmp_path, "c", "memory.ltm.shard=true"))


def test_processes_whose_banks_part_stop(tmp_path: Path) -> None:
    def spoil(module: LanguageModeling, batch: Any) -> None:
        if batch.step == 3 and module.global_rank == 1:
            module.model.memory["ltm"][0].bank.value[0, 0] += 1e-6

    settings = ["memory.ltm.scope=shared", "trainer.devices=2", "trainer.strategy=ddp_fork"]
    with pytest.raises(Exception, match="different banks after step 3"):
        fit(config(tmp_path, "a", *settings), before_step=spoil)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept_and_the_last_step_is_written(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "checkpoint.every=2", "trainer.max_steps=7"))
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["step=6.ckpt", "step=7.ckpt"]
    fit(config(tmp_path, "b", "checkpoint.every=2", "trainer.max_steps=5", "checkpoint.keep=null"))
    assert [path.name for path in checkpoints(tmp_path / "b")] == ["step=2.ckpt", "step=4.ckpt", "step=5.ckpt"]


@pytest.mark.parametrize("lacks", [False, True])
def test_the_first_process_says_whether_the_last_step_is_still_to_be_written(lacks: bool, tmp_path: Path) -> None:
    """Another may look before the file has its name, or in a directory of its own: nobody writes alone."""
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    expected = tmp_path / "first" / "checkpoints" / "step=4.ckpt"
    if not lacks:
        expected.touch()
    said: list[Any] = []
    written: list[Path] = []

    def broadcast(own: Any) -> Any:
        said.append(own)
        return said[0]

    strategy = SimpleNamespace(broadcast=broadcast)
    trainer: Any = SimpleNamespace(global_step=4, strategy=strategy, save_checkpoint=written.append)
    assert [save_last(trainer, tmp_path / name) for name in ("first", "other")] == [expected] * 2
    assert written == [expected] * 2 * lacks


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    def full(module: Any, batch: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match=r"no space is left in .*no checkpoint was written yet"):
        fit(config(tmp_path, "a"), before_step=full)

    def full_later(module: Any, batch: Any) -> None:
        if batch.step == 4:
            full(module, batch)

    with pytest.raises(ConfigError, match=r"no space is left in .*what was saved is whole, go on with resume=auto"):
        fit(config(tmp_path, "b"), before_step=full_later)


# --- the console -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_bar_with_readable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(callbacks, "_REFRESH", 0.0)
    fit(config(tmp_path, "a", "trainer.enable_progress_bar=true"), watch=lambda model: {"recall/on": 0.25})
    shown = screen.getvalue()
    assert shown.count("\n") == 1  # one bar, which stays; validation has none
    last = shown.split("\r")[-1]
    assert "9/9" in last
    assert "loss " in last
    assert "tok/s " in last
    assert "recall 25.0%" in last
    for noise in ("v_num", "Epoch", "Validation", "train/", "Tip", "GPU"):
        assert noise not in shown


def test_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    more = ["trainer.enable_progress_bar=true", "trainer.max_steps=40", "trainer.log_every_n_steps=4"]
    fit(config(tmp_path, "a", *more))
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == list(range(4, 41, 4))
    assert all("of 40: loss " in line and "tok/s " in line for line in lines)
    assert "\r" not in out + err
    assert not [r for r in caplog.records if r.name.startswith("lightning") and r.levelname == "INFO"]


@pytest.mark.filterwarnings("error")
def test_no_warnings_reach_the_user_not_even_when_resumed(tmp_path: Path) -> None:
    fit(config(tmp_path, "a", "training.min_lr_ratio=1", "trainer.max_steps=4"))
    fit(config(tmp_path, "b", "training.min_lr_ratio=1", f"resume={tmp_path / 'a'}"))


def test_time_that_is_not_training_does_not_count() -> None:
    clock, logged = Throughput(), []
    trainer: Any = SimpleNamespace(world_size=1, global_step=1, log_every_n_steps=1)
    module: Any = SimpleNamespace(log=lambda name, value: logged.append(value))
    batch = SimpleNamespace(ids=torch.zeros(10, 100))
    now = 0.0
    threads = 3  # that all work
    import memlm.training.callbacks as where

    original = where.time
    where.time = SimpleNamespace(  # type: ignore[assignment]
        perf_counter=lambda: now, process_time=lambda: threads * now, monotonic=original.monotonic
    )
    try:
        clock.on_train_start(trainer, module)
        now = 2.0
        clock.on_train_batch_end(trainer, module, None, batch, 0)
        with clock.paused():
            now += 50
        clock.on_validation_start(trainer, module)
        now += 100
        clock.on_validation_end(trainer, module)
        now += 4
        clock.on_train_batch_end(trainer, module, None, batch, 1)
    finally:
        where.time = original  # type: ignore[assignment]
    assert logged == [500.0, 6.0, 250.0, 12.0]  # tokens a second, CPU seconds


def test_processes_but_the_first_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress()
    bar.disable()
    trainer: Any = SimpleNamespace(global_step=1, max_steps=2, log_every_n_steps=1, callback_metrics={})
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    bar.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")


def test_lines_that_nobody_reads_stop_a_run_after_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And no other process is said to be gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as left:
            fit(config(tmp_path, "a", "trainer.enable_progress_bar=true", "trainer.max_steps=20"))
    assert left.value.code == 128 + signal.SIGPIPE
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["step=1.ckpt"]
    told = capfd.readouterr().err
    assert "stopped after step 1, as its output cannot be written" in told
    assert "another process" not in told


# --- loggers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"_target_": "os.getcwd"}, r"logger\.x\._target_ must be a logger of Lightning, got os.getcwd"),
        ({"_target_": "no.such.Logger"}, "no.such.Logger cannot be imported here"),
        ({"save_dir": "x"}, r"logger\.x must be the settings of a logger, with its _target_"),
        ({"_target_": WANDB, "prefix": "x"}, r"logger\.x\.prefix is not a setting of a run"),
        ({"_target_": WANDB, "mode": "online"}, r"logger\.x\.mode .*set logger\.wandb\.offline"),
        ({"_target_": WANDB, "projct": "x"}, "Did you mean 'project'"),
    ],
)
def test_loggers_that_a_run_would_not_honour_are_refused(node: Any, told: str, tmp_path: Path) -> None:
    settings = config(tmp_path, "a")
    settings["logger"]["x"] = node
    with pytest.raises(ConfigError, match=told), make_trainer(settings, tmp_path / "a"):
        pass


def test_a_logger_is_made_by_its_target_whatever_its_name(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "trainer.max_steps=2")
    settings["logger"] = {"mine": settings["logger"]["csv"], "other": {"_target_": f"{__name__}.Lines", "n": 1}}
    _, _, rows = fit(settings)
    assert sorted(curve(rows)) == [0, 1]
    assert Lines.steps == [0, 1]


class Lines(Logger):
    """A logger of somebody's own."""

    steps: ClassVar[list[int]] = []
    name, version = "lines", "0"

    def __init__(self, n: int) -> None:
        super().__init__()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.steps.append(step or 0)

    def log_hyperparams(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize("lines", [["logger=null"], ["logger=[]"]])
def test_no_logger(lines: list[str], tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "trainer.max_steps=2")
    assert compose(lines).get("logger") is None
    del settings["logger"]
    fit(settings)
    assert not (tmp_path / "a" / "csv").exists()


# --- weights and biases ----------------------------------------------------------------------------------------------


def test_environment_variables_win_over_defaults_but_not_over_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for name in ("PROJECT", "NAME", "RUN_ID", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", f"env-{name.lower()}")
    wandb.teardown()  # which read the environment before
    try:
        fit(config(tmp_path, "a", "trainer.max_steps=1", logger="wandb"))
        own = ["project=own", "tags=[own]", "id=own", "group=own"]
        more = [f"logger.wandb.{setting}" for setting in own]
        fit(config(tmp_path, "b", "trainer.max_steps=1", "name=own", *more, logger="wandb"))
        found = [next(r.run for r in records(tmp_path / run) if r.HasField("run")) for run in ("a", "b")]
    finally:
        monkeypatch.undo()
        wandb.teardown()
    told = [[run.project, run.display_name, run.run_id, run.run_group, *run.tags] for run in found]
    assert told == [["env-project", "env-name", "env-run_id", "env-run_group", "env-tags"], ["own"] * 5]


def test_the_line_that_uploads_a_run_names_each_part_once(tmp_path: Path) -> None:
    import wandb

    fit(config(tmp_path, "a", "trainer.max_steps=2", logger="wandb"))
    (first,) = (tmp_path / "a").glob("wandb/offline-run-*")
    settings = config(tmp_path, "a", "trainer.max_steps=2", f"resume={tmp_path / 'a'}", logger="wandb")
    origin = find_origin(settings["resume"], settings, [])
    time.sleep(1.1)  # the names of these directories are seconds
    with make_trainer(settings, tmp_path / "a", origin) as (trainer, _):
        hint = sync_hint(wandb_logger(trainer.loggers), origin)
    assert wandb.run is None
    (second,) = {*(tmp_path / "a").glob("wandb/offline-run-*")} - {first}
    assert hint == f"wandb sync {first} {second}"


def test_an_offline_run_has_steps_a_name_and_goes_on_when_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def stop(module: Any, batch: Any) -> None:
        if batch.step == 5:  # not by a signal to a forked process, which would share the connection to W&B
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(config(tmp_path, "a", logger="default"), before_step=stop)
    _, _, rows = fit(config(tmp_path, "b", f"resume={tmp_path / 'a'}", logger="default"))
    assert wandb.run is None  # finished
    assert sorted(curve(rows)) == list(range(9))
    runs = [record.run for record in records(tmp_path / "b") if record.HasField("run")]
    assert runs[0].display_name == "lmcode-ltm"
    assert runs[0].project == "memlm"
    (first,) = (tmp_path / "a").glob("wandb/offline-run-*")
    assert first.name.endswith(f"-{runs[0].run_id}")  # the same run
    metrics = {m.metric.name or m.metric.glob_name: m.metric for m in records(tmp_path / "b") if m.HasField("metric")}
    assert metrics["*"].step_metric == "trainer/global_step"
    logged = {
        int(row["trainer/global_step"]): float(row["train/loss"])
        for row in history(tmp_path / "b")
        if "train/loss" in row
    }
    assert logged == {step: value for step, value in curve(rows).items() if step >= 3}
    assert "WARNING" not in "".join(capfd.readouterr())


def test_a_run_that_fails_is_finished_as_failed(tmp_path: Path) -> None:
    import wandb

    def fail(module: Any, batch: Any) -> None:
        raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        fit(config(tmp_path, "a", logger="wandb"), before_step=fail)
    assert wandb.run is None
    exits = [record.exit for record in records(tmp_path / "a") if record.HasField("exit")]
    assert [e.exit_code for e in exits] == [1]
    with pytest.raises(ConfigError, match="log_model"):
        fit(config(tmp_path, "b", "logger.wandb.log_model=true", logger="wandb"))
    assert wandb.run is None


def test_how_to_upload_is_told(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", logger="wandb")
    with make_trainer(settings, tmp_path / "a") as (trainer, _):
        hint = sync_hint(wandb_logger(trainer.loggers))
        (folder,) = (tmp_path / "a").glob("wandb/offline-run-*")
        assert hint == f"wandb sync {folder}"
    assert sync_hint(None) is None


def test_consolidation_where_no_memory_outlives_a_step_is_refused(tmp_path: Path) -> None:
    every = "training.consolidate_every=3"
    with pytest.raises(ConfigError, match="consolidate_every=3 would consolidate nothing"):
        config(tmp_path, "a", every, phases=[SHORT])
    for more, memory, phase in (
        ([], "ltm", FACTS),
        ([], "ltm", PLAIN),
        ([], "none", SHORT),
        (["memory.ltm.scope=shared"], "ltm", SHORT),
    ):
        assert config(tmp_path, "a", every, *more, memory=memory, phases=[SHORT, phase])["trainer"]["max_steps"]


def test_no_logger_at_all(tmp_path: Path) -> None:
    settings = config(tmp_path, "a") | {"logger": None}
    assert plan_steps(settings)
    trainer, _, rows = fit(settings)
    assert isinstance(trainer, lightning.Trainer)
    assert rows == []
