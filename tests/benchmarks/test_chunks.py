"""Tiny sizes: what is measured is right; how fast it is does not matter here."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import chunks
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError

pytestmark = pytest.mark.slow

SETTINGS = ["benchmark=chunks", "n_row=[1]", "n_token=33", "n_head=1", "d_head=4", "rounds=2"]


@pytest.mark.parametrize(("rules", "n_row"), [(list(chunks.RULES), [1]), (["linear"], [1, 2])])
def test_each_rule_is_measured_in_both_ways(rules: list[str], n_row: list[int]) -> None:
    result, text = benchmark.run(to_dict(compose([*SETTINGS, f"n_row={n_row}", f"rules={rules}"], "benchmark")))
    assert {(row["rule"], row["n_row"]) for row in result.rows} == {(name, n) for name in rules for n in n_row}
    assert len(result.rows) == 2 * len(n_row) * len(rules)
    for name in rules:
        ratios = [row["loop"] / row["chunks"] for row in result.rows if (row["rule"], row["n_row"]) == (name, 1)]
        assert min(ratios) <= result.metrics[f"{name}/1/ratio"] <= max(ratios)
        assert name in text


@pytest.mark.parametrize("name", chunks.RULES)
def test_both_ways_give_the_same_and_their_gradients(name: str) -> None:
    parts = chunks._inputs(name, 2, 40, 3, 4, torch.Generator().manual_seed(0))
    asked = list({id(part): part for part in parts.values() if part is not None}.values())
    results = []
    for way in (chunks._loop, chunks._in_chunks):
        found, matrix = way(name, **parts)
        grads = torch.autograd.grad(found.sum() + (matrix * matrix).sum(), asked)
        if name == "kalman":  # whose covariance is symmetric
            grads = [grad + F.pad(grad[..., 4:].mT, (4, 0)) if grad.shape[-1] == 8 else grad for grad in grads]
        results.append([found, matrix, *grads])
    for loop, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, loop, atol=1e-3, rtol=1e-3)


def test_ways_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*arguments: Any, **parts: Any) -> tuple[Tensor, Tensor]:
        found, matrix = in_chunks(*arguments, **parts)
        return 2 * found, matrix

    in_chunks = chunks._in_chunks
    monkeypatch.setattr(chunks, "_in_chunks", doubled)
    with pytest.raises(ValueError, match="differ by"):
        benchmark.run(to_dict(compose([*SETTINGS, "rules=[delta]"], "benchmark")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rules=[delta,hebb]", "rules must be among .*, got hebb"),
        ("rules=[]", "rules must name at least one"),
        ("n_row=[0]", "n_row must be at least 1, got 0"),
        ("rounds=0", "rounds must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.run(to_dict(compose([*SETTINGS, setting], "benchmark")))
