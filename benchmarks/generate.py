"""Generation beside ``generate`` of Hugging Face GPT-2: milliseconds per step of a batch.

Shapes: B rows, L tokens of a prompt.
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
    peer_library,
    quartiles,
    spread,
    surroundings,
    torch_threads,
)
from benchmarks.candidates import GPT2, PEERS, Candidate, Setup, size_config

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result

_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def run(
    candidates: list[Literal["gpt2", "none", "ltm"]],
    batches: list[int],
    lengths: list[Literal["equal", "unlike"]],
    overrides: list[str],
    prompt_len: int,
    n_generate: int,
    warmup: int,
    rounds: int,
    clock: Literal["wall", "cpu"],
    compile: bool,
    device: str,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds per step of generation, candidates side by side; for the settings see the YAML.

    Returns:
        Metrics ``<candidate>/<batch>/<lengths>/<measure>``; one row per measurement.

    Raises:
        ConfigError: If a setting cannot work.
    """
    given = {"prompt_len": prompt_len, "n_generate": n_generate, "warmup": warmup, "rounds": rounds}
    check_least({**given, "threads": threads, "batches": min(batches, default=1)}, {"warmup": 0})
    check_names(candidates=candidates, batches=batches, lengths=lengths)
    config = size_config("default", overrides)
    if "gpt2" in candidates:
        peer_library(GPT2)

    from memlm.evaluation.result import Result

    check_device(device)
    context = prompt_len + n_generate  # of GPT-2, which has no segments
    setup = Setup(config, max(batches), 1, device, "fp32", False, seed)
    theirs = setup._replace(config=config | {"model": config["model"] | {"segment_len": context}})
    with torch_threads(threads) as n_thread:
        metadata: dict[str, Any] = {
            "settings": {
                **given, "candidates": candidates, "batches": batches, "lengths": lengths, "overrides": overrides,
                "clock": clock, "compile": compile, "device": device, "seed": seed,
            },
            "threads": n_thread,
            **surroundings(device),
            "shape": config["model"] | {"n_vocab": setup.n_vocab, "n_slot": config["memory"]["ltm"]["n_slot"]},
        }  # fmt: skip
        built: dict[str, Candidate] = {
            str(name): Candidate(name, theirs if name == "gpt2" else setup) for name in candidates
        }
        for candidate in built.values():
            candidate.model.eval()
        rows: list[dict[str, Any]] = []
        for n_row in batches:
            for kind in lengths:
                ids, mask = prompts(setup, n_row, prompt_len, kind)
                calls = {name: Call(model, ids, mask, n_generate, compile) for name, model in built.items()}
                rows += measure(calls, {"batch": n_row, "lengths": kind}, warmup, rounds, clock, device)
    metrics: dict[str, float] = {}
    for n_row in batches:
        for kind in lengths:
            here = [row for row in rows if (row["batch"], row["lengths"]) == (n_row, kind)]
            for name in candidates:
                metrics |= {f"{name}/{n_row}/{kind}/{key}": value for key, value in summarise(here, name).items()}
    return Result("benchmark_generate", metrics, tuple(rows), metadata)


def prompts(setup: Setup, n_row: int, prompt_len: int, kind: str) -> tuple[Tensor, Tensor]:
    """Random prompts (B, L) and which of their tokens there are, (B, L).

    With rows of ``unlike`` length row b of B has (b + 1) / B of the tokens, at the right, as Hugging Face wants them.
    """
    import torch

    generator = torch.Generator().manual_seed(setup.seed)
    ids = torch.randint(setup.n_vocab, (n_row, prompt_len), generator=generator)
    n = torch.full((n_row,), prompt_len)
    if kind == "unlike":
        n = (torch.arange(1, n_row + 1) * prompt_len / n_row).ceil().long()
    mask = torch.arange(prompt_len) >= prompt_len - n[:, None]
    return ids.to(setup.device), mask.to(setup.device)


class Call:
    """One generation of a candidate: prompts read, ``n`` tokens taken, each the likeliest.

    Args:
        candidate: What generates.
        ids: Prompts, (B, L).
        mask: Tokens that are no padding, (B, L).
        n: Tokens to add.
        compile: Whether the step of our models is compiled.

    Raises:
        ValueError: If a bank is not full, or a token reads nothing: then the speed of a memory that does less would be
            measured.
    """

    def __init__(self, candidate: Candidate, ids: Tensor, mask: Tensor, n: int, compile: bool) -> None:
        import torch

        self.model, self.ids, self.n = candidate.model, ids, n
        self.settings: dict[str, Any]
        if candidate.name == "gpt2":
            self.settings = {"attention_mask": mask.long(), "max_new_tokens": n, "do_sample": False}
            self.settings |= {"use_cache": True, "pad_token_id": 0, "eos_token_id": None}
            return
        self.settings = {"max_new_tokens": n, "do_sample": False, "compile": compile}
        if not bool(mask.all()):
            self.settings["mask"] = mask
        if candidate.state is not None:
            state = self.model.select_rows(candidate.state, torch.arange(len(ids), device=ids.device))
            self.settings["state"] = state
            with torch.no_grad():
                reads = self.model(ids[:, :1], state=state, logits=False).reads.values()
            filled = [
                module.filled(bank).all()
                for module, bank in zip(self.model.memory["ltm"], state.memory["ltm"], strict=True)
            ]
            if not (all(filled) and all(bool((read.weights > 0).any(dim=2).all()) for read in reads)):
                raise ValueError("the long-term memory was not full and read")

    def __call__(self) -> None:
        """Generate.

        Raises:
            ValueError: If there are not as many tokens as were asked for.
        """
        text = self.model.generate(self.ids, **self.settings)
        if text.shape != (len(self.ids), self.ids.shape[1] + self.n):
            raise ValueError(f"{self.n} tokens were to be added to {tuple(self.ids.shape)}, got {tuple(text.shape)}")


def measure(
    calls: Mapping[str, Call], labels: Mapping[str, Any], warmup: int, rounds: int, clock: str, device: str
) -> list[dict[str, Any]]:
    """Call all candidates in turn, so that what disturbs the machine meets all of them: a row per call."""
    import torch

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return _CLOCKS[clock]()

    rows = []
    for i in range(warmup + rounds):
        for name, call in calls.items():
            gc.collect()
            start = now()
            call()
            spent = now() - start
            if i >= warmup:
                rows.append({"candidate": name, **labels, "round": i - warmup, "seconds": spent, "steps": call.n})
    return rows


def summarise(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Median and quartiles of milliseconds per step, and of the speed as a share of each peer's in the same round."""
    seconds: dict[str, dict[int, float]] = {}
    for row in rows:
        seconds.setdefault(row["candidate"], {})[row["round"]] = row["seconds"] / row["steps"]
    found = quartiles("ms_per_step", [1000 * t for t in seconds[name].values()])
    for peer in PEERS[name]:
        if peer in seconds:
            found |= quartiles(f"vs_{peer}", [seconds[peer][i] / t for i, t in seconds[name].items()])
    return found


def report(result: Result) -> str:
    """The table and the conditions, to print."""
    from memlm.evaluation.table import table

    metadata, metrics = result.metadata, result.metrics
    settings, shape = metadata["settings"], metadata["shape"]

    lines = []
    for n_row in settings["batches"]:
        for kind in settings["lengths"]:
            for name in settings["candidates"]:
                key = f"{name}/{n_row}/{kind}"
                speed = round(1000 * n_row / metrics[f"{key}/ms_per_step"])
                ratios = [spread(metrics, f"{key}/vs_{peer}") for peer in ("gpt2", "none")]
                lines.append([n_row, kind, name, spread(metrics, f"{key}/ms_per_step"), speed, *ratios])
    title = (
        f"{shape['n_layer']} layers, {shape['n_head']} heads, width {shape['d_model']}, vocabulary "
        f"{shape['n_vocab']:,}; prompts of {settings['prompt_len']} tokens, {settings['n_generate']} more of each row; "
        f"ltm: {shape['n_slot']:,} slots per row, all used"
    )
    columns = ["rows", "length", "candidate", "ms per step", "tokens/s", "vs gpt2", "vs none"]
    time_of = {"wall": "time", "cpu": "processor time"}[settings["clock"]]
    how = [
        f"Median and quartiles of {settings['rounds']} rounds, of {time_of}; ratios are per round, of speeds.",
        f"fp32{', our steps compiled' if settings['compile'] else ''}",
    ]
    return "\n\n".join([table(columns, lines, title), "\n".join([*how, *conditions(metadata)])])
