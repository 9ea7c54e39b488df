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
    spec = importlib.util.spec_from_file_location("recall_by_memory", ROOT / "scripts/recall_by_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(memory: str, seed: int, rate: float, task: str = "Pairs") -> Any:
    metrics: dict[str, float] = {}
    for n in (1, 2):
        for condition in ("on", "off", "wiped", "swapped", "unseen"):
            value = rate if condition == "on" else 0.01 * n
            numbers = {"accuracy": value, "low": value / 4 + 0.02, "high": value, "n": 7 * n}
            metrics |= {f"{key}/{condition}/{n}": number for key, number in numbers.items()}
    config = {
        "seed": seed, "memory": {memory: {}} if memory != "none" else {}, "trainer": {"accumulate_grad_batches": 1},
        "curriculum": {"phases": [{"steps": 10, "n_row": 2, "n_segment": 3}]}, "model": {"segment_len": 4},
    }  # fmt: skip
    trained = SimpleNamespace(config=config, step=10, tokens_per_second=2.0, n_parameter=5, state_bytes=1234)
    result = Result("associative_recall", metrics, (), {"task": task, "n_pairs": [1, 2]})
    return SimpleNamespace(path=memory, trained=trained, results={"associative_recall": result})


def test_runs_become_entries_and_the_newest_of_a_memory_and_seed_stays(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [run("stm", 0, 0.9), run("none", 0, 0.02), run("stm", 1, 1.0)]
    monkeypatch.setattr(runs, "find_runs", lambda paths: (found, []))
    entries = script.entries(["anywhere"], "abc")
    assert [(entry["memory"], entry["seed"], entry["held"]) for entry in entries] == [
        ("stm", 0, 2), ("none", 0, 0), ("stm", 1, 2)
    ]  # fmt: skip
    assert entries[0]["rates"]["2"]["on"] == [0.9, pytest.approx(0.245), 0.9, 14]
    assert (entries[0]["tokens"], entries[0]["minutes"], entries[0]["commit"]) == (240, 2.0, "abc")
    found[:] = [run("stm", 0, 0.95)]
    record = script.merged(entries, script.entries(["anywhere"], "def"))
    assert [(entry["memory"], entry["seed"], entry["commit"]) for entry in record] == [
        ("none", 0, "abc"), ("stm", 0, "def"), ("stm", 1, "abc")
    ]  # fmt: skip
    _, _, *lines = script.table(record).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| `stm`", "| `stm`", "| `none`"]
    assert "| 1,234 | 2 or more | 95.0 (25.8 to 95.0) | 95.0 (25.8 to 95.0) | 2.0 | 10 | 240 | 2.0 | def |" in lines[0]
    found[:] = [run("stm", 0, 0.95, task="MQAR")]
    with pytest.raises(ConfigError, match="stm is no run of recipe=pairs"):
        script.entries(["anywhere"], None)


def test_the_page_is_what_the_record_says(script: Any) -> None:
    page = (ROOT / "docs/recall_by_memory.md").read_text()
    record = json.loads((ROOT / "docs/recall_by_memory.json").read_text())
    assert script.filled_in(page, record) == page
    assert script.filled_in(page, record[1:]) != page
