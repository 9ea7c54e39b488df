"""Batches as a pure function of seed, step and row.

Nothing here has a position of its own: the batch of a step is computed from the step alone. Resuming in the middle of
an epoch, any number of loader workers and any number of ranks therefore give the same batches.

Shapes: B rows, S segments of a window, T tokens per segment, N = S * T.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from memlm.data.curriculum import Curriculum
from memlm.data.tasks.base import Task
from memlm.data.tokens import TokenizedCorpus


class Batch(NamedTuple):
    """A window of every row.

    Attributes:
        ids: (B, N).
        targets: The token after each, or what a task asks for in its place, (B, N).
        weight: 1 where a target counts, 0 at padding and document ends, (B, N).
        answer: Targets that answer a question about a planted fact, (B, N), bool.
        reset: Segments that begin a document, (B, S); None if the whole batch begins new documents or none does.
        breaks: Segments that begin a new context within their document, (B, S); None if there are none.
        mask: Tokens that are no padding, (B, N); None if all are.
        fresh: Whether every row begins a new document.
        ends: Whether every row's document ends with this window, so that no state need be carried on.
        step: Number of the batch.
        told: Targets that are worth to be remembered, (B, N), bool; None if no task says so.
    """

    ids: Tensor
    targets: Tensor
    weight: Tensor
    answer: Tensor
    reset: Tensor | None
    breaks: Tensor | None
    mask: Tensor | None
    fresh: bool
    ends: bool
    step: int
    told: Tensor | None = None


class TextStream:
    """Documents one after the other, cut into segments, dealt out to rows.

    Args:
        corpus: The documents.
        segment_len: Tokens per segment.
        pad_id: Id of padding.
        seed: Of the order of the documents and of where a pass begins; None for the order of the corpus.
    """

    def __init__(self, corpus: TokenizedCorpus, segment_len: int, pad_id: int, seed: int | None) -> None:
        self.corpus, self.segment_len, self.pad_id, self.seed = corpus, segment_len, pad_id, seed
        self._per_document = -(-np.diff(corpus.offsets) // segment_len)  # segments of each document
        self.n_segment = int(self._per_document.sum())
        self.n_document = int((self._per_document > 0).sum())  # that have a token
        self._pass: tuple[int, np.ndarray, np.ndarray, int] | None = None

    def window(self, row: int, n_row: int, first: int, n_segment: int) -> tuple[np.ndarray, ...]:
        """``n_segment`` segments of a row's endless stream, from its segment ``first`` on.

        Returns:
            ids, targets, weight, mask, each (n_segment, T), and reset (n_segment,).
        """
        share = max(self.n_segment // n_row, 1)  # segments of one row in one pass over the corpus
        shape = (n_segment, self.segment_len)
        ids, targets = np.full(shape, self.pad_id, dtype=np.int64), np.full(shape, self.pad_id, dtype=np.int64)
        weight, mask = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        reset = np.zeros(n_segment, dtype=bool)
        for i in range(n_segment):
            epoch, place = divmod(first + i, share)
            order, ends, turn = self._documents(epoch)
            place_in_pass = (row * share + place + turn) % self.n_segment
            rank = int(np.searchsorted(ends, place_in_pass, side="right"))
            index = order[rank]
            within = place_in_pass - int(ends[rank] - self._per_document[index])
            start = int(self.corpus.offsets[index]) + within * self.segment_len
            stop = min(start + self.segment_len, int(self.corpus.offsets[index + 1]))
            n, n_target = stop - start, min(stop + 1, int(self.corpus.offsets[index + 1])) - start - 1
            ids[i, :n] = self.corpus.tokens[start:stop]
            targets[i, :n_target] = self.corpus.tokens[start + 1 : start + 1 + n_target]
            weight[i, :n_target], mask[i, :n] = 1.0, True
            reset[i] = within == 0 or place == 0
        return ids, targets, weight, mask, reset

    def _documents(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Order of the documents in a pass, where each ends in it, in segments, and the segment it begins with."""
        if self._pass is None or self._pass[0] != epoch:
            order, turn = np.arange(self.corpus.n_document), 0
            if self.seed is not None:
                rng = np.random.default_rng([self.seed, epoch])
                order, turn = rng.permutation(order), int(rng.integers(self.n_segment))
            self._pass = (epoch, order, self._per_document[order].cumsum(), turn)
        return self._pass[1:]


class TrainingBatches(Dataset[Batch]):
    """Training batches by step.

    Args:
        corpus: Training text.
        segment_len: Tokens per segment.
        pad_id: Id of padding.
        curriculum: Phases of training.
        task: What documents of the curriculum's phases hold; needed if a phase has a task.
        n_step: Number of batches.
        seed: Seed of everything random.
        rank: Rank of this process; row ``rank * B + i`` of the global batch is row ``i`` here.
        n_rank: Number of processes.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        segment_len: int,
        pad_id: int,
        curriculum: Curriculum,
        task: Task | None,
        n_step: int,
        seed: int,
        rank: int = 0,
        n_rank: int = 1,
    ) -> None:
        self.corpus, self.segment_len, self.curriculum, self.task = corpus, segment_len, curriculum, task
        self.stream = TextStream(corpus, segment_len, pad_id, seed)
        self.n_step, self.seed, self.rank, self.n_rank = n_step, seed, rank, n_rank

    def __len__(self) -> int:
        return self.n_step

    def __getitem__(self, step: int) -> Batch:
        index, phase, within = self.curriculum.at(step)
        n_row = phase.n_row // self.n_rank
        rows = [self.rank * n_row + i for i in range(n_row)]
        if phase.task is None:
            parts = [self.stream.window(row, phase.n_row, within * phase.n_segment, phase.n_segment) for row in rows]
            return _text_batch(parts, step, first=within == 0)
        assert self.task is not None
        n_token = phase.n_segment * self.segment_len
        document, window = divmod(within, phase.n_window)
        tokens, targets, answers, breaks, weights, told = [], [], [], [], [], []
        for row in rows:
            rng = np.random.default_rng([self.seed, index, row, document])
            length = phase.n_window * n_token + 1
            passage = _passage(rng, self.corpus.tokens, length)
            planted = self.task.document(rng, passage, self.segment_len, **phase.task)
            cells = slice(window * n_token, (window + 1) * n_token)
            tokens.append(planted.tokens[cells])
            targets.append((planted.tokens[1:] if planted.targets is None else planted.targets)[cells])
            answers.append(planted.answer[cells])
            breaks.append(planted.breaks[window * phase.n_segment : (window + 1) * phase.n_segment])
            weight = np.ones(length - 1) if planted.weight is None else planted.weight
            weights.append(weight[cells].astype(np.float32))
            if planted.told is not None:
                told.append(planted.told[cells])
        return Batch(
            ids=torch.from_numpy(np.stack(tokens)),
            targets=torch.from_numpy(np.stack(targets)),
            weight=torch.from_numpy(np.stack(weights)),
            answer=torch.from_numpy(np.stack(answers)),
            reset=None,
            breaks=torch.from_numpy(np.stack(breaks)),
            mask=None,
            fresh=window == 0,
            ends=window == phase.n_window - 1,
            step=step,
            told=torch.from_numpy(np.stack(told)) if told else None,
        )


class ValidationBatches(Dataset[Batch]):
    """One pass over a text, for validation and for experiments: rows go through their share of the documents in order.

    A document is cut where the share of a row begins, and memory begins anew there. So there are no more rows than
    documents, nor than windows; windows are longer then, and a batch has as many tokens. What is left when segments are
    dealt out evenly, less than one for each row, is not read.

    Args:
        corpus: The text.
        segment_len: Tokens per segment.
        pad_id: Id of padding.
        n_row: Rows, at most.
        n_segment: Segments per window, if there are as many rows.

    Attributes:
        n_row: Rows.
    """

    def __init__(
        self, corpus: TokenizedCorpus, segment_len: int, pad_id: int, n_row: int = 8, n_segment: int = 4
    ) -> None:
        self.stream = TextStream(corpus, segment_len, pad_id, seed=None)
        self.n_row = max(1, min(n_row, self.stream.n_document, self.stream.n_segment // n_segment))
        self.n_segment = n_row * n_segment // self.n_row

    def __len__(self) -> int:
        return -(-(self.stream.n_segment // self.n_row) // self.n_segment)

    def __getitem__(self, step: int) -> Batch:
        if step >= len(self):
            raise IndexError(step)
        first = step * self.n_segment
        n_segment = min(self.n_segment, self.stream.n_segment // self.n_row - first)
        parts = [self.stream.window(row, self.n_row, first, n_segment) for row in range(self.n_row)]
        return _text_batch(parts, step, first=step == 0)


def _text_batch(parts: list[tuple[np.ndarray, ...]], step: int, first: bool) -> Batch:
    """A batch of plain text from the windows of its rows."""
    ids, targets, weight, mask = (torch.from_numpy(np.stack([part[i] for part in parts])).flatten(1) for i in range(4))
    reset = torch.from_numpy(np.stack([part[4] for part in parts]))
    reset[:, 0] |= first
    return Batch(
        ids=ids,
        targets=targets,
        weight=weight,
        answer=torch.zeros_like(mask),
        reset=reset if bool(reset.any()) else None,
        breaks=None,
        mask=None if bool(mask.all()) else mask,
        fresh=first,
        ends=False,
        step=step,
    )


def _passage(rng: np.random.Generator, tokens: np.ndarray, length: int) -> np.ndarray:
    """``length`` tokens from a random place, going round at the end of the text."""
    start = int(rng.integers(len(tokens)))
    passage = tokens[start : start + length]
    while len(passage) < length:
        passage = np.concatenate([passage, tokens[: length - len(passage)]])
    return passage.astype(np.int64)
