"""What comes out of a file that somebody else may have written: nothing but data, until it was looked at.

- `plain`, `check_size`: is it as small and as flat as it should be?
- `find_class`: may what its configuration names be built?

Nothing that a file names is imported or called before its name was found to be of memlm, or of a trusted package.
"""

from __future__ import annotations

import importlib
import itertools
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from memlm.config import ConfigError
from memlm.printed import one_line

MOST_DEPTH = 60
"""Levels of nested lists and mappings: those of a run have less than ten."""

MOST_VALUES = 10_000_000
"""Values of one file, each counted as often as it occurs. A configuration has some hundreds."""

TRUST = "package, beside memlm, of which files may name classes: its code is then run; may be given again"
"""Help for command lines."""

_MOST_CHARACTERS = 10_000_000  # of a configuration
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_OURS = "memlm"


def check_size(value: Any, most: int = MOST_VALUES) -> None:
    """Refuse what is too deep, or would be too large once every value was looked at where it occurs.

    Lists and mappings of a file may be in several places, or in themselves; here each is looked at once.

    Args:
        value: What is in the file.
        most: Values that it may hold, each counted as often as it occurs.

    Raises:
        ConfigError: Says which limit is passed.
    """
    _count(value, 0, {}, most, texts=False)


def plain(value: Any) -> Any:
    """Return a copy of a configuration: mappings, lists, texts, numbers, true, false and null, each in one place.

    Raises:
        ConfigError: It holds anything else, or is too deep or too large.
    """
    _count(value, 0, {}, _MOST_CHARACTERS, texts=True)
    return _copy(value)


def _count(value: Any, depth: int, seen: dict[int, tuple[int, int]], most: int, texts: bool) -> tuple[int, int]:
    """Number of values, with ``texts`` also of characters, and of levels."""
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return 1 + (len(value) if texts and isinstance(value, str) else 0), 0
    if (known := seen.get(id(value))) is None:
        if depth >= MOST_DEPTH:
            raise ConfigError(f"lists and mappings are nested more than {MOST_DEPTH} deep, or in themselves")
        total, levels = 1, 0
        for part in itertools.chain(value.keys(), value.values()) if isinstance(value, dict) else value:
            n, below = _count(part, depth + 1, seen, most, texts)
            total, levels = total + n, max(levels, below)
            if total > most:
                raise ConfigError(f"it holds more than {most:,} values, each counted wherever it occurs")
        known = seen[id(value)] = (total, levels + 1)
    if depth + known[1] > MOST_DEPTH:
        raise ConfigError(f"lists and mappings are nested more than {MOST_DEPTH} deep")
    return known


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        for name in value:
            if type(name) not in (str, int):
                raise ConfigError(f"a mapping has a key of type {type(name).__name__}, where a name is expected")
        return {name: _copy(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(part) for part in value]
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"a whole number has {value.bit_length()} bits, where 63 are the most")
    if value is not None and type(value) not in (bool, int, float, str):
        raise ConfigError(f"it holds a {type(value).__name__}, where mappings, lists, texts and numbers are expected")
    return value


def find_class(
    target: Any, base: type, key: str, trust: Sequence[str] | str | None = None, *, itself: bool = False
) -> type:
    """Return the class that a configuration out of a file names.

    The name is looked at before anything is imported, the class before anything is called: a subclass of ``base`` that
    memlm or a trusted package defines. A function is never taken, whoever defines it.

    Args:
        target: The dotted name.
        base: What it has to be a subclass of.
        key: Full name of the setting, for the errors.
        trust: Names of packages of which classes may be taken too; see `packages`.
        itself: Whether ``base`` may be taken, which else only says what its subclasses have to be.

    Raises:
        ConfigError: It may not be taken; the message says what to do if it is to be.
    """
    if not isinstance(target, str) or not _NAME.fullmatch(target) or "." not in target:
        raise ConfigError(f"{key} must be the dotted name of a class, got {one_line(reprlib.repr(target))}")
    trusted = (_OURS, *packages(trust))
    if not _is_below(target, trusted):
        package = _short(target.partition(".")[0])
        raise ConfigError(
            f"{key} names {_short(target)}, which is no part of memlm, and no code of others is run because a file "
            f"names it: if you trust who wrote the file and that code, say so with trust=[{package}] "
            f"(memlm report, memlm compare: --trust {package})"
        )
    module, _, name = target.rpartition(".")
    try:
        found: Any = vars(importlib.import_module(module)).get(name)
    except ImportError as error:  # such as a mechanism that is not at hand here
        raise ConfigError(f"{key}: {_short(target)} cannot be imported here: {one_line(error)}") from error
    ours = isinstance(found, type) and _is_below(found.__module__, trusted)
    if not ours or not issubclass(found, base) or (found is base and not itself):
        raise ConfigError(f"{key} must name a {base.__name__}, which {_short(target)} is not")
    return found


def packages(trust: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the names of trusted packages: one, several or none were given.

    Raises:
        ConfigError: One is no dotted name.
    """
    names = [trust] if isinstance(trust, str) else [] if trust is None else trust
    if not isinstance(names, Sequence) or not all(isinstance(n, str) and _NAME.fullmatch(n) for n in names):
        raise ConfigError(f"trust must be names of packages, such as trust=[mypackage], got {reprlib.repr(trust)}")
    return tuple(names)


def _is_below(name: str, names: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in names)


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:97]}..."
