"""What every experiment shares: its result, intervals, figure style, terminal table and the one place that writes.

`emit` is the only function here that touches files or loggers. `style`, `PALETTE` and `wilson` come from
`memlm.analysis.figures` and are offered here so that an experiment imports from one place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from memlm.config import ConfigError
from memlm.evaluation.experiment import name_of
from memlm.models.base import LanguageModel

Row = dict[str, Any]


# JSON has no NaN or infinity: they are stored under these words, which pandas and JavaScript read as numbers too.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, eq=False)
class Result:
    """What an experiment found. Plain values only, so that it can be stored as JSON.

    Numpy and torch scalars become Python numbers, tuples become lists; two results are equal when their stored forms
    are (so NaN equals NaN).

    Attributes:
        name: Name of the experiment; prefixes what a logger shows.
        metrics: Metric name -> value, e.g. "exact_match/on".
        rows: One dict of scalars per measured item, holding what identifies the item, the condition and the outcome,
            e.g. {"condition": "on", "document": 0, "fact": 3, "distance": 4100, "correct": True}.
        metadata: What was run: seed, n, settings.

    Raises:
        ValueError: If a value is no plain value, with the place where it stands.
    """

    name: str
    metrics: Mapping[str, float]
    rows: tuple[Row, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name is {self.name!r}; expected a text")
        for part in ("metrics", "metadata"):
            if not isinstance(getattr(self, part), Mapping):
                raise ValueError(f"{part} is a {type(getattr(self, part)).__name__}; expected a dict")
        metrics = _plain(self.metrics, "metrics")
        for key, value in metrics.items():
            if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > sys.float_info.max):
                raise ValueError(f"metrics[{key!r}] is {value!r:.80}; expected a number (NaN where there is none)")
        rows = tuple(_plain(row, f"rows[{i}]") for i, row in enumerate(self.rows))
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"rows[{i}] is a {type(row).__name__}; expected a dict")
            for key, value in row.items():
                if isinstance(value, dict | list):
                    raise ValueError(f"rows[{i}][{key!r}] is a {type(value).__name__}; expected one number or text")
        object.__setattr__(self, "metrics", {key: float(value) for key, value in metrics.items()})
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "metadata", _plain(self.metadata, "metadata"))

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Result) else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for strict JSON; NaN and infinities become "NaN", "Infinity", "-Infinity"."""
        return {
            "name": self.name,
            "metrics": _encode(self.metrics),
            "rows": [_encode(row) for row in self.rows],
            "metadata": _encode(self.metadata),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Inverse of `to_dict`.

        Raises:
            ValueError: If keys are missing or unknown.
        """
        expected = {"name", "metrics", "rows", "metadata"}
        if set(data) != expected:
            missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
            raise ValueError(f"not a stored Result: missing keys {missing}, unknown keys {unknown}")
        if not isinstance(data["rows"], list):
            raise ValueError(f"rows is a {type(data['rows']).__name__}; expected a list")
        rows = tuple(_decode(row) for row in data["rows"])
        return cls(data["name"], _decode(data["metrics"]), rows, _decode(data["metadata"]))


def check_settings(settings: Any, least: Mapping[str, float]) -> None:
    """Check what the settings of many experiments have in common.

    Args:
        settings: Of an experiment.
        least: By name of a setting, the least it may be; None is always right.

    Raises:
        ConfigError: If one is less, or so much that it would not end, ``facts_per_segment`` is not positive, or
            ``split`` is text of training.
    """
    name = name_of(settings)
    _check_most(name, vars(settings))
    for key, number in least.items():
        given = getattr(settings, key)
        if given is not None and given < number:
            raise ConfigError(f"{name}.{key} must be at least {number}, got {given}")
    if not getattr(settings, "facts_per_segment", 1) > 0:
        raise ConfigError(f"{name}.facts_per_segment must be positive, got {settings.facts_per_segment}")
    if getattr(settings, "split", "val") not in ("val", "test"):
        raise ConfigError(f"{name}.split must be 'val' or 'test', text the model never saw, got {settings.split!r}")


_MOST = 10**8  # of any number but a seed


_MOST_ITEMS = 10**4  # of what is told, asked or read one by one


_ITEMS = frozenset({"n_ask", "n_document", "n_fact", "n_probe", "n_question", "n_statement", "n_stored", "n_story"})


_MOST_TOKENS = 10**9  # in all documents


_SPEED = 10_000  # tokens that a small model reads in a second on a CPU, about


def _check_most(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse what could only run for ever."""
    for key, given in settings.items():
        most = 2**31 - 1 if key in ("seed", "seeds") else _MOST_ITEMS if key in _ITEMS else _MOST
        for number in given if isinstance(given, list | tuple) else [given]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ConfigError(f"{name}.{key} must be at most {most:,}, got {number:,}")
    if "distance" in settings and "n_document" in settings:
        distance = settings["distance"]
        n_token = settings["n_document"] * (sum(distance) if isinstance(distance, list | tuple) else distance)
        if n_token > _MOST_TOKENS:
            raise ConfigError(
                f"{name} would read {n_token:,} tokens (n_document * distance) under each condition, about "
                f"{n_token / _SPEED / 86_400:,.1f} days at {_SPEED:,} tokens a second: lower one of them, so that they "
                f"are at most {_MOST_TOKENS:,}"
            )


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; then every module is in the mode it was in."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _plain(value: Any, where: str) -> Any:
    """The value as plain Python data; mappings become dicts, sequences lists."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; expected text, as JSON has no other keys")
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    value = scalar(value)
    if isinstance(value, str) and value in _NOT_FINITE:
        raise ValueError(f"{where} is the text {value!r}, which stands for a number in a stored Result; use float(...)")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; expected a number, text, None, or lists and dicts of those")


def scalar(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; everything else unchanged."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # numpy's text and enumerations are subclasses
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _encode(value: Any) -> Any:
    """Plain data -> strict JSON data."""
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    """Inverse of `_encode`."""
    if isinstance(value, Mapping):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
