"""Reading documents with a model, in batches, before it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlm.analysis.usage import banks
from memlm.evaluation.recall.haystack import Document
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel

_WINDOW = 16  # segments read per call


class Consolidation:
    """Consolidates memories now and then while documents are read, and counts what that frees.

    Args:
        every: Segments from one time to the next.

    Attributes:
        every: See above.
        merged: Slots that were merged into another since the documents' beginning, (B,), or () if it was not time yet.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.merged = torch.tensor(0)

    def __call__(self, model: LanguageModel, state: Any, turn: int) -> Any:
        """The state with consolidated memories; ``turn`` is how often that was done before."""
        new = model.map_memory(lambda module, part: module.consolidate(part, turn=turn)[0], state)
        self.merged = self.merged + _n_filled(model, state) - _n_filled(model, new)
        return new


def _n_filled(model: LanguageModel, state: Any) -> Tensor:
    """Slots that hold something, of all memories, for each row, (B,); 0 without memory."""
    counts = (module.filled(part).sum(dim=1).cpu() for module, part in banks(model, state).values())
    return sum(counts, torch.tensor(0))


def read(
    model: LanguageModel,
    documents: Sequence[Document],
    lengths: Sequence[int],
    progress: Callable[[int], None] | None = None,
    consolidation: Consolidation | None = None,
) -> Iterator[Any]:
    """Read documents side by side.

    Args:
        model: A language model.
        documents: One per row; of those that end before the others, what would follow is left out.
        lengths: Tokens after which to stop and look, ascending.
        progress: Called with the tokens read so far of a document.
        consolidation: What is done to memories in between; None for nothing.

    Yields:
        At each length the memories, without local context.
    """
    device = device_of(model)
    state, place = None, 0
    step = lengths[-1]
    if consolidation:
        step, consolidation.merged = consolidation.every * model.segment_len, torch.tensor(0)
    for length in lengths:
        while place < length:
            end = min(place + _WINDOW * model.segment_len, length, (place // step + 1) * step)
            ids = torch.from_numpy(np.stack([document.tokens(place, end) for document in documents])).long()
            there = torch.tensor([length if (n := document.n_token) is None else n for document in documents])
            mask = torch.arange(place, end) < there[:, None]
            options: dict[str, Any] = {} if bool(mask.all()) else {"mask": mask.to(device)}
            state = model.absorb(ids.to(device), state, donate=True, **options)
            place = end
            if consolidation and place % step == 0:
                state = consolidation(model, state, place // step - 1)
            if progress is not None:
                progress(place)
        yield model.new_context(state)


def visit(
    model: LanguageModel,
    documents: Sequence[Document],
    lengths: Sequence[int],
    n_row: int,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
    consolidation: Consolidation | None = None,
) -> Iterator[tuple[range, int, Any]]:
    """Read documents, some side by side.

    Args:
        model: A language model.
        documents: The documents.
        lengths: See `read`.
        n_row: Documents to read at once, where rows do not share a memory.
        progress: Called with the share of the text that is read, in 0..1.
        share: Which of the documents.
        consolidation: See `read`.

    Yields:
        Numbers of the documents that were read side by side, which of the lengths was reached, and their memories
        there, without local context.
    """
    groups = share.groups(len(documents), n_row_of(model, n_row))
    n_token = sum(map(len, groups)) * lengths[-1]
    for numbers in groups:

        def show(place: int, before: int = numbers[0] - groups[0][0], n: int = len(numbers)) -> None:
            if progress is not None:
                progress((before * lengths[-1] + n * place) / n_token)

        states = read(model, [documents[i] for i in numbers], lengths, show, consolidation)
        yield from ((numbers, i, state) for i, state in enumerate(states))


def part_of(
    progress: Callable[[float], None] | None, done: float, more: float, total: float
) -> Callable[[float], None]:
    """What reports the share of a part as a share of the whole: the part adds ``more`` to what is ``done``."""

    def report(share: float) -> None:
        if progress is not None:
            progress((done + share * more) / total)

    return report


def n_row_of(model: LanguageModel, wanted: int) -> int:
    """Documents to read at once: one where all rows share a memory."""
    return 1 if is_shared(model) else wanted


def is_shared(model: LanguageModel) -> bool:
    """Whether a memory of the model has one bank for all rows."""
    return any(modules[0].scope == "shared" for modules in model.memory.values())


def device_of(model: LanguageModel) -> torch.device:
    """Where the model is."""
    return next(model.parameters(), torch.empty(0)).device
