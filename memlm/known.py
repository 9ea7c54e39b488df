"""Which keys of a composed config anything reads; the others are refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from memlm.config import (
    ConfigError,
    did_you_mean,
    is_section,
    schema_hints,
)


def unknown(config: DictConfig, parent: str, name: str, names: Sequence[str]) -> str:
    """The sentence for a setting that does not exist."""
    prefix = f"{parent}." if parent else ""
    hint = did_you_mean(name, names)
    if places := [k for k in _walk_keys(config) if k.rpartition(".")[2] == name and k != f"{prefix}{name}"]:
        hint = f" Did you mean {places[0]!r}?"
    known = ", ".join(sorted({n for n in names if n[0] != "_"}))
    where = f"{parent} has" if parent else "The settings are"
    return f"There is no setting {prefix + name!r}.{hint} {where}: {known or 'nothing'}."


def refuse_unknown(
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
                refuse_unknown(config, hints[name], referred, parent=key)
        elif any(f"{key}.".startswith(f"{one}.") for one in referred) or name in experiments:
            continue
        elif any(f"{one}.".startswith(f"{key}.") for one in referred):
            refuse_unknown(config, _Own, referred, parent=key)
        elif parent or not is_experiment(config, name):
            names = list(hints) or [str(other) for other in section if other != name]
            raise ConfigError(
                f"{unknown(config, parent, name, names)} A key of your own is fine where a setting refers to it."
            )


class _Own:
    """The schema of a section of which code reads nothing."""


def is_experiment(config: DictConfig, name: str) -> bool:
    """Whether a setting is an experiment: a node whose class is one of experiments/."""
    node = config._get_node(name)
    return isinstance(node, DictConfig) and not node._is_none() and str(node.get("_target_")).startswith("experiments.")


def referred_keys(config: DictConfig, schema: type) -> set[str]:
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
    if key[0] == "hydra" or is_experiment(config, key[0]):
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
