"""A tiny base: what is measured is right; how fast it is does not matter here."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attach
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import hide
from tests.models import bases

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SIZES = ["n_token=12", "n_before=12", "prompt_len=4", "n_generate=5", "rounds=3", "warmup=0", "threads=1"]
CACHE = ["memory=cache", "memory.cache.n_token=20"]
LTM = ["memory=ltm", *(f"memory.ltm.{part}" for part in ("n_slot=24", "write_budget=null", "d_key=8", "d_value=8"))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.with_tokenizer(bases.make_base("llama", tmp_path_factory.mktemp("bases")))


def config(llama: Path, *overrides: str) -> dict[str, Any]:
    tiny = ["benchmark=attach", f"path={llama}", *SIZES, "peak_memory=false", "~candidates.knn"]
    tiny += [f"candidates.{name}={json.dumps(lines)}" for name, lines in {"cache": CACHE, "ltm": LTM}.items()]
    return to_dict(compose([*tiny, *overrides], "benchmark"))


def settings(llama: Path, **changes: Any) -> dict[str, Any]:
    keys = attach.run.__annotations__
    return {key: value for key, value in config(llama).items() if key in keys} | changes


def test_each_is_measured_beside_the_bare_model_in_the_same_round(llama: Path) -> None:
    result, text = benchmark.run(config(llama))
    names = ["transformers", "none", "cache", "ltm"]
    assert len(result.rows) == 2 * 4 * 3
    spent = {(row["candidate"], row["work"], row["round"]): row["seconds"] for row in result.rows}
    assert {row["tokens"] for row in result.rows if row["work"] == "generate"} == {5}
    ratios = [spent["transformers", "read", i] / spent["none", "read", i] for i in range(3)]
    assert result.metrics["none/read/vs_transformers"] == pytest.approx(statistics.median(ratios))
    speeds = [5 / spent["ltm", "generate", i] for i in range(3)]
    assert result.metrics["ltm/generate/tokens_per_s"] == pytest.approx(statistics.median(speeds))
    assert result.metrics["none/state_bytes"] == result.metrics["transformers/state_bytes"] == 0
    assert result.metrics["cache/state_bytes"] == 20 * (4 * 32 + 1)
    assert all(name in text for name in names)


def test_the_bare_model_and_what_is_attached_do_the_same(llama: Path) -> None:
    given = settings(llama)
    setup = attach.Setup(*(str(given[key]) if key == "path" else given[key] for key in attach.Setup._fields))
    bare, none = (attach.Candidate(name, setup) for name in ("transformers", "none"))
    ids = attach.texts(setup, 30, 5, 4)
    with torch.no_grad():
        assert torch.equal(bare.generate(ids), none.generate(ids))
        assert bare.generate(ids).shape == (1, 9)
        torch.testing.assert_close(bare.read(ids), none.read(ids))
        attach.check_same({"transformers": bare, "none": none}, setup)
        none.model.base.causal.get_input_embeddings().weight.mul_(1.5)
        with pytest.raises(ValueError, match="none does not say what the bare model says"):
            attach.check_same({"transformers": bare, "none": none}, setup)


def test_a_memory_that_reads_nothing_is_no_evidence(llama: Path) -> None:
    given = settings(llama)
    given["candidates"] = {"ltm": [*given["candidates"]["ltm"], "memory.ltm.retrieval_threshold=1"]}
    setup = attach.Setup(*(str(given[key]) if key == "path" else given[key] for key in attach.Setup._fields))
    with pytest.raises(ValueError, match="reads nothing of it"):
        attach.Candidate("ltm", setup)


def test_peak_memory_is_told_beyond_that_of_the_bare_model(llama: Path) -> None:
    given = settings(llama, peak_memory=True)
    given["candidates"] = {"none": ["memory=none"]}
    metrics = attach.run(**given).metrics
    assert metrics["none/peak_mib"] >= metrics["none/idle_mib"] > 0
    assert metrics["none/beyond_mib"] == metrics["none/peak_mib"] - metrics["transformers/peak_mib"]


def test_settings_that_cannot_work_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ({"path": None}, "path is missing: give the folder of a model"),
        ({"candidates": {"transformers": []}}, "candidates has transformers, which is measured anyway"),
        ({"candidates": {}}, "candidates must name at least one"),
        ({"n_token": 8}, "n_token must hold a prompt and what is added, 9 tokens, got 8"),
        ({"n_before": 11}, "n_before must be at least 12, got 11"),
    ):
        with pytest.raises(ConfigError, match=message):
            attach.run(**settings(llama, **change))
    hide("transformers", monkeypatch)
    with pytest.raises(ConfigError, match="the bare model needs the library transformers"):
        attach.run(**settings(llama))
