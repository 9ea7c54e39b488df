"""Experience replay: windows of earlier steps, trained on again with fresh memories.

Shapes: B rows, S segments of a window, N = S * T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.data.stream import Batch

Policy = Literal["reservoir", "surprise"]


class Window(NamedTuple):
    """What one row of a batch was trained on; see `memlm.data.stream.Batch`, whose rows these are, on the CPU."""

    ids: Tensor
    targets: Tensor
    weight: Tensor
    answer: Tensor
    reset: Tensor  # (S,)
    breaks: Tensor  # (S,)
    mask: Tensor


class Replay:
    """A bounded buffer of windows, and which of them a step trains on again.

    Windows that are the same token for token are kept once. A task's documents of several windows are kept by their
    first one alone, as later ones ask for what was told before them. What is drawn depends on the seed, the step and
    the buffer, which is part of the checkpoint.

    Args:
        policy: What is kept when the buffer is full, and how it is drawn. ``reservoir``: an even sample of all windows
            so far, drawn evenly (Vitter, Algorithm R). ``surprise``: the windows with the greatest loss when they were
            last trained on, drawn in proportion to it.
        ratio: Rows that are replayed, per row of the batch; rounded, the fraction by chance.
        capacity: Windows kept by each process.
        seed: Of what is kept and drawn.

    Raises:
        ConfigError: If a setting cannot work.
    """

    def __init__(self, policy: Policy = "reservoir", ratio: float = 0.2, capacity: int = 1024, seed: int = 0) -> None:
        if policy not in get_args(Policy):
            raise ConfigError(f"replay.policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")
        if not 0 < ratio <= 1:
            raise ConfigError(f"replay.ratio must be in (0, 1], got {ratio}; for none use replay=none")
        if capacity < 1:
            raise ConfigError(f"replay.capacity must be at least 1, got {capacity}")
        self.policy, self.ratio, self.capacity, self.seed = policy, ratio, capacity, seed
        self.windows: list[Window] = []
        self.losses: list[float] = []
        self.n_seen = 0
        self._places: dict[bytes, int] = {}  # of the windows in the list, by their tokens

    def __len__(self) -> int:
        return len(self.windows)

    def offer(self, batch: Batch, loss: Tensor, n_segment: int, rank: int = 0) -> None:
        """Keep some of the rows of a batch that was just trained on.

        Args:
            batch: The batch.
            loss: Mean loss of each row, (B,).
            n_segment: Segments of its windows.
            rank: Of this process.
        """
        if batch.breaks is not None and not batch.fresh:
            return
        rng = self._rng(batch.step, rank, 0)
        for window, value in zip(_rows(batch, n_segment), loss.tolist(), strict=True):
            self.n_seen += 1
            if (known := self._places.get(_name(window))) is not None:
                self.losses[known] = value
            elif len(self) < self.capacity:
                self._put(len(self), window, value)
            elif self.policy == "reservoir":
                if (place := int(rng.integers(self.n_seen))) < self.capacity:
                    self._put(place, window, value)
            elif value > min(self.losses):
                self._put(int(np.argmin(self.losses)), window, value)

    def draw(self, batch: Batch, rank: int = 0) -> tuple[Batch, list[int]] | None:
        """Rows to train on beside a batch: windows as long as its own, each a document of its own.

        Args:
            batch: The batch.
            rank: Of this process.

        Returns:
            The rows and their places in the buffer; None if there are none.
        """
        rng = self._rng(batch.step, rank, 1)
        whole, part = divmod(self.ratio * len(batch.ids), 1)
        n_row = int(whole) + int(rng.random() < part)
        fit = [i for i, window in enumerate(self.windows) if len(window.ids) == batch.ids.shape[1]]
        n_row = min(n_row, len(fit))
        if n_row == 0:
            return None
        odds = None
        if self.policy == "surprise":
            odds = np.array([max(self.losses[i], 1e-6) for i in fit])
            odds = odds / odds.sum()
        places = [fit[i] for i in rng.choice(len(fit), size=n_row, replace=False, p=odds)]
        columns = zip(*(self.windows[i] for i in places), strict=True)
        rows = Window(*(torch.stack(part).to(batch.ids.device) for part in columns))
        drawn = Batch(
            ids=rows.ids,
            targets=rows.targets,
            weight=rows.weight,
            answer=rows.answer,
            reset=rows.reset if bool(rows.reset.any()) else None,
            breaks=rows.breaks if bool(rows.breaks.any()) else None,
            mask=None if bool(rows.mask.all()) else rows.mask,
            fresh=True,
            ends=True,
            step=batch.step,
            memory=batch.memory,
        )
        return drawn, places

    def update(self, places: list[int], loss: Tensor) -> None:
        """Note the loss of windows that were replayed."""
        for place, value in zip(places, loss.tolist(), strict=True):
            self.losses[place] = value

    def state_dict(self) -> dict[str, Any]:
        """The buffer, as plain tensors and numbers."""
        return {
            "windows": [window._asdict() for window in self.windows],
            "losses": list(self.losses),
            "n_seen": self.n_seen,
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take up a buffer; of one that is too large, the first windows."""
        self.windows, self.losses, self._places, self.n_seen = [], [], {}, content["n_seen"]
        pairs = zip(content["windows"][: self.capacity], content["losses"][: self.capacity], strict=True)
        for place, (window, loss) in enumerate(pairs):
            self._put(place, Window(**window), loss)

    def take_up(self, parts: list[dict[str, Any]], rank: int, n_rank: int) -> None:
        """Go on with the buffers of all processes.

        As many processes as there were have their own again. Else each gets a share in which every window is kept once;
        of more than fit, those with the greatest loss (``surprise``) or an even sample (``reservoir``).

        Args:
            parts: `state_dict` of each process, by rank.
            rank: Of this process.
            n_rank: Processes there are now.
        """
        if len(parts) == n_rank:
            self.load_state_dict(parts[rank])
            return
        n_seen = sum(part["n_seen"] for part in parts)
        pairs = [pair for part in parts for pair in zip(part["windows"], part["losses"], strict=True)]
        once = list({_name(Window(**window)): (window, loss) for window, loss in pairs}.values())
        once = [once[i] for i in self._rng(n_seen, 0, 2).permutation(len(once))]
        if self.policy == "surprise":
            once.sort(key=lambda pair: -pair[1])
        share = once[rank::n_rank]
        self.load_state_dict(
            {
                "windows": [window for window, _ in share],
                "losses": [loss for _, loss in share],
                "n_seen": n_seen // n_rank + (rank < n_seen % n_rank),
            }
        )

    def _put(self, place: int, window: Window, loss: float) -> None:
        if place == len(self):
            self.windows.append(window)
            self.losses.append(loss)
        else:
            del self._places[_name(self.windows[place])]
            self.windows[place], self.losses[place] = window, loss
        self._places[_name(window)] = place

    def _rng(self, step: int, rank: int, use: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, rank, use])


def build_replay(config: Mapping[str, Any]) -> Replay | None:
    """The buffer of ``config["replay"]``; None if there is none."""
    settings = {name: value for name, value in config["replay"].items() if name != "_target_"}
    return Replay(**settings, seed=config["seed"]) if settings else None


def _rows(batch: Batch, n_segment: int) -> list[Window]:
    """The rows of a batch on the CPU, each a copy, so that the batch need not be kept."""
    n_row, n_token = batch.ids.shape
    none = torch.zeros(n_row, n_segment, dtype=torch.bool)
    parts = [batch.ids, batch.targets, batch.weight, batch.answer]
    parts += [none if flag is None else flag for flag in (batch.reset, batch.breaks)]
    parts.append(torch.ones(n_row, n_token, dtype=torch.bool) if batch.mask is None else batch.mask)
    parts = [part.detach().cpu() for part in parts]
    return [Window(*(part[row].clone() for part in parts)) for row in range(n_row)]


def _name(window: Window) -> bytes:
    return window.ids.numpy().tobytes()
