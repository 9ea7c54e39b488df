"""The LightningDataModule: a corpus, its tokenizer, and batches by step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import lightning
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Sampler

from memlm.config import ConfigError, instantiate
from memlm.data.corpora.base import Corpus
from memlm.data.curriculum import Curriculum
from memlm.data.stream import Batch, TextStream, TrainingBatches, ValidationBatches
from memlm.data.tasks.base import Task
from memlm.data.tasks.facts import Facts
from memlm.data.tasks.makers import FactMaker, Maker
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus, tokenize, tokenize_file

log = logging.getLogger(__name__)

_KEPT = 0.999  # of the characters, at least, or a tokenizer is warned of


class TextData(lightning.LightningDataModule):
    """Streams of text with planted facts.

    Args:
        corpus: The text.
        tokenizer: What encodes it.
        segment_len: Tokens per segment of the model.
        curriculum: Phases of training.
        cache_dir: Where tokens are cached.
        seed: Seed of the order of documents and of planted facts.
        n_worker: Loader processes.
        n_step: Training batches; None for the trainer's ``max_steps`` or else the curriculum's.
        trained_on: Hash of the text that a model was trained on; it is told if this is another one.

    Raises:
        ConfigError: If the training text is shorter than a segment.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        segment_len: int,
        curriculum: Curriculum,
        cache_dir: Path,
        seed: int = 0,
        n_worker: int = 0,
        n_step: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer, self.segment_len, self.curriculum = corpus, tokenizer, segment_len, curriculum
        self.cache_dir, self.seed, self.n_worker, self.n_step = cache_dir, seed, n_worker, n_step
        self.trained_on = trained_on
        self._splits: dict[str, TokenizedCorpus] = {}
        self._facts: Facts | None = None
        self._task: Task | None = None
        self._told = False

    def tokens(self, split: str) -> TokenizedCorpus:
        """Token ids of ``train``, ``val`` or ``test``."""
        if split not in self._splits:
            if not self._splits and self.trained_on not in (None, self.corpus.fingerprint()):
                log.warning(
                    "%s is another text now than the model was trained on: what is held out here may have been trained "
                    "on, and losses cannot be compared",
                    self.corpus.name,
                )
            tokens = tokenize(self.corpus, self.tokenizer, split, self.cache_dir)
            if tokens.n_token <= self.segment_len:
                raise ConfigError(
                    f"the {split} text of {self.corpus.name!r} has {tokens.n_token} tokens, no more than one segment "
                    f"of {self.segment_len}: use more text, or a smaller model.segment_len"
                )
            if np.diff(tokens.offsets).max() < 2:
                raise ConfigError(
                    f"every document of the {split} text of {self.corpus.name!r} is one token, so that none has a next "
                    "one to predict: join them, or use longer ones"
                )
            self._splits[split] = tokens
        return self._splits[split]

    def tokens_of_file(self, path: str) -> TokenizedCorpus:
        """Token ids of a text of the user's own, of any length; see `memlm.data.tokens.tokenize_file`.

        Raises:
            ConfigError: If it cannot be read, or is no longer than a segment.
        """
        tokens = tokenize_file(path, self.tokenizer, self.cache_dir)
        if tokens.n_token <= self.segment_len:
            raise ConfigError(
                f"the text {path!r} has {tokens.n_token} tokens, no more than one segment of {self.segment_len}: give "
                "a longer one"
            )
        return tokens

    @property
    def maker(self) -> FactMaker:
        """Where planted facts of words come from."""
        return self.facts.maker

    def maker_of(self, kind: str) -> Maker:
        """Where planted facts of a kind come from; see `memlm.data.tasks.makers.KINDS`."""
        return self.facts.maker_of(kind)

    @property
    def facts(self) -> Facts:
        """What makes planted facts, whether or not they are trained: the task itself if it is that."""
        if self._facts is None:
            task = self.task
            self._facts = task if isinstance(task, Facts) else Facts(self.tokenizer, self.tokens("train"))
        return self._facts

    @property
    def task(self) -> Task | None:
        """What the curriculum trains beside text; None if nothing."""
        if self._task is None and self.curriculum.task is not None:
            self._task = instantiate(
                self.curriculum.task, "curriculum.task", tokenizer=self.tokenizer, train=self.tokens("train")
            )
        return self._task

    def setup(self, stage: str | None = None) -> None:
        """Tokenise (or load the cached tokens of) what training needs."""
        for split in ("train", "val"):
            self.tokens(split)
        if not self._told:
            self._tell()
            self._told = True

    @rank_zero_only
    def _tell(self) -> None:
        """Log what documents the text has, how much of it the tokenizer keeps, and where memory cannot be read."""
        for split in ("train", "val"):
            tokens = self.tokens(split)
            median = int(np.median(np.diff(tokens.offsets)))
            kept = self.tokenizer.share_kept(self.corpus.documents(split))
            log.info(
                "%s, %s: %s documents of %s tokens, half of them of at least %s; %.2f %% of the characters survive the "
                "tokenizer",
                self.corpus.name, split, f"{tokens.n_document:,}", f"{tokens.n_token:,}", f"{median:,}",
                np.floor(kept * 10_000) / 100,
            )  # fmt: skip
            if kept < _KEPT:
                log.warning(
                    "%s, %s: the tokenizer loses %.2f %% of the characters, or makes them unknown; "
                    "data.tokenizer.kind=bpe and byte lose none",
                    self.corpus.name, split, 100 * (1 - kept),
                )  # fmt: skip
            if median < 2 * self.segment_len:
                log.warning(
                    "%s, %s: half of the documents have at most %d tokens, less than two segments (%d): memory begins "
                    "anew in each, and can be read from the second segment on; join them (data.corpus.document=join), "
                    "or lower model.segment_len",
                    self.corpus.name, split, median, 2 * self.segment_len,
                )  # fmt: skip
        n_segment = TextStream(self.tokens("train"), self.segment_len, self.tokenizer.pad_id, None).n_segment
        for i, phase in enumerate(self.curriculum.phases):
            if phase.task is None and n_segment < 2 * phase.n_row:
                log.warning(
                    "the train text has %d segments for %d rows (curriculum.phases[%d].n_row): memory begins anew at "
                    "each segment, and is never read; use more text, or fewer rows",
                    n_segment, phase.n_row, i,
                )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches from the step where training stands."""
        trainer = self.trainer
        n_step, rank, n_rank, begin = self.n_step, 0, 1, 0
        if trainer is not None:
            accumulate = trainer.accumulate_grad_batches
            n_step = n_step or (trainer.max_steps * accumulate if trainer.max_steps > 0 else None)
            rank, n_rank = trainer.global_rank, trainer.world_size
            begin = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        for i, phase in enumerate(self.curriculum.phases):
            if phase.n_row % n_rank:
                raise ConfigError(
                    f"curriculum.phases[{i}].n_row ({phase.n_row}) must be a multiple of {n_rank} devices"
                )
        dataset = TrainingBatches(
            self.tokens("train"),
            self.segment_len,
            self.tokenizer.pad_id,
            self.curriculum,
            self.task if self.curriculum.has_task else None,
            n_step or self.curriculum.steps,
            self.seed,
            rank,
            n_rank,
        )
        for step in self.curriculum.starts:  # what a task refuses in a later phase is told before the first step
            if begin <= step < len(dataset):
                dataset[step]
        return self._loader(dataset, begin)

    def val_dataloader(self) -> DataLoader[Batch]:
        """One pass over the validation text."""
        return self._loader(ValidationBatches(self.tokens("val"), self.segment_len, self.tokenizer.pad_id), 0)

    def _loader(self, dataset: TrainingBatches | ValidationBatches, begin: int) -> DataLoader[Batch]:
        return DataLoader(dataset, batch_size=None, sampler=_From(len(dataset), begin), num_workers=self.n_worker)


class _From(Sampler[int]):
    """Steps ``begin`` to ``end``, the first time; all of them after that."""

    def __init__(self, end: int, begin: int) -> None:
        self.begin, self.end = begin, end

    def __iter__(self) -> Iterator[int]:
        # A generator: a loader with workers asks for an iterator that it never uses.
        begin, self.begin = self.begin, 0
        yield from range(begin, self.end)

    def __len__(self) -> int:
        return self.end
