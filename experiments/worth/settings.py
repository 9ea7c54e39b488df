"""Settings of `worth`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlm.config import ConfigError
from memlm.evaluation.result import check_settings

CONDITIONS = {"on": "memory on", "off": "reads off", "wiped": "memory wiped", "swapped": "another document's memory"}
"""What is measured, and how it is called."""


KINDS = ("far", "new", "rest")
"""Kinds of tokens, see `experiments.worth.kinds`."""


FIRST = 128  # tokens of the first part of a document; each part behind it is as long as all before


@dataclass(frozen=True)
class Worth:
    """Settings.

    Attributes:
        split: Which text: ``test`` for final numbers, or ``val``.
        limit: Tokens to read at most: of more text every second (third, ...) document is read. None for all.
        length: Tokens of a document that are read at most, from its beginning; None for all.
        n_row: Documents read side by side; at least 2, as each also reads with the memory of another.
        distance: Tokens beyond which the last mention of a name is far.
        common: Share of the words of the training text that its most frequent words make up: these are no names.

    Raises:
        ConfigError: If a setting cannot work.
    """

    split: Literal["val", "test"] = "test"
    limit: int | None = 400_000
    length: int | None = 16_384
    n_row: int = 8
    distance: int = 256
    common: float = 0.8

    def __post_init__(self) -> None:
        check_settings(self, {"limit": 2, "length": 2, "n_row": 2, "distance": 1})
        if not 0 <= self.common < 1:
            raise ConfigError(f"worth.common must be at least 0 and below 1, got {self.common}")
