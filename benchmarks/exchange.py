"""Share of a training step that processes spend on a shared bank which is dealt out to them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import check_least, conditions, quartiles, surroundings
from benchmarks.candidates import Candidate, Setup, fill, size_config

if TYPE_CHECKING:
    from memlm.evaluation.result import Result


def run(
    n_process: int, overrides: list[str], n_row: int, n_segment: int, warmup: int, rounds: int, seed: int
) -> Result:
    """Share of a training step that processes spend on a shared bank which is dealt out to them; see the YAML.

    Returns:
        Metrics ``sending`` and ``waiting`` (for the slower process), as shares of a step; one row per step and process.

    Raises:
        ConfigError: If a setting cannot work.
    """
    import tempfile

    from torch import multiprocessing

    from memlm.evaluation.result import Result

    given = {"n_process": n_process, "n_row": n_row, "n_segment": n_segment, "warmup": warmup, "rounds": rounds}
    check_least(given, {"n_process": 2, "n_row": n_process, "n_segment": 2})
    config = size_config("default", ["memory.ltm.scope=shared", "memory.ltm.shard=true", *overrides])
    setup = Setup(config, n_row // n_process, n_segment, "cpu", "fp32", False, seed)
    before = surroundings("cpu")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _exchange_steps, (n_process, setup, warmup, rounds, folder), n_process, start_method="fork"
        )
        rows = [row for rank in range(n_process) for row in json.loads(Path(folder, f"{rank}.json").read_text())]
    shares = {key: [row[key] / row["seconds"] for row in rows] for key in ("sending", "waiting")}
    metrics = {name: value for key, parts in shares.items() for name, value in quartiles(key, parts).items()}
    metadata = {"settings": given | {"overrides": overrides, "seed": seed}, "threads": 1, **before}
    return Result("benchmark_exchange", metrics, tuple(rows), metadata)


def _exchange_steps(rank: int, n_rank: int, setup: Setup, warmup: int, rounds: int, folder: str) -> None:
    """Train in one of several processes; what its steps took, in seconds, is written to ``folder``."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_rank)
    spent = {"sending": 0.0, "waiting": 0.0}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            distributed.barrier()
            between = time.perf_counter()
            result = call(*arguments)
            spent["waiting"] += between - begin
            spent["sending"] += time.perf_counter() - between
            return result

        return timed_call

    candidate = Candidate("ltm", setup)
    for module in candidate.model.memory["ltm"]:
        module.over_ranks = True
        module.shard_bank(rank, n_rank)
    candidate.state = fill(candidate.model, setup)
    for name in ("all_gather", "all_to_all_single"):  # what `memlm.distributed` sends with
        setattr(distributed, name, timed(getattr(distributed, name)))
    rows = []
    for i in range(warmup + rounds):
        spent.update(sending=0.0, waiting=0.0)
        distributed.barrier()
        begin = time.perf_counter()
        candidate.step(setup.batch(i))
        if i >= warmup:
            rows.append({"process": rank, "step": i, "seconds": time.perf_counter() - begin, **spent})
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    distributed.destroy_process_group()


def report(result: Result) -> str:
    """The shares and the conditions, to print."""
    from memlm.evaluation.table import table

    lines = [
        [key, *(f"{100 * result.metrics[f'{key}{part}']:.1f} %" for part in ("", "_low", "_high"))]
        for key in ("sending", "waiting")
    ]
    settings = result.metadata["settings"]
    title = (
        f"a bank dealt out to {settings['n_process']} processes: share of a training step, {settings['n_row']} rows of "
        f"{settings['n_segment']} segments"
    )
    return "\n\n".join([table(["", "median", "from", "to"], lines, title), "\n".join(conditions(result.metadata))])
