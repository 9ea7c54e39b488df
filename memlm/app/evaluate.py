"""Measure what the memory of a trained model remembers: `memlm evaluate checkpoint=RUN`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm import threads
from memlm.app.cli import cli
from memlm.compose import config_dir, run_dir
from memlm.config import ConfigError, did_you_mean
from memlm.printed import printable

if TYPE_CHECKING:
    from memlm.models.base import LanguageModel


_LONG = ("continual",)  # train many models of their own: measured only if named


def name_all(arguments: list[str]) -> list[str]:
    """Put the names of all experiments, those that apply, in place of `experiment=all`."""
    found = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
    names = ",".join(name for name in found if name not in _LONG)
    every = [f"experiment=[{names}]", "skip_inapplicable=true"]
    return [word for argument in arguments for word in (every if argument == "experiment=all" else [argument])]


def changes(change: Any, model: LanguageModel) -> dict[str, Any]:
    """Settings of memories that an evaluation changes, checked as if the model was built with them.

    Raises:
        ConfigError: If the model lacks such a memory, the memory refuses a value, or it would need other weights.
    """
    from memlm.training.memory_settings import check_memory_settings

    if change is None:
        return {}
    if not isinstance(change, dict):
        raise ConfigError(f"change must be settings by name.attribute, as {{ltm.importance: fifo}}, got {change!r}")
    nodes = model.config["memory"]
    for key in change:
        name = str(key).partition(".")[0]
        if name not in nodes:
            raise ConfigError(
                f"change: the model has no memory {name!r} to set {key} of.{did_you_mean(name, nodes)} It has: "
                f"{', '.join(nodes) or 'none'}"
            )
    check_memory_settings(model, change, "change")
    return change


@cli("evaluate")
def main(config: Mapping[str, Any]) -> None:
    """Run the chosen experiments, write their results and print the summary; several processes do it together."""
    from memlm.checkpoint import find, load_run, place
    from memlm.evaluation import runner
    from memlm.evaluation.recall.asking import SHARED
    from memlm.evaluation.recall.reading import is_shared
    from memlm.evaluation.runs import describe, write_evaluation
    from memlm.evaluation.summary import not_measured, summary
    from memlm.training.loggers import evaluation_logger, sync_hint
    from memlm.training.memory_settings import memory_settings

    experiments = runner.chosen(config)
    if not experiments:
        raise ConfigError("experiment selects nothing to measure: give a name, a list of names, or all.")
    checkpoint, directory = find(config["checkpoint"]), Path(run_dir())
    with runner.together(directory) as share:
        model, data = load_run(
            checkpoint,
            paths={"cache_dir": config["paths"]["cache_dir"]},
            text=config["data"]["path"],
            trust=config["trust"],
        )
        place(model, config["device"])
        changed = changes(config["change"], model)
        if share.rank > 0:
            with memory_settings(model, changed):
                runner.run_all(model, data, experiments, directory)
            return
        print(printable(f"{checkpoint}: measured by {', '.join(experiments)} into {directory}"))
        print(threads.told())
        if is_shared(model):
            print(SHARED)
        with memory_settings(model, changed):
            trained = describe(checkpoint, model)._replace(memory=changed)
        about = write_evaluation(directory, trained)
        with evaluation_logger(config, trained.config) as logger, memory_settings(model, changed):
            results, written, skipped = runner.run_all(model, data, experiments, directory, logger)
            hint = sync_hint(logger)
    print("\n" + summary(results))
    print("\nWritten:", *(f"  {path}" for path in [about, *written]), sep="\n")
    if hint:
        print(f"\nW&B ran offline. To upload: {hint}")
    if skipped and not config["skip_inapplicable"]:
        raise ConfigError("; ".join(f"{name} was not measured: {reason}" for name, reason in skipped.items()))
    if skipped:
        print("\n" + not_measured(skipped))


def start() -> None:
    """What the command line runs."""
    sys.argv[1:] = name_all(sys.argv[1:])
    main()


if __name__ == "__main__":
    start()
