"""Tokens per second of whole training steps: two GPTs, and our model without and with a full memory.

Shapes: B rows, S segments, T tokens per segment, N = S * T, V vocabulary.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import (
    check_device,
    check_least,
    check_names,
    conditions,
    in_own_process,
    peak_rss,
    peer_library,
    quartiles,
    surroundings,
    torch_threads,
)
from benchmarks.candidates import GPT2, PEERS, Candidate, Setup, size_config

if TYPE_CHECKING:
    from memlm.evaluation.result import Result

_MEMORY_STEPS = 2  # the second step also holds the optimizer's moments and a carried state


def run(
    sizes: list[Literal["seed", "default", "124m"]],
    candidates: list[Literal["gpt2", "nanogpt", "none", "ltm", "delta", "titans"]],
    overrides: list[str],
    n_row: int,
    n_segment: int,
    warmup: int,
    rounds: int,
    steps: int,
    peak_memory: bool,
    device: str,
    precision: Literal["fp32", "bf16"],
    compile: bool,
    threads: int | None,
    seed: int,
) -> Result:
    """Tokens per second of whole training steps, candidates side by side; for the settings see the YAML.

    Returns:
        Metrics ``<size>/<candidate>/<measure>``; one row per measurement.

    Raises:
        ConfigError: If a setting cannot work.
    """
    given = {"n_row": n_row, "n_segment": n_segment, "warmup": warmup, "rounds": rounds, "steps": steps}
    check_least({**given, "threads": threads}, {"n_segment": 2})
    check_names(sizes=sizes, candidates=candidates)
    memories = [name for name in candidates if name in ("ltm", "delta", "titans")]
    configs = {size: size_config(size, overrides, memories) for size in sizes}
    if "gpt2" in candidates:
        peer_library(GPT2)

    from memlm.evaluation.result import Result

    check_device(device)
    with torch_threads(threads) as n_thread:
        metadata: dict[str, Any] = {
            "settings": {
                **given, "sizes": sizes, "candidates": candidates, "overrides": overrides, "device": device,
                "precision": precision, "compile": compile, "seed": seed,
            },
            "threads": n_thread,
            **surroundings(device),
            "shapes": {}, "evidence": {},
        }  # fmt: skip
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        for size, config in configs.items():
            setup = Setup(config, n_row, n_segment, device, precision, compile, seed)
            metadata["shapes"][size] = {
                **{key: config["model"][key] for key in ("n_layer", "n_head", "d_model", "segment_len", "overlap")},
                "n_vocab": setup.n_vocab, "tokens_per_step": setup.n_token,
                "memory_layers": config["model"]["memory_layers"], "ltm": config["memory"]["ltm"],
            }  # fmt: skip
            peaks: dict[str, dict[str, float]] = {}
            if peak_memory:  # first, while this process is small
                peaks = {name: in_own_process(peak, name, setup, n_thread) for name in candidates}
            built, seconds = measure(candidates, setup, warmup, rounds, steps)
            for name, candidate in built.items():
                metrics |= {
                    f"{size}/{name}/{key}": value for key, value in summarise(name, seconds, setup, steps).items()
                }
                metrics[f"{size}/{name}/parameters"] = candidate.n_parameter
                metrics |= {f"{size}/{name}/{key}": value for key, value in peaks.get(name, {}).items()}
                rows += [
                    {"size": size, "candidate": name, "round": i, "seconds": t, "tokens": steps * candidate.n_seen}
                    for i, t in enumerate(seconds[name])
                ]
                if name == "ltm":
                    metadata["evidence"][size] = evidence(candidate)
            del built, candidate
            gc.collect()
    return Result("benchmark_train", metrics, tuple(rows), metadata)


def evidence(candidate: Candidate) -> dict[str, float]:
    """What the banks hold, and what the last step read and wrote.

    Returns:
        ``banks`` (one per row and layer that reads), ``slots`` of a bank, and over all banks, layers and tokens the
        least of: ``filled``, used slots of a bank; ``read``, slots that one token read with some weight; ``distinct``,
        different slots that the tokens of a layer read; ``written``, slots of a bank that come from steps so far.

    Raises:
        ValueError: If a bank is not full, a token read nothing, or a bank was not written: then the speed of a
            memory that does less was measured.
    """
    model: Any = candidate.model
    pairs = list(zip(model.memory["ltm"], candidate.state.memory["ltm"], strict=True))
    reads = list(candidate.last.reads.values())
    found = {
        "banks": sum(len(bank.key) for _, bank in pairs),
        "slots": min(module.n_slot for module, _ in pairs),
        "filled": min(int(module.filled(bank).sum(dim=1).min()) for module, bank in pairs),
        "read": min(int((read.weights > 0).sum(dim=-1).min()) for read in reads) if reads else 0,
        "distinct": min(int(read.slots[read.weights > 0].unique().numel()) for read in reads) if reads else 0,
        "written": min(int((bank.record > 0).sum(dim=1).min()) for _, bank in pairs),
    }
    if len(reads) != len(pairs) or found["filled"] < found["slots"] or not found["read"] or not found["written"]:
        raise ValueError(f"the long-term memory was not full, read and written in the step that was measured: {found}")
    return found


def measure(
    names: Sequence[str], setup: Setup, warmup: int, rounds: int, steps: int
) -> tuple[dict[str, Candidate], dict[str, list[float]]]:
    """Train all candidates in turn, so that what disturbs the machine meets all of them.

    Returns:
        The candidates, and the seconds of each of their measurements.

    Raises:
        ValueError: If a loss is not finite or candidates did not get the same number of tokens.
    """
    import torch

    def wait() -> None:
        if setup.device.startswith("cuda"):
            torch.cuda.synchronize(setup.device)

    built = {name: Candidate(name, setup) for name in names}
    for name, candidate in built.items():
        for i in range(warmup):
            loss = candidate.step(setup.batch(i))
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of {name} is {loss.item()} in step {i} of the warm-up")
        if name == "ltm":
            evidence(candidate)
    if len(seen := {candidate.n_seen for candidate in built.values()}) > 1:
        raise ValueError(f"candidates got different numbers of tokens: {seen}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        texts = [setup.batch(warmup + i * steps + j) for j in range(steps)]
        for name, candidate in built.items():
            gc.collect()
            wait()
            start = time.perf_counter()
            for text in texts:
                candidate.step(text)
            wait()
            seconds[name].append(time.perf_counter() - start)
    return built, seconds


def summarise(name: str, seconds: Mapping[str, list[float]], setup: Setup, steps: int) -> dict[str, float]:
    """Median and quartiles of tokens per second, and of the ratio to each peer of the same round."""
    found = quartiles("tokens_per_s", [setup.n_token * steps / t for t in seconds[name]])
    for peer in PEERS[name]:
        if peer in seconds:
            ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[peer], strict=True)]
            found |= quartiles(f"vs_{peer}", ratios)
    return found


def peak(name: str, setup: Setup, threads: int) -> dict[str, float]:
    """Peak memory in MiB of training by a few steps, to be called in a fresh process.

    Returns:
        ``peak_mib``: of the process, or on an accelerator of what torch allocated there; ``idle_mib``: before the model
        was built. NaN where the system does not tell.
    """
    import torch

    import memlm.training.module  # noqa: F401 - what every candidate imports counts as idle

    if name == "gpt2":
        peer_library(GPT2)
    torch.set_num_threads(threads)
    cuda = setup.device.startswith("cuda")
    idle = 0.0 if cuda else peak_rss()
    candidate = Candidate(name, setup)
    for i in range(_MEMORY_STEPS):
        candidate.step(setup.batch(i))
    most = torch.cuda.max_memory_allocated(setup.device) / 2**20 if cuda else peak_rss()
    return {"peak_mib": most, "idle_mib": idle}


def report(result: Result) -> str:
    """The tables and the conditions, to print."""
    from memlm.evaluation.table import table

    metadata, metrics = result.metadata, result.metrics
    settings = metadata["settings"]
    peers = [peer for peer in ("gpt2", "nanogpt", "none") if any(f"/vs_{peer}" in key for key in metrics)]
    columns = ["candidate", "parameters", "tokens/s", "quartiles", *(f"vs {peer}" for peer in peers), "peak MiB"]
    texts = []
    for size, shape in metadata["shapes"].items():
        lines = []
        for name in settings["candidates"]:
            of = {key.rpartition("/")[2]: v for key, v in metrics.items() if key.startswith(f"{size}/{name}/")}
            ratios = [
                f"{of[f'vs_{p}']:.2f} ({of[f'vs_{p}_low']:.2f}-{of[f'vs_{p}_high']:.2f})" if f"vs_{p}" in of else None
                for p in peers
            ]
            speed = f"{of['tokens_per_s_low']:,.0f}-{of['tokens_per_s_high']:,.0f}"
            most = round(of["peak_mib"]) if of.get("peak_mib", float("nan")) > 0 else None
            lines.append([name, int(of["parameters"]), round(of["tokens_per_s"]), speed, *ratios, most])
        title = (
            f"{size}: {shape['n_layer']} layers, {shape['n_head']} heads, width {shape['d_model']}, vocabulary "
            f"{shape['n_vocab']:,}, context {shape['segment_len']}, {shape['tokens_per_step']:,} tokens per step"
        )
        texts.append(table(columns, lines, title))
        if found := metadata["evidence"].get(size):
            texts[-1] += (
                f"\nltm: {found['banks']} banks of {found['slots']:,} slots, all used; every token of every layer "
                f"searched them and read {found['read']} or more"
            )
    how = [
        f"Median and quartiles of {settings['rounds']} rounds of {settings['steps']} steps; ratios are per round.",
        f"{settings['precision']}{', compiled' if settings['compile'] else ''}",
    ]
    return "\n\n".join([*texts, "\n".join([*how, *conditions(metadata)])])
