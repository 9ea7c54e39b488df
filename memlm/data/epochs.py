"""Epochs over fixed sets of documents, each batch of one set, in an order that is drawn anew for each epoch.

So associative recall is trained in zoology: several sets of one length each, mixed. Batches stay a pure function of the
step, as in `memlm.data.stream`: a set and a number in it say what a batch holds, and come again in every epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum, Phase


class Epochs(Curriculum):
    """Phases that are trained mixed, again and again.

    Args:
        phases: Settings of each `Phase`; ``steps`` are the batches of its set in an epoch.
        task: Node of the task, see `Curriculum`.
        n_epoch: Epochs.
        scale: Share of all of this that is trained: first there are fewer epochs, and below one epoch fewer batches of
            each set. Documents seen once are worth more than a few seen often.

    Attributes:
        n_batch: Batches of each set in an epoch, as scaled.
        n_epoch: Epochs, as scaled.
        whole: Epochs without ``scale``.
        scale: See above.

    Raises:
        ConfigError: If a setting cannot work.
    """

    def __init__(
        self,
        phases: Sequence[Mapping[str, Any]],
        task: Mapping[str, Any] | None = None,
        n_epoch: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__(phases, task)
        for i, phase in enumerate(self.phases):
            if phase.n_window != 1 or phase.memory or phase.task is None:
                raise ConfigError(
                    f"curriculum.phases[{i}] is trained mixed with others, so it needs a task, and must have no memory "
                    "and an n_window of 1"
                )
        if not 1 <= n_epoch <= 10**6:
            raise ConfigError(f"curriculum.n_epoch must be in 1..1000000, got {n_epoch}")
        if not 0 < scale <= 1:
            raise ConfigError(f"curriculum.scale must be above 0 and at most 1, got {scale}")
        self.whole, self.scale = n_epoch, scale
        self.n_batch, self.n_epoch = scaled([phase.steps for phase in self.phases], n_epoch, scale)

    @property
    def share(self) -> str:
        """What of it all is trained, in words, to stand beside every number."""
        part = sum(self.n_batch) / sum(phase.steps for phase in self.phases)
        few = "" if part == 1 else f", of {100 * part:.2g} % of the documents"
        return f"{self.n_epoch} of {self.whole} epochs{few}"

    @property
    def steps(self) -> int:
        """Batches of all epochs."""
        return self.n_epoch * sum(self.n_batch)

    @property
    def starts(self) -> list[int]:
        """The first step of each phase."""
        order = order_of(tuple(self.n_batch), 0)
        return sorted(int(np.flatnonzero(order == i)[0]) for i in range(len(self.phases)))

    def at(self, step: int) -> tuple[int, Phase, int]:
        """The set of a step, its phase, and the number of its batch in the set; after the last epoch comes another."""
        epoch, place = divmod(step, sum(self.n_batch))
        batches = np.cumsum([0, *self.n_batch])
        batch = int(_shuffled(tuple(self.n_batch), epoch)[place])
        i = int(np.searchsorted(batches, batch, side="right")) - 1
        return i, self.phases[i], batch - int(batches[i])


def scaled(n_batch: Sequence[int], n_epoch: int, scale: float) -> tuple[list[int], int]:
    """Batches of each set in an epoch, and epochs, if a share ``scale`` of training is made; see `Epochs`."""
    epochs = scale * n_epoch
    return [max(1, round(n * min(epochs, 1.0))) for n in n_batch], max(1, round(epochs))


def order_of(n_batch: tuple[int, ...], epoch: int) -> np.ndarray:
    """The set of each batch of an epoch, by its number, (sum of ``n_batch``,)."""
    return np.repeat(np.arange(len(n_batch)), n_batch)[_shuffled(n_batch, epoch)]


@functools.lru_cache(maxsize=4)
def _shuffled(n_batch: tuple[int, ...], epoch: int) -> np.ndarray:
    """The batches of all sets, numbered through, in the order of an epoch."""
    return np.random.default_rng(epoch).permutation(sum(n_batch))
