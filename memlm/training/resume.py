"""Going on with a run that stopped: which one, and whether it is the same one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlm.checkpoint import checkpoints, find, read
from memlm.config import ConfigError

# What makes two runs the same run. The rest (loggers, paths, devices) may change.
_SAME = ("model", "memory", "data", "curriculum", "training", "seed")


def checkpoint_to_resume(resume: str | None, config: Mapping[str, Any], root: Path) -> Path | None:
    """The checkpoint that ``resume`` means.

    Args:
        resume: A run directory or checkpoint; ``auto`` for the newest unfinished run of this configuration below
            ``root``; None for none.
        config: Plain configuration of this run.
        root: Where runs are kept.

    Returns:
        A checkpoint file, or None to begin anew.

    Raises:
        ConfigError: If there is no such checkpoint, or it belongs to another configuration.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = find(resume)
        if differences := _differences(config, read(path)["memlm"]["config"]):
            raise ConfigError(
                f"{path} was trained with other settings: {'; '.join(differences[:5])}. "
                "Give the settings of that run, or leave out resume"
            )
        return path
    runs = {path.parent.parent for path in root.rglob("step=*.ckpt")}
    for run in sorted(runs, key=lambda run: checkpoints(run)[-1].stat().st_mtime, reverse=True):
        for path in reversed(checkpoints(run)):
            try:
                content = read(path)
            except ConfigError as error:
                print(f"resume=auto: {error}", file=sys.stderr)
                continue
            entry = content["memlm"]["config"]
            if not _differences(config, entry) and config["trainer"]["max_steps"] == entry["trainer"]["max_steps"]:
                return path if content["global_step"] < config["trainer"]["max_steps"] else None
            break
    return None


def _differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Settings in which two configurations are not the same run."""
    ours, theirs = _flat({key: config[key] for key in _SAME}), _flat({key: other.get(key) for key in _SAME})
    keys = sorted(set(ours) | set(theirs))
    return [
        f"{key} is {ours.get(key)!r} here, {theirs.get(key)!r} there"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: list(value) if isinstance(value, tuple) else value}
