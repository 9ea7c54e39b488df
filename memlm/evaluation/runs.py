"""What a run is, and what was measured of it: read from its directory, or from that of an evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from memlm.analysis.run_log import History, read_history
from memlm.checkpoint import FOLDER, Trust, blank, checkpoints, find, read
from memlm.config import ConfigError
from memlm.evaluation.headline import headline
from memlm.evaluation.result import Result
from memlm.files import atomic_file, read_json
from memlm.memory import state as states
from memlm.printed import one_line
from memlm.training.logged import history_files

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
        cpu_seconds: CPU time of all steps, as it was logged, without validation and experiments.
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
    cpu_seconds: float | None = None


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
        memory = {name: dict(node) for name, node in (config.get("memory") or {}).items()}
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
    history = [row for file in history_files(run) for row in read_history(file)]
    speeds = list(_logged(history, "train/tokens_per_second").values())
    step = content.get("global_step")
    return Trained(
        checkpoint=str(checkpoint.resolve()),
        step=step,
        config=entry["config"],
        n_parameter=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=sum(states.n_byte(module.init_state(1)) for modules in model.memory.values() for module in modules),
        text=entry.get("text"),
        tokenizer=hashlib.sha256(str(entry["tokenizer"]).encode()).hexdigest(),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        cpu_seconds=_cpu_seconds(history, step),
    )


def _logged(history: History, column: str) -> dict[int, float]:
    """The numbers of a column by step, without what is none; of a step that was repeated the later row counts."""
    found = {}
    for row in history:
        value, step = row.get(column), row.get("step")
        if isinstance(value, float) and isinstance(step, int) and math.isfinite(value):
            found[step] = value
    return found


def _cpu_seconds(history: History, step: int | None) -> float | None:
    """CPU time of so many steps: what was logged, which ends with the last step that is a multiple of the interval."""
    logged = {at: seconds for at, seconds in _logged(history, "train/cpu_seconds").items() if 0 <= at < (step or 0)}
    return sum(logged.values()) * step / (max(logged) + 1) if logged and step else None


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
            f"there is no result in {', '.join(left_out)}: a run is measured at its end; measure it now with memlm "
            f"evaluate checkpoint={left_out[0]}, and give the folder that this names"
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
        content = read_json(path)
        try:
            result = Result.from_dict(content)
            headline(result)  # refuses a rate without controls
            if not isinstance(result.metadata.get("settings", {}), dict):
                raise ValueError("its settings are no dict")
        except (ValueError, RecursionError) as error:  # RecursionError: nested hundreds of times
            raise ConfigError(f"{path}: {one_line(error)}") from error
        results[path.parent.name] = result
    return results


def _trained(folder: Path, trust: Trust) -> Trained:
    path = folder / EVALUATION
    try:
        given = read_json(path)
    except FileNotFoundError:
        path = find(folder)
        return _checked(describe(path, trust=trust), path)
    told = f"{path} is not what memlm evaluate writes"
    if not set(given) <= set(Trained._fields) or not {*Trained._fields} - {*Trained._field_defaults} <= set(given):
        raise ConfigError(f"{told}: expected {', '.join(Trained._fields)}, got {one_line(', '.join(given))}")
    return _checked(Trained(**given), path)


_KINDS: dict[str, Any] = {
    "checkpoint": str, "config": dict, "tokenizer": str, "memory": Mapping, "text": str | None,
    "step": int | None, "n_parameter": int | None, "state_bytes": int | None, "tokens_per_second": float | int | None,
    "cpu_seconds": float | int | None,
}  # fmt: skip


# Of a configuration, what is compared.
_NEEDED: dict[str, Any] = {
    "model._target_": str, "model.segment_len": int, "memory": dict | None, "seed": int | None, "name": str | None,
    "trainer.accumulate_grad_batches": int, "curriculum.phases": list, "curriculum.task": dict | None,
}  # fmt: skip


_MOST = 2**63


def _checked(trained: Trained, path: Path) -> Trained:
    """Refuse what no run says of itself, before anything is made of it."""

    def check(name: str, value: Any, kind: Any) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, kind) or isinstance(value, bool) or (whole and not -_MOST < value < _MOST):
            raise ConfigError(f"{path}: {name} is {one_line(repr(value)[:60])}, which no run says of itself")

    for name, kind in _KINDS.items():
        check(name, getattr(trained, name), kind)
    for key, kind in _NEEDED.items():
        value: Any = trained.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        check(f"config.{key}", value, kind)
    memories = trained.config.get("memory") or {}
    for name, node in memories.items():
        check("a name in config.memory", name, str)
        check(f"config.memory.{name}", node, dict)
    for i, phase in enumerate(trained.config["curriculum"]["phases"]):
        check(f"config.curriculum.phases[{i}]", phase, dict)
        for name in ("steps", "n_row", "n_segment"):
            check(f"config.curriculum.phases[{i}].{name}", phase.get(name), int)
    for key in trained.memory:
        if key.partition(".")[0] not in memories:
            raise ConfigError(f"{path}: memory.{one_line(key)} is a setting of a memory that the model lacks")
    try:
        json.dumps(trained.config)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: its configuration is not made of plain values ({one_line(error)})") from error
    return trained
