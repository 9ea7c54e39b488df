"""The page is what the record says, and the record is what runs found."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memlm.config import ConfigError
from memlm.evaluation import runs
from memlm.evaluation.result import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("public_figures", ROOT / "scripts/public_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(task: str, sizes: list[Any], rate: float) -> Any:
    ends = [""] if len(sizes) == 1 else [f"/{s[0]}_{s[1]}" if isinstance(s, list) else f"/{s}" for s in sizes] + [""]
    metrics = {
        f"{key}/{condition}{end}": number
        for condition, value in {"on": rate, "wiped": 0.1, "swapped": 0.05}.items()
        for end in ends
        for key, number in {"accuracy": value, "low": value / 2, "high": value, "n": 7}.items()
    }
    phase = {"steps": 10, "n_row": 2, "n_segment": 3, "task": {"n_pair": 4}}
    config = {
        "seed": 0, "memory": {"delta": {}}, "trainer": {"accumulate_grad_batches": 1}, "training": {},
        "curriculum": {"_target_": "X", "phases": [phase], "task": {"_target_": "memlm.data.tasks.kv.KeyValues"}},
        "model": {"_target_": "memlm.models.mixer.MixerModel", "segment_len": 4},
    }  # fmt: skip
    trained = SimpleNamespace(config=config, step=10, tokens_per_second=2.0, n_parameter=5, state_bytes=1234)
    settings = {"sizes" if task == "mqar_zoology" else "n_pair": sizes}
    trained_share = "1 of 32 epochs" if task == "mqar_zoology" else None
    metadata = {"settings": settings, "trained": trained_share, "random_blanks": True}
    return SimpleNamespace(path=task, trained=trained, results={task: Result(task, metrics, (), metadata)})


def test_runs_become_lines_with_what_was_trained(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [run("mqar_zoology", [[64, 4], [128, 32]], 0.5), run("capacity_per_byte", [4], 0.9)]
    monkeypatch.setattr(runs, "find_runs", lambda paths: (found, []))
    record = script.merged([], script.entries(["anywhere"], "abc"))
    _, _, *lines = script.table(record, "mqar_zoology").splitlines()
    assert [line.split(" | ")[3].split(",")[0] for line in lines] == ["all sizes", "64 tokens", "128 tokens"]
    assert "50.0 (25.0 to 50.0) | 10.0 | 7 | 1 of 32 epochs | 2 | 0 | 10 | 240 | 2.0 | abc |" in lines[0]
    _, _, line = script.table(record, "capacity_per_byte").splitlines()
    assert "| 1,234 | 4 pairs, random blanks | 90.0 (45.0 to 90.0) | 10.0 |" in line
    found[:] = [run("mqar_zoology", [[64, 4], [128, 32]], 0.6)]
    again = script.merged(record, script.entries(["anywhere"], "def"))
    assert sorted(entry["commit"] for entry in again) == ["abc", "def"]
    found[:] = [run("perplexity", [4], 0.5)]
    with pytest.raises(ConfigError, match="perplexity is no run of recipe=mqar_zoology"):
        script.entries(["anywhere"], None)


def test_the_page_is_what_the_record_says(script: Any) -> None:
    page = (ROOT / "docs/public_figures.md").read_text()
    record = json.loads((ROOT / "docs/public_figures.json").read_text())
    assert script.filled_in(page, record) == page
    assert script.filled_in(page, record[1:]) != page
