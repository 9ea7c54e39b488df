"""Composing the configs of `configs/` with Hydra; mistakes are told in one sentence."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path  # what --config-dir is made of, which has no public home
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from memlm.config import (
    ConfigError,
    check_settings,
    did_you_mean,
)
from memlm.config_files import bound_files
from memlm.known import is_experiment, referred_keys, refuse_unknown, unknown
from memlm.quoting import nothing
from memlm.schema import SCHEMAS, Evaluate, Train


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
    with session(directory, searchpath) as loader:
        whole = compose_with(loader, [nothing(line) for line in overrides], config_name, schema)
    config = without_hydra(whole)
    check_missing(config)
    if schema is not None:
        check_settings(to_dict(config), schema)
    return config


@contextmanager
def session(directory: str | Path | None, searchpath: Sequence[str | Path] = ()) -> Iterator[ConfigLoader]:
    """Set up Hydra on a config tree, and further ones as by `--config-dir`, and put back whatever was set up before."""
    path = Path(directory or config_dir()).resolve()
    if not path.is_dir():
        raise ConfigError(f"There is no config directory {str(path)!r}.")
    state, runtime = GlobalHydra.instance(), JobRuntime.instance()
    outer, job_name = state.hydra, runtime.get("name")
    state.hydra = None
    bound_files()
    try:
        with hydra.initialize_config_dir(str(path), job_name=job_name, version_base="1.3"):
            search = create_config_search_path(str(path))
            for place in searchpath:
                search.prepend("command-line", f"file://{Path(place).resolve()}", SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2(job_name, search)
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def compose_with(
    loader: ConfigLoader,
    overrides: list[str],
    config_name: str,
    schema: type | None = None,
) -> DictConfig:
    """Compose within a `session`, Hydra's own settings included; every override names what exists, or adds with +."""
    parsed = parse_overrides(overrides, loader)
    for override in parsed:
        if override.is_sweep_override():
            key, value = override.get_key_element(), (override.input_line or "").partition("=")[2]
            raise ConfigError(
                f"{override.input_line!r} gives several values: add -m to run one job for each, "
                f"or write a list as '{key}=[{value}]'."
            )
    extra = [
        line for override, line in zip(parsed, overrides, strict=True) if override.key_or_group == "hydra.searchpath"
    ]
    if config_name not in (names := options_of(loader, "", extra, None)):
        raise ConfigError(f"There is no config {config_name!r}.{did_you_mean(config_name, names)} {_listing(names)}")

    groups = functools.cache(lambda: _groups(loader, config_name, extra))  # which takes a while
    settings: list[Override] = []
    choices: list[str] = []
    base: list[str] = []
    for override, line in zip(parsed, overrides, strict=True):
        if override.is_hydra_override():
            base.append(line)
        elif options := options_of(loader, override.key_or_group, extra, config_name):
            check_choice(override, options)
            if override.type.name == "CHANGE":
                choices.append(override.key_or_group)
            base.append(line)
        elif override.type.name != "CHANGE":  # +key, ++key and ~key may name what is not there
            base.append(line)
        else:
            settings.append(override)
    try:
        whole = _composed(config_name, overrides, base, settings, groups)
    except ConfigError as error:
        for group in choices:
            if group not in groups():
                raise ConfigError(
                    f"{group} is no choice of {config_name}, which has {', '.join(groups())}. See --help."
                ) from error
        raise
    config = without_hydra(whole)
    if schema is not None:
        measures = issubclass(schema, Train | Evaluate)
        experiments = options_of(loader, "experiment", extra, config_name) if measures else []
        for override in parsed:
            name, _, rest = override.key_or_group.partition(".")
            if rest and name in experiments and name in config and not is_experiment(config, name):
                raise ConfigError(
                    f"{override.key_or_group} has no effect, as {name} is not measured: choose experiment={name}."
                )
        refuse_unknown(config, schema, referred_keys(whole, schema), experiments)
    return whole


def without_hydra(whole: DictConfig) -> DictConfig:
    """A composed config without Hydra's own settings."""
    config = whole.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config


def _composed(
    config_name: str, overrides: list[str], base: list[str], settings: list[Override], groups: Callable[[], list[str]]
) -> DictConfig:
    """Compose; where that fails, say which of the settings is to blame.

    Args:
        config_name: the primary config.
        overrides: all overrides.
        base: those of them that decide which settings there are.
        settings: the others.
        groups: names the groups of which the config chooses an option.
    """
    failed: ConfigError | None = None
    try:
        whole = _hydra_compose(config_name, overrides, return_hydra_config=True)
    except ConfigError as error:
        failed = error
    if settings and (failed or any(override.value() == {} for override in settings)):
        chosen = _hydra_compose(config_name, base)
        for override in settings:
            _check_key(chosen, override, groups)
    if failed:
        raise failed
    return whole


def _hydra_compose(config_name: str, overrides: list[str], **more: Any) -> DictConfig:
    with _told_in_a_sentence():
        return hydra.compose(config_name, overrides, **more)


@contextmanager
def _told_in_a_sentence() -> Iterator[None]:
    """Turn the errors of Hydra, OmegaConf and PyYAML into a ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(sentence_of(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"A config file is not valid YAML: {sentence_of(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"A config file is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"A config file cannot be read, or holds no mapping of settings: {error}") from error
    except RecursionError as error:
        raise ConfigError("The settings are nested too deeply, or hold or include themselves.") from error


def parse_overrides(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """The overrides of a command line, parsed."""
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
            raise ConfigError(f"Cannot read {brief(line)}. {reason}") from error
        except (RecursionError, ValueError) as error:  # of brackets in brackets, and numbers of very many digits
            raise ConfigError(f"Cannot read {brief(line)}: it is nested too deeply, or too long.") from error
    return parsed


def options_of(loader: ConfigLoader, group: str, extra: list[str], config_name: str | None) -> list[str]:
    """The options of a group of configs."""
    with _told_in_a_sentence():
        return sorted(set(loader.get_group_options(group, config_name=config_name, overrides=extra)))


def _groups(loader: ConfigLoader, config_name: str, extra: list[str]) -> list[str]:
    """The groups of which a config chooses an option."""
    with _told_in_a_sentence():
        defaults = loader.compute_defaults_list(config_name, extra, RunMode.RUN)
    chosen = {str(path).rpartition("/")[0] for path in (part.config_path for part in defaults.defaults) if path}
    chosen |= set(defaults.overrides.known_choices)  # also where the option is null
    return sorted(group for group in chosen if group and group.partition("/")[0] != "hydra")


def check_choice(override: Override, options: list[str]) -> None:
    """Raise ConfigError unless an override chooses an option that exists."""
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
            raise ConfigError(unknown(config, done, part, names if done else [*names, *groups()]))
        done = f"{done}.{part}" if done else part
        try:
            node = node[part]
        except OmegaConfBaseException:  # a missing value, or a reference to something that is still to be set
            return
    if isinstance(node, DictConfig) and not node._is_none() and len(node) and override.value() == {}:
        raise ConfigError(f"{key}={{}} would change nothing, as mappings are merged: use {key}=null for nothing.")


def check_missing(config: DictConfig) -> None:
    """Raise ConfigError if a required setting has no value."""
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


def sentence_of(error: BaseException) -> str:
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
        raise ConfigError(f"Cannot resolve {error.full_key}: {sentence_of(error)}") from error


def brief(text: str | None) -> str:
    """A value as it is shown in an error, cut short."""
    return repr(text) if len(str(text)) <= 80 else f"{str(text)[:77]!r}..."
