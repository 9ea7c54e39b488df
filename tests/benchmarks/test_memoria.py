"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import statistics
from typing import Any

import pytest

from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import hide

pytestmark = pytest.mark.slow


def config(*overrides: str) -> dict[str, Any]:
    tiny = [
        "benchmark=memoria", "n_row=2", "n_working=4", "d_model=6", "n_slot=40", "n_stm=8", "n_reminded_stm=3",
        "n_reminded_ltm=3", "search_depth=2", "lifespan=5", "warmup=6", "rounds=3",
        'candidates=["memoria-pytorch","memlm","memlm as 1.1.0"]',
    ]  # fmt: skip
    return to_dict(compose([*tiny, *overrides], "benchmark"))


def test_engrams_are_measured_side_by_side() -> None:
    names = ["memoria-pytorch", "memlm", "memlm as 1.1.0"]
    result, text = benchmark.run(config("extension=0"))
    assert {(row["candidate"], row["round"]) for row in result.rows} == {(name, i) for name in names for i in range(3)}
    for name in names:
        times = sorted(row["seconds"] for row in result.rows if row["candidate"] == name)
        assert result.metrics[f"{name}/ms"] == pytest.approx(1000 * times[1])
        assert result.metrics[f"{name}/engrams"] == 4 * 4  # nothing is kept beyond its first lifespan
    theirs, ours = ([row["seconds"] for row in result.rows if row["candidate"] == name] for name in names[:2])
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    assert result.metrics["memlm/speedup"] == pytest.approx(statistics.median(ratios))
    assert "memoria-pytorch/speedup" not in result.metrics
    assert result.metadata["memoria-pytorch"] in text
    longer = benchmark.run(config("extension=4", "rounds=1"))[0]
    assert all(longer.metrics[f"{name}/engrams"] > 4 * 4 for name in names)


def test_missing_memoria_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("memoria", monkeypatch)
    with pytest.raises(ConfigError, match=r"memlm\[bench\].*leave memoria-pytorch out"):
        benchmark.run(config())
    benchmark.run(config("candidates=[memlm]", "rounds=1"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds=0", "rounds must be at least 1"),
        ("candidates=[]", "candidates must name at least one"),
        ("candidates=[memlm,memlm]", "each once"),
        ("n_slot=10", "n_slot must hold"),
        ("lifespan=1", "lifespan must be at least 2"),
    ],
)
def test_mistakes_about_engrams_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(config(override))
