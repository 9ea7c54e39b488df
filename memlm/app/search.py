"""Search for good settings of `memlm train`: `memlm search training.lr='tag(log, interval(1e-4, 1e-2))'`.

Settings with several values are searched over, in the words in which Hydra sweeps over them; the others are those of
every trial. A trial is a run in a process and a directory of its own. The study is kept beside them, so that the same
command goes on with it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from memlm.app import train
from memlm.app.cli import cli
from memlm.app.command_line import check_command_line
from memlm.compose import run_dir
from memlm.config import ConfigError, did_you_mean
from memlm.printed import one_line, printable
from memlm.quoting import quoted

if TYPE_CHECKING:
    pass


def apart(arguments: Sequence[str]) -> list[str]:
    """Move settings with several values, which Hydra would make a sweep of, into `search.space`."""
    fixed: list[str] = []
    space: list[str] = []
    place = 0
    for argument in arguments:
        override = None if argument.startswith("-") else _parse(argument)
        if override is not None and override.is_sweep_override():
            place = len(fixed)  # among the settings: no option may stand between two of them
            space.append(f"{override.get_key_element()}: {json.dumps(argument.partition('=')[2])}")
        else:
            fixed.append(argument)
    return [*fixed[:place], *([f"+search.space={{{', '.join(space)}}}"] if space else []), *fixed[place:]]


def _parse(line: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(line)
    except Exception:  # told by what reads the command line next
        return None


def distributions(space: Mapping[str, str]) -> dict[str, Any]:
    """What Optuna draws from, by the name of the setting.

    Raises:
        ConfigError: If a setting has but one value, or an interval that nothing can be drawn from.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, text in space.items():
        override = _parse(f"{name}={text}")
        if override is None or not override.is_sweep_override():
            raise ConfigError(
                f"search.space: {name}={text} has nothing to choose from: write choice(1, 2), range(8, 65, 8), "
                "interval(0, 1) or tag(log, interval(1e-4, 1e-2))"
            )
        value: Any = override.value()
        log = "log" in getattr(value, "tags", ())
        try:
            if isinstance(value, IntervalSweep):
                ends: Any = (value.start, value.end)
                integers = all(isinstance(end, int) for end in ends)  # as in int(interval(8, 64))
                kind: Any = IntDistribution if integers else FloatDistribution
                found[name] = kind(*ends, log=log)
            elif isinstance(value, RangeSweep) and isinstance(value.step, int) and value.step > 0 and value.range():
                numbers = value.range()
                found[name] = IntDistribution(numbers[0], numbers[-1], step=value.step)  # type: ignore[index]
            else:
                found[name] = CategoricalDistribution(list(override.sweep_string_iterator()))
        except ValueError as error:
            raise ConfigError(f"search.space: nothing can be drawn from {name}={text}: {error}") from error
    return found


def measured(metric: str, returned: float | None) -> float:
    """The number that a trial is judged by.

    Raises:
        ConfigError: If it was not measured, or is no number.
    """
    if returned is None:
        raise ConfigError(
            f"optimized_metric={metric} was not measured: choose a number of an experiment that trials run"
        )
    if math.isnan(returned):
        raise ConfigError(f"optimized_metric={metric} is no number (nan)")
    return returned


def open_study(directory: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> Any:
    """The study of a directory, new or gone on with.

    Raises:
        ConfigError: If it is another search, or damaged.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{directory / 'study.db'}",
            direction=settings["direction"],
            load_if_exists=True,
        )
        before = study.user_attrs.get("about", about)
        trials = study.trials
    except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise ConfigError(
            f"{directory / 'study.db'} cannot be read: it is damaged ({one_line(str(error).splitlines()[0])}); give "
            "another hydra.run.dir, or remove it to begin anew"
        ) from error
    if before != about:
        differences = "; ".join(f"{key} is {about[key]!r} here, {before[key]!r} there"
                                for key in about if before[key] != about[key])  # fmt: skip
        raise ConfigError(f"{directory} holds another search ({differences}): give another hydra.run.dir")
    study.set_user_attr("about", about)
    # A sampler that began anew would draw again what it drew.
    seed = settings["seed"] + len(trials)
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study.sampler = samplers[settings["sampler"]](seed=seed)
    for trial in trials:
        if not trial.state.is_finished():  # the search was stopped in it
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return study


def check(config: Mapping[str, Any]) -> None:
    """Refuse wrong settings of the search, and of the trials what `train.py` refuses."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "a search needs Optuna: pip install 'memlm[search]', in a checkout pip install -e '.[search]'"
        )
    search = config["search"]
    if not search["space"]:
        raise ConfigError("there is nothing to search over: give a setting several values, or hparams_search=NAME")
    distributions(search["space"])
    _check_metric(config["optimized_metric"], config)
    train.check(config)


def _check_metric(metric: str, config: Mapping[str, Any]) -> None:
    """Refuse a number of an experiment that no trial would run."""
    from memlm.evaluation import runner

    names = runner.chosen(config)
    experiment = metric.partition("/")[0]
    if experiment not in names:
        raise ConfigError(
            f"optimized_metric={metric} is a number of experiment={experiment}, but trials "
            f"measure {', '.join(names) or 'nothing'}.{did_you_mean(experiment, names)} Name another number, or "
            "choose that experiment"
        )


@cli("search", check)
def main(config: Mapping[str, Any]) -> None:
    """Run trials until there are enough, and show them."""
    from optuna.trial import TrialState

    from memlm.evaluation.table import table
    from memlm.training.apart import config_dirs, run_apart
    from memlm.training.marks import running

    settings, directory = config["search"], Path(run_dir())
    space, metric = settings["space"], config["optimized_metric"]
    fixed = [line for line in HydraConfig.get().overrides.task
             if not line.lstrip("+").startswith(("search.", "hparams_search="))]  # fmt: skip
    drawn_from = distributions(space)
    places = config_dirs()
    check_command_line(["-m", *places, *fixed, *(f"{name}={text}" for name, text in space.items())], check=train.check)
    about = {"settings": sorted(fixed), **{name: settings[name] for name in ("space", "direction")}}

    with running(directory):
        study = open_study(directory, settings, about)
        failed = {trial.number: trial.user_attrs["error"] for trial in study.trials if "error" in trial.user_attrs}
        n_left = settings["n_trial"] - len(failed) - sum(trial.value is not None for trial in study.trials)
        for _ in range(n_left):
            trial = study.ask(drawn_from)
            lines = [f"{name}={trial.params[name]}" for name in space]
            print(f"trial {trial.number}: {' '.join(map(shlex.quote, lines))}", flush=True)
            run = directory / f"trial-{trial.number}"
            # If the search was stopped in a trial, the run to go on with is below this directory too.
            lines += [f"paths.root={quoted(str(directory))}", "resume=auto"]
            try:
                returned = run_apart(train.__file__, [*places, *fixed, *lines], run)
                study.tell(trial, measured(metric, returned))
            except (ConfigError, RuntimeError) as error:
                failed[trial.number] = str(error)
                trial.set_user_attr("error", str(error))
                study.tell(trial, state=TrialState.FAIL)
                print(printable(f"error: trial {trial.number}: {error}"), file=sys.stderr)
    ranked = sorted((trial for trial in study.trials if trial.value is not None), key=lambda trial: trial.value,
                    reverse=settings["direction"] == "maximize")  # fmt: skip
    rows = [[trial.number, trial.value, *(trial.params[name] for name in space)] for trial in ranked[:10]]
    print("\n" + table(["trial", metric, *space], rows, f"The best of {len(ranked)} trials in {directory}"))
    if failed:
        print("\nFailed:", *(f"  trial {number}: {why}" for number, why in failed.items()), sep="\n", file=sys.stderr)
    if not ranked:
        raise ConfigError("no trial came to an end")


def start() -> None:
    """What the command line runs."""
    sys.argv[1:] = apart(sys.argv[1:])
    main()


if __name__ == "__main__":
    start()
