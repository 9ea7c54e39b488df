"""Kill a training run again and again, go on with it, and compare it with one that was never stopped.

python scripts/survival.py n_kill=100

Every training is `train.py` itself, in a process forked from this one, which has imported everything: a start then
costs less than a second. It gets signal 9 at a random moment, or while it writes a checkpoint; the next one goes on
with ``resume=auto``. When a run is through, all that its last checkpoint holds and all that was logged is compared, bit
for bit, and another run begins, until so many processes were killed.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memlm.app.cli import cli
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from memlm.evaluation.result import Result

_POLL = 0.0005  # seconds between two looks at a process
_CLOCKS = ("train/tokens_per_second", "train/cpu_seconds")  # what is logged of time, and no part of what is trained


class Moment(NamedTuple):
    """When a process is killed.

    Attributes:
        n_checkpoint: Checkpoints that it makes first; 0: it may be killed as soon as it starts.
        in_write: Whether it then has to begin the write of another.
        delay: Seconds after that.
    """

    n_checkpoint: int
    in_write: bool
    delay: float

    @classmethod
    def draw(cls, rng: random.Random) -> Moment:
        """A random one: half of them within a few milliseconds of a write, the rest anywhere."""
        n, in_write = rng.randrange(4), rng.random() < 0.5
        return cls(n, in_write, rng.expovariate(1 / (0.002 if in_write else 0.5)))

    def has_come(self, folder: Path) -> bool:
        """Whether nothing but the delay is left, by what lies in the folder of checkpoints."""
        return len(_names(folder, ".ckpt")) >= self.n_checkpoint and (not self.in_write or _is_writing(folder))


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: Exit code; -9 if it was killed.
        writing: Whether a checkpoint was left half written.
        seconds: How long it ran.
    """

    code: int
    writing: bool
    seconds: float


def survive(overrides: Sequence[str], n_kill: int, workers: Sequence[int], seed: int, out: Path) -> Result:
    """Train once without a stop, then kill and resume until ``n_kill`` processes were killed.

    Args:
        overrides: Of ``configs/train.yaml``.
        n_kill: How many processes are killed.
        workers: Numbers of loader processes; each start has one of them.
        seed: Of the moments.
        out: Where runs are written.

    Returns:
        Counts, and one row per process: its run, how it ended, and where it differs from the run without a stop.

    Raises:
        ConfigError: If a setting cannot work, or the run without a stop fails.
    """
    from memlm.checkpoint import checkpoints
    from memlm.evaluation.result import Result

    if n_kill < 1:
        raise ConfigError(f"n_kill must be at least 1, got {n_kill}")
    if not workers or min(workers) < 0:
        raise ConfigError(f"workers must be numbers of loader processes, at least one, got {list(workers)}")
    rng = random.Random(seed)
    started = time.monotonic()
    whole = out / "whole"
    undisturbed = train([*overrides, f"paths.root={quoted(str(whole))}"], whole / "run")
    if undisturbed.code:
        raise ConfigError(f"the run without a stop failed; see {whole / 'run.log'}")
    last = checkpoints(whole / "run")[-1].name
    rows: list[dict[str, Any]] = []
    killed = 0
    for run in itertools.count():
        root = out / f"killed-{run}"
        for start in itertools.count():
            place = root / f"start-{start:03d}"
            settings = [
                *overrides,
                f"paths.root={quoted(str(root))}",
                f"data.n_worker={rng.choice(workers)}",
                "resume=auto",
            ]
            ended = train(settings, place, None if killed >= n_kill else Moment.draw(rng))
            killed += ended.code == -signal.SIGKILL
            made = checkpoints(place) if (place / "checkpoints").is_dir() else []
            rows.append({"run": run, "start": start, "code": ended.code, "writing": ended.writing,
                         "seconds": round(ended.seconds, 3), "last": made[-1].name if made else "",
                         "differs": ""})  # fmt: skip
            if ended.code != -signal.SIGKILL or rows[-1]["last"] == last:
                break
        rows[-1]["differs"] = "; ".join(differences(whole / "run", place)[:5]) if rows[-1]["last"] == last else "failed"
        print(f"run {run}: {start + 1} starts, {rows[-1]['differs'] or 'the same bit for bit'}", flush=True)
        if killed >= n_kill:
            break
    metrics = {
        "n_kill": killed,
        "n_kill_while_writing": sum(row["writing"] for row in rows),
        "n_kill_before_a_checkpoint": sum(row["code"] == -signal.SIGKILL and not row["last"] for row in rows),
        "n_run": run + 1,
        "n_divergent": sum(bool(row["differs"]) for row in rows),
        "seconds": time.monotonic() - started,
    }
    settings_of = {"overrides": list(overrides), "n_kill": n_kill, "workers": list(workers), "seed": seed}
    return Result("survival", metrics, tuple(rows), {"settings": settings_of})


def train(overrides: Sequence[str], run: Path, moment: Moment | None = None) -> Ended:
    """Train in a forked process.

    Args:
        overrides: Of ``configs/train.yaml``.
        run: Run directory; what is printed goes to ``<run>.log`` beside it.
        moment: When it is killed; None for never.
    """
    import torch

    from memlm.app.train import main as training

    for name in (
        "experiments.perplexity",
        "memlm.evaluation.run_figures",
        "memlm.training.fit",
        "memlm.training.module",
    ):
        importlib.import_module(name)  # before the fork, and once

    torch.set_num_threads(1)  # threads do not survive a fork
    config = compose([*overrides, f"paths.run_dir={quoted(str(run))}"])
    run.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(run.parent / f"{run.name}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                training(config)
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    folder, due = run / "checkpoints", float("inf")
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if moment is not None and due == float("inf") and moment.has_come(folder):
            due = now + moment.delay
        if now >= due:
            os.kill(child, signal.SIGKILL)
        time.sleep(_POLL)
    return Ended(os.waitstatus_to_exitcode(status), _is_writing(folder), time.monotonic() - begin)


def differences(run: Path, other: Path) -> list[str]:
    """Where the last checkpoints and the logs of two runs are not the same, bit for bit."""
    from memlm.analysis.run_log import read_history
    from memlm.checkpoint import checkpoints, read
    from memlm.training.logged import history_files

    parts: list[dict[str, Any]] = []
    for place in (run, other):
        content = read(checkpoints(place)[-1])
        content["memlm"] = {k: v for k, v in content["memlm"].items() if k not in ("config", "wandb_id")}
        content["loops"]["fit_loop"].pop("epoch_loop.val_loop.batch_progress", None)
        logged: dict[str, list[Any]] = {}
        for file in history_files(place):
            for row in read_history(file):
                for name, value in row.items():
                    if value is not None and name not in (*_CLOCKS, "step", "epoch"):
                        logged.setdefault(f"{name} at step {row['step']}", []).append(value)
        parts.append({"checkpoint": content, "logged": logged})
    return list(_differing(parts[0], parts[1], ""))


def _is_writing(folder: Path) -> bool:
    """Whether a checkpoint has begun that is not whole, or whose step is not all logged."""
    return bool(_names(folder, ".tmp"))


def _names(folder: Path, ending: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.name.endswith(ending)]
    except FileNotFoundError:
        return []


def _differing(one: Any, other: Any, name: str) -> Iterator[str]:
    """Names of the values that differ in two trees of plain values and tensors."""
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            if key in one and key in other:
                yield from _differing(one[key], other[key], f"{name}.{key}" if name else str(key))
            else:
                yield f"{name}.{key} is in one alone"
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from _differing(*pair, f"{name}[{i}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield name
    elif type(one) is not type(other) or one != other:
        yield name


@cli("survival")
def main(config: Mapping[str, Any]) -> None:
    """Kill, resume, compare, report."""
    from memlm.evaluation.emit import emit
    from memlm.evaluation.table import table

    out = Path(config["out"])
    result = survive(config["overrides"], config["n_kill"], config["workers"], config["seed"], out)
    print("\n" + table(["", "number"], [[name, value] for name, value in result.metrics.items()]))
    print("\nWritten:", *(f"  {path}" for path in emit(result, {}, out)), sep="\n")
    if result.metrics["n_divergent"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
