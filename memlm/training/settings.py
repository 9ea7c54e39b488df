"""Settings of a run, checked: light, so that a wrong value is told before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from memlm.config import ConfigError, check_kind, check_settings, did_you_mean, instantiate, whole
from memlm.data.curriculum import build_curriculum
from memlm.schema import Checkpoint
from memlm.training.amount import of_tokens

# What numbers of the trainer may be, null apart: Lightning takes others too, and fails or goes on for ever.
_RANGES = {
    "num_nodes": (1, 10**6),
    "gradient_clip_val": (0, 10**9),
    "accumulate_grad_batches": (1, 10**6),
    "val_check_interval": (1, 10**9),
    "check_val_every_n_epoch": (1, 10**9),
    "limit_val_batches": (0, 10**9),
    "num_sanity_val_steps": (-1, 10**9),
    "log_every_n_steps": (1, 10**9),
}


@dataclass(frozen=True)
class Training:
    """How weights are trained: AdamW, linear warm-up, then a cosine.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decay of matrices; vectors, scalars and embeddings are not decayed.
        betas: Of AdamW.
        warmup_steps: Steps of linear warm-up.
        min_lr_ratio: Learning rate at the end of the cosine, as a share of ``lr``.
        answer_weight: Weight in the loss of answers to questions about planted facts; other tokens weigh 1.
        consolidate_every: Steps after which shared banks and the memories of documents that go on are consolidated (see
            `memlm.memory.contract.Memory.consolidate`); None for never.
        compile: Compile the model's forward pass and its loss for training steps. Evaluation is never compiled.

    Raises:
        ConfigError: If a value cannot work; the message names it.
    """

    lr: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    min_lr_ratio: float = 0.05
    answer_weight: float = 5.0
    consolidate_every: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if not 0 < self.lr <= 1000:
            raise ConfigError(f"training.lr must be above 0 and at most 1000, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas must be two numbers in [0, 1), got {list(self.betas)}")
        for name in ("weight_decay", "warmup_steps", "answer_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"training.{name} must not be negative, got {getattr(self, name)}")
            if getattr(self, name) > 10**9:
                raise ConfigError(f"training.{name} must be at most {10**9}, got {getattr(self, name)}")
        if self.consolidate_every is not None and self.consolidate_every < 1:
            raise ConfigError(
                f"training.consolidate_every must be at least 1, or null for never, got {self.consolidate_every}"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"training.min_lr_ratio must be in 0..1, got {self.min_lr_ratio}")


# Arguments of lightning.Trainer that mean in a run what they mean there.
_TRAINER = (
    "accelerator", "accumulate_grad_batches", "benchmark", "check_val_every_n_epoch", "detect_anomaly", "deterministic",
    "devices", "enable_model_summary", "enable_progress_bar", "gradient_clip_algorithm", "gradient_clip_val",
    "inference_mode", "limit_val_batches", "log_every_n_steps", "max_steps", "max_time", "num_nodes",
    "num_sanity_val_steps", "precision", "strategy", "val_check_interval",
)  # fmt: skip
_NEEDED = (
    "accelerator", "accumulate_grad_batches", "devices", "enable_progress_bar", "log_every_n_steps", "max_steps",
    "num_nodes", "precision", "strategy", "val_check_interval",
)  # fmt: skip
_NO_EPOCHS = "a run has steps and no epochs: set trainer.max_steps, or the steps of curriculum.phases"
_BY_NUMBER = "a batch is a function of its number: to train on less set trainer.max_steps, or another data.path"
_BY_STEP = "batches are the same however often they are loaded"
_AFTER = "what is measured after training is chosen with experiment="
# What is set in place of the others.
_INSTEAD = {
    "barebones": "set logger=null trainer.enable_progress_bar=false checkpoint.every=NUMBER",
    "callbacks": "callbacks are those of memlm: from Python, give them to a lightning.Trainer of your own",
    "default_root_dir": "set hydra.run.dir=DIRECTORY",
    "enable_autolog_hparams": "all settings are logged; set logger=csv or logger=null for no W&B",
    "enable_checkpointing": "set checkpoint.every and checkpoint.keep",
    "fast_dev_run": "set trainer.max_steps=1 trainer.limit_val_batches=1 logger=null",
    "limit_predict_batches": _AFTER,
    "limit_test_batches": _AFTER,
    "limit_train_batches": _BY_NUMBER,
    "logger": "set logger=csv, logger=wandb, logger=[csv,wandb] or logger=null",
    "max_epochs": _NO_EPOCHS,
    "min_epochs": _NO_EPOCHS,
    "min_steps": "a run makes all of its steps: set trainer.max_steps",
    "model_registry": "export a trained model with memlm export",
    "overfit_batches": _BY_NUMBER,
    "plugins": "plugins are those of memlm: from Python, give them to a lightning.Trainer of your own",
    "profiler": "run memlm benchmark train, or torch.profiler around memlm from Python",
    "reload_dataloaders_every_n_epochs": _BY_STEP,
    "sync_batchnorm": "no model of memlm has batch normalisation",
    "use_distributed_sampler": "the rows of each batch are dealt out to processes by memlm",
}


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer that a run would not honour.

    Raises:
        ConfigError: If one is missing, is not honoured, or has a value that means nothing.
    """
    if trainer.get("_target_", "lightning.Trainer") != "lightning.Trainer":
        raise ConfigError(f"trainer._target_ must be lightning.Trainer, got {trainer['_target_']!r}")
    for name in trainer:
        if name in _INSTEAD:
            raise ConfigError(f"trainer.{name} has no meaning in a run of memlm, leave it out; {_INSTEAD[name]}")
        if name not in (*_TRAINER, "_target_"):
            raise ConfigError(
                f"trainer.{name} is not a setting of a run.{did_you_mean(name, _TRAINER)} Known: {', '.join(_TRAINER)}"
            )
    if missing := [name for name in _NEEDED if name not in trainer]:
        raise ConfigError(f"trainer.{missing[0]} is missing: give it a value")
    if trainer.get("check_val_every_n_epoch") is not None:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch must be null, got {trainer['check_val_every_n_epoch']!r}: {_NO_EPOCHS}; "
            "how often a run validates is trainer.val_check_interval, in batches"
        )
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not (_is_number(clip) and clip >= 0):
        raise ConfigError(
            f"trainer.gradient_clip_val must be a number of at least 0, got {clip!r}; 0 or null does not clip"
        )
    if trainer.get("gradient_clip_algorithm") not in (None, "norm", "value"):
        raise ConfigError(
            f"trainer.gradient_clip_algorithm must be norm or value, got {trainer['gradient_clip_algorithm']!r}"
        )
    sanity = trainer.get("num_sanity_val_steps")
    if sanity is not None and not (type(sanity) is int and sanity >= -1):
        raise ConfigError(
            f"trainer.num_sanity_val_steps must be a whole number of at least 0, or -1 for all, got {sanity!r}"
        )
    seconds_of(trainer.get("max_time"))


def seconds_of(max_time: Any) -> float | None:
    """The seconds of ``trainer.max_time``: DD:HH:MM:SS, or numbers by unit such as ``{hours: 8}``; None for null.

    Raises:
        ConfigError: If it is no time above 0.
    """
    units = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    if max_time is None:
        return None
    parts: dict[str, Any] = {}
    if isinstance(max_time, str) and re.fullmatch(r"\d+:\d+:\d+:\d+", max_time):
        parts = dict(zip(units, map(int, max_time.split(":")), strict=True))
    elif isinstance(max_time, Mapping) and set(max_time) <= set(units):
        parts = dict(max_time)
    total = sum(units[unit] * value for unit, value in parts.items() if _is_number(value) and value >= 0)
    if not all(map(_is_number, parts.values())) or not 0 < total < float("inf"):
        raise ConfigError(
            f"trainer.max_time must be a time above 0 as DD:HH:MM:SS, or as {{hours: 8, minutes: 30}}, got {max_time!r}"
        )
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def build_training(config: Mapping[str, Any]) -> Training:
    """The settings of ``config["training"]``, of the class that its ``_target_`` names.

    Raises:
        ConfigError: If that is no `Training`, or a value cannot work.
    """
    check_kind(config["training"], "training", Training)
    return instantiate(config["training"], "training")


def plan_steps(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``config`` with ``n_token`` dealt out to the phases, ``trainer.max_steps`` filled in from them, the rest checked.

    Raises:
        ConfigError: If a signal is asked for that is not there, or a number is out of range.
    """
    if not isinstance(config.get("trainer"), Mapping):
        raise ConfigError("trainer is missing: choose trainer=default, cpu, gpu, ddp or fsdp")
    trainer = dict(config["trainer"])
    check_settings(config["checkpoint"], Checkpoint, "checkpoint")
    check_trainer(trainer)
    for name in ("accumulate_grad_batches", "log_every_n_steps", "val_check_interval"):
        whole(f"trainer.{name}", trainer[name], 1)
    for name, (least, most) in _RANGES.items():
        value = trainer.get(name)
        if value is not None and not (_is_number(value) and least <= value <= most):
            raise ConfigError(f"trainer.{name} must be in {least}..{most}, got {value!r}")
    for kind, node in (config.get("logger") or {}).items():
        if "flush_logs_every_n_steps" in node:
            whole(f"logger.{kind}.flush_logs_every_n_steps", node["flush_logs_every_n_steps"], 1)
    if not 0 <= config["seed"] < 2**31:
        raise ConfigError(f"seed must be in 0..2147483647, got {config['seed']}")
    for name, node in config["memory"].items():
        if node.get("signals"):
            raise ConfigError(
                f"memory.{name}.signals names {', '.join(node['signals'])}, but the data of a run is text and has "
                "none: leave it null (from Python, each call may bring some: model(ids, signals=...))"
            )
    _check_consolidation(config)
    build_training(config)
    if config.get("n_token") is not None:
        if trainer["max_steps"] not in (None, -1):
            raise ConfigError(
                f"n_token and trainer.max_steps={trainer['max_steps']} both say how long it trains: give one of them"
            )
        config = {**config, "curriculum": _of_tokens(config)}
    if trainer["max_steps"] in (None, -1):
        batches = build_curriculum(config).steps
        trainer["max_steps"] = -(-batches // trainer["accumulate_grad_batches"])
    if trainer["max_steps"] < 0:
        raise ConfigError(
            f"trainer.max_steps must be at least 1, 0 to train nothing, or -1 for the curriculum, got "
            f"{trainer['max_steps']}"
        )
    if trainer["max_steps"] > 10**9:
        raise ConfigError(f"trainer.max_steps must be at most {10**9}, got {trainer['max_steps']}")
    if trainer["precision"] not in ("32-true", "32", 32, "bf16-mixed"):
        raise ConfigError(
            f"trainer.precision must be 32-true or bf16-mixed, got {trainer['precision']!r}: memories keep their "
            "searches and banks in 32 bits, and the loss makes its gradients before they could be scaled for fp16"
        )
    return {**config, "trainer": trainer}


def _of_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The curriculum with the steps of all phases scaled so that they have ``n_token`` tokens, to half a batch each."""
    if "n_epoch" in config["curriculum"]:
        raise ConfigError("n_token cannot be set where a curriculum has epochs: set curriculum.scale")
    phases = config["curriculum"]["phases"]
    sizes = [
        phase.n_row * phase.n_segment * config["model"]["segment_len"] for phase in build_curriculum(config).phases
    ]
    steps = of_tokens([phase["steps"] for phase in phases], sizes, config["n_token"])
    return config["curriculum"] | {"phases": [phase | {"steps": n} for phase, n in zip(phases, steps, strict=True)]}


def _check_consolidation(config: Mapping[str, Any]) -> None:
    """Refuse to consolidate where no memory outlives a step."""
    every = build_training(config).consolidate_every
    if every is None:
        return
    shared = any(node.get("scope") == "shared" for node in config["memory"].values())
    phases = build_curriculum(config).phases
    goes_on = any(phase.task is None or phase.n_window > 1 for phase in phases)
    if config["memory"] and not shared and not goes_on:
        raise ConfigError(
            f"training.consolidate_every={every} would consolidate nothing: documents of this curriculum are one "
            "window long, and their memory ends with them; leave it null, give phases with n_window above 1, or share "
            "the memory (such as memory.ltm.scope=shared)"
        )


def check_device(config: Mapping[str, Any]) -> None:
    """Refuse a device that this machine lacks; not for what is only sent to another machine from here.

    Raises:
        ConfigError: If CUDA is asked for and not there.
    """
    accelerator = config["trainer"]["accelerator"]
    if accelerator in ("gpu", "cuda") and not _has_cuda():
        raise ConfigError(
            f"trainer.accelerator={accelerator} asks for CUDA, but torch finds none here: "
            "use trainer=cpu, or install a CUDA build of torch"
        )


def places_of_runs(config: Mapping[str, Any]) -> list[Path]:
    """Where ``resume=auto`` looks for runs: below ``paths.root``; the jobs of a sweep also in sweeps before it."""
    places = [Path(config["paths"]["root"])]
    if (sweep := sweep_dir()) is not None and sweep.parent.resolve() != Path.cwd():
        places.append(sweep.parent)
    return places


def sweep_dir() -> Path | None:
    """Directory of the sweep that this run is a job of."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir)
    return None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
