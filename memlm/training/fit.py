"""The trainer of a run: loggers, callbacks, checkpoints, history."""

from __future__ import annotations

import contextlib
import csv
import importlib
import inspect
import io
import logging
import os
import re
import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from memlm.analysis.figures import read_history
from memlm.checkpoint import FOLDER, checkpoints
from memlm.cli import output_lost
from memlm.config import ConfigError, did_you_mean, instantiate
from memlm.files import atomic_file
from memlm.machine import no_space
from memlm.training.callbacks import AtomicCheckpointIO, Checkpoints, DuringTraining, Progress, Throughput
from memlm.training.resume import (
    Origin,
    forget_finished,
    history_files,
    keep_earlier_history,
    refuse_other_run,
    remove_leftovers_of_runs,
    running,
)
from memlm.training.settings import places_of_runs, seconds_of, sweep_dir
from memlm.training.stopping import UNREAD, Stopped

_WANDB_PATIENCE = 20.0  # seconds until a run goes on offline; WANDB_INIT_TIMEOUT sets another
# What libraries say that tells a user of memlm nothing.
_NOISE = (
    ".*LeafSpec.*",  # torch 2.13 renamed an internal that lightning still uses
    ".*does not have many workers.*",
    ".*number of training batches.*",
    ".*IterableDataset.*",
    ".*exists and is not empty.*",
    ".*dataloader is not resumable.*",  # it is: a batch is a function of its number
    ".*found in eval mode at the start of training.*",
    ".*have no `val_dataloader`.*",  # an experiment that trains measures by itself
)


# What is told where a process of the run was lost, by what torch and lightning say of it.
_LOST = {
    r"DataLoader worker \(pid.*?\) (?:is killed|exited)": (
        "a loader process was killed, most often because memory ran out (in a container: /dev/shm): lower data.n_worker"
    ),
    r"process \d+ terminated with|Child process with PID \d+ terminated": (
        "a process of this run was killed, most often because memory ran out, or failed (see above); so all end"
    ),
    r"Connection (?:closed|reset) by peer|Broken pipe|NCCL": (
        "another process of this run is gone: it was killed, most often because memory ran out, or failed (see above); "
        "so all end"
    ),
}
_OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"  # ends a run of which a process ended


@contextlib.contextmanager
def make_trainer(
    config: Mapping[str, Any],
    run: Path,
    origin: Origin | None = None,
    watch: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
) -> Iterator[tuple[lightning.Trainer, Callable[[], list[dict[str, Any]]]]]:
    """The trainer of a run, closed in an orderly way whatever happens.

    Args:
        config: Plain configuration, steps planned.
        run: Run directory.
        origin: What the run goes on from.
        watch: Numbers to measure and log every ``val_check_interval`` batches.

    Yields:
        The trainer, and a function that returns all that was logged, by step.

    Raises:
        ConfigError: If a setting of the trainer or a logger does not work here, no space is left, or a process is lost.
    """
    settings = {name: value for name, value in config["trainer"].items() if name not in ("_target_", "max_time")}
    clock = Throughput()
    keeper = Checkpoints(
        run, config["checkpoint"]["every"], config["checkpoint"]["keep"], seconds_of(config["trainer"].get("max_time"))
    )
    callbacks: list[Callback] = [clock, keeper]
    if watch is not None:
        callbacks.append(DuringTraining(watch, settings["val_check_interval"], clock))
    if settings["enable_progress_bar"]:
        callbacks.append(Progress(keeper.nobody_reads))

    def history() -> list[dict[str, Any]]:
        return [row for file in history_files(run) for row in read_history(file)]

    loggers: list[Logger] = []
    finished = False
    stopped: Stopped | None = None
    try:
        with quiet(run), running(run) if _is_first() else contextlib.nullcontext():
            if _is_first():
                refuse_other_run(run, origin)
                if origin is not None:
                    keep_earlier_history(run, origin)
                forget_finished(run)
                remove_leftovers_of_runs(run, places_of_runs(config))
            trainer = _trainer(
                **settings,
                logger=False,
                callbacks=callbacks,
                plugins=[AtomicCheckpointIO(), *_slurm()],
                default_root_dir=run,
                use_distributed_sampler=False,
            )
            loggers += _loggers(config, origin)  # W&B last: it starts a process and reaches for the network
            trainer.loggers = loggers
            yield trainer, history
            finished = True
    except Stopped as signal:
        stopped = signal
        raise
    except Exception as error:
        if isinstance(error, ProcessExitedException) and (asked := Stopped.by_exit(error.exit_code)) is not None:
            asked.told = True  # by that process
            raise asked from error
        if isinstance(error, OSError) and output_lost():
            raise Stopped(UNREAD) from error
        if no_space(error):
            raise ConfigError(f"no space is left in {run}: free some space{_then(run)}") from error
        if (told := _fault(error)) is not None:
            raise ConfigError(told + _then(run) * bool(_lost(str(error)))) from error
        if isinstance(error, MisconfigurationException):  # what Lightning finds when it meets the data
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        raise
    finally:
        for logger in loggers:
            with contextlib.suppress(OSError):  # of what led here the first error says most
                logger.finalize("success" if finished else "failed")
            if isinstance(logger, WandbLogger) and _is_first():
                logger.experiment.finish(exit_code=0 if finished else 1)
        if stopped is not None:
            stopped.hand_on()


@contextlib.contextmanager
def evaluation_logger(config: Mapping[str, Any], trained: Mapping[str, Any]) -> Iterator[WandbLogger | None]:
    """The W&B logger of an evaluation, whose run is finished whatever happens.

    Args:
        config: Plain configuration of the evaluation, in which ``logger`` may be missing.
        trained: That of the trained model; W&B shows it as ``trained``.

    Yields:
        The logger; None if none is named.

    Raises:
        ConfigError: If the logger does not work here, or is another than W&B's.
    """
    loggers = config.get("logger") or {}
    if not loggers:
        yield None
        return
    check_loggers(loggers)
    if [_kind(node) for node in loggers.values()] != [WandbLogger]:
        raise ConfigError("an evaluation writes its files without a logger; beside them it logs to W&B: logger=wandb")
    (key, node), *_ = loggers.items()
    settings = {name: value for name, value in node.items() if name != "_target_"}
    name = config["name"] or f"evaluate-{_model_and_memory(trained)}"
    logger = _wandb({**config, "trained": dict(trained)}, f"logger.{key}", settings, name, None)
    finished = False
    try:
        yield logger
        finished = True
    finally:
        logger.experiment.finish(exit_code=0 if finished else 1)


def save_last(trainer: lightning.Trainer, run: Path) -> Path:
    """The checkpoint of the last step; it is written if training ended before its last step.

    Every process has to ask. The first one decides: others may look before the file has its name, or elsewhere.
    """
    newest = checkpoints(run)[-1:] if (run / FOLDER).is_dir() else []
    path = run / FOLDER / f"step={trainer.global_step}.ckpt"
    # Where processes were forked to train, this one has made no step itself.
    lacks = not newest or (newest[0].name != path.name and trainer.global_step > 0)
    lacks, path = trainer.strategy.broadcast((lacks, path if lacks else newest[0]))
    if lacks:
        trainer.save_checkpoint(path)
    return path


def _fault(error: BaseException) -> str | None:
    """What to tell of an error that came from another process; None of any other error."""
    text = str(error)
    if (lost := _lost(text)) is not None:
        return lost
    if isinstance(error, ProcessRaisedException) or "in DataLoader worker process" in text:
        # What a process told comes with its traceback, whose last line it is.
        name, _, told = text.strip().rpartition("\n")[2].partition(": ")
        if name.rpartition(".")[2] in ("ConfigError", "NonFiniteLoss"):
            return told
    return None


def _lost(text: str) -> str | None:
    """What to tell where ``text`` says that a process was lost."""
    for pattern, told in _LOST.items():
        if re.search(pattern, text):
            return told
    return None


def _then(run: Path) -> str:
    """How to go on with a run that failed."""
    if (run / FOLDER).is_dir() and checkpoints(run):
        return "; what was saved is whole, go on with resume=auto"
    return "; no checkpoint was written yet, give the command again"


class _TellLost(logging.Handler):
    """Tells that a process was lost, before the others are killed.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        if (told := _lost(record.getMessage())) is not None:
            print(f"error: {told}{_then(self.run)}", file=sys.stderr, flush=True)


def count_processes(settings: Mapping[str, Any]) -> int:
    """How many processes a run on this machine would train with.

    Args:
        settings: Of the trainer.

    Raises:
        ConfigError: If one of them does not work here.
    """
    with quiet():
        return _trainer(**settings, plugins=[LightningEnvironment()], logger=False).world_size


def _trainer(**settings: Any) -> lightning.Trainer:
    """A trainer; what it refuses is told as a mistake in the settings."""
    if isinstance(settings["strategy"], Mapping):
        settings["strategy"] = instantiate(settings["strategy"], "trainer.strategy")
    try:
        return lightning.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def _slurm() -> list[SLURMEnvironment]:
    """The environment of a SLURM job, which leaves it to others to queue it again: a run stops only between steps."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class _Rows(ExperimentWriter):
    """Rows of a CSV file, which is never without what was logged before."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns; Lightning empties the file first, and a process killed right then would lose all."""
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_file(Path(self.metrics_file_path)) as file:
            file.write(text.getvalue().encode())


class _History(CSVLogger):
    """`CSVLogger` with `_Rows`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the rows."""
        if self._experiment is None:
            self._experiment = _Rows(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]


# Settings of logger.wandb that a run sets itself, and what sets them.
_WANDB_OWN = {
    "anonymous": "W&B has given it up",
    "config": "the settings of the run are its config",
    "dir": "set logger.wandb.save_dir",
    "experiment": "a run makes its own",
    "mode": "set logger.wandb.offline, or the environment variable WANDB_MODE",
    "prefix": "numbers are found by their names; tell runs apart by name, group or tags",
    "resume": "a run that goes on with resume= goes on in W&B too",
    "version": "set logger.wandb.id",
}
_WANDB_LOGGER = ("log_model", "checkpoint_name", "add_file_policy")  # of Lightning, not of wandb.init


def check_loggers(nodes: Any) -> None:
    """Refuse loggers that are none, and settings that one would not honour.

    Raises:
        ConfigError: Naming the logger.
    """
    if not isinstance(nodes, Mapping):
        raise ConfigError(f"logger must be loggers by name, each with its _target_, or null for none, got {nodes!r}")
    for key, node in nodes.items():
        if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
            raise ConfigError(f"logger.{key} must be the settings of a logger, with its _target_, got {node!r}")
        kind = _kind(node)
        if not (isinstance(kind, type) and issubclass(kind, Logger)):
            raise ConfigError(f"logger.{key}._target_ must be a logger of Lightning, got {node['_target_']}")
        if kind is WandbLogger:
            _check_wandb(f"logger.{key}", node)
    if sum(_kind(node) is WandbLogger for node in nodes.values()) > 1:
        raise ConfigError("logger has several of W&B: a run is logged there once, leave one out")


def _check_wandb(key: str, node: Mapping[str, Any]) -> None:
    import wandb

    known = {*inspect.signature(wandb.init).parameters, *_WANDB_LOGGER, "offline", "save_dir"} - set(_WANDB_OWN)
    for name in node:
        if name in _WANDB_OWN:
            raise ConfigError(f"{key}.{name} is not a setting of a run, leave it out: {_WANDB_OWN[name]}")
        if name not in known and name != "_target_":
            raise ConfigError(f"{key}.{name} is not a setting of W&B.{did_you_mean(name, known)}")


def _kind(node: Mapping[str, Any]) -> Any:
    """The class of a logger."""
    module, _, name = node["_target_"].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"logger: {node['_target_']} cannot be imported here: {error}") from error


def _loggers(config: Mapping[str, Any], origin: Origin | None) -> list[Logger]:
    """The loggers of ``config["logger"]``; W&B, which may take long to start, last."""
    nodes = config.get("logger") or {}
    check_loggers(nodes)
    loggers: list[Logger] = []
    for key, node in sorted(nodes.items(), key=lambda item: _kind(item[1]) is WandbLogger):
        settings = {name: value for name, value in node.items() if name != "_target_"}
        if _kind(node) is CSVLogger:
            loggers.append(_History(**settings))
        elif _kind(node) is WandbLogger:
            name = config["name"] or os.environ.get("WANDB_NAME") or _title(config)
            loggers.append(_wandb(config, f"logger.{key}", settings, name, origin))
        else:
            try:
                loggers.append(instantiate(node, f"logger.{key}"))
            except (ImportError, MisconfigurationException) as error:  # a package that is not installed
                raise ConfigError(f"logger.{key}: {' '.join(str(error).split())}") from error
    return loggers


def _wandb(
    config: Mapping[str, Any], key: str, settings: dict[str, Any], name: str, origin: Origin | None
) -> WandbLogger:
    """A W&B logger whose run goes on when training does; offline unless told otherwise, or if W&B cannot be reached.

    Args:
        config: What W&B shows as the config.
        key: The full name of the logger, for the errors.
        settings: Of the logger. What is None is left to W&B, and to the environment variables that it reads.
        name: Of the run, where the settings have none.
        origin: What the run goes on from.
    """
    import wandb

    settings = dict(settings)
    offline, folder = settings.pop("offline"), Path(settings.pop("save_dir"))
    of_logger = {part: settings.pop(part) for part in _WANDB_LOGGER if part in settings}
    settings["name"] = settings.get("name") or name
    sweep = sweep_dir()
    settings["group"] = (
        settings.get("group") or os.environ.get("WANDB_RUN_GROUP") or (sweep.name if sweep is not None else None)
    )
    earlier = origin.entry.get("wandb_id") if origin is not None else None
    run_id = settings.pop("id", None) or earlier or os.environ.get("WANDB_RUN_ID")
    run: Any = None
    if _is_first():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(silent=True)
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            quiet.init_timeout = _WANDB_PATIENCE

        def start(offline: bool) -> Any:
            asked = os.environ.get("WANDB_MODE")
            mode: Any
            if offline:
                mode = "offline" if asked != "disabled" else None
            else:  # asked for here, or by the environment
                mode = "online" if asked in ("offline", "dryrun", "disabled") else None
            # Not left to Lightning, which passes settings that W&B has given up and so earns a warning.
            return wandb.init(
                **settings,
                dir=folder,
                id=run_id or secrets.token_hex(4),
                resume="allow" if run_id and not offline and "WANDB_RESUME" not in os.environ else None,
                mode=mode,
                config=dict(config),
                settings=quiet,
            )

        try:
            try:
                run = start(offline)
            except wandb.errors.CommError as error:
                if "timed out" not in str(error).lower():
                    raise
                print(
                    f"W&B cannot be reached ({str(error).splitlines()[0]}): this run is logged offline, to be "
                    f"uploaded later with wandb sync {folder}/wandb/offline-run-*",
                    file=sys.stderr,
                )
                offline = True
                run = start(offline)
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B cannot start: {' '.join(str(error).split())}; use {key}.offline=true or logger=csv"
            ) from error
        except (ValueError, TypeError) as error:  # pydantic's, of its settings
            raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    try:
        return WandbLogger(
            experiment=run, project=settings.get("project"), save_dir=folder, offline=offline, **of_logger
        )
    except (MisconfigurationException, TypeError) as error:
        if run is not None:
            run.finish(exit_code=1)
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def _title(config: Mapping[str, Any]) -> str:
    """What a run is called by default: model-memory."""
    if HydraConfig.initialized():
        choices = HydraConfig.get().runtime.choices
        return f"{choices['model']}-{choices['memory']}"
    return _model_and_memory(config)


def _model_and_memory(config: Mapping[str, Any]) -> str:
    """The classes of a configuration's model and the names of its memories."""
    return f"{config['model']['_target_'].rpartition('.')[2].lower()}-{'+'.join(config['memory']) or 'none'}"


def _is_first() -> bool:
    """Whether this is the first of all processes."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextlib.contextmanager
def quiet(run: Path | None = None) -> Iterator[None]:
    """Silence what says nothing to a user of memlm, but tell where a process of a run is lost."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    observer, tell = logging.getLogger(_OBSERVER), _TellLost(run or Path())
    observer.addHandler(tell)
    observer.setLevel(logging.INFO)
    observer.propagate = False
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        try:
            logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)  # where asked for
            for logger in loggers:
                logger.setLevel(logging.WARNING)
                if logging.getLogger().hasHandlers():  # those of the job; lightning's own would say each line again
                    logger.handlers.clear()
                    logger.propagate = True
            yield
        finally:
            observer.removeHandler(tell)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def wandb_logger(loggers: list[Logger]) -> WandbLogger | None:
    """The W&B logger among ``loggers``, if there is one."""
    return next((logger for logger in loggers if isinstance(logger, WandbLogger)), None)


def sync_hint(logger: WandbLogger | None, origin: Origin | None = None) -> str | None:
    """How to upload an offline W&B run, with what was logged before it was resumed; None if there is none."""
    if logger is None or not logger.experiment.settings._offline:
        return None
    run = logger.experiment
    own = Path(run.dir).parent
    earlier = sorted((origin.run / "wandb").glob(f"offline-run-*-{run.id}")) if origin is not None else []
    parts = [part for part in earlier if part.resolve() != own.resolve()]
    return f"wandb sync {' '.join(map(str, [*parts, own]))}"
