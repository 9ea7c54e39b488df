"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import statistics
from typing import Any

import pytest
import torch

from benchmarks import generate
from benchmarks.candidates import Candidate
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import TINY, hide, tiny_setup

pytestmark = pytest.mark.slow


def config(*overrides: str) -> dict[str, Any]:
    quoted = ",".join(f'"{line}"' for line in TINY)
    tiny = [
        "benchmark=generate", "batches=[1,3]", f"overrides=[{quoted}]", "prompt_len=6", "n_generate=20", "rounds=3",
    ]  # fmt: skip
    return to_dict(compose([*tiny, *overrides], "benchmark"))


def test_candidates_are_measured_beside_their_peers_in_the_same_round() -> None:
    pytest.importorskip("transformers")
    result, text = benchmark.run(config())
    assert len(result.rows) == 2 * 2 * 3 * 3
    rows = [row for row in result.rows if (row["batch"], row["lengths"]) == (3, "unlike")]
    spent = {(row["candidate"], row["round"]): row["seconds"] for row in rows}
    ratios = [spent["gpt2", i] / spent["none", i] for i in range(3)]
    assert result.metrics["none/3/unlike/vs_gpt2"] == pytest.approx(statistics.median(ratios))
    times = [1000 * spent["ltm", i] / 20 for i in range(3)]
    assert result.metrics["ltm/3/unlike/ms_per_step"] == pytest.approx(statistics.median(times))
    assert "ltm/1/equal/vs_none" in result.metrics
    assert "64 slots per row, all used" in text


def test_rows_have_their_lengths_and_candidates_get_the_same_text() -> None:
    ids, mask = generate.prompts(tiny_setup(), 4, 8, "unlike")
    assert mask.sum(dim=1).tolist() == [2, 4, 6, 8]
    assert mask[:, -2:].all()
    equal, whole = generate.prompts(tiny_setup(), 4, 8, "equal")
    assert torch.equal(ids, equal)
    assert whole.all()
    none = Candidate("none", tiny_setup())
    heard: list[dict[str, Any]] = []
    none.model.generate = lambda ids, **given: heard.append({"ids": ids, **given}) or torch.zeros(4, 13)
    generate.Call(none, ids, mask, 5, False)()
    assert torch.equal(heard[0]["mask"], mask)
    assert torch.equal(heard[0]["ids"], ids)
    with pytest.raises(ValueError, match="6 tokens were to be added"):
        generate.Call(none, ids, mask, 6, False)()


def test_a_bank_that_is_not_full_is_no_evidence() -> None:
    candidate = Candidate("ltm", tiny_setup("default"))
    ids, mask = generate.prompts(tiny_setup(), 2, 8, "equal")
    generate.Call(candidate, ids, mask, 5, False)
    candidate.state = candidate.model.init_state(2)
    with pytest.raises(ValueError, match="not full and read"):
        generate.Call(candidate, ids, mask, 5, False)


def test_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="batches must be at least 1, got 0"):
        generate.run(**{**settings(), "batches": [0]})
    with pytest.raises(ConfigError, match="lengths must name at least one"):
        generate.run(**{**settings(), "lengths": []})
    hide("transformers", monkeypatch)
    with pytest.raises(ConfigError, match="GPT-2 needs the library transformers"):
        generate.run(**settings())


def settings() -> dict[str, Any]:
    keys = generate.run.__annotations__
    return {key: value for key, value in config().items() if key in keys}
