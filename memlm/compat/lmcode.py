"""LMCODE under its own names: configuration, model, trainer, memory operations, monitor, analysis.

Source: the README of LMCODE (Language Model with Memory CODE). The model is that of ``recipe=lmcode_seed``; training is
`memlm.training.module.LanguageModeling` in a plain trainer.

Shapes: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import memlm
from memlm.analysis import efficiency, filling, flow_figure, memory_page, monitor
from memlm.analysis.history import plot_training_history
from memlm.analysis.run_log import read_history
from memlm.config import ConfigError, did_you_mean
from memlm.data.curriculum import Curriculum
from memlm.data.stream import TrainingBatches, ValidationBatches
from memlm.data.tokens import TokenizedCorpus
from memlm.training.callbacks import AtomicCheckpointIO
from memlm.training.module import LanguageModeling
from memlm.training.replay import Replay
from memlm.training.settings import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memlm.store.remembered import Remembered

__all__ = [
    "LMCODE",
    "LMCODEConfig",
    "MemoryAwareTrainer",
    "MemoryDataset",
    "MemoryMonitor",
    "analyze_memory_capacity",
    "compute_memory_efficiency",
    "create_synthetic_dataset",
    "generate_memory_report",
    "plot_training_history",
    "visualize_memory_flow",
]

log = logging.getLogger(__name__)

_BPE = 4096  # tokens of the tokenizer, where the vocabulary is not smaller


@dataclass(frozen=True)
class LMCODEConfig:
    """What an `LMCODE` is made of.

    Attributes:
        vocab_size: Size of the vocabulary, at least 257: bytes and padding. The tokenizer, trained on the built-in
            text, uses at most 4,096 of it.
        hidden_size: Width, a multiple of ``num_heads``.
        num_layers: Layers, all with both memories.
        num_heads: Attention heads, and heads of the short-term memory.
        short_term_memory_size: Short-term slots of each layer.
        long_term_memory_slots: Long-term slots of each layer.
        segment_len: Tokens that attention sees; the source has no such limit. Memory is what leads beyond: of a text
            that is no longer, nothing is read from memory.
    """

    vocab_size: int = 50257
    hidden_size: int = 512
    num_layers: int = 6
    num_heads: int = 8
    short_term_memory_size: int = 512
    long_term_memory_slots: int = 10000
    segment_len: int = 128

    def overrides(self) -> list[str]:
        """The same for `memlm.build`."""
        return [
            "recipe=lmcode_seed",
            f"data.tokenizer.vocab_size={min(self.vocab_size, _BPE)}",
            f"data.tokenizer.n_vocab={self.vocab_size}",
            f"model.d_model={self.hidden_size}",
            f"model.n_layer={self.num_layers}",
            f"model.n_head={self.num_heads}",
            f"model.segment_len={self.segment_len}",
            f"model.overlap={min(16, self.segment_len)}",
            f"memory.stm.n_slot={self.short_term_memory_size}",
            f"memory.stm.n_head={self.num_heads}",
            f"memory.ltm.n_slot={self.long_term_memory_slots}",
            f"memory.ltm.write_budget={min(64, self.segment_len, self.long_term_memory_slots)}",
        ]


class LongTermMemory:
    """The long-term memory of one layer."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @torch.no_grad()
    def consolidate_memories(self, threshold: float = 0.1) -> int:
        """Merge similar slots of what is stored in this layer; `LMCODE.model.consolidate` does all layers.

        Args:
            threshold: Largest cosine distance of what is merged.

        Returns:
            How many slots were merged into another.
        """
        bank, merged = self._module.bank.state(), 0
        for turn in range(self._module.n_turn):
            bank, counts = self._module.consolidate(bank, threshold, turn=turn)
            merged += counts["merged"]
        if merged:
            self._module.bank.commit(bank)
        return merged


@dataclass(frozen=True)
class MemoryAugmentedLayer:
    """A layer, by its memories.

    Attributes:
        short_term_memory: The module `memlm.memory.stm.ShortTermMemory`.
        long_term_memory: What is stored for good.
    """

    short_term_memory: nn.Module
    long_term_memory: LongTermMemory


class LMCODE(nn.Module):
    """A transformer with short-term and long-term memory in every layer: ``memlm.build("recipe=lmcode_seed")``.

    The source says that about 2 % of the parameters belong to memory; with the memories here it is far more in its
    configuration (docs/analysis.md). It promises retrieval in O(log n); here a read scores all slots, or with
    ``memory.ltm.index=inverted`` those of some lists. What is stored is not found well before the model is trained.

    Args:
        config: Sizes.

    Attributes:
        model: memlm's model, with all that the names of the source leave out.
        config: What it was made of.
    """

    def __init__(self, config: LMCODEConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Any = memlm.build(*config.overrides())

    def forward(self, input_ids: Tensor, state: Any = None) -> Any:
        """Output with ``logits`` (B, L, V) and ``state``, to go on from; see `memlm.models.segments.Output`.

        Args:
            input_ids: Token ids, (B, L).
            state: Where the text before stopped; None for the beginning.
        """
        return self.model(input_ids, state=state)

    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = 0.9,
    ) -> Tensor:
        """Go on with a prompt.

        Args:
            input_ids: Prompt, (B, L).
            max_length: Length of prompt and new tokens together; a longer prompt is given back as it is.
            temperature: See `memlm.models.segments.SegmentModel.generate`, as for what follows.
            top_k: Likeliest tokens to sample from; None for all.
            top_p: Probability that they have to reach; None for all.

        Returns:
            Token ids, (B, max_length).
        """
        new = max(max_length - input_ids.shape[1], 0)
        return self.model.generate(input_ids, new, temperature, top_k, top_p)

    def store_experience(self, text: str) -> list[int]:
        """Store a text in long-term memory; ids of its records. See `memlm.store.operations`."""
        return self.model.store_experience(text)

    def query_memory(self, text: str, top_k: int = 5) -> tuple[list[Remembered], list[int]]:
        """What the model reads from long-term memory when it reads a text.

        Before training this says what is stored, not what is relevant: queries and keys are random projections then.

        Args:
            text: What to look for.
            top_k: Most records to return.

        Returns:
            Records by read weight, greatest first, and their ids, for ``model.forget`` and ``model.edit_memory``.
        """
        retrieved = self.model.query_memory(text, top_k=top_k)
        return retrieved, [record.id for record in retrieved]

    @property
    def layers(self) -> list[MemoryAugmentedLayer]:
        """The layers, by their memories."""
        pairs = zip(self.model.memory["stm"], self.model.memory["ltm"], strict=True)
        return [MemoryAugmentedLayer(stm, LongTermMemory(ltm)) for stm, ltm in pairs]


class MemoryDataset:
    """Token sequences to train on, and how much of what was trained is mixed in again.

    Args:
        data: Sequences of token ids; each is a document of its own.
        memory_sample_ratio: Windows of earlier steps that are trained again, per new one (`memlm.training.replay`); 0
            for none.

    Raises:
        ConfigError: If there is no sequence, or one has fewer than two tokens.
    """

    def __init__(self, data: Sequence[Sequence[int]] | Tensor, memory_sample_ratio: float = 0.2) -> None:
        self.sequences = [torch.as_tensor(row, dtype=torch.long) for row in data]
        self.memory_sample_ratio = memory_sample_ratio
        if min(map(len, self.sequences), default=0) < 2:
            raise ConfigError("a MemoryDataset needs sequences of at least two tokens: one to read, one to predict")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequences)

    def __getitem__(self, index: int) -> Tensor:
        """Token ids of a sequence."""
        return self.sequences[index]

    def tokens(self, split: str = "train") -> TokenizedCorpus:
        """All sequences one after the other; every ``split`` is the same."""
        offsets = np.cumsum([0, *map(len, self.sequences)])
        return TokenizedCorpus(torch.cat(self.sequences).numpy(), offsets)


def create_synthetic_dataset(num_samples: int = 1000, seq_len: int = 50, vocab_size: int = 257) -> Tensor:
    """Sequences that repeat a random span of ten tokens: what follows the first span can be predicted.

    Attention alone can do that wherever a sequence is no longer than a segment. For data that asks for memory see
    ``curriculum=recall`` and ``recipe=mqar``.

    Args:
        num_samples: Number of sequences.
        seq_len: Tokens of each.
        vocab_size: Ids are drawn below it, from 1.

    Returns:
        Token ids, (num_samples, seq_len); the same for the same numbers.
    """
    spans = torch.from_numpy(np.random.default_rng(0).integers(1, vocab_size, (num_samples, 10)))
    return spans.repeat(1, -(-seq_len // 10))[:, :seq_len]


class MemoryAwareTrainer:
    """Trains an `LMCODE` on token sequences.

    The source says that replay makes samples about 20 % more efficient; ``experiment=continual`` measures what it is
    worth. To train on text, and to learn whether memory is of use: ``python train.py``.

    Args:
        model: What is trained.
        config: Any of ``learning_rate`` (1e-4), ``weight_decay`` (0.01), ``gradient_clip`` (1.0),
            ``memory_consolidation_interval`` (steps, 1000; memories of sequences that go on are consolidated),
            ``warmup_steps`` (1000) and ``total_steps`` (10000): after these the learning rate has run down. How long is
            trained is said by ``num_epochs`` alone.

    Raises:
        ConfigError: If a setting is unknown or out of range.
    """

    def __init__(self, model: LMCODE, config: Mapping[str, Any] | None = None) -> None:
        settings = {
            "learning_rate": 1e-4, "weight_decay": 0.01, "gradient_clip": 1.0, "memory_consolidation_interval": 1000,
            "warmup_steps": 1000, "total_steps": 10000,
        }  # fmt: skip
        for name in config or {}:
            if name not in settings:
                raise ConfigError(f"trainer_config has no setting {name!r}.{did_you_mean(name, settings)}")
        settings |= config or {}
        self.model, self._clip, self._total = model, settings["gradient_clip"], int(settings["total_steps"])
        self._settings = Training(
            lr=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            warmup_steps=int(settings["warmup_steps"]),
            consolidate_every=int(settings["memory_consolidation_interval"]),
        )
        self._trainer: lightning.Trainer | None = None

    def train(
        self,
        train_dataset: MemoryDataset,
        num_epochs: int = 10,
        batch_size: int = 32,
        eval_dataset: MemoryDataset | None = None,
    ) -> dict[str, list[Any]]:
        """Train; sequences come in an order of their own in every epoch.

        Args:
            train_dataset: What to train on.
            num_epochs: How often.
            batch_size: Sequences of a step.
            eval_dataset: Measured at the end of every epoch; None for nothing.

        Returns:
            What was logged, as columns of one value per row, None where there is none: ``step``, ``train/loss``,
            ``val/nll`` and what memories do (docs/dashboard.md). For `plot_training_history`.

        Raises:
            ConfigError: If a number is below 1.
        """
        for name, number in {"num_epochs": num_epochs, "batch_size": batch_size}.items():
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
        model, ratio = self.model.model, train_dataset.memory_sample_ratio
        longest = max(map(len, train_dataset.sequences))
        if longest <= model.segment_len:
            log.warning(
                "sequences of at most %d tokens fit into a segment (%d): memory is never read while they are trained; "
                "give longer ones, or LMCODEConfig(segment_len=...)", longest, model.segment_len
            )  # fmt: skip
        n_segment = -(-longest // model.segment_len)
        n_row = min(batch_size, len(train_dataset))
        steps = num_epochs * -(-len(train_dataset) // n_row)
        phase = {"steps": steps, "n_row": n_row, "n_segment": n_segment}
        pad = model.tokenizer.pad_id
        batches = TrainingBatches(
            train_dataset.tokens(), model.segment_len, pad, Curriculum([phase], None), None, steps, seed=0
        )
        held_out = None
        if eval_dataset is not None:
            n_eval = min(batch_size, len(eval_dataset))
            held_out = ValidationBatches(eval_dataset.tokens(), model.segment_len, pad, n_eval, n_segment)
        replay = Replay(ratio=ratio) if ratio else None
        module = LanguageModeling(model, self._settings, total_steps=self._total, replay=replay)
        with tempfile.TemporaryDirectory() as folder:
            logger = CSVLogger(folder)
            self._trainer = lightning.Trainer(
                max_steps=steps,
                gradient_clip_val=self._clip,
                logger=logger,
                log_every_n_steps=max(steps // 100, 1),
                val_check_interval=steps // num_epochs,
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=folder,
                plugins=[AtomicCheckpointIO()],
            )
            self._trainer.fit(
                module,
                DataLoader(batches, batch_size=None),
                None if held_out is None else DataLoader(held_out, batch_size=None),
            )
            rows = read_history(Path(logger.log_dir) / "metrics.csv")
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}

    def save_checkpoint(self, path: str | PathLike[str]) -> None:
        """Write all of the training, to be read by `memlm.load`, which gives memlm's model.

        Args:
            path: The file, which appears whole or not at all.

        Raises:
            ConfigError: If nothing was trained.
        """
        if self._trainer is None:
            raise ConfigError("there is no training to save: call train first, or memlm.checkpoint.export(model.model)")
        self._trainer.save_checkpoint(Path(path))


class MemoryMonitor(monitor.MemoryMonitor):
    """See `memlm.analysis.monitor.MemoryMonitor`."""

    def __init__(self, model: LMCODE) -> None:
        super().__init__(model.model)


def analyze_memory_capacity(model: LMCODE, test_sequences: Sequence[Any] | Tensor) -> filling.Capacity:
    """How slots fill while texts or token ids are read; see `memlm.analysis.filling.analyze_memory_capacity`."""
    return filling.analyze_memory_capacity(model.model, test_sequences)


def compute_memory_efficiency(model: LMCODE) -> efficiency.Efficiency:
    """What the memories cost; see `memlm.analysis.efficiency.compute_memory_efficiency`."""
    return efficiency.compute_memory_efficiency(model.model)


def generate_memory_report(model: LMCODE, dataset: MemoryDataset, path: str | PathLike[str] | None = None) -> str:
    """A web page about the memory; see `memlm.analysis.memory_page.generate_memory_report`.

    Its text is the first sequence, read twice with the local context gone in between, so that the second reading shows
    what memory has kept of the first.
    """
    return memory_page.generate_memory_report(model.model, dataset, [dataset[0], dataset[0]], path)


def visualize_memory_flow(model: LMCODE, input_sequence: str | Sequence[int] | Tensor) -> Figure:
    """What each token reads and from where; see `memlm.analysis.flow_figure.visualize_memory_flow`."""
    return flow_figure.visualize_memory_flow(model.model, input_sequence)
