"""Settings of `continual`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from memlm.config import ConfigError
from memlm.evaluation.result import check_settings

Task = Literal["prose", "facts", "symbols", "stories"]


Policy = Literal["none", "reservoir", "surprise", "retrieved"]


N_SYMBOL = 64


@dataclass(frozen=True)
class Continual:
    """Settings.

    Attributes:
        tasks: What is trained, in this order; at least 1. With one there is nothing to forget, only sample efficiency.
        replay: Policies of `memlm.training.replay.Replay`, and ``none``, with which they are compared.
        consolidate: Whether memories are consolidated every ``consolidate_every`` steps; both by default.
        seeds: One run of every condition for each.
        n_step: Steps per task.
        n_row: New rows of a step.
        n_segment: Segments of a row.
        lr: Learning rate, constant after the warm-up.
        ratio: Rows replayed per new row.
        capacity: Windows that the replay buffer keeps.
        consolidate_every: Steps from one consolidation to the next.
        n_check: Measurements of a task while it is trained, for sample efficiency.
        n_batch: Held-out batches that a measurement takes, of ``n_row`` rows each.
        n_word: Most words of the vocabulary, symbols included.

    Raises:
        ConfigError: If a setting cannot work.
    """

    tasks: Sequence[Task] = ("prose", "facts", "symbols", "stories")
    replay: Sequence[Policy] = ("none", "reservoir", "retrieved")
    consolidate: Sequence[bool] = (False, True)
    seeds: Sequence[int] = (0, 1, 2)
    n_step: int = 120
    n_row: int = 6
    n_segment: int = 4
    lr: float = 3e-3
    ratio: float = 0.25
    capacity: int = 512
    consolidate_every: int = 25
    n_check: int = 10
    n_batch: int = 4
    n_word: int = 2000

    def __post_init__(self) -> None:
        for name, choices in {"tasks": get_args(Task), "replay": get_args(Policy), "consolidate": (False, True),
                              "seeds": None}.items():  # fmt: skip
            given = list(getattr(self, name))
            object.__setattr__(self, name, tuple(given))
            wrong = [value for value in given if choices is not None and value not in choices]
            if not given or wrong or len(set(given)) < len(given):
                among = f" among {', '.join(map(str, choices))}" if choices is not None else ""
                raise ConfigError(f"continual.{name} must be a list of different ones{among}, got {given}")
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"continual.ratio must be in (0, 1], got {self.ratio}; for no replay use replay=[none]")
        if not self.lr > 0:
            raise ConfigError(f"continual.lr must be above 0, got {self.lr}")
        least = {"n_step": 1, "n_row": 1, "n_segment": 2, "capacity": 1, "consolidate_every": 1, "n_check": 1,
                 "n_batch": 1, "n_word": N_SYMBOL + 2}  # fmt: skip
        check_settings(self, least)
        if min(self.seeds) < 0:
            raise ConfigError(f"continual.seeds must not be negative, got {list(self.seeds)}")
        if self.n_step < self.n_check:
            raise ConfigError(f"continual.n_check must be at most continual.n_step ({self.n_step}), got {self.n_check}")

    @property
    def conditions(self) -> dict[str, tuple[str, bool]]:
        """Policy and whether memories are consolidated, by name."""
        return {
            f"{policy}{'+consolidation' if merge else ''}": (policy, merge)
            for merge in self.consolidate
            for policy in self.replay
        }
