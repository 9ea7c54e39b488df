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
from tqdm import tqdm

from memlm import checkpoint
from memlm.files import unfinished
from memlm.output import output_lost
from memlm.training.stopping import OUT_OF_TIME, UNREAD, Signals, Stopped

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
    """Writes ``step=N.ckpt`` every so many steps, after the last one and when asked to stop, and keeps the newest.

    Ctrl-C, SIGHUP (a terminal that is closed, unless it is ignored), SIGTERM, SIGUSR1 and SIGUSR2 (what schedulers send
    before they take a machine away) stop a run after its step, and so does the end of its time. A second Ctrl-C ends
    it at once.

    A file gets its name only when all of its step is logged and validated, so that a run which goes on from it has lost
    no number.

    Args:
        run: Run directory.
        every: Optimizer steps between checkpoints.
        keep: How many are kept; None for all.
        max_seconds: Time from the first step of this start to its last one; None for any.
    """

    def __init__(self, run: Path, every: int, keep: int | None, max_seconds: float | None = None) -> None:
        self.run, self.every, self.keep, self.max_seconds = run, every, keep, max_seconds
        self._end = float("inf")  # of the time
        self._last = 0  # step of the newest checkpoint
        self._written: tuple[Path, Path] | None = None  # the checkpoint that has yet to get its name, and that
        self._seen = 0
        self._signals = Signals(self._ask)
        self._asked: int | None = None  # the exit code, if this process was asked to stop
        self._stopped: Stopped | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """What a run goes on from is there already. A run without this folder never began."""
        self._last = self._seen = trainer.global_step
        self._asked = self._stopped = None
        if trainer.is_global_zero:
            (self.run / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        if self.max_seconds is not None:
            self._end = time.monotonic() + self.max_seconds
        self._signals.listen()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time; with accumulated gradients only right after an optimizer step."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if self._asked is None and time.monotonic() >= self._end and step < trainer.max_steps:
            self._asked = OUT_OF_TIME
        asked = self._any_asked(trainer)
        if step != self._last and (asked is not None or step % self.every == 0 or step == trainer.max_steps):
            self._last = step
            self._write(trainer)
        self._stop(asked)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """All of the step before is logged; stop if asked to."""
        self._publish(trainer)
        if self._stopped is not None:
            raise self._stopped

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """All of the last step is logged. Leave signals to others; stop if asked to in it or in its validation."""
        self._publish(trainer)
        if self._stopped is None:
            self._stop(self._any_asked(trainer))
        self._signals.give_back()
        if self._stopped is not None:
            raise self._stopped

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leave signals to others; what was written is whole."""
        self._signals.give_back()
        self._publish(trainer)
        if isinstance(exception, Stopped) and self._stopped is exception:
            exception.told = True
            if trainer.is_global_zero:
                step = trainer.global_step
                print(
                    f"stopped after step {step}{exception.why}, with a checkpoint: resume=auto goes on", file=sys.stderr
                )

    def nobody_reads(self) -> None:
        """Stop after this step, as what it prints goes nowhere."""
        self._asked = self._asked or UNREAD

    def _any_asked(self, trainer: lightning.Trainer) -> int | None:
        """The exit code if any process was asked to stop: all stop after the same step. Every process has to ask."""
        if trainer.world_size == 1:
            return self._asked
        code = torch.tensor(self._asked or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(code, reduce_op="max")) or None

    def _stop(self, code: int | None) -> None:
        """Note that training ends before its next step."""
        if code is not None:
            self._stopped = self._signals.stopped(code)

    def _ask(self, signum: int) -> None:
        """Handle a signal."""
        if self._asked is not None and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif self._asked is None:
            self._asked = 128 + signum
            if signum == signal.SIGINT:
                # not print: what it writes to may be in use right now
                os.write(2, b"\nstopping after this step (Ctrl-C again: at once, without a checkpoint)\n")

    def _write(self, trainer: lightning.Trainer) -> None:
        """Write a checkpoint under a name by which it is not taken for one."""
        path = self.run / checkpoint.FOLDER / f"step={trainer.global_step}.ckpt"
        unnamed = unfinished(path)
        trainer.save_checkpoint(unnamed)
        self._written = unnamed, path

    def _publish(self, trainer: lightning.Trainer) -> None:
        """Give the checkpoint that was written its name, then remove what is too old."""
        written, self._written = self._written, None
        if written is None or not trainer.is_global_zero:
            return
        try:
            os.replace(*written)
        finally:
            written[0].unlink(missing_ok=True)
        if self.keep is not None:
            for old in checkpoint.checkpoints(self.run)[: -self.keep]:
                old.unlink()


class Throughput(Callback):
    """Logs what the steps since the last log cost, without validation and experiments.

    ``train/tokens_per_second``, and ``train/cpu_seconds``: CPU time of this process, all threads together.
    """

    def __init__(self) -> None:
        self._since, self._cpu_since = 0.0, 0.0
        self._tokens = 0
        self._stopped = 0.0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the clocks."""
        self._stop()
        yield
        self._go_on()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clocks."""
        self._begin()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of a step."""
        self._tokens += batch.ids.numel() * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            module.log("train/tokens_per_second", self._tokens / max(time.perf_counter() - self._since, 1e-9))
            module.log("train/cpu_seconds", time.process_time() - self._cpu_since)
            self._begin()

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Leave validation out of the clocks."""
        self._stop()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Go on."""
        self._go_on()

    def _begin(self) -> None:
        self._since, self._cpu_since, self._tokens = time.perf_counter(), time.process_time(), 0

    def _stop(self) -> None:
        self._stopped = time.perf_counter(), time.process_time()

    def _go_on(self) -> None:
        self._since += time.perf_counter() - self._stopped[0]
        self._cpu_since += time.process_time() - self._stopped[1]


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
        pause = self.clock.paused() if self.clock is not None else contextlib.nullcontext()
        training: Any = module  # a LanguageModeling
        with pause, training.banks.whole(training.device), training.dealt.whole(training.device):
            numbers = {name: float(value) for name, value in self.run(training.model).items()}
        if not numbers:
            return
        for name, value in numbers.items():
            module.log(name, value, logger=False, rank_zero_only=True)
        # Not by `module.log`, which would forget the numbers of a step that is not logged.
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step - 1)
            logger.save()


class Progress(ProgressBar):
    """One bar over all steps with the numbers that matter; plain lines, fewer of them, where there is no terminal.

    Args:
        nobody_reads: Called where lines cannot be written any more.
    """

    _SHOWN = {  # noqa: RUF012 - never changed
        "loss": ("train/loss", "{:.3f}"),
        "tok/s": ("train/tokens_per_second", "{:,.0f}"),
        "recall": ("recall/on", "{:.1%}"),
        "reads off": ("recall/off", "{:.1%}"),
    }

    def __init__(self, nobody_reads: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.nobody_reads = nobody_reads
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
            with contextlib.suppress(OSError):
                print(f"step {step:,} of {trainer.max_steps:,}: {self._numbers(trainer)}")
            if output_lost():
                self.nobody_reads()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that what comes next has a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _numbers(self, trainer: lightning.Trainer) -> str:
        found = trainer.callback_metrics
        return ", ".join(
            f"{label} {form.format(float(found[name]))}" for label, (name, form) in self._SHOWN.items() if name in found
        )
