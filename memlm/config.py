"""Settings: what they may be, and what is built of them.

- `validate`: does every `_target_` node fit the signature of what it names?
- `instantiate`: build the object of a node.

Both take plain dicts, as a checkpoint holds them, so that a trained model is loaded without Hydra; `memlm.app.cli`
composes them. Every mistake is a `ConfigError`: one sentence with the full name of the setting, what was given, what
was expected. Whatever needs torch or lightning is imported only when a node that names it is checked.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import reprlib
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from memlm.annotations import Node, described, fits, hints_of, members_of, ranges_of, shown

# Constructor parameters that the code supplies, so that no YAML has to: the width of the model for its memories,
# the size of the vocabulary for the model, what one built object hands to the next.
INJECTED = frozenset({"d_model", "memories", "model", "n_vocab", "sizes", "tokenizer", "train"})

# Packages that take seconds to import.
_SLOW = ("lightning", "pytorch_lightning", "wandb")
_HYDRA_KEYS = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "_args_"})


class ConfigError(ValueError):
    """A mistake in the settings, told in one sentence that says how to mend it."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the option closest to `name`, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(o) for o in options], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def whole(name: str, value: Any, least: int = 0) -> int:
    """Return an argument that has to be a whole number, also one of numpy or torch, as an int.

    Raises:
        ConfigError: it is none, or less than `least`.
    """
    number = value.tolist() if hasattr(value, "tolist") else value
    if type(number) is not int or number < least:  # bool is no number here
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {reprlib.repr(value)}")
    return number


def validate(
    config: Any,
    *,
    key: str = "",
    injected: Collection[str] = INJECTED,
    skip: Collection[str] = (),
) -> None:
    """Check every node with a `_target_` against the signature of what it names.

    Checked are unknown and missing keys and the simple types of values: int, float, bool, str, None, unions,
    `Literal`, and lists, tuples and dicts of these. An annotation that is anything else accepts every value.

    Nodes of packages that take seconds to import are checked last.

    Args:
        config: a plain config or a part of it, see `memlm.compose.to_dict`.
        key: the full name of `config`, for the errors.
        injected: required parameters that the code passes when it builds the node.
        skip: full names of top-level parts that are not looked at.

    Raises:
        ConfigError: naming the setting, what was given and what was expected.
    """
    if isinstance(config, Mapping) and not isinstance(config, dict):
        raise TypeError(f"validate takes a plain config, made by memlm.compose.to_dict, not a {type(config).__name__}")
    nodes = [(k, node) for k, node in _nodes(config, key) if k.partition(".")[0] not in skip]
    for full_key, node in sorted(nodes, key=lambda item: _is_slow(item[1])):
        _check_node(full_key, node, frozenset(injected))


def check_settings(settings: Any, schema: type, key: str = "") -> None:
    """Check settings that belong to no `_target_`, such as those of a script: none missing, types, ranges.

    Args:
        settings: a plain config or a section of it; which keys it may have is not looked at.
        schema: a class whose annotations are the settings; a section has such a class as its annotation, and what has a
            default may be missing.
        key: the full name of `settings`, for the errors.

    Raises:
        ConfigError: naming the setting, what was given and what was expected.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key} must be a mapping, with {', '.join(schema_hints(schema))}, got {shown(settings)}.")
    for name, hint in schema_hints(schema).items():
        full, value = _dot(key, name), settings.get(name)
        if name not in settings:
            if not hasattr(schema, name):
                raise ConfigError(f"{full} is missing: give it a value.")
        elif is_section(hint):
            check_settings(value, hint, full)
        elif isinstance(value, dict) and (
            inner := [part for part in members_of(hint) if typing.get_origin(part) is dict]
        ):
            for child in value:
                _check_value(_dot(full, str(child)), value[child], typing.get_args(inner[0])[1])
        else:
            _check_value(full, value, hint)


@functools.cache
def schema_hints(schema: type) -> dict[str, Any]:
    """Return the settings of a schema by name, see `check_settings`."""
    return typing.get_type_hints(schema, include_extras=True)


def is_section(hint: Any) -> bool:
    """Tell whether the annotation of a setting is a schema itself."""
    return isinstance(hint, type) and hint is not Node and "__annotations__" in vars(hint)


def slow_parts(config: Any) -> set[str]:
    """Return the top-level parts of a plain config with nodes of packages that take seconds to import."""
    return {key.partition(".")[0].partition("[")[0] for key, node in _nodes(config, "") if _is_slow(node)}


def _is_slow(node: dict[str, Any]) -> bool:
    return str(node["_target_"]).startswith(_SLOW)


def _nodes(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield key, value
        for name, child in value.items():
            yield from _nodes(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _nodes(child, f"{key}[{i}]")


def _check_node(key: str, node: dict[str, Any], injected: frozenset[str]) -> None:
    target = node["_target_"]
    if not isinstance(target, str):
        raise ConfigError(f"{_dot(key, '_target_')} must be the dotted name of a class or function, got {target!r}.")
    parameters, hints = _signature(target, _dot(key, "_target_"))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = {n: v for n, v in node.items() if n not in _HYDRA_KEYS}

    for name in given:
        if name not in named and not takes_any:
            options = ", ".join(sorted(set(named) - injected)) or "nothing"
            raise ConfigError(
                f"{_dot(key, name)} is not a setting of {target}.{did_you_mean(name, named)} It takes: {options}."
            )
    if not node.get("_partial_"):
        positional = list(named)[: len(node.get("_args_") or [])]
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in {*given, *injected, *positional}:
                raise ConfigError(f"{_dot(key, name)} is required by {target} and missing: give it a value.")
    for name, value in given.items():
        if name in hints and not (value is None and name in named and named[name].default is None):
            _check_value(_dot(key, name), value, hints[name])


def target_of(node: Mapping[str, Any], key: str) -> Any:
    """What a node names: a class or function.

    Args:
        node: the settings.
        key: their full name, for the errors.

    Raises:
        ConfigError: if there is no such thing.
    """
    return _locate(node["_target_"], _dot(key, "_target_"))


def check_kind(node: Any, key: str, kind: type) -> None:
    """Check that a node names a class of the kind that is wanted there; of a function only its call can tell.

    Args:
        node: the settings.
        key: their full name, for the errors.
        kind: what they have to make.

    Raises:
        ConfigError: if they name no class, or another kind of class.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key} must be settings with a _target_, got {shown(node)}.")
    thing = target_of(node, key)
    if not (issubclass(thing, kind) if isinstance(thing, type) else callable(thing)):
        raise ConfigError(
            f"{key}._target_ must name {kind.__module__}.{kind.__name__} or a class made of it, got {node['_target_']}."
        )


def check_arguments(target: str, given: Mapping[str, Any], key: str, supplied: Collection[str]) -> None:
    """Check names and simple types of arguments for a function; what is left out is not missed.

    Args:
        target: the dotted name of the function.
        given: arguments by name.
        key: the full name of `given`, for the errors.
        supplied: parameters that the code passes.

    Raises:
        ConfigError: naming the setting, what was given and what was expected.
    """
    _check_node(key, {"_target_": target, "_partial_": True, **given}, frozenset(supplied))


def instantiate(
    node: Mapping[str, Any], key: str, *arguments: Any, offered: Mapping[str, Any] | None = None, **injected: Any
) -> Any:
    """Call the ``_target_`` of a plain node; what a constructor refuses is told with the node's name.

    Of what is ``offered`` it gets what it has a parameter for, by name.
    """
    settings = {name: value for name, value in node.items() if name != "_target_"}
    module, _, name = node["_target_"].rpartition(".")
    try:
        constructor = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # such as a checkpoint of somebody's own mechanism
        raise ConfigError(f"{key}._target_: {node['_target_']} cannot be imported here: {error}") from error
    if offered:
        injected |= {name: part for name, part in offered.items() if name in inspect.signature(constructor).parameters}
    try:
        return constructor(*arguments, **injected, **settings)
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        if text.partition(" ")[0].partition(".")[0] in settings:  # "n_slot must be ..."
            text = f"{key}.{text}"
        raise ConfigError(text if text.startswith(f"{key}.") else f"{key}: {text}") from error


def _dot(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


@functools.cache
def _signature(target: str, key: str) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Return the parameters of a target and the annotations that could be understood."""
    thing = _locate(target, key)
    if not callable(thing):
        raise ConfigError(f"{key}: {target} is not a class or function.")
    try:
        parameters = dict(inspect.signature(thing).parameters)
    except (TypeError, ValueError):  # written in C without a signature: anything goes
        empty = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        return {"kwargs": empty}, {}
    return parameters, hints_of(thing, parameters)


def _locate(target: str, key: str) -> Any:
    parts = target.split(".")
    module: Any = None
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Only "this dotted name is no module" means: look for a class. A module that fails to import another
            # one is a missing package.
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise ConfigError(f"{key}: cannot import {name}, because {error}.") from error
            continue
        except ValueError:  # an empty part, as in "a..b"
            continue
        break
    if module is None:
        raise ConfigError(
            f"{key}: there is no module {parts[0]!r} to take {target} from. Install it, or put its folder in PYTHONPATH"
        )
    thing = module
    for i in range(n, len(parts)):
        try:
            thing = getattr(thing, parts[i])
        except AttributeError:
            names = [k for k in vars(thing) if not k.startswith("_")] if hasattr(thing, "__dict__") else []
            where = ".".join(parts[:i])
            raise ConfigError(f"{key}: {where} has no {parts[i]!r}.{did_you_mean(parts[i], names)}") from None
    return thing


def _check_value(key: str, value: Any, hint: Any) -> None:
    if fits(value, hint):
        for least, most in ranges_of(hint):
            if isinstance(value, int | float) and not least <= value <= most:
                bounds = f"at least {least:,}" if most == math.inf else f"in {least:,}..{most:,}"
                raise ConfigError(f"{key} must be {bounds}, got {value:,}.")
        return
    choices = [str(c) for part in members_of(hint) if typing.get_origin(part) is Literal for c in typing.get_args(part)]
    raise ConfigError(
        f"{key} must be {described(hint)}, got {shown(value)}.{did_you_mean(value, choices) if choices else ''}"
    )
