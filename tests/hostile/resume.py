"""Going on, stopping, and the settings of the trainer and of loggers."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from memlm.analysis.run_log import read_history
from memlm.checkpoint import checkpoints, read, write
from memlm.files import unfinished
from memlm.training.marks import running
from memlm.training.module import LanguageModeling
from memlm.training.resume import find_origin
from memlm.training.stopping import OUT_OF_TIME
from tests.hostile.base import CHECKOUT, Case, Silent, command
from tests.training.small import config, fit, overrides

Change = Callable[[dict[str, Any]], object]


# --- training states that were changed --------------------------------------------------------------------------------


@functools.cache
def _trained() -> tuple[Path, dict[str, Any]]:
    """A run of nine steps with memories, replay and documents of three windows, and its settings."""
    folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-trained-"))
    more = ["checkpoint.every=1", "checkpoint.keep=null"]
    settings = config(folder, "run", *more, memory="dual", replay="reservoir")
    fit(settings)
    return folder / "run" / "checkpoints", settings


def _place(change: Change) -> tuple[Path, dict[str, Any]]:
    """A run directory whose newest checkpoint is changed and whose older one is whole, and settings of that run."""
    source, settings = _trained()
    run = Path.cwd() / "run"
    (run / "checkpoints").mkdir(parents=True)
    os.link(source / "step=4.ckpt", run / "checkpoints" / "step=4.ckpt")
    content = read(source / "step=5.ckpt")
    change(content)
    write(content, run / "checkpoints" / "step=5.ckpt")
    new = str(Path.cwd() / "new")
    csv = settings["logger"]["csv"] | {"save_dir": new}
    return run, settings | {"paths": settings["paths"] | {"run_dir": new}, "logger": {"csv": csv}}


def _changed(name: str, change: Change) -> Case:
    """``resume=auto`` has to take the older checkpoint, ``resume=RUN`` to refuse."""

    def do() -> None:
        run, settings = _place(change)
        origin = find_origin("auto", settings, [Path.cwd()])
        if origin is None or origin.path.name != "step=4.ckpt":
            raise Silent(f"resume=auto took {origin}")
        find_origin(str(run), settings, [])

    return Case(f"checkpoint with {name}", do)


def _put(*path: Any, value: Any) -> Change:
    """Set the part of a checkpoint at a path; a function makes the value of what was there."""

    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value(node[path[-1]]) if callable(value) else value

    return change


def _drop(*path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


def _filled(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(part: torch.Tensor) -> torch.Tensor:
        part = part.clone()
        part.view(-1)[0] = number
        return part

    return fill


_NAN, _INF = float("nan"), float("inf")
_WEIGHT = "model.embedding.weight"
_BATCHES = ("loops", "fit_loop", "epoch_loop.batch_progress")
_STEPS = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step")


def _half_of_moments(content: dict[str, Any]) -> None:
    state = content["optimizer_states"][0]["state"]
    for i in list(state)[::2]:
        del state[i]


def _rename(content: dict[str, Any]) -> None:
    content["state_dict"] = {f"other.{name}": part for name, part in content["state_dict"].items()}


def _swap(content: dict[str, Any]) -> None:
    groups = content["optimizer_states"][0]["param_groups"]
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]


def _rows(n: int) -> Callable[[Any], Any]:
    """The same state with another number of rows."""

    def change(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part[:n] if n <= len(part) else torch.cat([part, part])[:n]
        if isinstance(part, dict):
            return {name: change(value) for name, value in part.items()}
        return [change(value) for value in part] if isinstance(part, list) else part

    return change


def _states() -> dict[str, Change]:
    first = ("optimizer_states", 0, "state", 2)
    group = ("optimizer_states", 0, "param_groups", 0)
    scheduler = ("lr_schedulers", 0)
    local, ltm = ("carried", "local"), ("carried", "memory", "ltm", 0)
    window = ("replay", 0, "windows", 0)
    found: dict[str, Change] = {
        "half of the moments": _half_of_moments,
        "weights under other names": _rename,
        "parameter groups swapped": _swap,
        "one parameter group": lambda c: c["optimizer_states"][0]["param_groups"].pop(),
        "a parameter group too many": lambda c: c["optimizer_states"][0]["param_groups"].append({}),
        "an extra weight": _put("state_dict", "model.extra", value=torch.zeros(3)),
        "an extra moment": _extra_moment,
        "two optimizers": lambda c: c["optimizer_states"].append(c["optimizer_states"][0]),
        "an extra loop": lambda c: c["loops"].update(tune_loop={"step": 3}),
        "a schedule of another step": _put(*scheduler, "last_epoch", value=2),
        "a window more than there are losses": lambda c: c["replay"][0]["losses"].pop(),
        "the moments of another weight": lambda c: c["optimizer_states"][0]["state"].update(
            {2: c["optimizer_states"][0]["state"][0]}
        ),
        "carried rows of fewer": _put("carried", value=_rows(1)),
        "carried rows of more": _put("carried", value=_rows(4)),
        "no carried row": _put("carried", value=_rows(0)),
    }
    for value in ([], {}, None, 5, "x"):
        found |= {f"{key}: {value!r}": _put(key, value=value) for key in
                  ("optimizer_states", "lr_schedulers", "loops", "state_dict", "carried", "replay")}  # fmt: skip
    for value in ({"Timer": {"time_elapsed": {}}}, [], None):
        found[f"callbacks: {value!r}"] = _put("callbacks", value=value)
    for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks", "carried", "replay", "global_step"):
        found[f"no {key}"] = _drop(key)
    for value in (10**9, -1, 0, 4, 6, "5", 5.0, True, None, [5]):
        found[f"global_step {value!r}"] = _put("global_step", value=value)
    for value in ("99.0", "0.0.1", "", None, 5, "abc"):
        found[f"memlm {value!r}"] = _put("memlm", "version", value=value)
        found[f"lightning {value!r}"] = _put("pytorch-lightning_version", value=value)
    for moment in ("exp_avg", "exp_avg_sq"):
        found |= {
            f"{moment} of another shape": _put(*first, moment, value=torch.zeros(3, 3)),
            f"{moment} of another type": _put(*first, moment, value=lambda part: part.double()),
            f"{moment} of whole numbers": _put(*first, moment, value=lambda part: part.long()),
            f"{moment} not a number": _put(*first, moment, value=_filled(_NAN)),
            f"{moment} infinite": _put(*first, moment, value=_filled(_INF)),
            f"{moment} no tensor": _put(*first, moment, value=[1.0]),
            f"no {moment}": _drop(*first, moment),
        }
    found["exp_avg_sq negative"] = _put(*first, "exp_avg_sq", value=_filled(-1.0))
    for value in (torch.tensor(0.0), torch.tensor(99.0), torch.tensor(_NAN), torch.zeros(2), 5, None):
        found[f"moments at step {value!r}"] = _put(*first, "step", value=value)
    for key, value in (("lr", 7.0), ("lr", _NAN), ("betas", (0.1, 0.1)), ("weight_decay", 9.0), ("initial_lr", 1.0),
                       ("params", []), ("params", [0] * 14), ("params", None)):  # fmt: skip
        found[f"{key} {value!r} of the optimizer"] = _put(*group, key, value=value)
    for key, value in (("_step_count", 99), ("base_lrs", [1.0, 1.0]), ("base_lrs", []), ("_last_lr", [_NAN, _NAN]),
                       ("_last_lr", []), ("last_epoch", "x")):  # fmt: skip
        found[f"{key} {value!r} of the schedule"] = _put(*scheduler, key, value=value)
    for value in (4, 10**9, -1, "5", 5.0, None):
        found[f"place of the data {value!r}"] = _put(*_BATCHES, "current", "ready", value=value)
        found[f"batches in all {value!r}"] = _put(*_BATCHES, "total", "ready", value=value)
        found[f"optimizer steps {value!r}"] = _put(*_STEPS, "total", "completed", value=value)
    for key in ("fit_loop", "validate_loop"):
        found[f"no {key}"] = _drop("loops", key)
    found["no place of the data"] = _drop(*_BATCHES)
    found["epochs"] = _put("loops", "fit_loop", "epoch_progress", "current", "processed", value=3)
    for name in (_WEIGHT, "model.norm.weight"):
        found |= {
            f"no {name}": _drop("state_dict", name),
            f"{name} of another shape": _put("state_dict", name, value=torch.zeros(2, 2)),
            f"{name} of half precision": _put("state_dict", name, value=lambda part: part.half()),
            f"{name} not a number": _put("state_dict", name, value=_filled(_NAN)),
            f"{name} infinite": _put("state_dict", name, value=_filled(_INF)),
            f"{name} no tensor": _put("state_dict", name, value="x"),
        }
    for field in ("ids", "n_open", "position", "streams", "continues"):
        place = ("streams", "mixed") if field == "streams" else (field,)
        found |= {
            f"carried {field} of another shape": _put(*local, field, value=torch.zeros(2, 3, 5, 7)),
            f"carried {field} of another type": _put(*local, *place, value=lambda part: part.to(torch.float64)),
            f"no carried {field}": _drop(*local, field),
        }
    found |= {
        "carried ids beyond the vocabulary": _put(*local, "ids", value=_filled(10**6)),
        "carried ids below 0": _put(*local, "ids", value=_filled(-1)),
        "carried open segment beyond its end": _put(*local, "n_open", value=_filled(99)),
        "carried open segment below 0": _put(*local, "n_open", value=_filled(-5)),
        "carried hidden states not numbers": _put(*local, "streams", "mixed", value=_filled(_NAN)),
        "carried cache of one layer": lambda c: c["carried"]["local"]["cache"].pop(),
        "carried part that nobody knows": _extra_part,
        "no carried memory": _drop("carried", "memory", "ltm"),
        "another carried memory": lambda c: c["carried"]["memory"].update(imm=[]),
        "carried memory of one layer more": lambda c: c["carried"]["memory"]["ltm"].append({}),
        "carried keys not numbers": _put(*ltm, "key", value=_filled(_NAN)),
        "carried keys of fewer slots": _put(*ltm, "key", value=lambda part: part[:, 1:]),
        "carried records of 32 bits": _put(*ltm, "record", value=lambda part: part.int()),
        "no carried priorities": _drop(*ltm, "priority"),
        "carried lists of a memory that has none": _put(*ltm, "lists", value=[]),
        "a replayed window without its mask": _drop(*window, "mask"),
        "a replayed window cut short": _put(*window, "targets", value=lambda part: part[:-1]),
        "a replayed window beyond the vocabulary": _put(*window, "ids", value=_filled(10**6)),
        "a replayed weight not a number": _put(*window, "weight", value=_filled(_NAN)),
        "a replayed window that is none": _put("replay", 0, "windows", 0, value=7),
        "a loss of what is replayed not a number": _put("replay", 0, "losses", 0, value=_NAN),
        "a loss of what is replayed in words": _put("replay", 0, "losses", 0, value="x"),
        "fewer windows seen than kept": _put("replay", 0, "n_seen", value=-1),
        "windows seen in words": _put("replay", 0, "n_seen", value="x"),
        "no number of moments": _drop("memlm", "n_moment"),
        "another number of moments": _put("memlm", "n_moment", value=3),
        "a configuration that is a list": _put("memlm", "config", value=[]),
        "no configuration": _drop("memlm", "config"),
        "an empty tokenizer": _put("memlm", "tokenizer", value=""),
        "a tokenizer that is a number": _put("memlm", "tokenizer", value=5),
    }  # fmt: skip
    return found


def _extra_moment(content: dict[str, Any]) -> None:
    state = content["optimizer_states"][0]["state"]
    state[999] = copy.deepcopy(state[2])


def _extra_part(content: dict[str, Any]) -> None:
    content["carried"]["local"]["other"] = torch.zeros(2)


def _neighbour(name: str, spoil: Callable[[Path], object]) -> Case:
    """``resume=auto`` has to find its run beside one that is odd."""

    def do() -> None:
        run, settings = _place(lambda content: None)
        other = Path.cwd() / "other"
        (other / "checkpoints").mkdir(parents=True)
        spoil(other)
        origin = find_origin("auto", settings, [Path.cwd()])
        if origin is None or origin.run != run or origin.step != 5:
            raise Silent(f"resume=auto took {origin}")

    return Case(f"auto beside {name}", do, ("right",))


def _with_config(value: Any) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        content = read(_trained()[0] / "step=9.ckpt")
        content["memlm"]["config"] = value
        write(content, run / "checkpoints" / "step=9.ckpt")

    return spoil


def _cyclic() -> dict[str, Any]:
    value: dict[str, Any] = copy.deepcopy(_trained()[1])
    value["model"]["self"] = value["model"]
    return value


def _log(run: Path, name: str, content: bytes) -> None:
    (run / "csv").mkdir()
    (run / "csv" / name).write_bytes(content)


def _own_log(name: str, spoil: Callable[[Path], object], *wanted: Any) -> Case:
    """A run goes on though its own files are odd, or says why not."""

    def do() -> None:
        run, settings = _place(lambda content: None)
        spoil(run)
        fit(settings | {"resume": str(run)})

    return Case(f"own directory with {name}", do, wanted)


def files() -> list[Case]:
    """Checkpoints and run directories that were damaged or changed."""
    link = lambda run: (run / "checkpoints" / "step=7.ckpt").symlink_to("step=7.ckpt")  # noqa: E731
    half, huge = b'{"config": {', b"step,a\n1," + b"x" * 200_000
    _trained()
    return [
        *(_changed(name, change) for name, change in _states().items()),
        Case("whole checkpoint", lambda: find_origin(str(_place(lambda c: None)[0]), _trained()[1], []), ("right",)),
        *(_neighbour(f"a configuration {value!r}", _with_config(value)) for value in ([], None, 5, "x", {})),
        _neighbour("a configuration that holds itself", lambda run: _with_config(_cyclic())(run)),
        _neighbour("a link to itself", link),
        _neighbour("a file of random bytes", lambda run: (run / "checkpoints/step=9.ckpt").write_bytes(os.urandom(99))),
        _neighbour("an empty file", lambda run: (run / "checkpoints/step=9.ckpt").touch()),
        _neighbour("a directory named as a checkpoint", lambda run: (run / "checkpoints/step=9.ckpt").mkdir()),
        _neighbour("a folder that holds itself", lambda run: (run / "checkpoints/checkpoints").symlink_to(".")),
        _neighbour("a lock that is a pipe", lambda run: os.mkfifo(run / ".lock")),
        _own_log("half of a finished.json", lambda run: (run / "finished.json").write_bytes(half), "right"),
        _own_log("a finished.json that is a list", lambda run: (run / "finished.json").write_text("[]"), "right"),
        _own_log("a finished.json of null", lambda run: (run / "finished.json").write_text("null"), "right"),
        _own_log("a finished.json that is a pipe", lambda run: os.mkfifo(run / "finished.json"), "right"),
        _own_log("a log that is not UTF-8", lambda run: _log(run, "metrics.csv", b"step,a\n1,\xff\n"), "sentence"),
        _own_log("a log with a huge field", lambda run: _log(run, "metrics.csv", huge), "sentence"),
        _own_log("a log of zeros", lambda run: _log(run, "metrics.csv", b"\0" * 500), "sentence", "right"),
        _own_log("an empty log", lambda run: _log(run, "metrics.csv", b""), "right"),
        _own_log("a log by another name", lambda run: _log(run, "earlier-x.csv", b"step\n1\n"), "right"),
        _own_log("a log cut in a line", lambda run: _log(run, "metrics.csv", b"step,a\n1,2\n3"), "right"),
    ]  # fmt: skip


# --- settings --------------------------------------------------------------------------------------------------------


def _tiny(*more: str) -> list[str]:
    """A command line of a run of a second in the current directory."""
    lines = [line for line in overrides(Path.cwd()) if not line.startswith(("trainer.max_steps", "logger"))]
    logger = [] if any(line.startswith("logger=") for line in more) else ["logger=csv"]
    steps = [] if any("trainer.max_steps" in line for line in more) else ["trainer.max_steps=3"]
    return [*lines, *logger, *steps, "experiment=[]", "curriculum=plain", *more]


def _runs() -> list[Path]:
    """Run directories, of which each has the settings that Hydra writes."""
    return [path.parent for path in Path.cwd().rglob(".hydra")]


def _refused(*more: str) -> Case:
    """A command line that is refused in a sentence, and leaves no directory."""

    def do() -> None:
        try:
            command("train", *_tiny(*more))
        except SystemExit as error:
            if error.code == 2 and _runs():
                raise Silent(f"left {_runs()}") from None
            raise
        raise Silent("trained")

    return Case(f"train {' '.join(more)}", do)


def _honoured(*more: str, look: Callable[[Path], object] | None = None, **environment: str) -> Case:
    """A command line that trains a run to its end."""

    def do() -> None:
        os.environ.update(environment)
        command("train", *_tiny(*more))
        (run,) = _runs()
        if not (run / "finished.json").exists():
            raise Silent("is not finished")
        if look is not None:
            look(run)

    names = " ".join(f"{name}={value}" for name, value in environment.items())
    return Case(f"train {' '.join(more)} {names}".strip(), do, ("right",))


def _time_is_over() -> None:
    """A run stopped by its time is unfinished, and goes on."""
    with _in_step(0, lambda: time.sleep(1.1)):
        code = _exit_of("trainer.max_time={seconds: 1}")
    _expect(code == OUT_OF_TIME, f"ended with {code}")
    (first,) = _runs()
    made = [path.name for path in checkpoints(first)]
    if (first / "finished.json").exists() or made != ["step=1.ckpt"]:
        raise Silent(f"finished, or has {made}")
    command("train", *_tiny("resume=auto"))
    (second,) = [run for run in _runs() if run != first]
    if not (second / "finished.json").exists() or checkpoints(second)[-1].name != "step=3.ckpt":
        raise Silent("did not go on to its end")


def _wandb(**wanted: str) -> Callable[[Path], None]:
    """What W&B was told of a run."""

    def look(run: Path) -> None:
        from tests.training.wandb_file import records

        told = next(record.run for record in records(run) if record.WhichOneof("record_type") == "run")
        for name, value in wanted.items():
            found = getattr(told, name)
            if (",".join(found) if name == "tags" else found) != value:
                raise Silent(f"{name} is {found}, wanted {value}")

    return look


def _validated(run: Path) -> None:
    if not any("val/" in name for row in read_history(run / "csv" / "metrics.csv") for name in row):
        raise Silent("no validation")


def _summary(run: Path) -> None:
    if "Trainable params" not in Path(".printed").read_text():
        raise Silent("no summary")


def settings() -> list[Case]:
    """Arguments of the trainer and of loggers."""
    refused = {
        "max_epochs": ("1", "-1", "0", "null"), "min_epochs": ("1", "null"), "min_steps": ("2", "10", "null"),
        "limit_train_batches": ("1", "0.5", "0"), "overfit_batches": ("1", "0.5", "0"),
        "limit_test_batches": ("1", "0.5"), "limit_predict_batches": ("1", "0.5"),
        "fast_dev_run": ("true", "3", "false"),
        "reload_dataloaders_every_n_epochs": ("1", "0"), "enable_checkpointing": ("true", "false"),
        "barebones": ("true", "false"), "profiler": ("simple", "advanced", "pytorch"), "sync_batchnorm": ("true",),
        "use_distributed_sampler": ("true", "false"), "default_root_dir": ("x", "null"), "logger": ("true", "false"),
        "callbacks": ("[]", "null"), "plugins": ("[]", "null"), "enable_autolog_hparams": ("false",),
        "model_registry": ("x",), "check_val_every_n_epoc": ("1",), "gpus": ("1",), "resume_from_checkpoint": ("x",),
        "gradient_clip_algorithm": ("x", "5", "true"), "benchmark": ("5", "x"), "detect_anomaly": ("x", "5"),
        "inference_mode": ("x", "null"),
    }  # fmt: skip
    bad = {
        "max_time": ("abc", "0", "00:00:00:00", "-1", "{weeks: 1}", "{hours: -1}", "{hours: x}", "{}", "1.5", "01:00"),
        "max_steps": ("0", "-2", "1.5", "abc", "true", "null"), "accumulate_grad_batches": ("0", "-1", "1.5", "null"),
        "val_check_interval": ("0", "-1", "0.5", "abc", "null"), "limit_val_batches": ("-1", "1.5", "abc"),
        "num_sanity_val_steps": ("-2", "1.5", "abc"), "log_every_n_steps": ("0", "-1", "1.5", "null"),
        "gradient_clip_val": ("-1", "-0.5", "abc", "nan", "inf", "[1]"), "devices": ("0", "-2", "abc", "null", "1.5"),
        "num_nodes": ("0", "-1", "abc", "null"), "accelerator": ("abc", "tpu", "gpu", "5", "null"),
        "strategy": ("abc", "5", "null"), "precision": ("16-mixed", "64", "abc", "null", "8"),
        "deterministic": ("abc", "5"), "check_val_every_n_epoch": ("1", "0", "abc"), "enable_progress_bar": ("5", "x"),
        "_target_": ("os.getcwd", "x.y", "5", "null"),
    }  # fmt: skip
    needed = ("accelerator", "accumulate_grad_batches", "devices", "enable_progress_bar", "log_every_n_steps",
              "max_steps", "num_nodes", "precision", "strategy", "val_check_interval")  # fmt: skip
    wandb = {"prefix": "x", "version": "x", "mode": "online", "resume": "allow", "experiment": "x", "anonymous": "true",
             "dir": "x", "config": "{a: 1}", "bogus": "1", "projct": "x"}  # fmt: skip
    tensorboard = "+logger.csv2={_target_: lightning.pytorch.loggers.TensorBoardLogger, save_dir: .}"
    phases = "curriculum.phases=[{steps: 5, n_row: 2, n_segment: 2, memory: {%s}}]"
    honoured = (
        "trainer.max_time={hours: 1}", "trainer.max_time=01:00:00:00", "trainer.gradient_clip_val=0",
        "trainer.gradient_clip_val=null", "+trainer.gradient_clip_algorithm=value", "+trainer.detect_anomaly=true",
        "+trainer.benchmark=true", "+trainer.inference_mode=false", "trainer.deterministic=warn",
        "trainer.num_sanity_val_steps=1", "trainer.limit_val_batches=0",
        "trainer.accumulate_grad_batches=2", "logger=null", "logger=[]",
    )  # fmt: skip
    return [
        *(_refused(f"+trainer.{name}={value}") for name, values in refused.items() for value in values),
        *(_refused(f"trainer.{name}={value}") for name, values in bad.items() for value in values),
        *(_refused(f"~trainer.{name}") for name in needed),
        *(_refused("logger=wandb", f"+logger.wandb.{name}={value}") for name, value in wandb.items()),
        *(_refused("logger=csv", f"logger.csv={value}") for value in ("5", "[1]")),
        _refused("logger=csv", "+logger.x={_target_: os.getcwd}"),
        _refused("logger=csv", "+logger.x={_target_: no.such.Logger}"),
        _refused("logger=csv", "+logger.x={_target_: torch.nn.Linear, in_features: 1, out_features: 1}"),
        _refused("logger=csv", "+logger.x={save_dir: y}"),
        _refused("logger=csv", tensorboard) if not _has("tensorboard", "tensorboardX") else _honoured(tensorboard),
        _refused("logger=wandb", "+logger.b={_target_: lightning.pytorch.loggers.WandbLogger}"),
        _refused("logger=wandb", "logger.wandb.log_model=true"),
        _refused(phases % "ltm.no_such: 3"),
        _refused(phases % "ltm.top_k: -1"),
        _refused("training.compile=5"),
        _honoured("trainer.limit_val_batches=0.5", "trainer.val_check_interval=2", look=_validated),
        _refused("trainer.limit_val_batches=0.001"),  # of a few batches
        *(_honoured(setting) for setting in honoured),
        _honoured("trainer.enable_model_summary=true", look=_summary),
        Case("train +trainer.max_time that is over", _time_is_over, ("right",)),
        _honoured("logger=wandb", look=_wandb(project="memlm", display_name="lmcode-ltm")),
        _honoured("logger=wandb", WANDB_PROJECT="mine", look=_wandb(project="mine")),
        _honoured("logger=wandb", WANDB_NAME="mine", look=_wandb(display_name="mine")),
        _honoured("logger=wandb", WANDB_TAGS="a,b", look=_wandb(tags="a,b")),
        _honoured("logger=wandb", WANDB_RUN_ID="mine", look=_wandb(run_id="mine")),
        _honoured("logger=wandb", WANDB_RUN_GROUP="mine", look=_wandb(run_group="mine")),
        _honoured("logger=wandb", WANDB_MODE="disabled"),
        _honoured("logger=wandb", "logger.wandb.project=own", WANDB_PROJECT="x", look=_wandb(project="own")),
        _honoured("logger=wandb", "name=own", WANDB_NAME="x", look=_wandb(display_name="own")),
        _honoured("logger=wandb", "logger.wandb.tags=[c]", WANDB_TAGS="x", look=_wandb(tags="c")),
        _honoured("logger=wandb", "logger.wandb.id=own", WANDB_RUN_ID="x", look=_wandb(run_id="own")),
        _honoured("logger=wandb", "logger.wandb.offline=true", WANDB_MODE="online", look=_wandb(project="memlm")),
    ]  # fmt: skip


def _has(*packages: str) -> bool:
    import importlib.util

    return any(importlib.util.find_spec(name) is not None for name in packages)


# --- signals, streams, locks -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something in the middle of a training step."""
    original = LanguageModeling.training_step

    def training_step(self: LanguageModeling, batch: Any, batch_idx: int) -> Any:
        if batch.step == step:
            act()
        return original(self, batch, batch_idx)

    LanguageModeling.training_step = training_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        LanguageModeling.training_step = original  # type: ignore[method-assign]


def _exit_of(*more: str) -> Any:
    try:
        command("train", *_tiny(*more))
    except SystemExit as error:
        return error.code
    return 0


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise Silent(text)


def _told(text: str) -> bool:
    sys.stderr.flush()
    return text in Path(".printed").read_text()


def _kill(signum: int) -> Callable[..., None]:
    return lambda *arguments: os.kill(os.getpid(), signum)


def _while_training(signum: int) -> None:
    with _in_step(1, _kill(signum)):
        code = _exit_of()
    (run,) = _runs()
    _expect(code == 128 + signum, f"ended with {code}")
    _expect([path.name for path in checkpoints(run)] == ["step=2.ckpt"], "no checkpoint of its step")
    _expect(not (run / "finished.json").exists(), "is finished")
    _expect(_told("stopped after step 2, with a checkpoint"), "says nothing")
    _expect(_exit_of("resume=auto") == 0, "does not go on")


def _ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _in_step(1, _kill(signal.SIGHUP)):
        _expect(_exit_of() == 0, "is stopped, though it was told to ignore that")


def _while_starting(signum: int) -> None:
    import memlm.assemble

    original, memlm.assemble.build_corpus = memlm.assemble.build_corpus, _kill(signum)  # type: ignore[assignment]
    code = _exit_of()
    memlm.assemble.build_corpus = original
    _expect(code == 128 + signum, f"ended with {code}")
    _expect(_told("began: give the command again"), "says nothing")
    _expect(not _runs(), "leaves a directory")


def _while_measuring(signum: int) -> None:
    from memlm.evaluation import runner

    original, runner.run_all = runner.run_all, _kill(signum)  # type: ignore[assignment]
    code = _exit_of()
    runner.run_all = original
    (run,) = _runs()
    _expect(code == 128 + signum, f"ended with {code}")
    _expect(_told(f"training is complete, measuring was stopped: memlm train resume={run} measures it"), "says nothing")
    _expect(not (run / "finished.json").exists(), "is finished")
    _expect(_exit_of(f"resume={run}") == 0, "does not go on")
    _expect(any((other / "finished.json").exists() for other in _runs()), "is not measured")


@contextlib.contextmanager
def _output(descriptor: int) -> Iterator[None]:
    """Another standard output."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)


def _unread(descriptor: int, reason: str) -> None:
    with _output(descriptor):
        code = _exit_of("trainer.enable_progress_bar=true", "trainer.log_every_n_steps=1")
    (run,) = _runs()
    _expect(code == 141, f"ended with {code}")
    _expect([path.name for path in checkpoints(run)] == ["step=1.ckpt"], "no checkpoint of its step")
    _expect(_told("its output cannot be written"), "says nothing")
    _expect(not _told("another process") and not _told("no space is left in"), "says another reason")
    _expect(_told(reason), "does not say why")
    _expect(_exit_of("resume=auto") == 0, "does not go on")


def _closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    _unread(writer, "")


def _closed_pipe_at_the_end() -> None:
    """All is done before it is found that nobody reads the table."""
    reader, writer = os.pipe()
    os.close(reader)
    with _output(writer):
        code = _exit_of()
    (run,) = _runs()
    _expect(code == 141, f"ended with {code}")
    _expect((run / "finished.json").exists(), "is not finished")


def _without_streams() -> None:
    code = (
        f"import os, sys, runpy; [os.close(i) for i in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None; "
        f"sys.argv = {['train.py', *_tiny('trainer.enable_progress_bar=true')]!r}; "
        f"runpy.run_path({str(CHECKOUT / 'train.py')!r}, run_name='__main__')"
    )
    child = os.fork()
    if child == 0:
        try:
            exec(code, {})
        except SystemExit as error:
            os._exit(error.code or 0)  # type: ignore[arg-type]
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    _expect(all((run / "finished.json").exists() for run in _runs()) and bool(_runs()), "did not train")


def _lock(make: Callable[[Path], object]) -> None:
    """The lock of the directory that a run is to be trained in."""
    settings = config(Path.cwd(), "run", "trainer.max_steps=1")
    (Path.cwd() / "run").mkdir()
    make(Path.cwd() / "run" / ".lock")
    fit(settings)


def _alive(*, own: bool, auto: bool = False) -> None:
    """A run that another process trains."""
    run, settings = _place(lambda content: None)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with running(run):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    if own:
        settings["paths"]["run_dir"] = str(run)
    if auto:
        _expect(find_origin("auto", settings, [Path.cwd()]) is None, "took a run that is alive")
    else:
        fit(settings | {"resume": str(run)})


def _further() -> None:
    """The clock of the run that is further is older."""
    source, settings = _trained()
    for name, step, age in (("far", 7, 10_000), ("near", 3, 0)):
        folder = Path.cwd() / name / "checkpoints"
        folder.mkdir(parents=True)
        write(read(source / f"step={step}.ckpt"), folder / f"step={step}.ckpt")
        stamp = time.time() - age
        os.utime(folder / f"step={step}.ckpt", (stamp, stamp))
    settings = settings | {"paths": settings["paths"] | {"run_dir": str(Path.cwd() / "new")}}
    origin = find_origin("auto", settings, [Path.cwd()])
    _expect(origin is not None and origin.step == 7, f"took {origin}")


def _leftover() -> None:
    """Half a checkpoint of a process that was killed in its first one."""
    folder = Path.cwd() / "killed" / "checkpoints"
    folder.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        unfinished(folder / "step=1.ckpt").write_bytes(b"x")  # its name tells the process
        os._exit(0)
    os.waitpid(child, 0)
    _expect(len(list(folder.iterdir())) == 1, "was not written")
    fit(config(Path.cwd(), "new", "trainer.max_steps=1"))
    _expect(not list(folder.iterdir()), "is still there")


def _not_finite() -> None:
    """What is told where no checkpoint was ever written."""
    spoil = lambda module, batch: module.model.norm.weight.data.fill_(_NAN)  # noqa: E731
    try:
        fit(config(Path.cwd(), "run", "checkpoint.every=100"), before_step=spoil)
    except ValueError as error:
        _expect("not finite" in str(error), "says something else")
        _expect("checkpoint is kept" not in str(error), "tells of a checkpoint")
        return
    raise Silent("trained")


def _same_directory_twice() -> None:
    """The wandb sync line of a run that went on in its own directory names each part once."""
    from memlm.training.fit import make_trainer
    from memlm.training.loggers import sync_hint, wandb_logger

    settings = config(Path.cwd(), "run", "trainer.max_steps=2", logger="wandb")
    fit(settings)
    settings = settings | {"resume": str(Path.cwd() / "run")}
    origin = find_origin(settings["resume"], settings, [])
    time.sleep(1.1)  # names of W&B's directories are seconds
    with make_trainer(settings, Path.cwd() / "run", origin) as (trainer, _):
        hint = sync_hint(wandb_logger(trainer.loggers), origin)
    parts = (hint or "").split()[2:]
    _expect(len(parts) == 2 and len(set(parts)) == 2, f"says {hint}")


def _evaluation_refused() -> None:
    """An evaluation that is refused leaves no directory."""
    source, _ = _trained()
    more = [f"checkpoint='{source / 'step=9.ckpt'}'", f"paths.root={Path.cwd()}"]
    for line in (["experiment=babi"], ["experiment=needle", "logger=csv"], ["experiment=needle", "change={x.y: 1}"]):
        try:
            command("evaluate", *more, *line)
        except SystemExit as error:
            _expect(error.code == 2, f"{line} ended with {error.code}")
        _expect(not _runs(), f"{line} left {_runs()}")


def faults() -> list[Case]:
    """Signals, output that cannot be written, locks, runs that are alive."""
    _trained()
    asking = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    cases: dict[str, Callable[[], object]] = {}
    for signum in asking:
        name = signal.Signals(signum).name
        cases[f"{name} while training"] = functools.partial(_while_training, signum)
        cases[f"{name} while starting"] = functools.partial(_while_starting, signum)
        cases[f"{name} while measuring"] = functools.partial(_while_measuring, signum)
    cases |= {
        "SIGHUP under nohup": _ignored,
        "output into a closed pipe": _closed_pipe,
        "output into a closed pipe, noticed at the end": _closed_pipe_at_the_end,
        "output onto a full device": lambda: _unread(os.open("/dev/full", os.O_WRONLY), "No space left on device"),
        "no standard streams": _without_streams,
        "auto beside a run that is alive": lambda: _alive(own=False, auto=True),
        "auto takes the run that is further": _further,
        "half a first checkpoint": _leftover,
        "not finite before a checkpoint": _not_finite,
        "W&B of a run that went on in its own directory": _same_directory_twice,
        "evaluations that are refused": _evaluation_refused,
    }
    refused: dict[str, Callable[[], object]] = {
        "resume of a run that is alive, into another directory": lambda: _alive(own=False),
        "resume of a run that is alive, in its own directory": lambda: _alive(own=True),
        "a lock that is a pipe": lambda: _lock(os.mkfifo),
        "a lock that is a directory": lambda: _lock(Path.mkdir),
        "a lock that is a link to nowhere else": lambda: _lock(lambda path: path.symlink_to(".lock")),
    }
    return [
        *(Case(name, do, ("right",), seconds=120.0) for name, do in cases.items()),
        *(Case(name, do, seconds=120.0) for name, do in refused.items()),
    ]
