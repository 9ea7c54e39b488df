"""Milliseconds and recall of top-k searches of a batch of queries, by number of slots: ours, plain torch and faiss.

Shapes: N queries, M keys, k slots that a query finds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
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
from benchmarks.retrieval_keys import Keys, made_keys, trained_keys
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from memlm.evaluation.result import Result
    from memlm.retrieval.inverted import InvertedFile
    from memlm.retrieval.lists import Lists

_WRITE = 128  # slots that `inverted grown` writes at a time
FAISS = Peer("faiss", "faiss needs the library faiss-cpu", "faiss out with candidates=[exact,inverted,torch]")


def run(
    candidates: list[
        Literal[
            "exact",
            "inverted",
            "inverted grown",
            "exact bf16",
            "inverted bf16",
            "torch",
            "faiss flat",
            "faiss ivf",
            "faiss hnsw",
        ]
    ],
    keys: list[Literal["trained", "clustered", "random"]],
    checkpoint: str | None,
    trust: list[str],
    cache: str | None,
    sizes: list[int],
    d_key: int,
    n_query: int,
    top_k: int,
    n_list: int | None,
    n_probe: int | None,
    hnsw_most: int,
    rounds: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds and recall of searches, candidates side by side; for the settings see the YAML.

    Returns:
        Metrics ``<keys>/<slots>/<candidate>/<measure>`` and, by the slope of log time over log slots,
        ``<keys>/<candidate>/exponent``; one row per keys, slots, candidate, round and what was done.

    Raises:
        ConfigError: If a setting cannot work.
    """
    check_least({
        "n_query": n_query, "top_k": top_k, "d_key": d_key, "rounds": rounds, "threads": threads, "n_list": n_list,
        "n_probe": n_probe,
    })  # fmt: skip
    check_names(candidates=candidates, keys=keys, sizes=sizes)
    if min(sizes) < max(top_k, n_list or 1):
        raise ConfigError(f"sizes must be at least top_k ({top_k}) and n_list ({n_list}), got {min(sizes)}.")
    faiss = peer_library(FAISS) if any(name.startswith("faiss") for name in candidates) else None
    from memlm.evaluation.result import Result

    with torch_threads(threads) as n_thread:
        if faiss is not None:
            faiss.omp_set_num_threads(n_thread)
        metadata: dict[str, Any] = {
            "settings": {
                "candidates": candidates, "keys": keys, "checkpoint": checkpoint, "sizes": sizes, "n_query": n_query,
                "top_k": top_k, "n_list": n_list, "n_probe": n_probe, "rounds": rounds, "seed": seed,
            },
            "threads": n_thread,
            **surroundings("cpu"),
        }  # fmt: skip
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        for source in dict.fromkeys("clustered" if k == "trained" and checkpoint is None else k for k in keys):
            if source == "trained":
                every = trained_keys(str(checkpoint), trust, max(sizes), n_query * rounds, cache)
            else:
                every = made_keys(max(sizes), n_query * rounds, d_key, source == "clustered", seed)
            for size in sizes:
                some = every._replace(key=every.key[:size], bias=every.bias[:size])
                names = [name for name in candidates if name != "faiss hnsw" or size <= hnsw_most]
                found, timed = _search_in_turn(names, some, top_k, n_list, n_probe, n_query, rounds)
                metrics |= {f"{source}/{size}/{name}": value for name, value in found.items()}
                rows += [{"keys": source, "slots": size, **row} for row in timed]
            for name in candidates:
                known = [size for size in sizes if f"{source}/{size}/{name}/ms" in metrics]
                if len(known) > 1:
                    times = [math.log(metrics[f"{source}/{size}/{name}/ms"]) for size in known]
                    slope = statistics.linear_regression([math.log(size) for size in known], times).slope
                    metrics[f"{source}/{name}/exponent"] = slope
    return Result("benchmark_retrieval", metrics, tuple(rows), metadata)


class Searcher:
    """A candidate over one set of keys.

    Args:
        name: ``exact``, ``inverted``, ``inverted grown`` (the lists that writes leave), one of the first two with
            `` bf16`` behind it (keys and values are held in 16 bits), ``torch``, ``faiss flat``, ``faiss ivf`` or
            ``faiss hnsw``.
        keys: What is searched.
        top_k: Slots that a query finds.
        n_list: Lists; None for the default of ``memory=ltm``.
        n_probe: Lists that a query searches; None for the default of ``memory=ltm``.
    """

    def __init__(self, name: str, keys: Keys, top_k: int, n_list: int | None, n_probe: int | None) -> None:
        import torch

        from memlm.retrieval.exact import Pool
        from memlm.retrieval.inverted import InvertedFile

        self.name, self.keys, self.top_k = name, keys, top_k
        self.temperature = torch.tensor(keys.temperature)
        visible = torch.ones(1, 1, len(keys.key), dtype=torch.bool)
        held = keys.key.to(torch.bfloat16 if name.endswith("bf16") else torch.float32)
        self.pool = Pool(held[None], held[None], keys.bias[None], visible)
        file = InvertedFile(len(keys.key), keys.key.shape[1], n_list, n_probe, held.dtype)
        self._find: Any = None
        if name.startswith("inverted"):
            empty = file.empty(1, keys.key.device)
            lists = (
                _grown(file, empty, self.pool.key)
                if name == "inverted grown"
                else file.rebuild(empty, self.pool.key, visible[0], torch.ones(1).bool())
            )
            self._find = lambda *arguments: file.search(lists, *arguments)
        elif name.startswith("faiss"):
            faiss = peer_library(FAISS)
            n, width = len(keys.key), keys.key.shape[1] + 1
            if name == "faiss ivf":
                flat = faiss.IndexFlatIP(width)
                self.peer = faiss.IndexIVFFlat(flat, width, min(file.n_list, n), faiss.METRIC_INNER_PRODUCT)
                self.peer.nprobe = file.n_probe
            elif name == "faiss hnsw":
                self.peer = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
                self.peer.hnsw.efSearch = 4 * top_k
            else:
                self.peer = faiss.IndexFlatIP(width)
            # The bias is one number more of a key, and 1 / temperature one of a query: the order of scores is the same.
            wide = torch.cat([keys.key, keys.bias[:, None] / keys.temperature], dim=1).numpy()
            self.peer.train(wide)
            self.peer.add(wide)

    def search(self, query: Tensor) -> Tensor:
        """The best slots of each query (N, d_key), (N, k), in any order."""
        import torch
        from torch.nn import functional as F

        from memlm.retrieval import exact

        if self.name == "torch":
            return torch.addmm(self.keys.bias, query * self.temperature, self.keys.key.T).topk(self.top_k).indices
        if self.name.startswith("faiss"):
            return torch.from_numpy(self.peer.search(F.pad(query, (0, 1), value=1.0).numpy(), self.top_k)[1])
        find = self._find or exact.search
        return find(query[None], self.temperature, -1.0, self.top_k, self.pool)[1][0]

    def learn(self, query: Tensor) -> None:
        """A whole read of the values, softmax and all, and its backward pass; not for faiss."""
        import torch

        from memlm.retrieval.exact import attend

        query, temperature = query.clone().requires_grad_(), self.temperature.clone().requires_grad_()
        if self.name == "torch":
            score, index = torch.addmm(self.keys.bias, query * temperature, self.keys.key.T).topk(self.top_k)
            read = (score.softmax(dim=1)[..., None] * self.keys.key[index]).sum(dim=1)
        else:
            null = torch.zeros(())
            read = attend(query[None], temperature, null, -1.0, self.top_k, self.pool, None, find=self._find)[0]
        read.sum().backward()


def _grown(file: InvertedFile, lists: Lists, key: Tensor) -> Lists:
    """``lists`` after all slots were written, those of a segment (`_WRITE`) at a time; ``key`` (1, M, d_key)."""
    import torch

    used = torch.zeros(key.shape[:2], dtype=torch.bool)
    lists = file.own(lists)
    for slot in torch.arange(key.shape[1])[None].split(_WRITE, dim=1):
        lists = file.own(lists, given=True)
        accept = torch.ones_like(slot, dtype=torch.bool)
        file.fill(lists, file.replace(lists, slot, key[:, slot[0]], accept), key)
        used[0, slot[0]] = True
        lists = file.settle(lists, slot.shape[1], key, lambda: used)
    return lists


def _search_in_turn(
    names: Sequence[str],
    keys: Keys,
    top_k: int,
    n_list: int | None,
    n_probe: int | None,
    n_query: int,
    rounds: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics ``<candidate>/<measure>`` of searches of the same keys, and a row for each measurement."""
    import torch

    metrics: dict[str, float] = {}
    built: dict[str, Searcher] = {}
    for name in names:
        start, cpu = time.perf_counter(), time.process_time()
        built[name] = Searcher(name, keys, top_k, n_list, n_probe)
        metrics[f"{name}/build_s"] = time.perf_counter() - start
        metrics[f"{name}/build_cpu_s"] = time.process_time() - cpu
    true = Searcher("exact", keys, top_k, None, None)
    seconds: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    recalls: dict[str, list[float]] = {name: [] for name in names}

    def measure_one(name: str, what: str, run: Callable[[Tensor], Any], query: Tensor) -> Any:
        start = time.perf_counter()
        done = run(query)
        spent = time.perf_counter() - start
        seconds.setdefault(f"{name}/{what}", []).append(spent)
        rows.append({"candidate": name, "what": what, "round": len(seconds[f"{name}/{what}"]) - 1, "seconds": spent})
        return done

    for searcher in built.values():
        searcher.search(keys.query[:n_query])  # warm-up
    for query in keys.query[: n_query * rounds].split(n_query):
        best = true.search(query)
        gc.collect()
        for name, searcher in built.items():
            with torch.no_grad():
                index = measure_one(name, "ms", searcher.search, query)
            hit = (index[:, :, None] == best[:, None]).any(dim=1)
            recalls[name].append(float(hit.float().mean()))
            if not name.startswith("faiss"):
                measure_one(name, "learn_ms", searcher.learn, query)
    for key, times in seconds.items():
        metrics |= quartiles(key, [1000 * t for t in times])
    for name in names:
        metrics[f"{name}/recall"] = statistics.fmean(recalls[name])
        for peer in ("exact", "faiss flat"):
            if peer in built and peer != name:
                for what, against in (("ms", "vs"), ("learn_ms", "learn_vs")):
                    if mine := seconds.get(f"{name}/{what}"):
                        ratios = [theirs / own for own, theirs in zip(mine, seconds[f"{peer}/ms"], strict=True)]
                        metrics |= quartiles(f"{name}/{against}_{peer.replace(' ', '_')}", ratios)
    return metrics, rows


def report(result: Result) -> str:
    """The tables and the conditions, to print."""
    from memlm.evaluation.table import table

    metrics, settings = result.metrics, result.metadata["settings"]
    texts = []
    for source in dict.fromkeys(key.split("/")[0] for key in metrics):
        lines: list[list[Any]] = []
        for size in settings["sizes"]:
            for name in settings["candidates"]:
                here = f"{source}/{size}/{name}/"
                of = {key.removeprefix(here): value for key, value in metrics.items() if key.startswith(here)}
                if not of:
                    continue
                ratios = [
                    f"{of[key]:.2f} ({of[f'{key}_low']:.2f}-{of[f'{key}_high']:.2f})" if key in of else None
                    for key in ("vs_exact", "vs_faiss_flat", "learn_vs_faiss_flat")
                ]
                learn = f"{of['learn_ms']:,.1f}" if "learn_ms" in of else None
                spread = f"{of['ms_low']:,.1f}-{of['ms_high']:,.1f}"
                lines.append(
                    [f"{size:,}", name, f"{of['ms']:,.1f}", spread, f"{of['recall']:.3f}", *ratios[:2], learn,
                     ratios[2], f"{of['build_s']:,.1f}", f"{of['build_cpu_s']:,.1f}"]
                )  # fmt: skip
        columns = ["slots", "candidate", "ms", "quartiles", "recall", "x exact", "x faiss flat", "learn ms",
                   "learn x faiss flat", "build s", "build CPU s"]  # fmt: skip
        what = {
            "trained": f"keys that {settings['checkpoint']} wrote",
            "clustered": "made keys around random centres (no checkpoint was given)",
            "random": "random unit keys",
        }[source]
        title = f"{what}: {settings['n_query']} queries at a time, best {settings['top_k']}"
        growth = ", ".join(
            f"{name} {metrics[key]:.2f}"
            for name in settings["candidates"]
            if (key := f"{source}/{name}/exponent") in metrics
        )
        texts.append(
            table(columns, lines, title) + (f"\ntime grows with slots to the power of: {growth}" if growth else "")
        )
    notes = [
        f"Median and quartiles of {settings['rounds']} batches, candidates in turn; ratios are per batch.",
        "learn: a whole read with softmax and values, and its backward pass, against the bare search of the peer.",
    ]
    return "\n\n".join([*texts, "\n".join([*notes, *conditions(result.metadata)])])
