"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import retrieval_keys
from benchmarks.candidates import Candidate
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import hide, tiny_setup


def config(*overrides: str) -> dict[str, Any]:
    tiny = ["benchmark=retrieval", "sizes=[200,400]", "d_key=8", "n_query=6", "top_k=4", "rounds=3", "n_list=8"]
    return to_dict(compose([*tiny, "candidates=[exact,inverted,torch]", *overrides], "benchmark"))


@pytest.mark.slow
def test_searches_are_measured_side_by_side() -> None:
    pytest.importorskip("faiss")
    names = ["exact", "inverted", "torch", "faiss flat", "faiss ivf", "faiss hnsw"]
    quoted = ",".join(f'"{name}"' for name in names)
    result, text = benchmark.run(config(f"candidates=[{quoted}]", "n_probe=8", "hnsw_most=200"))
    for source in ("clustered", "random"):  # no checkpoint is given
        for size in (200, 400):
            for name in names:
                here = f"{source}/{size}/{name}"
                rows = [row["seconds"] for row in result.rows if row["what"] == "ms" and row["candidate"] == name
                        and row["slots"] == size and row["keys"] == source]  # fmt: skip
                if name == "faiss hnsw" and size == 400:
                    assert not rows
                    continue
                assert result.metrics[f"{here}/ms"] == pytest.approx(1000 * statistics.median(rows))
                assert (f"{here}/learn_ms" in result.metrics) == (not name.startswith("faiss"))
                if name != "faiss hnsw":  # all lists are probed
                    assert result.metrics[f"{here}/recall"] == 1
    assert "no checkpoint was given" in text
    assert result.metrics["random/200/exact/vs_faiss_flat"] > 0
    quoted = '"exact","exact bf16","inverted bf16"'
    rounded = benchmark.run(config(f"candidates=[{quoted}]", "n_probe=8", "top_k=16", "d_key=32"))[0].metrics
    for name in ("exact bf16", "inverted bf16"):  # rounded keys part few of the best from the rest
        assert 0.8 < rounded[f"random/400/{name}/recall"] < 1
    few = benchmark.run(config("n_probe=1", "keys=[random]"))[0].metrics
    assert few["random/400/inverted/recall"] < 0.9


def test_keys_are_those_that_a_trained_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a text without memory being read, in order of the text; queries from held-out text; kept in a file."""
    import memlm.checkpoint

    model: Any = Candidate("ltm", tiny_setup("default")).model.eval()
    text = torch.randint(model.n_vocab, (1500,), generator=torch.Generator().manual_seed(0)).numpy()
    data = SimpleNamespace(tokens=lambda split: SimpleNamespace(tokens=text if split == "train" else text[::-1].copy()))
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path, trust: (model, data))
    cache = str(tmp_path / "keys.pt")
    keys = retrieval_keys.trained_keys("RUN", [], 3000, 100, cache)
    assert (len(keys.key), len(keys.bias), len(keys.query)) == (3000, 3000, 100)
    torch.testing.assert_close(keys.key.norm(dim=1), torch.ones(3000))
    assert len(keys.key.unique(dim=0)) > 2900, "segments come twice"
    module = model.memory["ltm"][0]
    monkeypatch.setattr(module, "n_slot", 400)
    monkeypatch.setattr(module, "write_budget", None)
    with torch.no_grad():
        row = torch.from_numpy(text[: len(text) // 8 * 8]).view(8, -1)[:1, :64]
        bank = model.new_context(model(row, read=False).state).memory["ltm"][0]
    own = bank.key[0][module.filled(bank)[0]]
    nearest = (own @ keys.key.T).amax(dim=1)
    assert (nearest > 1 - 1e-4).float().mean() > 0.8  # all but those that a later segment settles
    monkeypatch.setattr(memlm.checkpoint, "load_run", None)
    again = retrieval_keys.trained_keys("RUN", [], 3000, 100, cache)
    assert torch.equal(again.key, keys.key)
    with pytest.raises(ConfigError, match="remove it, or name another cache"):
        retrieval_keys.trained_keys("RUN", [], 3001, 100, cache)


def test_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("faiss", monkeypatch)
    with pytest.raises(ConfigError, match=r"memlm\[bench\].*candidates=\[exact,inverted,torch\]"):
        benchmark.run(config('candidates=["faiss flat"]'))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds=0", "rounds must be at least 1"),
        ("sizes=[]", "sizes must name at least one"),
        ("sizes=[2]", "sizes must be at least top_k"),
        ("keys=[random,random]", "each once"),
    ],
)
def test_mistakes_about_searches_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(config(override))
