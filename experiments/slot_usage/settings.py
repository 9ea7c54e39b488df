"""Settings of `slot_usage`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from memlm.config import ConfigError
from memlm.evaluation.result import check_settings

MODELS = ("trained", "untrained")


PROBES = {"answer": "answers about facts", "text": "text that goes on"}


"""What is read when slots are ablated."""


USE = (
    "filled", "effective_reads", "even_reads", "reads_per_token", "read_weight", "effective_writes", "even_writes",
    "cosine", "cosine_p05", "cosine_p95",
)  # fmt: skip


SHARES = ("read", "even", "write")  # what the heat map is made of


@dataclass(frozen=True)
class SlotUsage:
    """Settings.

    Attributes:
        n_document: Documents, each with facts of its own; at least 2.
        n_fact: Facts told and asked for per document.
        distance: Fewest tokens between the end of any fact and the questions.
        shares: Shares of the filled slots to forget, ascending; the last is the one of the headline.
        n_pair: Slots of a bank whose contents are compared, at most.
        split: Where the text around the facts is from: ``val``, or ``test`` for final numbers.
        seed: Of facts, gaps, passages and random slots.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_document: int = 8
    n_fact: int = 32
    distance: int = 1024
    shares: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    n_pair: int = 512
    split: Literal["val", "test"] = "val"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "n_fact": 1, "distance": 0, "n_pair": 2, "seed": 0})
        if (
            not self.shares
            or list(self.shares) != sorted(set(self.shares))
            or not 0 < self.shares[0] <= self.shares[-1] <= 1
        ):
            raise ConfigError(f"slot_usage.shares must be ascending shares in (0, 1], got {list(self.shares)}")
