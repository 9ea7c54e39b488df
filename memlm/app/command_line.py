"""A command line is checked before Hydra acts on it."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser  # the flags of a Hydra command line, which have no public home
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from memlm.compose import (
    brief,
    check_choice,
    check_missing,
    compose_with,
    options_of,
    parse_overrides,
    session,
    to_dict,
    without_hydra,
)
from memlm.config import (
    INJECTED,
    ConfigError,
    check_settings,
    slow_parts,
    validate,
)
from memlm.schema import SCHEMAS


def check_command_line(
    argv: Sequence[str],
    config_name: str = "train",
    *,
    directory: str | Path | None = None,
    injected: Collection[str] = INJECTED,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> DictConfig | None:
    """Check a command line before Hydra acts on it.

    Of a sweep every choice of every swept setting is checked, with the other settings at their first choice: a typing
    error in the last value is found before the first job starts. `--help` and the like pass unchecked.

    Args:
        argv: the arguments without the name of the program.
        config_name: the primary config, unless `argv` names another.
        directory: the config tree; the shipped one by default.
        injected: see `memlm.config.validate`.
        check: what else a config, plain dicts, is put before.

    Returns:
        The config of a single run, Hydra's own settings included, which is thereby composed for good. None for what
        Hydra has to compose itself: the jobs of a sweep, and what is only to be looked at.

    Raises:
        ConfigError: what `compose`, `validate` and `check` raise.
    """
    _check_options(argv)
    # A newer Hydra may know further flags: they are its own business.
    flags, rest = get_args_parser().parse_known_intermixed_args(list(argv))
    if flags.help or flags.hydra_help or flags.shell_completion or flags.experimental_rerun or flags.info:
        return None
    if unknown := [a for a in rest if a.startswith("-")]:
        raise _no_option(unknown[0])
    if flags.config_path is not None:
        if not os.path.isabs(flags.config_path):
            return None  # relative to the script, which only Hydra knows
        directory = flags.config_path
    searchpath = [flags.config_dir] if flags.config_dir else []
    if searchpath and not Path(flags.config_dir).is_dir():
        raise ConfigError(f"There is no config directory {flags.config_dir!r} (--config-dir).")
    schema = SCHEMAS.get(config_name) if directory is None else None
    config_name = flags.config_name or config_name

    with session(directory, searchpath) as loader:
        parsed = parse_overrides(flags.overrides, loader)
        multirun = flags.multirun or any(
            o.key_or_group == "hydra.mode" and str(o.value()).upper().endswith("MULTIRUN") for o in parsed
        )
        touched = {o.key_or_group.partition(".")[0].partition("/")[0] for o in parsed}
        for override in parsed:
            if override.key_or_group == "hydra/launcher":
                _check_launcher(loader, config_name, override)
        for overrides in _jobs(parsed) if multirun else [list(flags.overrides)]:
            whole = compose_with(loader, overrides, config_name, schema)
            config = without_hydra(whole)
            if flags.cfg:  # to be looked at, complete or not
                continue
            check_missing(config)
            plain = to_dict(config)
            if schema is not None:
                check_settings(plain, schema)
            validate(plain, injected=injected, skip=slow_parts(plain) - touched)
            if check is not None:
                check(plain)
    swept = multirun or whole.hydra.mode is RunMode.MULTIRUN
    return None if swept or flags.cfg or flags.resolve or flags.package else whole


def _check_options(argv: Sequence[str]) -> None:
    """Refuse an option that does not exist, which `argparse` may take for the beginning of another."""
    known = _known_options()
    for argument in argv:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise _no_option(option)


def _known_options() -> list[str]:
    return [option for action in get_args_parser()._actions for option in action.option_strings]


def _no_option(option: str) -> ConfigError:
    close = difflib.get_close_matches(option, _known_options(), n=1, cutoff=0.8)
    hint = f" Did you mean {close[0]!r}?" if close else f" A setting is written {option.lstrip('-')}=VALUE."
    return ConfigError(f"There is no option {option!r}.{hint} See --help.")


def _check_launcher(loader: ConfigLoader, config_name: str, override: Override) -> None:
    """Refuse a launcher that does not exist, or whose package is not installed."""
    check_choice(override, options_of(loader, "hydra/launcher", [], config_name))
    try:
        hydra.compose(config_name, [str(override.input_line)], return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(
            f"{override.input_line} needs a package that is not installed: pip install 'memlm[launchers]' "
            "(in a checkout: pip install -e '.[launchers]')"
        ) from error


_MOST_JOBS = 10_000  # of a sweep: Hydra makes a list of all before the first one starts


_MOST_CHECKED = 16  # values of a setting that are checked one by one


def _jobs(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """Yield the overrides of enough jobs to see every choice of every sweep once.

    Of very many values of a setting, the first ones, the last one, the least and the greatest stand for all, and one of
    each type.
    """
    choices: list[list[str]] = []
    n_job = 1
    for override in parsed:
        key = override.get_key_element()
        value = override.value()
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
            continue
        if isinstance(value, IntervalSweep):
            n, lines = 2, [f"{key}={value.start}", f"{key}={value.end}"]
        elif isinstance(value, RangeSweep):
            n, ends = _range(value)
            lines = [f"{key}={end}" for end in ends]
        else:
            values = list(override.sweep_string_iterator())
            n, lines = len(values), [f"{key}={v}" for v in _some(values)]
        if not lines:
            raise ConfigError(f"{override.input_line!r} sweeps over nothing.")
        n_job *= n
        if n_job > _MOST_JOBS:
            raise ConfigError(
                f"The sweep would be more than {_MOST_JOBS:,} jobs (with {brief(override.input_line)}): give fewer "
                "values, or draw from them with memlm search."
            )
        choices.append(lines)
    yield [c[0] for c in choices]
    for i, lines in enumerate(choices):
        for line in lines[1:]:
            yield [line if j == i else c[0] for j, c in enumerate(choices)]


def _range(sweep: RangeSweep) -> tuple[int, list[float]]:
    """How many numbers a range has, and its ends."""
    start, stop, step = sweep.start or 0, sweep.stop or 0, sweep.step
    if not step or not all(map(math.isfinite, (start, stop, step))):
        return (sys.maxsize, [start]) if step else (0, [])
    n = max(0, math.ceil((stop - start) / step))
    return n, list(dict.fromkeys((start, start + (n - 1) * step))) if n else []


def _some(values: list[str]) -> list[str]:
    """Those of the values of a sweep that are checked."""
    if len(values) <= _MOST_CHECKED:
        return values
    found: dict[type, list[tuple[Any, str]]] = {}
    for value in values:
        plain = yaml.safe_load(value)
        found.setdefault(type(plain), []).append((plain, value))
    some = [*values[:_MOST_CHECKED], values[-1]]
    for kind, pairs in found.items():
        if kind in (int, float):
            some += [min(pairs)[1], max(pairs)[1]]
        some.append(pairs[0][1])
    return list(dict.fromkeys(some))
