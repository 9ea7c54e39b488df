"""Run the chosen experiments on a model: once, writing what they found, or again and again while it is trained."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.config import ConfigError
from memlm.evaluation.emit import emit
from memlm.evaluation.experiment import home_of, name_of
from memlm.evaluation.headline import headline
from memlm.evaluation.result import Result
from memlm.evaluation.share import Share
from memlm.models.base import LanguageModel
from memlm.printed import printable

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings objects of the experiments that a plain configuration names, by name.

    Raises:
        ConfigError: If a setting cannot work.
    """
    return {name: _settings(node) for name, node in config.items() if _is_experiment(node)}


def run_all(
    model: LanguageModel,
    data: TextData | None,
    experiments: Mapping[str, Any],
    directory: Path,
    logger: Any | None = None,
) -> tuple[list[Result], list[Path], dict[str, str]]:
    """All experiments one after the other, with a progress bar.

    Where several processes run them together, experiments whose ``run`` takes a share are dealt out to all of them; the
    others are left to the first, which also writes.

    Args:
        model: A language model.
        data: Its data; None where no experiment needs any.
        experiments: Settings by name, see `chosen`.
        directory: Each experiment writes into a folder of its own below it.
        logger: A W&B logger that gets tables and images too.

    Returns:
        The results, the paths of all that was written, and by name why an experiment does not apply to this model or
        its data; in other processes than the first, nothing.
    """
    from rich.progress import Progress

    results: list[Result] = []
    written: list[Path] = []
    skipped: dict[str, str] = {}
    first = Share.here().rank == 0
    with Progress(transient=True, disable=not first) as bar:
        for name, settings in experiments.items():
            task = bar.add_task(name, total=1.0)

            def show(done: float, task: Any = task) -> None:
                bar.update(task, completed=done)

            try:
                result = _run(model, data, settings, show)
            except ConfigError as error:
                skipped[name] = str(error)
                continue
            if result is None or not first:
                continue
            results.append(result)
            written += emit(result, home_of(settings).plot(result), directory / name, logger=logger)
    return results, written, skipped


@contextmanager
def together(directory: Path) -> Iterator[Share]:
    """Let the processes that torchrun started measure together.

    Args:
        directory: Where this process would write.

    Yields:
        What falls to this process.

    Raises:
        ConfigError: If the processes would not write into one directory.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Share()
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo")  # what is exchanged is on the CPU
    try:
        share = Share.here()
        if len(set(share.join([str(directory)]))) > 1:
            raise ConfigError("several processes write into one directory: name it by hydra.run.dir=DIRECTORY")
        yield share
    finally:
        torch.distributed.destroy_process_group()


def watched(nodes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings objects of what is measured while a model is trained.

    Args:
        nodes: Settings of experiments by name, as plain values; None for nothing.

    Raises:
        ConfigError: If a node is not of an experiment, or a setting cannot work.
    """
    found = {}
    for name, node in (nodes or {}).items():
        if node is None:
            continue
        if not _is_experiment(node):
            raise ConfigError(
                f"watch.{name} must be the settings of an experiment, with _target_: experiments.NAME.CLASS, or null; "
                f"got {node!r}"
            )
        found[name] = _settings(node)
    return found


def watch(experiments: Mapping[str, Any], data: TextData) -> Callable[[Any], dict[str, float]] | None:
    """What measures a model while it is trained.

    Args:
        experiments: Settings by name, see `watched`.
        data: The data of the run; what says that it does not apply to it is left out.

    Returns:
        A function from the model to numbers by the names under which they are logged: those that the experiment
        gives them, else ``<name>/<metric>``, the headline and what stands behind it. An experiment that does not
        apply to the model is left out from then on, with a printed sentence. None if there is nothing to measure.
    """
    left = {
        name: settings
        for name, settings in experiments.items()
        if getattr(home_of(settings), "applies", lambda data: True)(data)
    }
    if not left:
        return None

    def measure(model: LanguageModel) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, settings in list(left.items()):
            try:
                result = _run(model, data, settings)
                numbers |= {} if result is None else _names_of_log(name, settings)(result)
            except ConfigError as error:
                del left[name]
                print(printable(f"watch.{name} is left out: {error}"))
        return numbers

    return measure


def _run(
    model: LanguageModel, data: TextData | None, settings: Any, progress: Callable[[float], None] | None = None
) -> Result | None:
    """The result of an experiment; None where it is left to another process."""
    run, share = home_of(settings).run, Share.here()
    if "share" in inspect.signature(run).parameters:
        return run(model, data, settings, progress=progress, share=share)
    return run(model, data, settings, progress=progress) if share.rank == 0 else None


def _names_of_log(name: str, settings: Any) -> Callable[[Result], dict[str, float]]:
    """What names the numbers of a result: the experiment itself, where it is watched under its own name."""
    own = getattr(home_of(settings), "logged", None) if name == name_of(settings) else None
    return own or partial(_logged, name)


def _logged(name: str, result: Result) -> dict[str, float]:
    """Numbers of a result by the names under which they are logged during training."""
    headline(result)  # refuses a rate without controls
    names = [entry[key] for entry in result.metadata.get("headline", ()) for key in ("metric", "low", "high", "n")]
    return {f"{name}/{metric}": result.metrics[metric] for metric in names if metric is not None}


def _is_experiment(node: Any) -> bool:
    return isinstance(node, Mapping) and str(node.get("_target_")).startswith("experiments.")


def _settings(node: Mapping[str, Any]) -> Any:
    module, _, name = str(node["_target_"]).rpartition(".")
    values = {key: value for key, value in node.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(**values)
