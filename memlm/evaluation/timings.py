"""Records of benchmarks: what each run reported, and under which conditions.

A record is a list of entries, one per command. What was reported is kept as it was printed, as a benchmark may later
report in another way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from memlm.config import ConfigError
from memlm.files import read_json

PREFIX = "benchmark_"
"""Of the name of a benchmark's result."""

REPORT = "report.txt"
"""File of a run with what it printed."""

NEEDED = ("name", "experiment", "command", "commit", "report")
"""What an entry has."""


def is_benchmark(run: Path) -> bool:
    """Whether a directory has what a benchmark measured."""
    try:
        name = read_json(run / "result.json")["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(name, str) and name.startswith(PREFIX)


def entry(run: Path) -> dict[str, Any]:
    """What a record keeps of a run of a benchmark; for paths of this machine stand the names of their settings.

    Raises:
        ConfigError: If it does not say by which command it was made, or what was measured is in no commit.
    """
    stored = read_json(run / "result.json")
    try:
        given = [str(line) for line in yaml.safe_load((run / ".hydra/overrides.yaml").read_text(encoding="utf-8"))]
        report = (run / REPORT).read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{run} does not tell its command and report: {error}") from error
    if stored["metadata"].get("uncommitted_changes"):
        raise ConfigError(f"{run} was measured with changes that are in no commit: commit them and measure again")
    name = stored["name"].removeprefix(PREFIX)
    settings = [line for line in given if line.partition("=")[0] not in ("benchmark", "hydra.run.dir", "out")]
    text = json.dumps([settings, stored["metadata"], report])
    for key, _, value in (line.partition("=") for line in settings):
        if (path := value.strip("'\"")).startswith("/"):  # of this machine alone
            text = text.replace(value, key.upper()).replace(path, key.upper())
    settings, metadata, report = json.loads(text)
    return {
        "name": name,
        "experiment": stored["name"],
        "command": " ".join(["python scripts/benchmark.py", name, *settings]),
        "commit": str(metadata["commit"])[:7],
        "metadata": metadata,
        "report": report,
    }


def merged(record: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A record with new entries; of the same command the newer one stays, in its place."""
    return list({part["command"]: part for part in [*record, *new]}.values())


def text(record: Sequence[Mapping[str, Any]]) -> str:
    """What each entry reported, below its command."""
    return "\n\n".join(f"    {part['command']}\n\n```text\n{part['report'].strip()}\n```" for part in record)
