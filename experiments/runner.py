"""Run the chosen experiments on a model, write what they found, and say it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.base import Result, emit
from memlm.config import ConfigError


def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings objects of the experiments that a plain configuration names, by name.

    Raises:
        ConfigError: If there are none, or a setting cannot work.
    """
    found = {
        name: _settings(node)
        for name, node in config.items()
        if isinstance(node, Mapping) and str(node.get("_target_")).startswith("experiments.")
    }
    if not found:
        raise ConfigError("experiment selects nothing to measure: give a name, a list of names, or all.")
    return found


def run_all(
    model: Any, data: Any, experiments: Mapping[str, Any], directory: Path, logger: Any | None = None
) -> tuple[list[Result], list[Path]]:
    """All experiments one after the other, with a progress bar.

    Args:
        model: A language model.
        data: Its data.
        experiments: Settings by name, see `chosen`.
        directory: Each experiment writes into a folder of its own below it.
        logger: A W&B logger that gets tables and images too.

    Returns:
        The results, and the paths of all that was written.
    """
    from rich.progress import Progress

    results, written = [], []
    with Progress(transient=True) as bar:
        for name, settings in experiments.items():
            task = bar.add_task(name, total=1.0)

            def show(done: float, task: Any = task) -> None:
                bar.update(task, completed=done)

            result = _module(settings).run(model, data, settings, progress=show)
            results.append(result)
            written += emit(result, _module(settings).plot(result), directory / name, logger=logger)
    return results, written


def _settings(node: Mapping[str, Any]) -> Any:
    module, _, name = str(node["_target_"]).rpartition(".")
    values = {key: value for key, value in node.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(**values)


def _module(settings: Any) -> Any:
    return importlib.import_module(type(settings).__module__)
