"""Settings of `preferences`."""

from __future__ import annotations

from dataclasses import dataclass

from memlm.evaluation.result import check_settings


@dataclass(frozen=True)
class Preferences:
    """Settings.

    Attributes:
        n_user: Users of the evaluation; at least 2, as one is the other's control.
        n_session: Sessions of each.
        n_turn: Turns of a session; the model's memory must have as many short-term slots.
        top_k: Memories that go into a prompt.
        write_price: What a write costs in training, against 1 for a right answer; it rises from 0 in the first half.
        n_step: Steps of training a controller, 64 users each; the encoder gets twice as many.
        seed: Of users, initial values and choices.
        n_row: Users simulated at once; the result does not depend on it.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_user: int = 1000
    n_session: int = 30
    n_turn: int = 6
    top_k: int = 3
    write_price: float = 0.2
    n_step: int = 150
    seed: int = 0
    n_row: int = 250

    def __post_init__(self) -> None:
        least = {"n_user": 2, "n_session": 6, "n_turn": 1, "top_k": 1, "write_price": 0, "n_step": 1}
        check_settings(self, least | {"seed": 0, "n_row": 1})
