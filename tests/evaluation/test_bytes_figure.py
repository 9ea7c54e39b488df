"""Tests of the figure of recall against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memlm.evaluation import bytes_figure
from tests.evaluation.held_figures import check_holds_figure

FILES = ["docs/figures/mqar_bytes-light.svg", "docs/figures/mqar_bytes-dark.svg"]


def entry(name: str, state_bytes: int, rate: float) -> dict[str, Any]:
    told = {"name": name, "seed": 0, "experiment": "mqar_zoology", "state_bytes": state_bytes, "commit": "a"}
    metrics = {"accuracy/on": rate, "low/on": rate - 0.01, "high/on": rate + 0.01, "accuracy/wiped": 0.0}
    return told | {"metrics": metrics, "headline": [], "step": 1, "tokens": None, "minutes": None, "machine": "m"}


RECORD = [entry("delta", 8_192, 0.5), entry("ltm", 32_000, 0.75)]
TOLD = "delta, seed 0: 50.0% in 8,192 bytes; ltm, seed 0: 75.0% in 32,000 bytes"


def test_an_empty_record_has_no_figure() -> None:
    assert bytes_figure.told([]) == ""
    assert bytes_figure.figures([]) == {}


def test_a_check_holds_the_figure_to_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    check_holds_figure("mqar_zoology", FILES, RECORD, TOLD, [entry("delta", 8_192, 0.6)])
