"""Lightning callbacks and plugins: checkpoints, throughput, experiments during training, what the console shows."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from memlm import checkpoint

_N_LINE = 20  # lines of progress in a log file
_REFRESH = 0.5  # seconds between two looks at the numbers of the bar: each waits for the accelerator


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent, and that hold no code."""

    def save_checkpoint(self, content: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `memlm.checkpoint.write`."""
        checkpoint.write(content, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `memlm.checkpoint.read_plain`; what a run goes on from was looked at before."""
        return checkpoint.read_plain(Path(path))


class Checkpoints(Checkpoint):
    """Writes ``step=N.ckpt`` every so many steps, after the last one and on SIGTERM, and keeps the newest.

    A file gets its name only when all of its step is logged and validated, so that a run which goes on from it has lost
    no number.

    Args:
        run: Run directory.
        every: Optimizer steps between checkpoints.
        keep: How many are kept; None for all.
    """

    def __init__(self, run: Path, every: int, keep: int | None) -> None:
        self.run, self.every, self.keep = run, every, keep
        self._last = 0  # step of the newest checkpoint
        self._seen, self._stepped = 0, False
        self._written: Path | None = None  # the checkpoint that has yet to get its name

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """What a run goes on from is there already."""
        self._last = self._seen = trainer.global_step
        self._stepped = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time; with accumulated gradients only right after an optimizer step."""
        step = trainer.global_step
        self._stepped, self._seen = step != self._seen, step
        if step != self._last and (step % self.every == 0 or step == trainer.max_steps):
            self._last = step
            self._write(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """All of the step before is logged."""
        self._publish(trainer)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """All of the last step is logged."""
        self._publish(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Write what was trained before a SIGTERM, which comes between batches, and end with the exit code of one.

        In the middle of accumulated gradients or of a validation the last checkpoint is what there is to go on from.
        """
        self._publish(trainer)
        if not isinstance(exception, SIGTERMException):
            return
        exception.code = 128 + signal.SIGTERM
        if self._stepped and trainer.global_step != self._last and not trainer.validating:
            self._write(trainer)
            self._publish(trainer)

    def _write(self, trainer: lightning.Trainer) -> None:
        """Write a checkpoint under a name by which it is not taken for one."""
        path = self.run / checkpoint.FOLDER / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(checkpoint.unfinished(path))
        self._written = path

    def _publish(self, trainer: lightning.Trainer) -> None:
        """Give the checkpoint that was written its name, then remove what is too old."""
        path, self._written = self._written, None
        if path is None or not trainer.is_global_zero:
            return
        try:
            os.replace(checkpoint.unfinished(path), path)
        finally:
            checkpoint.unfinished(path).unlink(missing_ok=True)
        if self.keep is not None:
            for old in checkpoint.checkpoints(self.run)[: -self.keep]:
                old.unlink()


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` over the steps since the last log."""

    def __init__(self) -> None:
        self._since = 0.0
        self._tokens = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the clock."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

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
            module.log("train/tokens_per_second", self._tokens / max(now - self._since, 1e-9))
            self._since, self._tokens = now, 0

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Leave validation out of the clock."""
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Go on."""
        self._since += time.perf_counter() - self._stopped


class DuringTraining(Callback):
    """Runs experiments every so many batches and logs some of their numbers.

    Args:
        run: Called with the model; returns numbers by the name under which they are logged.
        every: Batches between runs.
        clock: Leaves the experiments out of its clock.
    """

    def __init__(
        self, run: Callable[[torch.nn.Module], Mapping[str, float]], every: int, clock: Throughput | None = None
    ) -> None:
        self.run, self.every, self.clock = run, every, clock

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run when it is time."""
        if (batch_idx + 1) % self.every:
            return
        with self.clock.paused() if self.clock is not None else contextlib.nullcontext():
            numbers = {name: float(value) for name, value in self.run(module.model).items()}  # type: ignore[operator, arg-type]
        if not numbers:
            return
        for name, value in numbers.items():
            module.log(name, value, logger=False, rank_zero_only=True)
        # Not by `module.log`, which would forget the numbers of a step that is not logged.
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step - 1)
            logger.save()


class Progress(ProgressBar):
    """One bar over all steps with the numbers that matter; plain lines, fewer of them, where there is no terminal."""

    _SHOWN = {  # noqa: RUF012 - never changed
        "loss": ("train/loss", "{:.3f}"),
        "tok/s": ("train/tokens_per_second", "{:,.0f}"),
        "recall": ("recall/on", "{:.1%}"),
        "reads off": ("recall/off", "{:.1%}"),
    }

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._looked, self._printed, self._every = 0.0, -1, 1

    def disable(self) -> None:
        """Show nothing (on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Open the bar where training stands."""
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True
            )
        self._printed = trainer.global_step
        self._every = max(trainer.max_steps // _N_LINE, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        if self._bar is not None:
            now = time.monotonic()
            if last or now - self._looked > _REFRESH:
                self._looked = now
                self._bar.set_postfix_str(self._numbers(trainer), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if self._enabled and step != self._printed and (last or step % self._every == 0):
            self._printed = step
            print(f"step {step:,} of {trainer.max_steps:,}: {self._numbers(trainer)}", flush=True)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that what comes next has a line of its own."""
        self._close()
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and self._enabled:
            print(f"stopped after step {trainer.global_step}: go on with resume=auto", file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _numbers(self, trainer: lightning.Trainer) -> str:
        found = trainer.callback_metrics
        return ", ".join(
            f"{label} {form.format(float(found[name]))}" for label, (name, form) in self._SHOWN.items() if name in found
        )
