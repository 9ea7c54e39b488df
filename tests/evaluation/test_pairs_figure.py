"""How many pairs each memory holds: rows in order, the mean of seeds, and a figure that a check holds to the record."""

from pathlib import Path
from typing import Any

import pytest

from memlm.evaluation import pairs_figure
from tests.evaluation.held_figures import check_holds_figure

FILES = ["docs/figures/recall_by_memory-light.svg", "docs/figures/recall_by_memory-dark.svg"]


def entry(name: str, state_bytes: int, *rates: float, seed: int = 0) -> dict[str, Any]:
    metrics = {f"accuracy/on/{n}": rate for n, rate in zip((1, 2, 16), rates, strict=True)}
    told = {"name": name, "seed": seed, "experiment": "associative_recall", "state_bytes": state_bytes}
    others = {f"accuracy/wiped/{n}": 0.5 for n in (1, 2, 16)} | {"accuracy/on": 0.5}
    return told | {
        "metrics": metrics | others,
        "headline": [],
        "step": 1,
        "tokens": None,
        "commit": "a",
        "machine": "m",
    }


RECORD = [
    entry("small", 2_000, 1.0, 0.5, 0.25),
    entry("large", 9_000, 1.0, 1.0, 1.0),
    entry("lean", 4_000, 1.0, 1.0, 1.0),
    entry("small", 2_000, 1.0, 0.75, 0.125, seed=1),
]
TOLD = (
    "lean: 1 pairs 100.0%, 2 pairs 100.0%, 16 pairs 100.0%; large: 1 pairs 100.0%, 2 pairs 100.0%, 16 pairs 100.0%; "
    "small: 1 pairs 100.0%, 2 pairs 62.5%, 16 pairs 18.8%"
)


def test_the_best_stands_first_and_of_equal_ones_the_smaller() -> None:
    assert pairs_figure.told(RECORD) == TOLD
    assert pairs_figure.told([]) == ""
    assert pairs_figure.figures([]) == {}


def test_a_check_holds_the_figure_to_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    check_holds_figure("recall_by_memory", FILES, RECORD, TOLD, RECORD[1:])
