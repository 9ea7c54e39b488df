"""Hydra: composing the configs of `configs/`, and running them from a command line.

- `compose`: do the overrides name settings and options that exist?
- `check_command_line` and `cli`: that, and whether what is composed fits what it builds (`memlm.config.validate`), for
  every job of a command line, ahead of the first one.

All that comes before anything heavy is imported or built. Every mistake is a `ConfigError`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser  # the flags of a Hydra command line, which have no public home
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from memlm.config import (
    INJECTED,
    ConfigError,
    check_settings,
    did_you_mean,
    is_section,
    schema_hints,
    slow_parts,
    validate,
)
from memlm.machine import refusal
from memlm.printed import one_line
from memlm.schema import SCHEMAS, Evaluate, Train

# Packages whose ValueErrors are mistakes of a user.
_OURS = ("memlm", "experiments", "benchmarks", "scripts", "__main__")
_ASKING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_STOPPED = frozenset(128 + signum for signum in _ASKING)
_OUT_OF_TIME = 124  # of a job whose time is over, which ends no other
_UNREAD = 128 + signal.SIGPIPE  # output cannot be written
_MAY_BE_NONE = ("experiment", "logger")  # groups of which any number is chosen
_LAUNCHERS = ("joblib", "submitit")  # packages that start the jobs of a sweep, and tell when one of them dies


def config_dir() -> Path:
    """Return the directory of the shipped configs: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def run_dir() -> str:
    """Return the output directory of the running Hydra job, or `.` outside of one.

    Configs reach it as `${run_dir:}`, which unlike Hydra's own resolver also works for a composed config.
    """
    if HydraConfig.initialized():
        runtime: Any = HydraConfig.get().runtime
        return "." if OmegaConf.is_missing(runtime, "output_dir") else runtime.output_dir
    return "."


def device_of_job(num: int) -> str:
    """Return what `CUDA_VISIBLE_DEVICES` is for a job of a sweep, so that jobs side by side use different GPUs.

    A process that does several jobs keeps the GPU of its first one, as CUDA does not look again.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    devices = [device for device in visible.split(",") if device]
    return devices[num % len(devices)] if devices else ""


def wandb_offline() -> bool:
    """Return whether W&B stays offline by default: unless the environment variable `WANDB_MODE` says otherwise."""
    return os.environ.get("WANDB_MODE", "offline") not in ("online", "shared")


def digest(text: str) -> str:
    """Return six hexadecimal digits that stand for a text in the name of a directory."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def absolute(path: Any, if_there: bool = False) -> Any:
    """Return a path, or pattern of paths, that means the same in any directory; nothing else is changed.

    Args:
        path: the path.
        if_there: whether what is no path of this machine stays as it is.
    """
    if not isinstance(path, str) or (if_there and not os.path.exists(path)):
        return path
    if os.path.isabs(path := os.path.expanduser(path)):
        return path
    here = os.getcwd()
    return os.path.join(glob.escape(here) if glob.has_magic(path) and not os.path.exists(path) else here, path)


OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)
OmegaConf.register_new_resolver("absolute", absolute, replace=True)
OmegaConf.register_new_resolver("digest", digest, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
OmegaConf.register_new_resolver("device_of_job", device_of_job, replace=True)


# ---------------------------------------------------------------------------------------------------- composing


def compose(
    overrides: Sequence[str] = (),
    config_name: str = "train",
    *,
    directory: str | Path | None = None,
    searchpath: Sequence[str | Path] = (),
) -> DictConfig:
    """Compose a config from its YAML files and overrides; usable anywhere, also inside a Hydra job.

    Args:
        overrides: what would stand on the command line, such as `["memory=ltm", "model.n_layer=2"]`.
        config_name: the primary config, a YAML file in `directory`.
        directory: the config tree; the shipped one by default.
        searchpath: further config trees, looked up after `directory`.

    Raises:
        ConfigError: an unknown option or setting, a malformed override, or a required setting without a value.
    """
    schema = SCHEMAS.get(config_name) if directory is None else None
    with _session(directory) as loader:
        config = _compose(loader, [_nothing(line) for line in overrides], config_name, searchpath, schema)
    _check_missing(config)
    if schema is not None:
        check_settings(to_dict(config), schema)
    return config


@contextmanager
def _session(directory: str | Path | None) -> Iterator[ConfigLoader]:
    """Set up Hydra on a config tree and put back whatever was set up before."""
    path = Path(directory or config_dir()).resolve()
    if not path.is_dir():
        raise ConfigError(f"There is no config directory {str(path)!r}.")
    state, runtime = GlobalHydra.instance(), JobRuntime.instance()
    outer, job_name = state.hydra, runtime.get("name")
    state.hydra = None
    try:
        with hydra.initialize_config_dir(str(path), job_name=job_name, version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(
    loader: ConfigLoader,
    overrides: list[str],
    config_name: str,
    searchpath: Sequence[str | Path],
    schema: type | None = None,
) -> DictConfig:
    parsed = _parse(overrides, loader)
    for override in parsed:
        if override.is_sweep_override():
            key, value = override.get_key_element(), (override.input_line or "").partition("=")[2]
            raise ConfigError(
                f"{override.input_line!r} gives several values: add -m to run one job for each, "
                f"or write a list as '{key}=[{value}]'."
            )
    path = [f"file://{Path(p).resolve()}" for p in searchpath]
    extra = [f"hydra.searchpath=[{','.join(path)}]"] if path else []
    if path and any(o.key_or_group == "hydra.searchpath" for o in parsed):
        raise ConfigError("Give either --config-dir or hydra.searchpath, not both.")
    if config_name not in (names := _options(loader, "", extra, None)):
        raise ConfigError(f"There is no config {config_name!r}.{did_you_mean(config_name, names)} {_listing(names)}")

    groups = functools.cache(lambda: _groups(loader, config_name, extra))  # which takes a while
    settings: list[Override] = []
    base = list(extra)
    for override, line in zip(parsed, overrides, strict=True):
        if override.is_hydra_override():
            base.append(line)
        elif options := _options(loader, override.key_or_group, extra, config_name):
            _check_choice(override, options)
            if override.type.name == "CHANGE" and override.key_or_group not in groups():
                known = ", ".join(groups())
                raise ConfigError(
                    f"{override.key_or_group} is no choice of {config_name}, which has {known}. See --help."
                )
            base.append(line)
        elif override.type.name != "CHANGE":  # +key, ++key and ~key may name what is not there
            base.append(line)
        else:
            settings.append(override)
    # First only what decides which settings there are, so that each of the others can be looked up.
    if settings:
        chosen = _hydra_compose(config_name, base)
        for override in settings:
            _check_key(chosen, override, groups)
    whole = _hydra_compose(config_name, extra + overrides, return_hydra_config=True)
    config = whole.copy()
    with open_dict(config):
        config.pop("hydra", None)
    if schema is not None:
        measures = issubclass(schema, Train | Evaluate)
        experiments = _options(loader, "experiment", extra, config_name) if measures else []
        for override in parsed:
            name, _, rest = override.key_or_group.partition(".")
            if rest and name in experiments and name in config and not _is_experiment(config, name):
                raise ConfigError(
                    f"{override.key_or_group} has no effect, as {name} is not measured: choose experiment={name}."
                )
        _refuse_unknown(config, schema, _referred(whole, schema), experiments)
    return config


def _hydra_compose(config_name: str, overrides: list[str], **more: Any) -> DictConfig:
    with _told_in_a_sentence():
        return hydra.compose(config_name, overrides, **more)


@contextmanager
def _told_in_a_sentence() -> Iterator[None]:
    """Turn the errors of Hydra, OmegaConf and PyYAML into a ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"A config file is not valid YAML: {_sentence(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"A config file is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"A config file cannot be read, or holds no mapping of settings: {error}") from error
    except RecursionError as error:
        raise ConfigError("The settings are nested too deeply, or hold or include themselves.") from error


def _parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for line in overrides:
        try:
            parsed += parser.parse_overrides([line])
        except HydraException as error:
            if line.startswith("-"):
                reason = "It looks like an option, but options come from Hydra only (see --hydra-help)."
            elif "=" not in line:
                reason = "A setting is changed with key=value."
            else:
                reason = "Values with spaces or special characters need quotes, such as 'key=\"a, b\"'."
            raise ConfigError(f"Cannot read {_brief(line)}. {reason}") from error
        except (RecursionError, ValueError) as error:  # of brackets in brackets, and numbers of very many digits
            raise ConfigError(f"Cannot read {_brief(line)}: it is nested too deeply, or too long.") from error
    return parsed


def _options(loader: ConfigLoader, group: str, extra: list[str], config_name: str | None) -> list[str]:
    with _told_in_a_sentence():
        return sorted(set(loader.get_group_options(group, config_name=config_name, overrides=extra)))


def _groups(loader: ConfigLoader, config_name: str, extra: list[str]) -> list[str]:
    """The groups of which a config chooses an option."""
    with _told_in_a_sentence():
        defaults = loader.compute_defaults_list(config_name, extra, RunMode.RUN)
    chosen = {str(path).rpartition("/")[0] for path in (part.config_path for part in defaults.defaults) if path}
    chosen |= set(defaults.overrides.known_choices)  # also where the option is null
    return sorted(group for group in chosen if group and group.partition("/")[0] != "hydra")


def _check_choice(override: Override, options: list[str]) -> None:
    group, value = override.key_or_group, override.value()
    for choice in value if isinstance(value, list) else [value]:
        if override.is_delete() and choice in (None, ""):
            continue
        if choice is None:
            raise ConfigError(
                f"{group}=null chooses nothing: give an option, or leave {group} out. {_listing(options)}"
            )
        if not isinstance(choice, str) or choice.removesuffix(".yaml") not in options:
            raise ConfigError(
                f"{group} has no option {str(choice)!r}.{did_you_mean(str(choice), options)} {_listing(options)}"
            )


def _check_key(config: DictConfig, override: Override, groups: Callable[[], list[str]]) -> None:
    """Raise unless the setting of an override exists."""
    key = override.key_or_group
    node: Any = config
    done = ""
    for part in filter(None, re.split(r"[.\[\]]+", key)):
        if isinstance(node, ListConfig):
            return  # Hydra's own message about an index says it all
        if not isinstance(node, DictConfig) or node._is_none():
            raise ConfigError(f"There is no setting {key!r}: {done} is a single value.")
        names = [str(k) for k in node]
        if part not in names:
            raise ConfigError(_unknown(config, done, part, names if done else [*names, *groups()]))
        done = f"{done}.{part}" if done else part
        try:
            node = node[part]
        except OmegaConfBaseException:  # a missing value, or a reference to something that is still to be set
            return
    if isinstance(node, DictConfig) and not node._is_none() and len(node) and override.value() == {}:
        raise ConfigError(f"{key}={{}} would change nothing, as mappings are merged: use {key}=null for nothing.")


def _unknown(config: DictConfig, parent: str, name: str, names: Sequence[str]) -> str:
    prefix = f"{parent}." if parent else ""
    hint = did_you_mean(name, names)
    if places := [k for k in _walk_keys(config) if k.rpartition(".")[2] == name and k != f"{prefix}{name}"]:
        hint = f" Did you mean {places[0]!r}?"
    known = ", ".join(sorted({n for n in names if n[0] != "_"}))
    where = f"{parent} has" if parent else "The settings are"
    return f"There is no setting {prefix + name!r}.{hint} {where}: {known or 'nothing'}."


def _refuse_unknown(
    config: DictConfig, schema: type, referred: Collection[str], experiments: Collection[str] = (), parent: str = ""
) -> None:
    """Refuse a key that nothing reads: no code by its schema, and no other setting.

    Args:
        config: The config.
        schema: The schema of its section `parent`.
        referred: Full names to which settings refer.
        experiments: Names that may stand beside those of the schema: experiments, chosen or not.
        parent: The full name of the section; the whole config by default.
    """
    hints = schema_hints(schema)
    section = OmegaConf.select(config, parent) if parent else config
    for name in map(str, section):
        key = f"{parent}.{name}" if parent else name
        if name in hints:
            child = section._get_node(name)
            if is_section(hints[name]) and isinstance(child, DictConfig) and not child._is_none():
                _refuse_unknown(config, hints[name], referred, parent=key)
        elif any(f"{key}.".startswith(f"{one}.") for one in referred) or name in experiments:
            continue
        elif any(f"{one}.".startswith(f"{key}.") for one in referred):
            _refuse_unknown(config, _Own, referred, parent=key)
        elif parent or not _is_experiment(config, name):
            names = list(hints) or [str(other) for other in section if other != name]
            raise ConfigError(
                f"{_unknown(config, parent, name, names)} A key of your own is fine where a setting refers to it."
            )


class _Own:
    """The schema of a section of which code reads nothing."""


def _is_experiment(config: DictConfig, name: str) -> bool:
    node = config._get_node(name)
    return isinstance(node, DictConfig) and not node._is_none() and str(node.get("_target_")).startswith("experiments.")


def _referred(config: DictConfig, schema: type) -> set[str]:
    """Full names to which settings that are read refer, as `${data.path}` or `${.path}`; with those of Hydra."""
    pairs = []
    for key, text in _texts(OmegaConf.to_container(config, resolve=False)):
        if key[:2] == ["hydra", "overrides"]:  # the command line, told once more
            continue
        for name in re.findall(r"\$\{([^${}:]+)\}", text):
            levels = len(name) - len(name.lstrip("."))
            place = key[: len(key) - levels] if levels else []
            pairs.append((key, ".".join([*place, name.lstrip(".")])))
    found: set[str] = set()
    while more := {name for key, name in pairs if _is_read(config, schema, key, found)} - found:
        found |= more
    return found


def _is_read(config: DictConfig, schema: type, key: Sequence[str], referred: Collection[str]) -> bool:
    """Whether something reads a setting: Hydra, code by the schema, or another setting that is read."""
    if key[0] == "hydra" or _is_experiment(config, key[0]):
        return True
    hint: Any = schema
    for part in key:
        if is_section(hint) and part not in (hints := schema_hints(hint)):
            return any(f"{'.'.join(key)}.".startswith(f"{name}.") for name in referred)
        hint = hints[part] if is_section(hint) else hint
    return True


def _texts(value: Any, key: Sequence[str] = ()) -> Iterator[tuple[Sequence[str], str]]:
    """Every string of a plain config, with the parts of its full name."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from _texts(child, [*key, str(name)])


def _walk_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        yield f"{prefix}{key}"
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _walk_keys(child, f"{prefix}{key}.")


def _check_missing(config: DictConfig) -> None:
    # Not OmegaConf.missing_keys, which follows references, and fails at one to a missing value.
    if missing := sorted(_missing(OmegaConf.to_container(config, resolve=False))):
        raise ConfigError(_required(missing[0]))


def _missing(value: Any, key: str = "") -> Iterator[str]:
    if value == "???":
        yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from _missing(child, f"{key}.{name}" if key else str(name))


def _required(key: str) -> str:
    return f"{key} is required and has no value: give it as {key}=VALUE."


def _listing(options: Sequence[str]) -> str:
    return f"Choose one of: {', '.join(options)}."


def _sentence(error: BaseException) -> str:
    """Return the message of a library's error, and of its cause, on one line."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 3:
        # OmegaConf appends details on lines of their own: "    full_key: ..." and "    object_type=dict"
        lines = [line.strip() for line in str(cause).splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith(("object_type=", "reference_type=")))
        if text and not any(text in part for part in parts):
            parts.append(text)
        cause = cause.__cause__
    return ": ".join(parts) or type(error).__name__


def to_dict(config: Any) -> Any:
    """Return a config as plain dicts, lists and values with every reference resolved.

    Raises:
        ConfigError: a required setting has no value, or a reference leads nowhere.
    """
    if not isinstance(config, DictConfig | ListConfig):
        return config
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(_required(str(error.full_key))) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"Cannot resolve {error.full_key}: {_sentence(error)}") from error


# ------------------------------------------------------------------------------------------------- command lines


def check_command_line(
    argv: Sequence[str],
    config_name: str = "train",
    *,
    directory: str | Path | None = None,
    injected: Collection[str] = INJECTED,
    check: Callable[[DictConfig], None] | None = None,
) -> None:
    """Check a command line before Hydra acts on it.

    Of a sweep every choice of every swept setting is checked, with the other settings at their first choice: a typing
    error in the last value is found before the first job starts. `--help` and the like pass unchecked.

    Args:
        argv: the arguments without the name of the program.
        config_name: the primary config, unless `argv` names another.
        directory: the config tree; the shipped one by default.
        injected: see `memlm.config.validate`.
        check: what else a config is put before.

    Raises:
        ConfigError: what `compose`, `validate` and `check` raise.
    """
    _check_options(argv)
    # A newer Hydra may know further flags: they are its own business.
    flags, rest = get_args_parser().parse_known_intermixed_args(list(argv))
    if flags.help or flags.hydra_help or flags.shell_completion or flags.experimental_rerun or flags.info:
        return
    if unknown := [a for a in rest if a.startswith("-")]:
        raise _no_option(unknown[0])
    if flags.config_path is not None:
        if not os.path.isabs(flags.config_path):
            return  # relative to the script, which only Hydra knows
        directory = flags.config_path
    searchpath = [flags.config_dir] if flags.config_dir else []
    if searchpath and not Path(flags.config_dir).is_dir():
        raise ConfigError(f"There is no config directory {flags.config_dir!r} (--config-dir).")
    schema = SCHEMAS.get(config_name) if directory is None else None
    config_name = flags.config_name or config_name

    with _session(directory) as loader:
        parsed = _parse(flags.overrides, loader)
        multirun = flags.multirun or any(
            o.key_or_group == "hydra.mode" and str(o.value()).upper().endswith("MULTIRUN") for o in parsed
        )
        touched = {o.key_or_group.partition(".")[0].partition("/")[0] for o in parsed}
        for override in parsed:
            if override.key_or_group == "hydra/launcher":
                _check_launcher(loader, config_name, override)
        for overrides in _jobs(parsed) if multirun else [list(flags.overrides)]:
            config = _compose(loader, overrides, config_name, searchpath, schema)
            if flags.cfg:  # to be looked at, complete or not
                continue
            _check_missing(config)
            plain = to_dict(config)
            if schema is not None:
                check_settings(plain, schema)
            validate(plain, injected=injected, skip=slow_parts(plain) - touched)
            if check is not None:
                check(config)


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
    _check_choice(override, _options(loader, "hydra/launcher", [], config_name))
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
                f"The sweep would be more than {_MOST_JOBS:,} jobs (with {_brief(override.input_line)}): give fewer "
                "values, or draw from them with scripts/search.py."
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


def _brief(text: str | None) -> str:
    return repr(text) if len(str(text)) <= 80 else f"{str(text)[:77]!r}..."


class JobFailed(Exception):
    """A job of a sweep has failed, and `ERROR` in its directory says why.

    Arguments are the first line of that, and the directory of the sweep.
    """


ERROR = "error.txt"
"""File in the directory of a failed job: one sentence, and the traceback if it was no mistake of the user."""


def cli(
    config_name: str,
    check: Callable[[DictConfig], None] | None = None,
    *,
    directory: str | Path | None = None,
) -> Callable[[Callable[[DictConfig], Any]], Any]:
    """Make a function of a config the main function of a script.

        @cli("train")
        def main(cfg: DictConfig) -> float | None: ...

        if __name__ == "__main__":
            main()

    The command line is checked first. A mistake of the user ends the program with `error: <sentence>` on stderr and
    exit code 2; `MEMLM_TRACEBACK=1` (or Hydra's `HYDRA_FULL_ERROR=1`) shows the traceback instead. Of a sweep the
    other jobs still run; the failed ones are reported when they fail, and listed at the end. A run that leaves
    nothing leaves no directory. Called with a config, `main(cfg)` is the bare function.

    Args:
        config_name: the primary config.
        check: what refuses a config before anything is run, see `check_command_line`.
        directory: the config tree; the shipped one by default.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def job(cfg: DictConfig) -> Any:
            # What _quiet_hydra() sets must not reach the processes that this job starts.
            os.environ.pop("HYDRA_FULL_ERROR", None)
            ended = False  # before it was done
            try:
                if _is_sweep():
                    (Path(run_dir()) / ERROR).unlink(missing_ok=True)
                return function(cfg)
            except Exception as error:
                if isinstance(error, OSError) and output_lost():
                    raise SystemExit(_UNREAD) from error
                if _is_sweep():
                    raise _job_failed(error) from error
                if is_user_error(error):
                    ended = True
                    _report(error)
                    # Not an Exception, so Hydra adds no report of its own.
                    raise SystemExit(2) from error
                raise
            except (KeyboardInterrupt, SystemExit) as stop:
                ended = True
                if _is_sweep() and _exit_code(stop) == _OUT_OF_TIME:
                    return None
                if _is_sweep() and (code := _exit_code(stop)) in _STOPPED:
                    print(f"The sweep was stopped. {_again(HydraConfig.get().sweep.dir)}", file=sys.stderr)
                    raise SystemExit(code) from stop
                raise
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1"
                _remove_if_bare(Path(run_dir()), ended)

        @functools.wraps(function)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return function(cfg)
            _open_streams()
            sys.argv[1:] = quote_texts([_nothing(argument) for argument in sys.argv[1:]])
            path = str(Path(directory or config_dir()).resolve())
            run = hydra.main(version_base="1.3", config_path=path, config_name=config_name)
            if _wants_traceback():
                os.environ["HYDRA_FULL_ERROR"] = "1"
                check_command_line(sys.argv[1:], config_name, directory=directory, check=check)
                return run(function)()
            try:
                check_command_line(sys.argv[1:], config_name, directory=directory, check=check)
                with _quiet_hydra():
                    run(job)()
                if output_lost():
                    raise SystemExit(_UNREAD)
            except (KeyboardInterrupt, SystemExit) as stop:
                raise SystemExit(_exit_code(stop)) from None
            except Exception as error:
                if isinstance(error, OSError) and output_lost():
                    raise SystemExit(_UNREAD) from None
                raise SystemExit(_end_of_failed(error)) from None

        return main

    return decorate


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Let a mistake of the user inside the block end the program with ``error: <sentence>`` and exit code 2."""
    try:
        yield
    except Exception as error:
        if _wants_traceback() or not is_user_error(error):
            raise
        _report(error)
        raise SystemExit(2) from None


def _job_failed(error: Exception) -> JobFailed:
    """Report why a job of a sweep has failed, and write it into its directory."""
    sentence, user = _message(error), is_user_error(error)
    lines = sentence if user else f"{sentence}\n\n{''.join(traceback.format_exception(error))}"
    with suppress(OSError):  # such as of a full disk, which is what is told
        (Path(run_dir()) / ERROR).write_text(lines + "\n", encoding="utf-8")
    if user:
        _report(error, f"job {HydraConfig.get().job.num}: ")
    else:
        sys.stdout.flush()
        print(lines.partition("\n\n")[2], file=sys.stderr)
    return JobFailed(sentence, HydraConfig.get().sweep.dir)


def _end_of_failed(error: Exception) -> int:
    """Say what is not said yet of what ended a program; returns its exit code."""
    if isinstance(error, JobFailed):
        sweep = error.args[1]
        texts = {
            path.parent: path.read_text(encoding="utf-8", errors="replace").splitlines()
            for path in sorted(Path(sweep).rglob(ERROR))
        }
        lines = [f"  {place}: {one_line(text[0] if text else 'failed')}" for place, text in texts.items()]
        print(f"\nerror: {len(lines)} of the jobs in {sweep} failed:", *lines, _again(sweep), sep="\n", file=sys.stderr)
        return 1 if any(len(text) > 1 for text in texts.values()) else 2
    if type(error).__module__.partition(".")[0] in _LAUNCHERS:
        print(f"error: the process of a job has died: {_sentence(error)}", file=sys.stderr)
        return 1
    if is_user_error(error):
        _report(error)
        return 2
    raise error


def _exit_code(stop: KeyboardInterrupt | SystemExit) -> Any:
    """What a program that was stopped leaves with. Lightning exits with code 1 on Ctrl-C."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 130
    return stop.code


def _again(sweep: str) -> str:
    """How a sweep is started again."""
    return f"To run what is left, repeat the command with hydra.sweep.dir={shlex.quote(sweep)}"


def _remove_if_bare(run: Path, ended: bool) -> None:
    """Remove a run directory in which there is nothing but what a start has put there.

    Args:
        run: The directory.
        ended: Whether it was refused or stopped: what loggers and evaluations begin with is nothing either then.
    """
    if run.resolve() == Path.cwd() or not (run / ".hydra").is_dir():
        return
    started = {".hydra", ".lock", f"{HydraConfig.get().job.name}.log"}
    if ended:
        started |= {"csv", "wandb", "evaluation.json"}
    with contextlib.suppress(OSError):
        if {path.name for path in run.iterdir()} <= started:
            shutil.rmtree(run, ignore_errors=True)


class _Output:
    """Standard output that stops nothing where it cannot be written: neither a program nor its log.

    Args:
        stream: What it was.

    Attributes:
        lost: Whether it could not be written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self.lost = stream, False

    def write(self, text: str) -> int:
        """Write, or let it go nowhere."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Write what waits, or let it go nowhere."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self.lost:
            self.lost = True
            _go_nowhere(self._stream, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def output_lost() -> bool:
    """Whether standard output cannot be written, since what read it is gone or a disk is full.

    What is printed from then on goes nowhere.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        _go_nowhere(sys.stdout, error)
        return True
    return getattr(sys.stdout, "lost", False)


def _go_nowhere(stream: Any, error: OSError) -> None:
    """Let what is written to a stream go nowhere from now on, and say why."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not isinstance(error, BrokenPipeError):  # which what closed it knows of
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)


def _open_streams() -> None:
    """Give a program standard streams that it can rely on.

    Where it was started without, the next files that are opened would be taken for them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    sys.stdout = _Output(sys.stdout)


def _nothing(argument: str) -> str:
    """Choose nothing of a group by null too, which Hydra knows as an empty list alone."""
    group, _, value = argument.partition("=")
    return f"{group}=[]" if value == "null" and group in _MAY_BE_NONE else argument


# Settings that are text, whatever it looks like: Hydra never reads what is given for them.
_VERBATIM = ("prompt",)
# Names and paths: text, but null, lists, sweeps, references and quotes are Hydra's.
_TEXTS = (
    "checkpoint", "resume", "output", "out", "name", "cache", "prompt_file", "data.path", "data.name",
    "data.corpus.path", "data.tokenizer.path", "paths.root", "paths.cache_dir", "paths.run_dir", "hydra.run.dir",
    "hydra.sweep.dir", "logger.wandb.project", "logger.wandb.name", "logger.wandb.group",
)  # fmt: skip
_HYDRAS_OWN = re.compile(
    r"""null | [\[{].*[\]}] | (choice|range|interval|glob|shuffle|sort|tag|str|int|float|bool|json_str)\(.*\) | .*\$\{.*
    | (?P<quote>['"]) ((?!(?P=quote))[^\\] | \\.)* (?P=quote) (,.*)?""",
    re.VERBOSE | re.DOTALL,
)


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Put quotes around the texts of a command line, so that Hydra takes them as they are.

    Prompts are text throughout. Names and paths may be `null`, lists, sweeps, references, or have quotes already.

    Args:
        arguments: The arguments without the name of the program.
    """
    flags, _ = get_args_parser().parse_known_args([a for a in arguments if not a.startswith("prompt=")])
    several = flags.multirun or any(a.upper() == "HYDRA.MODE=MULTIRUN" for a in arguments)
    return [_quoted(argument, several) for argument in arguments]


def _quoted(argument: str, several: bool) -> str:
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    if not equals or key not in (*_VERBATIM, *_TEXTS):
        return argument
    if key in _VERBATIM:
        return f"{name}={quoted(value)}"
    if _HYDRAS_OWN.fullmatch(value) and not os.path.exists(value):
        return argument
    return f"{name}=" + ",".join(map(quoted, _paths(value) if several else [value]))


def quoted(text: str) -> str:
    """Return a text as a value of an override, which Hydra and OmegaConf take as it is."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # refers to nothing
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _paths(value: str) -> Iterator[str]:
    """Split at commas, but not at those of a path that exists."""
    parts = value.split(",")
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]))), 1)
        yield ",".join(parts[:n]).strip()
        parts = parts[n:]


class CompareHint(Callback):
    """Says at the end of a sweep how its jobs are put side by side."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the command."""
        print(f"\nTo compare the jobs: python scripts/compare.py {shlex.quote(config.hydra.sweep.dir)}")


@contextmanager
def _quiet_hydra() -> Iterator[None]:
    """Let Hydra pass errors on instead of printing them and leaving."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _wants_traceback() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("HYDRA_FULL_ERROR", "MEMLM_TRACEBACK"))


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def is_user_error(error: BaseException) -> bool:
    """Tell a mistake of the user, or what the machine refuses, from one of the program, which needs its traceback."""
    error = _root(error)
    if isinstance(error, ConfigError | HydraException | OmegaConfBaseException) or refusal(error) is not None:
        return True
    # By convention this project raises ValueError for what a user can get wrong; elsewhere it may mean anything.
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return isinstance(error, ValueError) and module.partition(".")[0] in _OURS


def _root(error: BaseException) -> BaseException:
    """Return what went wrong inside of `hydra.utils.instantiate`, which wraps every error."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _message(error: BaseException) -> str:
    """What an error says, on one line."""
    error = _root(error)
    if isinstance(error, ConfigError):
        return one_line(error)
    return one_line(refusal(error) or _sentence(error))


def _report(error: BaseException, prefix: str = "") -> None:
    sys.stdout.flush()
    print(f"error: {prefix}{_message(error)}", file=sys.stderr)
    if not isinstance(_root(error), ConfigError):
        print("(MEMLM_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
