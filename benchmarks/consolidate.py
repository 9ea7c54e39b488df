"""Seconds and memory of consolidating a full long-term bank with known near-duplicates, and the share it finds."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import check_least, conditions, in_own_process, peak_rss, quartiles, surroundings
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result


def run(
    sizes: list[int],
    duplicates: float,
    similarity: float,
    cluster: int,
    passes: int,
    d_key: int,
    d_value: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Seconds, memory and finds of consolidating large banks; for the settings see the YAML.

    Returns:
        Metrics ``<slots>/<measure>``; one row per size and turn.

    Raises:
        ConfigError: If a setting cannot work.
    """
    check_least({"cluster": cluster, "passes": passes, "d_key": d_key, "d_value": d_value, "threads": threads})
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 100 or max(sizes) >= 2**22:
        raise ConfigError(f"sizes must name at least one, each once, and each in 100..{2**22 - 1}; got {list(sizes)}.")
    if not 0 < duplicates <= 0.5:
        raise ConfigError(f"duplicates must be in (0, 0.5], as each is near another slot, got {duplicates}.")
    if not 0.9 < similarity <= 1:
        raise ConfigError(
            f"similarity must be in (0.9, 1]: slots that differ by more are not merged, got {similarity}."
        )
    import torch

    from memlm.evaluation.result import Result

    settings = {"duplicates": duplicates, "similarity": similarity, "cluster": cluster, "passes": passes,
                "d_key": d_key, "d_value": d_value}  # fmt: skip
    n_thread = torch.get_num_threads() if threads is None else threads
    metadata = {"settings": settings | {"sizes": sizes, "seed": seed}, "threads": n_thread, **surroundings("cpu")}
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for n_slot in sizes:
        found = in_own_process(consolidate_bank, n_slot, *settings.values(), n_thread, seed)
        seconds = [turn[0] for turn in found["turns"]]
        metrics |= {f"{n_slot}/{key}": value for key, value in quartiles("seconds", seconds).items()}
        metrics |= {f"{n_slot}/{key}": found[key] for key in ("pairs", "n_turn", "bank_mib", "peak_mib")}
        total = 0
        for i, (spent, merged) in enumerate(found["turns"]):
            total += merged
            rows.append({"slots": n_slot, "turn": i, "seconds": spent, "merged": merged})
            if (i + 1) % found["n_turn"] == 0:
                metrics[f"{n_slot}/found_{(i + 1) // found['n_turn']}"] = total / found["pairs"]
    return Result("benchmark_consolidate", metrics, tuple(rows), metadata)


def near_duplicates(
    n_slot: int, duplicates: float, similarity: float, cluster: int, d_key: int, d_value: int, seed: int
) -> tuple[Any, Any, int]:
    """A full bank in which some slots are near another one, each pair by itself, and none else is.

    Keys lie in clusters; values are random, so that slots of a cluster hold different things. Of a pair both keys and
    values have the cosine ``similarity``.

    Returns:
        The memory, its state, and the number of pairs.
    """
    import torch
    from torch.nn import functional as F

    from memlm.memory.ltm import LongTermMemory
    from memlm.tensors import Host

    generator = torch.Generator().manual_seed(seed)
    memory = LongTermMemory(d_key, n_slot, d_key, d_value)

    def unit(n: int, d: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator), dim=-1)

    n_pair = round(duplicates * n_slot)
    first, second = torch.randperm(n_slot, generator=generator)[: 2 * n_pair].chunk(2)

    def with_pairs(part: Tensor) -> Tensor:
        """Unit vectors (n, d), the second of each pair in place near the first."""
        noise = unit(n_pair, part.shape[1])
        across = F.normalize(noise - (noise * part[first]).sum(dim=1, keepdim=True) * part[first], dim=-1)
        part[second] = similarity * part[first] + (1 - similarity**2) ** 0.5 * across
        return part[None]

    centre = unit(max(n_slot // cluster, 1), d_key)
    key = F.normalize(
        centre[torch.randint(len(centre), (n_slot,), generator=generator)].add_(unit(n_slot, d_key), alpha=0.7), dim=-1
    )
    bank = memory.init_state(1)
    state = bank._replace(
        key=with_pairs(key),
        value=with_pairs(unit(n_slot, d_value)),
        log_gate=-torch.rand(1, n_slot, generator=generator),
        priority=-torch.rand(1, n_slot, generator=generator),
        record=torch.zeros(1, n_slot, dtype=torch.long),
        document=torch.zeros(1, n_slot, dtype=torch.long),
        position=torch.arange(n_slot)[None],
        tokens=torch.zeros_like(bank.tokens, memory_format=torch.contiguous_format),
        n_record=torch.ones(1, dtype=torch.long),
        n_used=Host(torch.tensor([n_slot])),
    )
    return memory, state, n_pair


def consolidate_bank(
    n_slot: int,
    duplicates: float,
    similarity: float,
    cluster: int,
    passes: int,
    d_key: int,
    d_value: int,
    threads: int,
    seed: int,
) -> dict[str, Any]:
    """Consolidate one bank in turns, to be called in a fresh process.

    Returns:
        ``turns``: seconds and merged slots of each; ``pairs``; ``n_turn`` of a pass; ``bank_mib``; ``peak_mib``, by how
        much the process grew beyond the bank and what was there before (NaN where the system does not tell).
    """
    import torch

    from memlm.memory.state import n_byte

    torch.set_num_threads(threads)
    memory, state, n_pair = near_duplicates(n_slot, duplicates, similarity, cluster, d_key, d_value, seed)
    gc.collect()
    before = _forget_peak_rss()
    turns: list[list[float]] = []
    for turn in range(passes * memory.n_turn):
        start = time.perf_counter()
        state, report = memory.consolidate(state, turn=turn)
        turns.append([time.perf_counter() - start, report["merged"]])
    return {
        "turns": turns,
        "pairs": n_pair,
        "n_turn": memory.n_turn,
        "bank_mib": n_byte(state) / 2**20,
        "peak_mib": peak_rss() - before,
    }


def _forget_peak_rss() -> float:
    """Resident size of this process in MiB, from which `peak_rss` counts on; NaN where the system does not let it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return peak_rss()


def report(result: Result) -> str:
    """The table and the conditions, to print."""
    from memlm.evaluation.table import table

    metrics, settings = result.metrics, result.metadata["settings"]
    lines = []
    for n_slot in settings["sizes"]:
        of = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{n_slot}/")}
        shares = [f"{100 * of[f'found_{i + 1}']:.1f} %" for i in range(settings["passes"])]
        spread = f"{of['seconds_low']:.2f}-{of['seconds_high']:.2f}"
        most = None if of["peak_mib"] != of["peak_mib"] else round(of["peak_mib"])
        lines.append([n_slot, round(of["seconds"], 2), spread, int(of["n_turn"]), most, round(of["bank_mib"]), *shares])
    columns = ["slots", "s per turn", "quartiles", "turns of a pass", "peak MiB beside bank", "bank MiB"]
    columns += [f"found in {i + 1}" for i in range(settings["passes"])]
    title = (
        f"{100 * settings['duplicates']:g} % of the slots near another one (cosine {settings['similarity']:g}); keys "
        f"of {settings['d_key']}, values of {settings['d_value']}, clusters of {settings['cluster']}"
    )
    return "\n\n".join([table(columns, lines, title), "\n".join(conditions(result.metadata))])
