"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

from typing import Any

import pytest
import torch

from benchmarks import consolidate
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError

pytestmark = pytest.mark.slow


def config(*overrides: str) -> dict[str, Any]:
    return to_dict(compose(["benchmark=consolidate", *overrides], "benchmark"))


def test_the_pairs_of_the_bank_are_the_only_similar_slots() -> None:
    memory, state, n_pair = consolidate.near_duplicates(1000, 0.1, 0.97, 50, 64, 64, seed=1)
    assert n_pair == 100
    assert memory.filled(state).all()
    similar = [part[0] @ part[0].T - torch.eye(1000) for part in (state.key, state.value)]
    both = (torch.minimum(*similar) >= 0.9).nonzero()
    assert len(both) == 2 * n_pair
    assert len(both[:, 0].unique()) == 2 * n_pair, "each is near one other"
    for part in similar:
        torch.testing.assert_close(part[both[:, 0], both[:, 1]], torch.full((2 * n_pair,), 0.97))
    assert (similar[0] > 0.4).sum() > 1000 * 30, "keys lie in clusters"


def test_consolidation_is_measured_in_a_process_of_its_own() -> None:
    result, text = benchmark.run(config("sizes=[2000]", "passes=2", "threads=1"))
    metrics = result.metrics
    assert metrics["2000/found_1"] == metrics["2000/found_2"] == 1.0  # all pairs are compared
    assert [row["merged"] for row in result.rows] == [200, 0]
    assert min(row["seconds"] for row in result.rows) > 0
    # at the least, blocks of similarities in floats, and a copy of keys and values
    assert 2 < metrics["2000/peak_mib"] < 500
    assert metrics["2000/bank_mib"] == pytest.approx(2000 * (256 * 4 + 2 * 4 + 3 * 8 + 6 * 4 + 8 * 4) / 2**20, rel=0.01)
    assert "100.0 %" in text


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sizes=[]", "sizes must name at least one"),
        ("sizes=[10]", "each in 100"),
        ("duplicates=0.6", "duplicates must be in"),
        ("similarity=0.8", "similarity must be in"),
        ("passes=0", "passes must be at least 1"),
    ],
)
def test_mistakes_about_consolidation_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(config(override))
