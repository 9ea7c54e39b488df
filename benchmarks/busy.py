"""Tokens per second of training beside other processes that are busy: torch's own threads, and ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import check_least, check_names, conditions, quartiles, surroundings
from benchmarks.candidates import Candidate, Setup, size_config
from memlm import threads

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from memlm.evaluation.result import Result

# What each candidate does to its threads.
CANDIDATES = {
    "spinning": "torch by itself: a thread for each core, which spins while it waits",
    "passive": "as many, which sleep while they wait: a run that the neighbours came to later",
    "memlm": "as many as are free when it begins beside the neighbours, which sleep while they wait",
}

# Tells when it begins, and its processor time when it is asked to end.
_NEIGHBOUR = """
import os, signal, sys, time
parent, start = os.getppid(), time.process_time()
def end(*_):
    print(time.process_time() - start)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(flush=True)
while os.getppid() == parent:
    sum(range(10**5))
"""


def run(
    memories: list[Literal["none", "ltm"]],
    neighbours: list[int],
    overrides: list[str],
    n_row: int,
    n_segment: int,
    warmup: int,
    rounds: int,
    steps: int,
    seed: int,
) -> Result:
    """Tokens per second of training beside busy processes, candidates in turn; for the settings see the YAML.

    Returns:
        Metrics ``<memory>/<candidate>/<neighbours>/<measure>``, of which ``of_idle`` is the speed as a share of that of
        torch's own threads without neighbours, and ``neighbours/<n>/cores``, what they took; one row per measurement.

    Raises:
        ConfigError: If a setting cannot work.
        ValueError: If the neighbours were not busy.
    """
    from memlm.evaluation.result import Result

    given = {"n_row": n_row, "n_segment": n_segment, "warmup": warmup, "rounds": rounds, "steps": steps}
    check_least({**given, "neighbours": min(neighbours, default=1)}, {"n_segment": 2, "warmup": 0})
    check_names(memories=memories, neighbours=neighbours)
    setup = Setup(size_config("default", overrides), n_row, n_segment, "cpu", "fp32", False, seed)
    before = surroundings("cpu")
    rows: list[dict[str, Any]] = []
    taken: dict[int, list[float]] = {n: [] for n in neighbours}
    with ExitStack() as stack:
        pairs = [(memory, name) for memory in memories for name in CANDIDATES]
        at_work = {pair: stack.enter_context(_training(*pair, setup, warmup)) for pair in pairs}
        n_own = {pair: connection.recv() for pair, connection in at_work.items()}
        for i in range(rounds):
            for n in [0, *neighbours]:
                with _beside(n) as used:
                    for (memory, name), connection in at_work.items():
                        n_thread = _chosen(n_own[memory, name]) if name == "memlm" else n_own[memory, name]
                        connection.send((n_thread, warmup + i * steps, steps))
                        rows.append(
                            {"memory": memory, "candidate": name, "neighbours": n, "round": i, "threads": n_thread,
                             "seconds": connection.recv(), "tokens": steps * setup.n_token}
                        )  # fmt: skip
                if n:
                    taken[n].append(used[0])
    metrics = summarise(rows)
    for n, cores in taken.items():
        metrics |= {f"neighbours/{n}/{key}": value for key, value in quartiles("cores", cores).items()}
    settings = given | {"memories": memories, "neighbours": neighbours, "overrides": overrides, "seed": seed}
    metadata = {"settings": settings, "threads": max(n_own.values()), **before}
    return Result("benchmark_busy", metrics, tuple(rows), metadata)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of measurements."""
    idle = {
        (row["memory"], row["round"]): row["seconds"]
        for row in rows
        if row["candidate"] == "spinning" and row["neighbours"] == 0
    }
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["memory"], row["candidate"], row["neighbours"]), []).append(row)
    metrics: dict[str, float] = {}
    for (memory, name, n), group in groups.items():
        found = quartiles("tokens_per_s", [row["tokens"] / row["seconds"] for row in group])
        found |= quartiles("of_idle", [idle[memory, row["round"]] / row["seconds"] for row in group])
        found |= quartiles("threads", [row["threads"] for row in group])
        metrics |= {f"{memory}/{name}/{n}/{key}": value for key, value in found.items()}
    return metrics


def _chosen(n_own: int) -> int:
    """Threads that a command of memlm takes now."""
    return threads.choose(n_own, threads.core_limit(), threads.busy_share(threads.usable_cores()))


@contextmanager
def _beside(n: int) -> Iterator[list[float]]:
    """Beside so many busy processes; afterwards the list holds how many cores' worth of time they took.

    Raises:
        ValueError: If they took none.
    """
    used: list[float] = []
    command = [sys.executable, "-S", "-c", _NEIGHBOUR]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(n)]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()
        start = time.perf_counter()
        yield used
        seconds = time.perf_counter() - start
    finally:
        for process in busy:
            process.terminate()
        told = [process.communicate()[0] for process in busy]
    used.append(sum(map(float, told)) / seconds)
    if used[0] < 0.02 * n:
        raise ValueError(f"{n} neighbours took {used[0]:.2f} cores: they were not busy")


@contextmanager
def _training(memory: str, name: str, setup: Setup, warmup: int) -> Iterator[Connection]:
    """A process that trains on request, and first sends the number of threads that torch takes."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train, args=(theirs, memory, setup, warmup), daemon=True)
    before = {key: os.environ.pop(key) for key in (*threads.WAITING, *threads.NUMBER) if key in os.environ}
    try:
        if name != "spinning":
            threads.wait_passively()
        process.start()
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)
        os.environ.update(before)
    theirs.close()  # so that its end is noticed
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _train(connection: Connection, memory: str, setup: Setup, warmup: int) -> None:
    """Train as often as is asked for: threads, number of the first batch, steps; the seconds are sent back."""
    import torch

    from benchmarks.train import evidence

    candidate = Candidate(memory, setup)
    for i in range(warmup):
        candidate.step(setup.batch(i))
    connection.send(torch.get_num_threads())
    while True:
        try:
            n_thread, first, steps = connection.recv()
        except EOFError:
            return
        torch.set_num_threads(n_thread)
        texts = [setup.batch(first + i) for i in range(steps)]
        start = time.perf_counter()
        for text in texts:
            candidate.step(text)
        seconds = time.perf_counter() - start
        if memory == "ltm":
            evidence(candidate)
        connection.send(seconds)


def report(result: Result) -> str:
    """The tables and the conditions, to print."""
    from memlm.evaluation.table import table

    metrics, settings = result.metrics, result.metadata["settings"]
    texts = []
    for memory in settings["memories"]:
        lines: list[list[Any]] = []
        for n in (0, *settings["neighbours"]):
            for name in CANDIDATES:
                of = {
                    key.rpartition("/")[2]: v for key, v in metrics.items() if key.startswith(f"{memory}/{name}/{n}/")
                }
                share = f"{of['of_idle']:.2f} ({of['of_idle_low']:.2f}-{of['of_idle_high']:.2f})"
                speed = f"{of['tokens_per_s_low']:,.0f}-{of['tokens_per_s_high']:,.0f}"
                lines.append([n, name, f"{of['threads']:g}", round(of["tokens_per_s"]), speed, share])
        columns = ["neighbours", "candidate", "threads", "tokens/s", "quartiles", "of spinning, idle"]
        texts.append(table(columns, lines, f"memory={memory}"))
    took = [f"{n} took {metrics[f'neighbours/{n}/cores']:.1f} cores" for n in settings["neighbours"]]
    how = [
        *(f"{name}: {what}" for name, what in CANDIDATES.items()),
        f"Median and quartiles of {settings['rounds']} rounds of {settings['steps']} steps; ratios are per round. "
        f"Neighbours: {', '.join(took)}.",
    ]
    return "\n\n".join([*texts, "\n".join([*how, *conditions(result.metadata)])])
