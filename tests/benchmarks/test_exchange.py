"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import pytest

from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import TINY

pytestmark = pytest.mark.slow


def test_what_processes_spend_on_a_dealt_bank_is_a_share_of_the_step() -> None:
    quoted = ",".join(f'"{line}"' for line in TINY)
    settings = ["benchmark=exchange", f"overrides=[{quoted}]", "n_row=4", "n_segment=2", "warmup=1", "rounds=2"]
    result, text = benchmark.run(to_dict(compose(settings, "benchmark")))
    assert [(row["process"], row["step"]) for row in result.rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for row in result.rows:
        assert 0 < row["sending"] < row["seconds"]
        assert 0 < row["waiting"] < row["seconds"] - row["sending"]
    shares = sorted(row["sending"] / row["seconds"] for row in result.rows)
    assert shares[1] <= result.metrics["sending"] <= shares[2]
    assert f"{100 * result.metrics['waiting']:.1f} %" in text
    with pytest.raises(ConfigError, match="n_row must be at least 2, got 1"):
        benchmark.run(to_dict(compose([*settings, "n_row=1"], "benchmark")))
