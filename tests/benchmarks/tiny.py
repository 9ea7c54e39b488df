"""Tiny models to measure, and libraries that are not there."""

import importlib
from typing import Any

import pytest

from benchmarks.candidates import Setup, size_config

TINY = [
    "model.n_layer=2", "model.n_head=2", "model.d_model=32", "model.segment_len=16",
    "data.tokenizer.n_vocab=101", "memory.ltm.n_slot=64", "memory.ltm.write_budget=4", "memory.ltm.top_k=8",
]  # fmt: skip


def tiny_setup(size: str = "seed", **settings: Any) -> Setup:
    given = {"n_row": 2, "n_segment": 3, "device": "cpu", "precision": "fp32", "compile": False, "seed": 0}
    return Setup(size_config(size, TINY), **given | settings)


def hide(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name == library:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
