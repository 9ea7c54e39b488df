"""Milliseconds of one step of Memoria's engrams: memoria-pytorch, and ours.

Shapes: B rows, W new engrams, D their width, R reminded engrams.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import (
    Peer,
    check_least,
    check_names,
    conditions,
    peer_library,
    quartiles,
    surroundings,
    torch_threads,
)
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result

MEMORIA_PEER = "memoria-pytorch"
MEMORIA = Peer("memoria", f"{MEMORIA_PEER} needs it", f"{MEMORIA_PEER} out of candidates")


def run(
    candidates: list[Literal["memoria-pytorch", "memlm", "memlm compiled", "memlm as 1.1.0"]],
    n_row: int,
    n_working: int,
    d_model: int,
    n_slot: int,
    n_stm: int,
    n_reminded_stm: int,
    n_reminded_ltm: int,
    search_depth: int,
    lifespan: int,
    extension: float,
    warmup: int,
    rounds: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds of one step of engrams, candidates side by side; for the settings see the YAML.

    All get the same random engrams. Each reminded engram gets a random share of ``extension`` times their number.

    Returns:
        Metrics ``<candidate>/<measure>``; one row per candidate and step.

    Raises:
        ConfigError: If a setting cannot work.
    """
    check_least({"n_row": n_row, "d_model": d_model, "warmup": warmup, "rounds": rounds, "threads": threads})
    check_names(candidates=candidates)
    if MEMORIA_PEER in candidates:
        peer_library(MEMORIA)
    import torch

    from memlm.evaluation.result import Result
    from memlm.memory.memoria import MemoriaMemory

    settings = {
        "n_slot": n_slot, "n_working": n_working, "n_stm": n_stm, "n_reminded_stm": n_reminded_stm,
        "n_reminded_ltm": n_reminded_ltm, "search_depth": search_depth, "lifespan": lifespan,
    }  # fmt: skip
    try:
        MemoriaMemory(
            d_model, n_slot, n_working, n_stm, n_reminded_stm, n_reminded_ltm, search_depth, lifespan, extension, 1
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    with torch_threads(threads) as n_thread:
        metadata: dict[str, Any] = {
            "settings": {
                **settings, "candidates": candidates, "n_row": n_row, "d_model": d_model, "extension": extension,
                "warmup": warmup, "rounds": rounds, "seed": seed,
            },
            "threads": n_thread,
            **surroundings("cpu"),
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        built = {name: EngramSteps(name, n_row, d_model, settings) for name in candidates}
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        rows: list[dict[str, Any]] = []
        with torch.no_grad():
            for i in range(warmup + rounds):
                data = 0.3 * torch.randn(n_row, n_working, d_model, generator=generator)
                luck = torch.rand(n_row, n_slot, generator=generator)
                for name, steps in built.items():
                    gc.collect()
                    start = time.perf_counter()
                    reminded = steps.remember(data)
                    between = time.perf_counter()
                    share = luck[:, : reminded.shape[1]] * (reminded >= 0)
                    total = extension * (reminded >= 0).sum(dim=1, keepdim=True)
                    gain = total * share / share.sum(dim=1, keepdim=True).clamp(min=1e-9)
                    again = time.perf_counter()
                    steps.adjust(gain)
                    spent = between - start + time.perf_counter() - again
                    if i >= warmup:
                        seconds[name].append(spent)
                        rows.append(
                            {"candidate": name, "round": i - warmup, "seconds": spent, "engrams": steps.n_engram}
                        )
    metrics: dict[str, float] = {}
    for name, steps in built.items():
        metrics |= quartiles(f"{name}/ms", [1000 * t for t in seconds[name]])
        metrics[f"{name}/engrams"] = steps.n_engram
        metrics[f"{name}/mib"] = steps.n_byte / 2**20
        if name != MEMORIA_PEER and MEMORIA_PEER in seconds:
            ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[MEMORIA_PEER], strict=True)]
            metrics |= quartiles(f"{name}/speedup", ratios)
    return Result("benchmark_memoria", metrics, tuple(rows), metadata)


class EngramSteps:
    """Engrams of one candidate.

    Args:
        name: ``memoria-pytorch``, ``memlm``, ``memlm compiled`` or ``memlm as 1.1.0``.
        n_row: Rows.
        d_model: Width of an engram.
        settings: Of `memlm.memory.engrams.EngramGraph`.
    """

    def __init__(self, name: str, n_row: int, d_model: int, settings: Mapping[str, int]) -> None:
        import torch

        from memlm.compat.memoria import SourceGraph
        from memlm.memory.engrams import EngramGraph

        self.peer: Any = None
        if name == MEMORIA_PEER:
            self.peer = peer_library(MEMORIA).Memoria(
                num_reminded_stm=settings["n_reminded_stm"],
                stm_capacity=settings["n_stm"],
                ltm_search_depth=settings["search_depth"],
                initial_lifespan=settings["lifespan"],
                num_final_ltms=settings["n_reminded_ltm"],
            )
            return
        graph = SourceGraph("1.1.0", **settings) if name == "memlm as 1.1.0" else EngramGraph(**settings)
        self.engrams: Any = graph.empty(n_row, d_model)
        self.reminded: Any = None

        def remember(engrams: Any, data: Tensor) -> Any:
            return graph.remind(graph.add(engrams, data))

        compiled = name == "memlm compiled"
        self._remember: Any = torch.compile(remember, fullgraph=True) if compiled else remember
        self._adjust: Any = torch.compile(graph.adjust, fullgraph=True) if compiled else graph.adjust

    def remember(self, data: Tensor) -> Tensor:
        """Add engrams ``data`` (B, W, D) and remind. Returns what was reminded, (B, R), -1 where none."""
        if self.peer is not None:
            self.peer.add_working_memory(data)
            _, self.reminded = self.peer.remind()
        else:
            self.engrams, self.reminded = self._remember(self.engrams, data)
        return self.reminded

    def adjust(self, gain: Tensor) -> None:
        """Pass a segment, with what ``gain`` (B, R) adds to the lives of the reminded."""
        if self.peer is not None:
            self.peer.adjust_lifespan_and_memories(self.reminded, gain)
        else:
            self.engrams = self._adjust(self.engrams, self.reminded, gain)

    @property
    def n_engram(self) -> float:
        """Engrams of a row, the mean over rows."""
        kind = self.engrams.kind if self.peer is None else self.peer.engrams.engrams_types
        return float((kind > 0).sum(dim=1).float().mean())

    @property
    def n_byte(self) -> int:
        """Bytes of the engrams and their graph."""
        from memlm.memory.state import n_byte

        if self.peer is None:
            return n_byte(self.engrams)
        held = self.peer.engrams
        return n_byte((held.data, held.induce_counts, held.engrams_types, held.lifespan))


def report(result: Result) -> str:
    """The table and the conditions, to print."""
    from memlm.evaluation.table import table

    metrics, settings = result.metrics, result.metadata["settings"]
    lines = []
    for name in settings["candidates"]:
        of = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{name}/")}
        ratio = f"{of['speedup']:.1f} ({of['speedup_low']:.1f}-{of['speedup_high']:.1f})" if "speedup" in of else None
        spread = f"{of['ms_low']:,.0f}-{of['ms_high']:,.0f}"
        lines.append([name, round(of["ms"]), spread, ratio, round(of["engrams"]), round(of["mib"])])
    columns = ["candidate", "ms", "quartiles", "times as fast", "engrams", "MiB"]
    title = (
        f"{settings['n_row']} rows, {settings['n_working']} new engrams of width {settings['d_model']}, short-term "
        f"{settings['n_stm']}, reminded {settings['n_reminded_stm']}/{settings['n_reminded_ltm']}, depth "
        f"{settings['search_depth']}, lifespan {settings['lifespan']}, extension {settings['extension']:g}"
    )
    rounds = f"Median and quartiles of {settings['rounds']} steps; ratios are per step."
    return "\n\n".join([table(columns, lines, title), "\n".join([rounds, *conditions(result.metadata)])])
