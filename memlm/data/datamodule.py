"""The LightningDataModule: a corpus, its tokenizer, and batches by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning
from torch.utils.data import DataLoader, Sampler

from memlm.config import ConfigError, instantiate
from memlm.data.corpus import Corpus
from memlm.data.curriculum import Curriculum
from memlm.data.facts import FactMaker, Facts, Maker
from memlm.data.stream import Batch, TrainingBatches, ValidationBatches
from memlm.data.task import Task
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus, tokenize


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
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer, self.segment_len, self.curriculum = corpus, tokenizer, segment_len, curriculum
        self.cache_dir, self.seed, self.n_worker, self.n_step = cache_dir, seed, n_worker, n_step
        self._splits: dict[str, TokenizedCorpus] = {}
        self._facts: Facts | None = None
        self._task: Task | None = None

    def tokens(self, split: str) -> TokenizedCorpus:
        """Token ids of ``train``, ``val`` or ``test``."""
        if split not in self._splits:
            tokens = tokenize(self.corpus, self.tokenizer, split, self.cache_dir)
            if tokens.n_token <= self.segment_len:
                raise ConfigError(
                    f"the {split} text of {self.corpus.name!r} has {tokens.n_token} tokens, no more than one segment "
                    f"of {self.segment_len}: use more text, or a smaller model.segment_len"
                )
            self._splits[split] = tokens
        return self._splits[split]

    @property
    def maker(self) -> FactMaker:
        """Where planted facts of words come from."""
        return self.facts.maker

    def maker_of(self, kind: str) -> Maker:
        """Where planted facts of a kind come from; see `memlm.data.facts.KINDS`."""
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
