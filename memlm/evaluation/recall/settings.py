"""Settings that experiments have in common in which facts are told in documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlm.evaluation.result import check_settings


@dataclass(frozen=True, kw_only=True)
class Telling:
    """How facts are told, and in how many documents.

    Attributes:
        n_document: Documents, each with facts of its own; at least 2, as one is the other's control.
        facts_per_segment: How densely facts are told, on average.
        split: Where the text around the facts is from: ``val``, or ``test`` for final numbers.
        seed: Of facts, their order, gaps and passages.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_document: int = 8
    facts_per_segment: float = 2.0
    split: Literal["val", "test"] = "val"
    seed: int = 0
    n_row: int = 8

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "seed": 0, "n_row": 1})
