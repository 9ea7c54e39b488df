"""What annotations say of a plain value of a config: whether it fits, and how what is expected is told."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import os
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypeVar, Union


class Range(NamedTuple):
    """What a number may be: `Annotated[int, Range(1, 100)]`, both ends included."""

    least: float
    most: float = math.inf


class Node:
    """As an annotation: settings with a `_target_`, which `validate` checks against what it names."""


def hints_of(thing: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the annotations of the parameters of a class or function that could be understood, by name."""
    source: Any = thing
    if inspect.isclass(thing):
        init = getattr(thing, "__init__")  # noqa: B009 - `thing.__init__` of a class is an error to type checkers
        source = thing.__new__ if init is object.__init__ else init
        if dataclasses.is_dataclass(thing) and {field.name for field in dataclasses.fields(thing)} >= set(parameters):
            source = thing  # whose fields may be those of a class in another module
    inner = inspect.unwrap(source)
    try:
        return typing.get_type_hints(inner, include_extras=True)
    except Exception:
        # One name that is imported only for type checkers must not cost the other annotations.
        hints = {}
        for name, parameter in parameters.items():
            hint = parameter.annotation
            if isinstance(hint, str):
                try:
                    hint = eval(hint, getattr(inner, "__globals__", {}))
                except Exception:
                    continue
            if hint is not parameter.empty:
                hints[name] = hint
        return hints


def _unwrap(hint: Any) -> Any:
    while True:
        if typing.get_origin(hint) is Annotated:
            hint = typing.get_args(hint)[0]
        elif isinstance(hint, NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":  # `type X = ...` of Python 3.12
            hint = hint.__value__
        else:
            return hint


def ranges_of(hint: Any) -> Iterator[Range]:
    """The ranges of numbers in an annotation."""
    if typing.get_origin(hint) is Annotated:
        yield from (part for part in hint.__metadata__ if isinstance(part, Range))
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from ranges_of(part)


def members_of(hint: Any) -> list[Any]:
    """Return what an annotation allows: the members of a union, else itself."""
    hint = _unwrap(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [m for part in typing.get_args(hint) for m in members_of(part)]
    return [hint]


_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, set, frozenset)


_DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a plain config value may be passed where `hint` is asked for; True if that cannot be known."""
    hint = _unwrap(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Node:
        return isinstance(value, dict) and "_target_" in value
    if isinstance(value, dict) and "_target_" in value:
        return hint not in (int, float, bool, str)  # will be an object by then
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in args)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # which torch can count
    if hint is int:
        return False
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str)
    if hint in (Path, os.PathLike) or origin is os.PathLike:
        return isinstance(value, str)
    if (origin or hint) is tuple:
        if not isinstance(value, list | tuple):
            return False
        if not args:
            return True
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if (origin or hint) in _LISTS:
        if isinstance(value, str):  # a string is a sequence, but hardly ever the one that was meant
            return (origin or hint) is not list and args[:1] in ((str,), ())
        return isinstance(value, list | tuple) and all(fits(v, args[0]) for v in value if args)
    if (origin or hint) in _DICTS:
        if not isinstance(value, dict):
            return False
        return len(args) != 2 or all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if isinstance(hint, type) and hint is not Any:  # no plain value is an object of a class
        try:
            return isinstance(value, hint)
        except TypeError:  # a protocol that says nothing of its objects
            return True
    # Any, a type variable, a function: what is right there only the constructor can tell, except that nothing but None
    # stands for None.
    return hint is Any or isinstance(hint, TypeVar) or value is not None


def described(hint: Any) -> str:
    """Return what an annotation allows, in words."""
    words: list[str] = []
    for part in members_of(hint):
        origin, args = typing.get_origin(part), typing.get_args(part)
        if origin is Literal:
            words += [shown(choice) if not isinstance(choice, str) else repr(choice) for choice in args]
        elif part in (None, type(None)):
            words.append("null")
        elif part is Node:
            words.append("settings with a _target_")
        elif part in (Path, os.PathLike) or origin is os.PathLike:
            words.append("a path")
        elif (origin or part) is tuple or (origin or part) in _LISTS:
            inner = [a for a in args if a is not Ellipsis]
            words.append("a list" + (f" of {' and '.join(dict.fromkeys(map(described, inner)))}" if inner else ""))
        elif (origin or part) in _DICTS:
            words.append("a mapping" + (f" of {described(args[1])}" if len(args) == 2 else ""))
        else:
            names = {int: "an int", float: "a float", bool: "true or false", str: "a string"}
            words.append(str(names.get(part) or getattr(part, "__name__", part)))
    words = list(dict.fromkeys(words))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shown(value: Any) -> str:
    """Return a plain value as a message shows it."""
    names = {bool: "", int: " (an int)", float: " (a float)", str: " (a string)"}
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = reprlib.repr(value) if isinstance(value, int) else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{text} (not a finite number)"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{text[:77]} (too large)"
    return (text if len(text) <= 80 else f"{text[:77]}...") + names.get(type(value), "")
