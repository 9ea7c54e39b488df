"""What a run is, and what was measured of it: read from its directory, or from that of an evaluation."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.base import Result
from experiments.headline import headline
from memlm.analysis.figures import read_history
from memlm.checkpoint import FOLDER, Trust, blank, checkpoints, find, read
from memlm.config import ConfigError
from memlm.data.tokens import atomic_file
from memlm.memory import state as states
from memlm.training.resume import history_files

EVALUATION = "evaluation.json"
"""File of an evaluation's directory that says what was measured, see `Trained`."""

# Settings that do not make two runs different, beside those of experiments, which a result tells itself.
_ASIDE = ("seed", "paths", "logger", "name", "resume", "checkpoint", "watch")


class Trained(NamedTuple):
    """What a checkpoint says of its run; None where it says nothing.

    Attributes:
        checkpoint: Path of the file.
        step: Optimizer steps made.
        config: The whole configuration, plain.
        n_parameter: Parameters of the model.
        state_bytes: Bytes of all memories of one row, full or not.
        text: Fingerprint of the text.
        tokenizer: Fingerprint of the tokenizer.
        tokens_per_second: Median over the run, as it was logged.
        memory: Settings of memories, by ``name.attribute``, that were changed for an evaluation.
    """

    checkpoint: str
    step: int | None
    config: dict[str, Any]
    n_parameter: int | None
    state_bytes: int | None
    text: str | None
    tokenizer: str
    tokens_per_second: float | None
    memory: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Run:
    """A trained model and what was measured of it.

    Attributes:
        path: Directory, as it was given.
        trained: What it is.
        results: By the name of the experiment.
        figures: PNG files, by the name of the experiment.
    """

    path: Path
    trained: Trained
    results: dict[str, Result]
    figures: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def training(self) -> dict[str, Any]:
        """The settings that make it what it is, with those that were changed for an evaluation, but for the seed."""
        config = {
            name: node
            for name, node in self.trained.config.items()
            if name not in _ASIDE
            and not (isinstance(node, Mapping) and str(node.get("_target_")).startswith("experiments."))
        }
        memory = {name: dict(node) for name, node in config.get("memory", {}).items()}
        for key, value in self.trained.memory.items():
            name, _, setting = key.partition(".")
            memory[name][setting] = value
        return config | {"memory": memory, "step": self.trained.step}

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """Settings of the experiments, but for their seeds."""
        return {
            name: {key: value for key, value in result.metadata.get("settings", {}).items() if key != "seed"}
            for name, result in self.results.items()
        }


def describe(checkpoint: Path, model: Any | None = None, trust: Trust = None) -> Trained:
    """What a checkpoint says of its run.

    Args:
        checkpoint: The file.
        model: The model in it, if it is at hand.
        trust: Packages of which it may name classes, as for `memlm.checkpoint.load`.

    Raises:
        ConfigError: If it cannot be read, or names what is not trusted.
    """
    content = read(checkpoint, peek=True)
    entry = content["memlm"]
    if model is None:
        model = blank(checkpoint, content, trust)
    run = checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint.parent
    speeds = [row.get("train/tokens_per_second") for file in history_files(run) for row in read_history(file)]
    found = [speed for speed in speeds if speed is not None]
    return Trained(
        checkpoint=str(checkpoint.resolve()),
        step=content.get("global_step"),
        config=entry["config"],
        n_parameter=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=sum(states.n_byte(module.init_state(1)) for modules in model.memory.values() for module in modules),
        text=entry.get("text"),
        tokenizer=hashlib.sha256(str(entry["tokenizer"]).encode()).hexdigest(),
        tokens_per_second=statistics.median(found) if found else None,
    )


def write_evaluation(directory: Path, trained: Trained) -> Path:
    """Write into the directory of an evaluation what is measured there."""
    path = directory / EVALUATION
    with atomic_file(path) as file:
        file.write((json.dumps(trained._asdict() | {"memory": dict(trained.memory)}, indent=1) + "\n").encode())
    return path


def find_runs(paths: Sequence[str | Path], trust: Trust = None) -> tuple[list[Run], list[str]]:
    """The runs in directories, and those directories that were left out because nothing was measured there.

    Args:
        paths: Directories of runs or of evaluations, or directories of these, such as that of a sweep. What was
            measured of one checkpoint in several places is put together, unless it is the same experiment twice.
        trust: Packages of which checkpoints may name classes, as for `memlm.checkpoint.load`.

    Raises:
        ConfigError: If there is no such directory, nothing was measured in any, or a file cannot be read or names what
            is not trusted.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    for given in paths:
        folders = _expand(Path(given))
        for folder in folders:
            results = _results(folder)
            if not results:
                left_out.append(str(folder))
                continue
            figures = {name: sorted((folder / name).glob("*.png")) for name in results}
            run = Run(folder, _trained(folder, trust), results, figures)
            for i, known in enumerate(runs):
                both = known.results.keys() & results.keys()
                same = (known.trained.checkpoint, known.trained.memory) == (run.trained.checkpoint, run.trained.memory)
                if same and all(known.results[name] == results[name] for name in both):
                    runs[i] = Run(known.path, known.trained, known.results | results, known.figures | figures)
                    break
            else:
                runs.append(run)
    if not runs:
        raise ConfigError(
            f"there is no result in {', '.join(left_out)}: expected EXPERIMENT/result.json, as training writes at its "
            f"end; measure with python scripts/evaluate.py checkpoint={left_out[0]}, which says where its results are"
        )
    return runs, left_out


def _expand(path: Path) -> list[Path]:
    """The directory itself, or those in it that are runs."""
    if not path.exists():
        raise ConfigError(f"there is no run at {path}")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file: give the directory of a run or of an evaluation")

    def is_run(folder: Path) -> bool:
        # The files of checkpoints may lie in a run directory or in a folder of their own.
        return folder.is_dir() and bool((folder / EVALUATION).exists() or checkpoints(folder) or _result_files(folder))

    def in_order(folder: Path) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", folder.name)]

    jobs = [] if is_run(path) else [folder for folder in sorted(path.iterdir(), key=in_order) if is_run(folder)]
    return jobs or [path]


def _result_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/result.json"))


def _results(folder: Path) -> dict[str, Result]:
    results = {}
    for path in _result_files(folder):
        try:
            result = Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
            headline(result)  # refuses a rate without controls
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        results[path.parent.name] = result
    return results


def _trained(folder: Path, trust: Trust) -> Trained:
    path = folder / EVALUATION
    if not path.exists():
        return describe(find(folder), trust=trust)
    try:
        return Trained(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not what scripts/evaluate.py writes: {error}") from error
