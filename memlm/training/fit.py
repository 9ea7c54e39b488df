"""The trainer of a run: loggers, callbacks, checkpoints, history."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
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
from lightning.pytorch.utilities import rank_zero_only

from memlm.analysis.figures import read_history
from memlm.checkpoint import FOLDER, checkpoints, no_space
from memlm.config import ConfigError
from memlm.training.callbacks import AtomicCheckpointIO, Checkpoints, DuringTraining, Progress, Throughput
from memlm.training.resume import (
    Origin,
    forget_finished,
    history_files,
    keep_earlier_history,
    refuse_other_run,
    running,
)
from memlm.training.settings import sweep_dir
from memlm.training.stopping import Stopped

# What libraries say that tells a user of memlm nothing.
_NOISE = (
    ".*LeafSpec.*",  # torch 2.13 renamed an internal that lightning still uses
    ".*does not have many workers.*",
    ".*number of training batches.*",
    ".*IterableDataset.*",
    ".*exists and is not empty.*",
    ".*dataloader is not resumable.*",  # it is: a batch is a function of its number
    ".*found in eval mode at the start of training.*",
)


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
        ConfigError: If a setting of the trainer or a logger does not work here, or no space is left.
    """
    settings = {name: value for name, value in config["trainer"].items() if name != "_target_"}
    clock = Throughput()
    callbacks: list[Callback] = [clock, Checkpoints(run, config["checkpoint"]["every"], config["checkpoint"]["keep"])]
    if watch is not None:
        callbacks.append(DuringTraining(watch, settings["val_check_interval"], clock))
    if settings["enable_progress_bar"]:
        callbacks.append(Progress())

    def history() -> list[dict[str, Any]]:
        return [row for file in history_files(run) for row in read_history(file)]

    loggers: list[Logger] = []
    finished = False
    stopped: Stopped | None = None
    try:
        with _quiet(), running(run) if _is_first() else contextlib.nullcontext():
            if _is_first():
                refuse_other_run(run, origin)
                if origin is not None:
                    keep_earlier_history(run, origin)
                forget_finished(run)
            loggers += _loggers(config, origin)
            trainer = _trainer(
                **settings,
                logger=loggers,
                callbacks=callbacks,
                plugins=[AtomicCheckpointIO(), *_slurm()],
                default_root_dir=run,
                use_distributed_sampler=False,
            )
            yield trainer, history
            finished = True
    except Stopped as signal:
        stopped = signal
        raise
    except OSError as error:
        if no_space(error):
            raise ConfigError(f"no space is left in {run}: free some and go on with resume=auto") from error
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
    if set(loggers) != {"wandb"}:
        raise ConfigError("an evaluation writes its files without a logger; beside them it logs to W&B: logger=wandb")
    node = loggers["wandb"]
    settings = {name: value for name, value in node.items() if name != "_target_"}
    name = config["name"] or f"evaluate-{_model_and_memory(trained)}"
    logger = _wandb({**config, "name": name, "trained": dict(trained)}, settings, None)
    finished = False
    try:
        yield logger
        finished = True
    finally:
        logger.experiment.finish(exit_code=0 if finished else 1)


def save_last(trainer: lightning.Trainer, run: Path) -> Path:
    """The checkpoint of the last step; it is written if training ended before its last step."""
    newest = checkpoints(run)[-1:] if (run / FOLDER).is_dir() else []
    # Where processes were forked to train, this one has made no step itself.
    if not newest or (newest[0].name != f"step={trainer.global_step}.ckpt" and trainer.global_step > 0):
        newest = [run / FOLDER / f"step={trainer.global_step}.ckpt"]
        trainer.save_checkpoint(newest[0])
    return newest[0]


def count_processes(settings: Mapping[str, Any]) -> int:
    """How many processes a run on this machine would train with.

    Args:
        settings: Of the trainer.

    Raises:
        ConfigError: If one of them does not work here.
    """
    with _quiet():
        return _trainer(**settings, plugins=[LightningEnvironment()], logger=False).world_size


def _trainer(**settings: Any) -> lightning.Trainer:
    """A trainer; what it refuses is told as a mistake in the settings."""
    try:
        return lightning.Trainer(**settings)
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def _slurm() -> list[SLURMEnvironment]:
    """The environment of a SLURM job, which leaves it to others to queue it again: a run stops only between steps."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _loggers(config: Mapping[str, Any], origin: Origin | None) -> list[Logger]:
    """CSV and W&B loggers of ``config["logger"]``."""
    loggers: list[Logger] = []
    for kind, node in (config["logger"] or {}).items():
        settings = {name: value for name, value in node.items() if name != "_target_"}
        if kind == "csv":
            loggers.append(CSVLogger(**settings))
        else:
            loggers.append(_wandb(config, settings, origin))
    return loggers


def _wandb(config: Mapping[str, Any], settings: dict[str, Any], origin: Origin | None) -> WandbLogger:
    """A W&B logger whose run goes on when training does; offline unless told otherwise."""
    import wandb

    offline, log_model, folder = settings.pop("offline"), settings.pop("log_model"), Path(settings.pop("save_dir"))
    settings["name"] = settings["name"] or config["name"] or _title(config)
    sweep = sweep_dir()
    settings["group"] = settings["group"] or (sweep.name if sweep is not None else None)
    run_id = origin.entry.get("wandb_id") if origin is not None else None
    run: Any = None
    if _is_first():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Not left to Lightning, which passes settings that W&B has given up and so earns a warning.
            run = wandb.init(
                **settings,
                dir=folder,
                id=run_id or secrets.token_hex(4),
                resume="allow" if run_id and not offline else None,
                mode="offline" if offline and os.environ.get("WANDB_MODE") != "disabled" else None,
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"W&B cannot start: {error}; use logger.wandb.offline=true or logger=csv") from error
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    try:
        return WandbLogger(
            experiment=run, project=settings["project"], save_dir=folder, offline=offline, log_model=log_model
        )
    except MisconfigurationException as error:
        if run is not None:
            run.finish(exit_code=1)
        raise ConfigError(f"logger.wandb: {' '.join(str(error).split())}") from error


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
def _quiet() -> Iterator[None]:
    """Silence what says nothing to a user of memlm."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
                if logging.getLogger().hasHandlers():  # those of the job; lightning's own would say each line again
                    logger.handlers.clear()
                    logger.propagate = True
            yield
        finally:
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
    earlier = sorted((origin.run / "wandb").glob(f"offline-run-*-{run.id}")) if origin is not None else []
    return f"wandb sync {' '.join(map(str, [*earlier, Path(run.dir).parent]))}"
