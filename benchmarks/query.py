"""Milliseconds and recall of `query_memory` over a large memory that a trained model filled with text."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.base import SHIFT, check_least, conditions, quartiles, surroundings, torch_threads, trained_with_ltm
from memlm.config import ConfigError

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData
    from memlm.evaluation.result import Result

KINDS = {
    "told": "cues of facts that were stored with the text, in the words they were told in",
    "paraphrased": "cues of these facts in other words",
    "stored": "sentences of the stored text",
    "new": "sentences of held-out text",
}
"""What is asked."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_LENGTH = range(30, 80)  # characters of the sentences that are asked


class _Query(NamedTuple):
    """What is asked, and what it should find.

    Attributes:
        kind: Of `KINDS`.
        text: The words.
        fact: The fact that is asked for as it was told, if any.
    """

    kind: str
    text: str
    fact: str | None = None


def run(
    checkpoint: str | None,
    trust: list[str],
    cache: str | None,
    n_slot: int,
    n_query: int,
    top_k: int,
    threads: int | None,
    seed: int,
) -> Result:
    """Milliseconds and recall of queries, through the inverted file and through all slots; for settings see the YAML.

    Returns:
        Metrics ``<kind>/<measure>``; one row per query and index.

    Raises:
        ConfigError: If a setting cannot work, or the model has no long-term memory.
    """
    check_least({"n_slot": n_slot, "n_query": n_query, "top_k": top_k, "threads": threads}, {"n_slot": 1000})
    if checkpoint is None:
        raise ConfigError(
            "checkpoint must name a run directory of a model with memory=ltm, such as one of python train.py "
            "recipe=needle: what a model that learned nothing reads says nothing about searches."
        )
    from memlm.evaluation.result import Result
    from memlm.training.memory_settings import check_memory_settings, memory_settings

    model, data = trained_with_ltm(checkpoint, trust)
    if model.memory["ltm"][0].bank.exists:
        raise ConfigError(
            f"checkpoint must name a model with an empty memory of its own; {checkpoint} has stored text already, or "
            "its memory is shared by all text (memory.ltm.scope=shared)"
        )
    change = {"ltm.n_slot": n_slot, "ltm.write_budget": None, "ltm.index": "inverted"}
    check_memory_settings(model, change, "n_slot")
    with torch_threads(threads) as n_thread, memory_settings(model, change):
        metadata: dict[str, Any] = {
            "settings": {"checkpoint": checkpoint, "n_slot": n_slot, "n_query": n_query, "top_k": top_k, "seed": seed},
            "threads": n_thread,
            **surroundings("cpu"),
        }
        start, cpu = time.perf_counter(), time.process_time()
        _fill(model, data, n_slot, cache)
        metadata |= {"fill_s": time.perf_counter() - start, "fill_cpu_s": time.process_time() - cpu}
        metrics, rows = _ask(model, _queries(model, data, n_query, seed), top_k)
    return Result("benchmark_query", metrics, tuple(rows), metadata)


def _fill(model: Any, data: TextData, n_slot: int, cache: str | None) -> None:
    """Store the training text in the model's memory, again and again, until all slots are in use."""
    if cache and Path(cache).exists():
        model.load_memory(cache)
        return
    tokens = data.tokens("train").tokens
    module = model.memory["ltm"][0]
    left, reading = n_slot, 0
    while left:
        begin = reading * SHIFT % len(tokens)
        # Some tokens write no slot: the last of a passage have none after them to be the value of.
        text = model.tokenizer.decode(tokens[begin : begin + left + left // 50 + model.segment_len].tolist())
        model.store_experience(text)
        before, left = left, n_slot - int(module.filled(module.bank.state()).sum())
        if left == before:
            raise ConfigError(
                f"storing the training text left {left:,} of n_slot={n_slot:,} slots empty, and again: the model "
                "writes nothing of it; give a checkpoint whose memory writes"
            )
        reading += 1
    if cache:
        model.save_memory(cache)


def _queries(model: Any, data: TextData, n_query: int, seed: int) -> list[_Query]:
    """``n_query`` of each kind. Stores the facts that are asked for."""
    import numpy as np

    from memlm.data.tasks.facts import Facts

    rng = np.random.default_rng(seed)
    facts = Facts(model.tokenizer, data.tokens("train")).maker_of("natural").draw(rng, n_query, "evaluation")
    model.store_experience(" ".join(fact.text for fact in facts))

    def sentences(split: str) -> list[str]:
        text = model.tokenizer.decode(data.tokens(split).tokens.tolist())
        found = [part for part in _SENTENCE.split(text) if len(part) in _LENGTH and "\n" not in part]
        if len(found) < n_query:
            raise ConfigError(
                f"the {split} text has {len(found)} sentences of {_LENGTH.start} to {_LENGTH.stop} characters, but "
                f"n_query={n_query} are needed: lower n_query"
            )
        return [found[i] for i in rng.permutation(len(found))[:n_query]]

    decode = model.tokenizer.decode
    return [
        *(_Query("told", decode(fact.cue), fact.text) for fact in facts),
        *(_Query("paraphrased", decode(fact.paraphrases[0].cue), fact.text) for fact in facts),
        *(_Query("stored", text) for text in sentences("train")),
        *(_Query("new", text) for text in sentences("val")),
    ]


def _ask(model: Any, queries: list[_Query], top_k: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics ``<kind>/<measure>`` of queries by both indexes in turn, and a row for each answer."""
    from tqdm import tqdm

    from memlm.training.memory_settings import memory_settings

    def answer(query: str, index: str) -> tuple[list[Any], float]:
        with memory_settings(model, {"ltm.index": index}):
            start = time.perf_counter()
            found = model.query_memory(query, top_k)
            return found, 1000 * (time.perf_counter() - start)

    for index in ("inverted", "exact"):
        answer(queries[0].text, index)  # warm-up
    rows: list[dict[str, Any]] = []
    for query in tqdm(queries, desc="querying", disable=None, leave=False):
        best: set[int] = set()
        for index in ("exact", "inverted"):
            found, spent = answer(query.text, index)
            ids = {record.id for record in found}
            best = best or ids
            told = None if query.fact is None else any(query.fact in record.text for record in found)
            rows.append(
                {"kind": query.kind, "query": query.text, "tokens": len(model.encode_text(query.text)), "index": index,
                 "ms": spent, "found": len(ids), "recall": len(ids & best) / len(best) if best else None, "told": told}
            )  # fmt: skip
    metrics: dict[str, float] = {}
    for kind in dict.fromkeys(query.kind for query in queries):
        for index in ("exact", "inverted"):
            of = [row for row in rows if (row["kind"], row["index"]) == (kind, index)]
            metrics |= quartiles(f"{kind}/{index}_ms", [row["ms"] for row in of])
            if of[0]["told"] is not None:
                metrics[f"{kind}/{index}_told"] = statistics.fmean(row["told"] for row in of)
        recalls = [row["recall"] for row in of if row["recall"] is not None]
        metrics[f"{kind}/recall"] = statistics.fmean(recalls) if recalls else float("nan")
        metrics[f"{kind}/tokens"] = statistics.fmean(row["tokens"] for row in of)
    return metrics, rows


def report(result: Result) -> str:
    """The table and the conditions of `run`, to print."""
    from memlm.evaluation.table import table

    metrics, settings = result.metrics, result.metadata["settings"]
    top_k = settings["top_k"]
    lines = []
    for kind, what in KINDS.items():
        ms = [f"{metrics[f'{kind}/{index}_ms']:.0f} ({metrics[f'{kind}/{index}_ms_low']:.0f}-"
              f"{metrics[f'{kind}/{index}_ms_high']:.0f})" for index in ("inverted", "exact")]  # fmt: skip
        told = [f"{metrics[key]:.3f}" if (key := f"{kind}/{index}_told") in metrics else None
                for index in ("inverted", "exact")]  # fmt: skip
        lines.append([what, f"{metrics[f'{kind}/tokens']:.1f}", *ms, f"{metrics[f'{kind}/recall']:.3f}", *told])
    columns = ["asked", "tokens", "ms", "ms, all slots", f"recall@{top_k}", f"fact in {top_k}", "so, all slots"]
    title = (
        f"query_memory over {settings['n_slot']:,} slots that {settings['checkpoint']} wrote of its training text; "
        f"{settings['n_query']} queries of each kind"
    )
    notes = [
        "Median and quartiles over queries, both searches in turn. recall: share of the records that a search of all",
        "slots finds; fact: whether the record of the fact that is asked for is among what is found.",
        f"Filling (or loading what was filled) took {result.metadata['fill_s']:,.0f} s, "
        f"{result.metadata['fill_cpu_s']:,.0f} s of CPU time.",
    ]
    return "\n\n".join([table(columns, lines, title), "\n".join([*notes, *conditions(result.metadata)])])
