"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

from typing import Any

import pytest
import torch

from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.memory import ltm_write
from tests.benchmarks.tiny import TINY

pytestmark = pytest.mark.slow

OWN = [line for line in TINY if "n_slot" not in line]
SETTINGS = [
    "benchmark=write", f"overrides=[{','.join(chr(34) + line + chr(34) for line in OWN)}]", "sizes=[64,128]",
    "n_token=64", "warmup=1", "rounds=2",
]  # fmt: skip


def test_writes_are_measured_in_turn_and_what_they_wrote_is_counted() -> None:
    result, text = benchmark.run(to_dict(compose(SETTINGS, "benchmark")))
    assert len(result.rows) == 2 * 2 * 2 * 2 * 2  # whats, indices, sizes, ways, rounds
    for row in result.rows:
        assert row["ms"] > 0
        assert 0 < row["slots_written"] <= 16  # 4 segments of 4 slots each in one layer
    times = [row["ms"] for row in result.rows if (row["what"], row["index"], row["slots"]) == ("store", "exact", 128)]
    given, kept = times[::2], times[1::2]
    ratios = sorted(a / b for a, b in zip(given, kept, strict=True))
    assert ratios[0] <= result.metrics["store/exact/128/given/vs_kept"] <= ratios[1]
    assert "64 slots" in text
    with pytest.raises(ConfigError, match="two segments"):
        benchmark.run(to_dict(compose([*SETTINGS, "n_token=16"], "benchmark")))


def test_another_memory_is_measured_by_what_changes_in_it() -> None:
    settings = ["memory_name=camelot", "whats=[absorb]", "indices=[exact]"]
    result, text = benchmark.run(to_dict(compose([*SETTINGS, *settings], "benchmark")))
    assert len(result.rows) == 2 * 2 * 2  # sizes, ways, rounds
    assert all(0 < row["slots_written"] <= row["slots"] for row in result.rows)
    assert "into camelot" in text
    with pytest.raises(RuntimeError, match="absorb copied 64 slots that were given away"):
        benchmark.run(to_dict(compose([*SETTINGS, "memory_name=imm", *settings[1:]], "benchmark")))
    with pytest.raises(ConfigError, match="stores no texts"):
        benchmark.run(to_dict(compose([*SETTINGS, "memory_name=camelot"], "benchmark")))


def test_a_copy_of_what_is_given_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def copying(memory: Any, state: Any, given: bool, own: Any = ltm_write.own) -> Any:
        return own(memory, state, False)

    monkeypatch.setattr(ltm_write, "own", copying)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="copied 64 slots that were given away"):
        benchmark.run(to_dict(compose([*SETTINGS, "indices=[exact]"], "benchmark")))
