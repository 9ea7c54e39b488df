"""Loggers of a run: CSV, W&B."""

from __future__ import annotations

import contextlib
import csv
import importlib
import inspect
import io
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from memlm.config import ConfigError, did_you_mean, instantiate
from memlm.files import atomic_file
from memlm.training.resume import (
    Origin,
)
from memlm.training.settings import sweep_dir

_WANDB_PATIENCE = 20.0  # seconds until a run goes on offline; WANDB_INIT_TIMEOUT sets another


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
    if [kind_of(node) for node in loggers.values()] != [WandbLogger]:
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


WANDB_LOGGER = ("log_model", "checkpoint_name", "add_file_policy")  # of Lightning, not of wandb.init


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
        kind = kind_of(node)
        if not (isinstance(kind, type) and issubclass(kind, Logger)):
            raise ConfigError(f"logger.{key}._target_ must be a logger of Lightning, got {node['_target_']}")
        if kind is WandbLogger:
            _check_wandb(f"logger.{key}", node)
    if sum(kind_of(node) is WandbLogger for node in nodes.values()) > 1:
        raise ConfigError("logger has several of W&B: a run is logged there once, leave one out")


def _check_wandb(key: str, node: Mapping[str, Any]) -> None:
    import wandb

    known = {*inspect.signature(wandb.init).parameters, *WANDB_LOGGER, "offline", "save_dir"} - set(_WANDB_OWN)
    for name in node:
        if name in _WANDB_OWN:
            raise ConfigError(f"{key}.{name} is not a setting of a run, leave it out: {_WANDB_OWN[name]}")
        if name not in known and name != "_target_":
            raise ConfigError(f"{key}.{name} is not a setting of W&B.{did_you_mean(name, known)}")


def kind_of(node: Mapping[str, Any]) -> Any:
    """The class of a logger."""
    module, _, name = node["_target_"].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"logger: {node['_target_']} cannot be imported here: {error}") from error


def make_loggers(config: Mapping[str, Any], origin: Origin | None) -> list[Logger]:
    """The loggers of ``config["logger"]``; W&B, which may take long to start, last."""
    nodes = config.get("logger") or {}
    check_loggers(nodes)
    loggers: list[Logger] = []
    for key, node in sorted(nodes.items(), key=lambda item: kind_of(item[1]) is WandbLogger):
        settings = {name: value for name, value in node.items() if name != "_target_"}
        if kind_of(node) is CSVLogger:
            loggers.append(_History(**settings))
        elif kind_of(node) is WandbLogger:
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
    of_logger = {part: settings.pop(part) for part in WANDB_LOGGER if part in settings}
    settings["name"] = settings.get("name") or name
    sweep = sweep_dir()
    settings["group"] = (
        settings.get("group") or os.environ.get("WANDB_RUN_GROUP") or (sweep.name if sweep is not None else None)
    )
    earlier = origin.entry.get("wandb_id") if origin is not None else None
    run_id = settings.pop("id", None) or earlier or os.environ.get("WANDB_RUN_ID")
    run: Any = None
    if is_first():
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


def is_first() -> bool:
    """Whether this is the first of all processes."""
    return getattr(rank_zero_only, "rank", 0) == 0


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
