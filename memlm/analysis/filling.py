"""How the slots of a memory fill while text is read: how many, how soon, what is pushed out, how many are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memlm.analysis.flow import Text, check_texts, token_ids
from memlm.analysis.usage import banks, read_weights, slot_changes, slot_reads
from memlm.config import ConfigError
from memlm.memory.state import n_byte
from memlm.models.base import LanguageModel
from memlm.statistics import effective


@dataclass(frozen=True)
class BankCapacity:
    """What became of the slots of one bank; means over texts.

    Attributes:
        n_slot: Slots.
        state_bytes: Bytes of them all, full or not.
        n_filled: Slots that hold something, after each segment, (S,).
        written: Slots that each segment wrote, (S,).
        evicted: Slots whose contents each segment pushed out, (S,).
        full_after: Tokens after which no slot of any text was empty any more; None if that did not happen.
        effective_reads: Slots that all reads together would be spread over as evenly: exp of their entropy.
        read_weight: Share of the read weight that was on slots; the rest was read from nothing.
    """

    n_slot: int
    state_bytes: int
    n_filled: list[float]
    written: list[float]
    evicted: list[float]
    full_after: int | None
    effective_reads: float
    read_weight: float

    @property
    def filled_share(self) -> float:
        """Share of the slots that hold something at the end."""
        return self.n_filled[-1] / self.n_slot

    @property
    def kept_share(self) -> float:
        """Share of what was ever written that is still there at the end, 1 if nothing was."""
        written = sum(self.written)
        return 1 - min(sum(self.evicted) / written, 1.0) if written else 1.0


@dataclass(frozen=True)
class Capacity:
    """What became of the slots of a model.

    Attributes:
        banks: By bank, see `memlm.analysis.usage.banks`.
        n_text: Texts that were read.
        n_token: Tokens read of each.
    """

    banks: dict[str, BankCapacity]
    n_text: int
    n_token: int


@torch.no_grad()
def analyze_memory_capacity(model: LanguageModel, texts: Sequence[Text] | torch.Tensor) -> Capacity:
    """How the slots of a model fill while it reads texts, each with memories of its own.

    This is about slots, not about what can be recalled from them: for that see ``experiment=capacity``. Texts are cut
    to the length of the shortest, in whole segments. A bank that all rows share is copied for each text.

    Args:
        model: A language model; it is left as it was.
        texts: Texts or token ids, one row each.

    Raises:
        ConfigError: If there is no text, one is shorter than a segment, or ``texts`` is a bare text.
    """
    check_texts("texts", texts)
    rows = [token_ids(model, text) for text in texts]
    segment_len, device = model.segment_len, model.head_weight.device
    n_segment = min(map(len, rows), default=0) // segment_len
    if n_segment < 1:
        raise ConfigError(
            f"expected at least one text, and each of at least one segment ({segment_len} tokens), "
            f"got lengths {sorted(map(len, rows))[:5]}"
        )
    training = model.training
    model.eval()
    found: list[dict[str, BankCapacity]] = []
    try:
        for row in rows:
            ids = torch.tensor([row[: n_segment * segment_len]], device=device)
            found.append(_read(model, ids))
    finally:
        model.train(training)
    joined = {label: _mean([part[label] for part in found], segment_len) for label in found[0]}
    return Capacity(joined, len(rows), n_segment * segment_len)


def _read(model: LanguageModel, ids: torch.Tensor) -> dict[str, BankCapacity]:
    """What became of the slots while one text (1, N) was read."""
    state = model.init_state(1)
    counts: dict[str, tuple[list[float], list[float], list[float]]] = {
        label: ([], [], []) for label in banks(model, state)
    }
    weight = {label: np.zeros(module.filled(part).shape[1]) for label, (module, part) in banks(model, state).items()}
    mass: dict[str, list[float]] = {label: [] for label in counts}
    for part in ids.split(model.segment_len, dim=1):
        out = model(part, state=state, logits=False)
        for label, read in read_weights(model, out.reads, state).items():
            weight[label] += read[0].double().cpu().numpy()
        for key, (_, weights) in slot_reads(out.reads).items():
            mass[key if key in mass else key.partition("/")[0]].append(float(weights.sum(dim=2).mean()))
        before, after = banks(model, state), banks(model, out.state)
        for label, (module, now) in after.items():
            written, evicted = slot_changes(module, before[label][1], now)
            for count, mask in zip(counts[label], (module.filled(now), written, evicted), strict=True):
                count.append(float(mask.sum()))
        state = out.state
    return {
        label: BankCapacity(
            n_slot=len(weight[label]),
            state_bytes=n_byte(part),
            n_filled=counts[label][0],
            written=counts[label][1],
            evicted=counts[label][2],
            full_after=None,
            effective_reads=effective(weight[label]),
            read_weight=float(np.mean(mass[label])) if mass[label] else 0.0,
        )
        for label, (_, part) in banks(model, state).items()
    }


def _mean(parts: Sequence[BankCapacity], segment_len: int) -> BankCapacity:
    """The mean over texts."""

    def mean(name: str) -> list[float]:
        return np.mean([getattr(part, name) for part in parts], axis=0).tolist()

    first = parts[0]
    full = [s for s, n in enumerate(mean("n_filled")) if n == first.n_slot]
    return BankCapacity(
        n_slot=first.n_slot,
        state_bytes=first.state_bytes,
        n_filled=mean("n_filled"),
        written=mean("written"),
        evicted=mean("evicted"),
        full_after=(full[0] + 1) * segment_len if full else None,
        effective_reads=float(np.mean([part.effective_reads for part in parts])),
        read_weight=float(np.mean([part.read_weight for part in parts])),
    )
