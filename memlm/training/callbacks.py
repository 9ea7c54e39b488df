"""Lightning callbacks and plugins: atomic checkpoints, throughput, experiments during training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from memlm import checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent, and that hold no code."""

    def save_checkpoint(self, content: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `memlm.checkpoint.write`."""
        checkpoint.write(content, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `memlm.checkpoint.read`."""
        return checkpoint.read(Path(path))


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` over the steps since the last log."""

    def __init__(self) -> None:
        self._since = 0.0
        self._tokens = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._since, self._tokens = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of a step."""
        self._tokens += batch.ids.numel() * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now = time.perf_counter()
            module.log("train/tokens_per_second", self._tokens / max(now - self._since, 1e-9), prog_bar=True)
            self._since, self._tokens = now, 0

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Leave validation out of the clock."""
        self._since, self._tokens = time.perf_counter(), 0


class DuringTraining(Callback):
    """Runs an experiment every so many steps and logs some of its numbers.

    Args:
        run: Called with the model; returns numbers by the name under which they are logged.
        every: Steps between runs.
    """

    def __init__(self, run: Callable[[torch.nn.Module], Mapping[str, float]], every: int) -> None:
        self.run, self.every = run, every
        self._last = -1

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run when it is time."""
        step = trainer.global_step
        if step % self.every == 0 and step != self._last:
            self._last = step
            for name, value in self.run(module.model).items():
                module.log(name, float(value), prog_bar=name == "recall/on", rank_zero_only=True)
