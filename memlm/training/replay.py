"""Experience replay: windows of earlier steps, trained on again with fresh memories.

Shapes: B rows, S segments of a window, N = S * T tokens, M slots of a bank, L tokens of a slot, R slots that were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from memlm.config import ConfigError, check_kind, instantiate
from memlm.data.stream import Batch
from memlm.memory.contract import Read as MemoryRead
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel, placed

Policy = Literal["reservoir", "surprise", "retrieved"]

_FACTOR = 6_364_136_223_846_793_005  # of a polynomial hash modulo 2**64 (Knuth's MMIX)


class Window(NamedTuple):
    """What one row of a batch was trained on; see `memlm.data.stream.Batch`, whose rows these are, on the CPU."""

    ids: Tensor
    targets: Tensor
    weight: Tensor
    answer: Tensor
    reset: Tensor  # (S,)
    breaks: Tensor  # (S,)
    mask: Tensor
    told: Tensor


class Read(NamedTuple):
    """Slots that a batch read and that earlier windows wrote.

    Attributes:
        tokens: Ids of the tokens that each slot holds, (R, L), on the CPU.
        weight: Read weight of each, summed over tokens and layers, (R,), on the CPU.
    """

    tokens: Tensor
    weight: Tensor


class Replay:
    """A bounded buffer of windows, and which of them a step trains on again.

    Windows that are the same token for token are kept once. A task's documents of several windows are kept by their
    first one alone, as later ones ask for what was told before them. What is drawn depends on the seed, the step and
    the buffer, which is part of the checkpoint.

    Args:
        policy: What is kept when the buffer is full, and how it is drawn. ``reservoir``: an even sample of all windows
            so far, drawn evenly (Vitter, Algorithm R). ``surprise``: the windows with the greatest loss when they were
            last trained on, drawn in proportion to it. ``retrieved``: an even sample of all windows so far, of which
            those are drawn whose text the memory read most for the batch (see `draw`).
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
            elif self.policy != "surprise":
                if (place := int(rng.integers(self.n_seen))) < self.capacity:
                    self._put(place, window, value)
            elif value > min(self.losses):
                self._put(int(np.argmin(self.losses)), window, value)

    def draw(self, batch: Batch, rank: int = 0, reads: Sequence[Read] = ()) -> tuple[Batch, list[int]] | None:
        """Rows to train on beside a batch: windows as long as its own, each a document of its own.

        Under ``retrieved`` a slot counts for every window in which its tokens stand in a row, with its weight; the
        windows with the greatest sums are drawn, of equal ones those that were kept first, and none of sum zero.

        Args:
            batch: The batch.
            rank: Of this process.
            reads: What the batch read from each memory (see `retrieved`); only ``retrieved`` asks for it.

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
        if self.policy == "retrieved":
            read = self._read(fit, reads)
            places = [fit[i] for i in np.argsort(-read, kind="stable")[:n_row] if read[i] > 0]
            if not places:
                return None
        else:
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
            told=rows.told if bool(rows.told.any()) else None,
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

    def _read(self, places: list[int], reads: Sequence[Read]) -> np.ndarray:
        """How much of the text of some windows was read, (len(places),)."""
        total = np.zeros(len(places))
        ids = np.stack([self.windows[place].ids.numpy() for place in places])  # (n, N)
        for tokens, weight in reads:
            whole = (tokens >= 0).all(dim=1)  # a slot from the start of a context holds fewer tokens
            if ids.shape[1] < tokens.shape[1] or not whole.any():
                continue
            slots, which = np.unique(_spans(tokens[whole].numpy(), tokens.shape[1])[:, 0], return_inverse=True)
            worth = np.bincount(which, weight[whole].numpy())
            spans = _spans(ids, tokens.shape[1])  # (n, N - L + 1)
            found = np.searchsorted(slots, spans).clip(max=len(slots) - 1)
            window, place = (slots[found] == spans).nonzero()
            once = np.unique(np.stack([window, found[window, place]]), axis=1)
            total += np.bincount(once[0], worth[once[1]], minlength=len(places))
        return total

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


def check_sources(model: LanguageModel) -> None:
    """Check that ``retrieved`` has something to go by.

    Raises:
        ConfigError: If no memory of the model says which text its slots hold.
    """
    modules = [part.module for part in placed(model) if isinstance(part.module, Slots)]
    if all(module.tokens(module.init_state(1)) is None for module in modules):
        names = ", ".join(model.memory) or "none"
        raise ConfigError(
            f"replay.policy=retrieved replays the text of the slots that are read, but no memory of this model "
            f"({names}) says which text its slots hold: choose one that does (such as memory=ltm), or replay=reservoir"
        )


def retrieved(model: LanguageModel, before: Any, after: Any, reads: Mapping[str, MemoryRead]) -> list[Read]:
    """The text that a batch read from its memories, as far as earlier windows wrote it.

    A slot counts if it holds the same tokens before and after the batch: what was written or replaced in between was
    in no earlier window, or may have been another text when it was read.

    Args:
        model: The model.
        before: Its state before the batch.
        after: Its state after it.
        reads: What the batch read, by name of the memory and layer.

    Returns:
        One `Read` for each memory and layer that says which text its slots hold.
    """
    found = []
    for _, name, number, places, module in placed(model):
        old, new = before.memory[name][number], after.memory[name][number]
        tokens = module.tokens(old) if isinstance(module, Slots) else None
        if tokens is None:
            continue
        weight = torch.zeros(tokens.shape[:2], device=tokens.device)  # (banks, M)
        for read in (reads[place] for place in places if place in reads):
            assert read.slots is not None
            assert read.weights is not None
            slots, weights = (part.detach().reshape(len(tokens), -1) for part in (read.slots, read.weights.float()))
            weight = weight.scatter_add(1, slots.clamp(min=0), weights * (slots >= 0))
        kept: Any = module
        same = (tokens == kept.tokens(new)).all(dim=2) & kept.filled(old)
        held = same & (weight > 0)
        found.append(Read(tokens[held].cpu(), weight[held].cpu()))
    return found


def weightless(batch: Batch) -> Batch:
    """The first row of a batch, in which nothing counts in the loss."""
    first: dict[str, Any] = {name: part[:1] for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**first | {"weight": torch.zeros_like(first["weight"])})


def build_replay(config: Mapping[str, Any]) -> Replay | None:
    """The buffer of ``config["replay"]``; None if there is none.

    Raises:
        ConfigError: If its ``_target_`` is no `Replay`, or a setting cannot work.
    """
    if not config["replay"]:
        return None
    check_kind(config["replay"], "replay", Replay)
    return instantiate({"seed": config["seed"], **config["replay"]}, "replay")


def _spans(ids: np.ndarray, n: int) -> np.ndarray:
    """A number for each ``n`` tokens in a row, (rows, N) -> (rows, N - n + 1): equal spans have equal ones."""
    parts = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), n, axis=1)
    power = np.array([pow(_FACTOR, i, 2**64) for i in range(n)], dtype=np.uint64)
    return parts @ power  # modulo 2**64


def _rows(batch: Batch, n_segment: int) -> list[Window]:
    """The rows of a batch on the CPU, each a copy, so that the batch need not be kept."""
    n_row, n_token = batch.ids.shape
    none = torch.zeros(n_row, n_segment, dtype=torch.bool)
    parts = [batch.ids, batch.targets, batch.weight, batch.answer]
    parts += [none if flag is None else flag for flag in (batch.reset, batch.breaks)]
    parts.append(torch.ones(n_row, n_token, dtype=torch.bool) if batch.mask is None else batch.mask)
    parts.append(torch.zeros(n_row, n_token, dtype=torch.bool) if batch.told is None else batch.told)
    parts = [part.detach().cpu() for part in parts]
    return [Window(*(part[row].clone() for part in parts)) for row in range(n_row)]


def _name(window: Window) -> bytes:
    return window.ids.numpy().tobytes()
