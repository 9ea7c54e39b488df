"""In which settings runs differ, and groups of runs that differ in the seed alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memlm.evaluation.runs import Run
from memlm.printed import one_line

_ABSENT = object()


@dataclass
class Group:
    """Runs that differ only in seed.

    Attributes:
        runs: One per seed.
        label: What tells it from the other groups.
    """

    runs: list[Run]
    label: str = ""

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """Settings of all experiments of its runs, which agree in them."""
        return {name: settings for run in self.runs for name, settings in run.measured.items()}


def measuring_differences(groups: Sequence[Group]) -> Iterator[tuple[str, list[Any]]]:
    """Settings of experiments that were measured in several groups."""
    measured = [group.measured for group in groups]
    for name in dict.fromkeys(name for settings in measured for name in settings):
        yield from _among_present([settings.get(name, _ABSENT) for settings in measured], name)


def differences_of(values: Sequence[Any], key: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Parts of plain values that differ, by full name; what one of them lacks as a whole is not taken apart."""
    if all(isinstance(value, list) and len(value) == len(values[0]) for value in values) and any(
        isinstance(item, Mapping) for item in values[0]
    ):
        values = [{str(i): item for i, item in enumerate(value)} for value in values]
    if all(isinstance(value, Mapping) for value in values):
        for name in dict.fromkeys(name for value in values for name in value):
            parts = [value.get(name, _ABSENT) for value in values]
            if any(part is _ABSENT for part in parts):
                yield _dotted(key, name), parts
            yield from _among_present(parts, _dotted(key, name))
    elif any(value != values[0] for value in values):
        yield key, list(values)


def _among_present(values: Sequence[Any], key: str) -> Iterator[tuple[str, list[Any]]]:
    """Differences between the values that are there; the others stay absent."""
    there = [i for i, value in enumerate(values) if value is not _ABSENT]
    for name, parts in differences_of([values[i] for i in there], key):
        whole = [_ABSENT] * len(values)
        for i, part in zip(there, parts, strict=True):
            whole[i] = part
        yield name, whole


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def brief(value: Any) -> str:
    """A value of a setting on a few characters."""
    if value is _ABSENT:
        return "absent"
    if isinstance(value, Mapping):
        return "given"
    text = value if isinstance(value, str) else json.dumps(value)
    return textwrap.shorten(one_line(text), 60, placeholder="...")


def name_of(groups: Sequence[Group], differences: Sequence[tuple[str, list[Any]]]) -> None:
    """Label groups by name or memories, and by the fewest settings that tell apart those which are alike in that.

    Where models of several kinds are compared, their kind stands before the memories.
    """
    configs = [group.runs[0].trained.config for group in groups]
    kinds = [str(config["model"]["_target_"]).rpartition(".")[2].lower() for config in configs]
    for group, config, kind in zip(groups, configs, kinds, strict=True):
        memories = "+".join(config.get("memory") or ()) or "none"
        group.label = one_line(config.get("name") or (f"{kind}-{memories}" if len(set(kinds)) > 1 else memories))
    settings = [(key, [brief(value) for value in values]) for key, values in differences]
    for label in {group.label for group in groups}:
        alike = [i for i, group in enumerate(groups) if group.label == label]
        while (n := len({groups[i].label for i in alike})) < len(alike):
            # What tells most of them apart; of several a setting of a memory, and the shortest.
            told = [
                (len({groups[i].label + texts[i] for i in alike}), key.startswith("memory."), -len("".join(texts)), key)
                for key, texts in settings
            ]
            most, *_, key = max(told, default=(n, ""))
            if most == n:  # they differ in what is too long to be shown
                for number, i in enumerate(alike, 1):
                    groups[i].label += f" ({number})"
                break
            for i in alike:
                groups[i].label += f" {_short(key)}={dict(settings)[key][i]}"


def _short(key: str) -> str:
    """The name of a setting without where it is, but for a part of a list, such as a phase of a curriculum."""
    *_, above, name = ["", *key.split(".")]
    return key if above.isdigit() else name


def seeds_of(group: Group) -> str:
    """How many seeds a group has, in words."""
    return f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
