"""An untrained model and a small memory: what is measured is right; how fast it is does not matter here."""

import copy
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memlm.app import benchmark
from memlm.assemble import build_corpus, build_data, build_model, build_tokenizer
from memlm.compose import compose, to_dict
from memlm.config import ConfigError

pytestmark = pytest.mark.slow

TINY = [
    "model.n_layer=1", "model.n_head=2", "model.d_model=16", "model.segment_len=64", "memory.ltm.top_k=8",
    "data.tokenizer.kind=byte",
]  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Any:
    settings = to_dict(compose(TINY))
    corpus = build_corpus(settings)
    return build_data(settings, build_tokenizer(settings, corpus), corpus)


@pytest.fixture
def run(data: Any) -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(to_dict(compose(TINY)), data.tokenizer).eval(), data


def config(*overrides: str) -> dict[str, Any]:
    return to_dict(compose(["benchmark=query", "checkpoint=RUN", "n_slot=1000", "n_query=4", *overrides], "benchmark"))


def test_answers_are_compared_with_those_of_all_slots(
    run: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all lists searched both find the same; with one list fewer; the memory is filled once and kept in a file."""
    import memlm.checkpoint

    model, data = run
    untouched = copy.deepcopy(model)
    module = model.memory["ltm"][0]
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, trust: run)
    cache = f"cache={tmp_path / 'filled'}"
    monkeypatch.setattr(module, "n_probe", 1000)
    result, text = benchmark.run(config(cache))
    metrics = result.metrics
    for kind in ("told", "paraphrased", "stored", "new"):
        of = [row for row in result.rows if row["kind"] == kind]
        assert [row["index"] for row in of] == ["exact", "inverted"] * 4
        assert metrics[f"{kind}/recall"] == 1
        assert metrics[f"{kind}/exact_ms"] == statistics.median(row["ms"] for row in of if row["index"] == "exact")
        told = {row["told"] for row in of}
        assert told <= ({True, False} if kind in ("told", "paraphrased") else {None})
    share = statistics.fmean(row["told"] for row in result.rows if row["kind"] == "told")
    assert metrics["told/exact_told"] == metrics["told/inverted_told"] == share
    assert "over 1,000 slots" in text
    assert (module.n_slot, module.index) == (10_000, "exact"), "settings are put back"

    stored: list[str] = []
    store = type(model).store_experience
    monkeypatch.setattr(type(model), "store_experience", lambda own, text: stored.append(text) or store(own, text))
    monkeypatch.setattr(untouched.memory["ltm"][0], "n_probe", 1)
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, trust: (untouched, data))
    few = benchmark.run(config(cache))[0].metrics
    assert len(stored) == 1, "only the facts are stored; the rest comes from the file"
    assert few["new/recall"] < 1


def test_what_an_answer_is_checked_against(run: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fact counts as found if a record that has its text is found."""
    from benchmarks import query

    model, _ = run
    records = {
        "exact": [SimpleNamespace(id=1, text="Ann has a cat. Bob has a dog."), SimpleNamespace(id=2, text="No.")],
        "inverted": [SimpleNamespace(id=2, text="No."), SimpleNamespace(id=3, text="Ann has a dog.")],
    }
    monkeypatch.setattr(model, "query_memory", lambda text, top_k: records[model.memory["ltm"][0].index])
    metrics, _ = query._ask(model, [query._Query("told", "Bob has", "Bob has a dog.")], 2)
    assert metrics["told/recall"] == 0.5
    assert (metrics["told/exact_told"], metrics["told/inverted_told"]) == (1, 0)


def test_mistakes_are_told(run: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import memlm.checkpoint

    with pytest.raises(ConfigError, match="checkpoint must name a run directory of a model with memory=ltm"):
        benchmark.run(config("checkpoint=null"))
    with pytest.raises(ConfigError, match="n_slot must be at least 1000, got 999"):
        benchmark.run(config("n_slot=999"))
    model, data = run
    empty = copy.deepcopy(model)
    without = SimpleNamespace(memory={"stm": None})
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, trust: (without, data))
    with pytest.raises(ConfigError, match="RUN has stm"):
        benchmark.run(config())
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, trust: run)
    model.store_experience("This is kept.")
    with pytest.raises(ConfigError, match="RUN has stored text already"):
        benchmark.run(config())
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, trust: (empty, data))
    monkeypatch.setattr(empty, "store_experience", lambda text: [])
    with pytest.raises(ConfigError, match="left 1,000 of n_slot=1,000 slots empty"):
        benchmark.run(config())
