"""The trainer of a run: loggers, callbacks, checkpoints, history."""

from __future__ import annotations

import contextlib
import logging
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from memlm.analysis.figures import read_history
from memlm.checkpoint import FOLDER, read
from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum
from memlm.training.callbacks import AtomicCheckpointIO, DuringTraining, Throughput

_EARLIER = "earlier-{}.csv"  # what was logged before a run was resumed, oldest first


def plan_steps(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with ``trainer.max_steps`` filled in from the curriculum, and the devices checked.

    Raises:
        ConfigError: If a device is asked for that is not there, or no step is to be made.
    """
    trainer = dict(config["trainer"])
    if trainer["max_steps"] is None:
        trainer["max_steps"] = Curriculum(config["curriculum"]["phases"]).steps
    if trainer["max_steps"] < 1:
        raise ConfigError(f"trainer.max_steps must be at least 1 or null, got {trainer['max_steps']}")
    if trainer["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={trainer['accelerator']} asks for CUDA, but torch finds none here: "
            "use trainer=cpu, or install a CUDA build of torch"
        )
    return config | {"trainer": trainer}


@contextlib.contextmanager
def make_trainer(
    config: Mapping[str, Any],
    run: Path,
    resume: Path | None,
    watch: Callable[[torch.nn.Module], Mapping[str, float]] | None,
) -> Iterator[tuple[lightning.Trainer, Callable[[], list[dict[str, Any]]]]]:
    """The trainer of a run, closed in an orderly way whatever happens.

    Args:
        config: Plain configuration, steps planned.
        run: Run directory.
        resume: Checkpoint the run goes on from.
        watch: Numbers to measure and log every ``val_check_interval`` steps.

    Yields:
        The trainer, and a function that returns all that was logged, by step.
    """
    settings = {name: value for name, value in config["trainer"].items() if name != "_target_"}
    _keep_earlier_history(run, resume)
    loggers = _loggers(config, resume)
    checkpoints = ModelCheckpoint(
        dirpath=run / FOLDER,
        filename="{step}",
        every_n_train_steps=config["checkpoint"]["every"],
        save_top_k=config["checkpoint"]["keep"],
        monitor="step",
        mode="max",
        save_on_train_epoch_end=False,
    )
    callbacks: list[Callback] = [checkpoints, Throughput(), LearningRateMonitor("step")]
    if settings["enable_progress_bar"]:
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    if watch is not None:
        callbacks.append(DuringTraining(watch, every=int(settings["val_check_interval"])))
    _quiet()
    trainer = lightning.Trainer(
        **settings,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run,
        use_distributed_sampler=False,
    )

    def history() -> list[dict[str, Any]]:
        return [row for file in _history_files(run) for row in read_history(file)]

    try:
        yield trainer, history
    finally:
        for logger in loggers:
            logger.finalize("finished")
        if wandb_logger(loggers) is not None:
            import wandb

            wandb.finish()


def save_last(trainer: lightning.Trainer, run: Path) -> Path:
    """Write the checkpoint of the last step, if it is not there yet."""
    path = run / FOLDER / f"step={trainer.global_step}.ckpt"
    if not path.is_file():
        trainer.save_checkpoint(path)
    return path


def _loggers(config: Mapping[str, Any], resume: Path | None) -> list[Logger]:
    """CSV and W&B loggers of ``config["logger"]``."""
    loggers: list[Logger] = []
    for kind, node in (config["logger"] or {}).items():
        settings = {name: value for name, value in node.items() if name != "_target_"}
        if kind == "csv":
            loggers.append(CSVLogger(**settings))
        else:
            loggers.append(_wandb(config, settings, resume))
    return loggers


def _wandb(config: Mapping[str, Any], settings: dict[str, Any], resume: Path | None) -> WandbLogger:
    """A W&B logger whose run goes on when training does; offline unless told otherwise."""
    import wandb

    run_id = read(resume)["memlm"].get("wandb_id") if resume is not None else None
    logger = WandbLogger(
        **settings,
        id=run_id or secrets.token_hex(4),
        resume="allow" if run_id and not settings["offline"] else None,
        config=dict(config),
        settings=wandb.Settings(silent=True),
    )
    experiment = logger.experiment
    experiment.define_metric("trainer/global_step")
    for section in ("train", "val", "memory", "recall", "lr-AdamW"):
        experiment.define_metric(f"{section}/*", step_metric="trainer/global_step")
    return logger


def _keep_earlier_history(run: Path, resume: Path | None) -> None:
    """Copy what was logged before the checkpoint into the run that goes on."""
    if resume is None:
        return
    step = read(resume)["global_step"]
    target = run / "csv"
    target.mkdir(parents=True, exist_ok=True)
    for i, source in enumerate(_history_files(resume.parent.parent)):
        header, *rows = source.read_text(encoding="utf-8").splitlines()
        place = header.split(",").index("step")
        kept = [row for row in rows if int(row.split(",")[place]) < step]
        (target / _EARLIER.format(i)).write_text("\n".join([header, *kept, ""]), encoding="utf-8")


def _history_files(run: Path) -> list[Path]:
    """What a run and those it went on from have logged, oldest first."""
    folder = run / "csv"
    files = sorted(folder.glob(_EARLIER.format("*")), key=lambda file: int(file.stem.partition("-")[2]))
    return [*files, *folder.glob("metrics.csv")]


def _quiet() -> None:
    """Silence what says nothing to a user of memlm."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*IterableDataset.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def wandb_logger(loggers: list[Logger]) -> WandbLogger | None:
    """The W&B logger among ``loggers``, if there is one."""
    return next((logger for logger in loggers if isinstance(logger, WandbLogger)), None)


def sync_hint(logger: WandbLogger | None) -> str | None:
    """How to upload an offline W&B run; None if there is nothing to upload."""
    if logger is None or not logger._offline:
        return None
    return f"wandb sync {Path(logger.experiment.dir).parent}"
