"""Milliseconds of a write against the number of slots that are held: in place, and into a copy.

Shapes: n slots of one row.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import check_least, check_names, conditions, quartiles, surroundings, torch_threads
from benchmarks.candidates import Setup, fill, ours, size_config
from memlm.config import ConfigError

if TYPE_CHECKING:
    from memlm.evaluation.result import Result

WAYS = ("given", "kept")
"""A state that is given away, and its peer, one that somebody keeps."""


def run(
    memory_name: str,
    whats: list[Literal["absorb", "store"]],
    indices: list[Literal["exact", "inverted"]],
    sizes: list[int],
    overrides: list[str],
    n_token: int,
    warmup: int,
    rounds: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds of writes, candidates in turn; for the settings see the YAML.

    Returns:
        Metrics ``<what>/<index>/<slots>/<way>/<measure>`` and, by the slope of log time over log slots,
        ``<what>/<index>/<way>/exponent``; one row per candidate and round.

    Raises:
        ConfigError: If a setting cannot work.
    """
    check_least({"n_token": n_token, "rounds": rounds, "threads": threads})
    check_names(whats=whats, indices=indices, sizes=sizes)
    if memory_name != "ltm" and (whats != ["absorb"] or indices != ["exact"]):
        raise ConfigError(
            f"memory_name={memory_name} has no index and stores no texts: add whats=[absorb] indices=[exact]."
        )
    from memlm.evaluation.result import Result

    with torch_threads(threads) as n_thread:
        before = surroundings("cpu")
        if memory_name == "ltm":
            writers: list[_Writer] = [
                _Stored(index, size, overrides, n_token, seed) for index in indices for size in sizes
            ]
        else:
            writers = [_Held(memory_name, size, overrides, n_token, seed) for size in sizes]
        rows = []
        for i in range(warmup + rounds):
            for what in whats:
                for writer in writers:
                    for way in WAYS:
                        row = writer.timed(what, way, i)
                        rows += [row] if i >= warmup else []
    settings = {
        "memory_name": memory_name, "whats": whats, "indices": indices, "sizes": sizes, "overrides": overrides,
        "n_token": n_token, "warmup": warmup, "rounds": rounds, "seed": seed,
    }  # fmt: skip
    metadata = {"settings": settings, "threads": n_thread, **before}
    return Result("benchmark_write", _measures(rows, sizes), tuple(rows), metadata)


class _Writer:
    """A model with a memory of so many slots."""

    def __init__(self, memory: str, index: str, size: int, setup: Setup, n_token: int) -> None:
        self.index, self.size, self.n_token, self.n_vocab = index, size, n_token, setup.n_vocab
        model: Any = ours(memory, setup)
        self.model: Any = model.eval()
        if n_token < 2 * self.model.segment_len:
            raise ConfigError(f"n_token must be at least two segments ({2 * self.model.segment_len}), got {n_token}.")
        self.modules: list[Any] = list(self.model.memory[memory])

    def timed(self, what: str, way: str, number: int) -> dict[str, Any]:
        """Write once more; what it took.

        Raises:
            RuntimeError: If it was not written, or what was given away was copied.
        """
        import torch

        ids = torch.randint(0, self.n_vocab, (1, self.n_token), generator=torch.Generator().manual_seed(number))
        at = self._places()
        gc.collect()
        with torch.no_grad():
            seconds, cpu, n_new = getattr(self, f"_{what}")(ids, way == "given")
        if not n_new:
            raise RuntimeError(f"{what} wrote nothing into {self.size} slots")
        if way == "given" and self._places() != at:
            raise RuntimeError(f"{what} copied {self.size} slots that were given away")
        return {
            "what": what, "index": self.index, "slots": self.size, "way": way, "round": number,
            "ms": 1000 * cpu, "wall_ms": 1000 * seconds, "slots_written": n_new,
        }  # fmt: skip

    def _places(self) -> list[int]:
        """Where what is large is."""
        raise NotImplementedError


class _Stored(_Writer):
    """A model whose persistent memory is full."""

    def __init__(self, index: str, size: int, overrides: list[str], n_token: int, seed: int) -> None:
        import torch

        settings = [f"memory.ltm.n_slot={size}", f"memory.ltm.index={index}"]
        setup = Setup(size_config("default", [*overrides, *settings]), 1, 1, "cpu", "fp32", False, seed)
        super().__init__("ltm", index, size, setup, n_token)
        with torch.no_grad():
            for module, part in zip(self.modules, fill(self.model, setup).memory["ltm"], strict=True):
                every = module.filled(part)
                lists = module.search_index().assign(part.lists, part.key, every, torch.ones(1, dtype=torch.bool))
                module.bank.commit(part._replace(lists=lists))

    def _absorb(self, ids: Any, given: bool) -> tuple[float, float, int]:
        first = self._n_record()
        state = self.model.init_state(1)
        state = state._replace(memory={"ltm": tuple(module.bank.release() for module in self.modules)})
        wall, cpu = time.perf_counter(), time.process_time()
        after = self.model.absorb(ids, state, donate=given)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        n_new = sum(int((part.record >= first).sum()) for part in after.memory["ltm"])
        for module, part in zip(self.modules, (after if given else state).memory["ltm"], strict=True):
            module.bank.commit(part)
        return wall, cpu, n_new

    def _store(self, ids: Any, given: bool) -> tuple[float, float, int]:
        from memlm.store.kept import written
        from memlm.store.passages import absorbed

        first, passages = self._n_record(), ids[0].split(self.model.segment_len)
        before = None if given else [module.bank.first(1) for module in self.modules]  # for which it is copied
        wall, cpu = time.perf_counter(), time.process_time()
        texts = iter([passage.tolist() for passage in passages])
        written(self.model, lambda state: absorbed(self.model, texts, state, first), first)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        del before
        return wall, cpu, sum(int((module.bank.state().record >= first).sum()) for module in self.modules)

    def _n_record(self) -> int:
        return max(int(module.bank.state().n_record) for module in self.modules)

    def _places(self) -> list[int]:
        return [module.bank.key.data_ptr() for module in self.modules]


class _Held(_Writer):
    """A model with another memory, and a state of it that is handed on."""

    def __init__(self, memory: str, size: int, overrides: list[str], n_token: int, seed: int) -> None:
        import torch

        from memlm.memory.state import map_tensors

        setup = Setup(size_config("default", overrides, [memory]), 1, 1, "cpu", "fp32", False, seed)
        if len(names := ours(memory, setup).memory[memory][0].sized) == 0:  # type: ignore[index, union-attr]
            raise ConfigError(f"memory_name={memory} has no setting that says how many slots it has.")
        node = setup.config["memory"][memory] | {names[0]: size}
        setup = setup._replace(config=setup.config | {"memory": {memory: node}})
        super().__init__(memory, "exact", size, setup, n_token)
        self.memory = memory
        # Zeros that were never touched take no memory.
        self.state = map_tensors(torch.clone, self.model.init_state(1))

    def _absorb(self, ids: Any, given: bool) -> tuple[float, float, int]:
        before = [part.clone() for part in self._large()]
        wall, cpu = time.perf_counter(), time.process_time()
        after = self.model.absorb(ids, self.state, donate=given)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.state, kept = after, self.state
        n_new = sum(int((a != b).flatten(2).any(dim=2).sum()) for a, b in zip(before, self._large(), strict=True))
        self.state = after if given else kept
        return wall, cpu, n_new

    def _large(self) -> list[Any]:
        """The largest part of each state, (1, n, ...)."""
        from memlm.memory.state import tensors

        return [max(tensors(part), key=lambda tensor: tensor.numel()) for part in self.state.memory[self.memory]]

    def _places(self) -> list[int]:
        return [part.data_ptr() for part in self._large()]


def _measures(rows: list[dict[str, Any]], sizes: list[int]) -> dict[str, float]:
    """Medians with quartiles, ratios within rounds, and powers of growth."""
    times: dict[tuple[str, str, int, str], list[float]] = {}
    for row in rows:
        times.setdefault((row["what"], row["index"], row["slots"], row["way"]), []).append(row["ms"])
    metrics: dict[str, float] = {}
    for (what, index, size, way), mine in times.items():
        here = f"{what}/{index}/{size}/{way}"
        metrics |= quartiles(f"{here}/ms", mine)
        for measure, of in (("vs_kept", (size, "kept")), ("growth", (min(sizes), way))):
            if of != (size, way):
                ratios = [a / b for a, b in zip(mine, times[what, index, *of], strict=True)]
                metrics |= quartiles(f"{here}/{measure}", ratios)
    for what, index, way in dict.fromkeys((key[0], key[1], key[3]) for key in times if len(sizes) > 1):
        logs = [math.log(metrics[f"{what}/{index}/{size}/{way}/ms"]) for size in sizes]
        slope = statistics.linear_regression([math.log(size) for size in sizes], logs).slope
        metrics[f"{what}/{index}/{way}/exponent"] = slope
    return metrics


def report(result: Result) -> str:
    """The table and the conditions, to print."""
    from memlm.evaluation.table import table

    metrics, settings = result.metrics, result.metadata["settings"]
    lines = []
    for what in settings["whats"]:
        for index in settings["indices"]:
            for size in settings["sizes"]:
                for way in WAYS:
                    here = f"{what}/{index}/{size}/{way}"
                    ratios = [
                        f"{metrics[key]:.2f} ({metrics[f'{key}_low']:.2f}-{metrics[f'{key}_high']:.2f})"
                        if (key := f"{here}/{measure}") in metrics
                        else None
                        for measure in ("growth", "vs_kept")
                    ]
                    ms = [metrics[f"{here}/ms{part}"] for part in ("", "_low", "_high")]
                    lines.append(
                        [what, index, f"{size:,}", way, f"{ms[0]:,.1f}", f"{ms[1]:,.1f}-{ms[2]:,.1f}", *ratios]
                    )
    least = f"x {min(settings['sizes']):,} slots"
    columns = ["", "index", "slots", "state", "CPU ms", "quartiles", least, "x kept"]
    growth = ", ".join(
        f"{key.removesuffix('/exponent').replace('/', ' ')} {value:.2f}"
        for key, value in metrics.items()
        if key.endswith("/exponent")
    )
    into = "full banks" if settings["memory_name"] == "ltm" else settings["memory_name"]
    title = f"a write of {settings['n_token']:,} tokens into {into}"
    notes = [f"time grows with slots to the power of: {growth}"] if growth else []
    notes.append(f"Median and quartiles of {settings['rounds']} rounds, candidates in turn; ratios are per round.")
    return "\n\n".join([table(columns, lines, title), "\n".join([*notes, *conditions(result.metadata)])])
