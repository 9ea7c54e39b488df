"""The trainer of a run: loggers, callbacks, checkpoints, history."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from torch.multiprocessing import ProcessExitedException

from memlm import threads
from memlm.analysis.run_log import read_history
from memlm.checkpoint import FOLDER, checkpoints
from memlm.config import ConfigError, instantiate
from memlm.machine import no_space
from memlm.output import output_lost
from memlm.training.callbacks import AtomicCheckpointIO, Checkpoints, DuringTraining, Progress, Throughput
from memlm.training.logged import history_files, keep_earlier_history
from memlm.training.loggers import is_first, make_loggers
from memlm.training.marks import forget_finished, running
from memlm.training.resume import Origin, refuse_other_run, remove_leftovers_of_runs
from memlm.training.settings import places_of_runs, seconds_of
from memlm.training.stopping import UNREAD, Stopped
from memlm.training.told import fault, lost_process, quiet, then


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
        with quiet(run), running(run) if is_first() else contextlib.nullcontext():
            if is_first():
                refuse_other_run(run, origin)
                if origin is not None:
                    keep_earlier_history(run, origin.run, origin.step)
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
            threads.share(trainer.num_devices)
            loggers += make_loggers(config, origin)  # W&B last: it starts a process and reaches for the network
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
            raise ConfigError(f"no space is left in {run}: free some space{then(run)}") from error
        if (told := fault(error)) is not None:
            raise ConfigError(told + then(run) * bool(lost_process(str(error)))) from error
        if isinstance(error, MisconfigurationException):  # what Lightning finds when it meets the data
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        raise
    finally:
        for logger in loggers:
            with contextlib.suppress(OSError):  # of what led here the first error says most
                logger.finalize("success" if finished else "failed")
            if isinstance(logger, WandbLogger) and is_first():
                logger.experiment.finish(exit_code=0 if finished else 1)
        if stopped is not None:
            stopped.hand_on()


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
