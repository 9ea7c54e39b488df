"""What is said while a run trains, and of a process that is lost."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch.multiprocessing import ProcessRaisedException

from memlm.checkpoint import FOLDER, checkpoints

# What libraries say that tells a user of memlm nothing.
_NOISE = (
    ".*LeafSpec.*",  # torch 2.13 renamed an internal that lightning still uses
    ".*does not have many workers.*",
    ".*number of training batches.*",
    ".*IterableDataset.*",
    ".*exists and is not empty.*",
    ".*dataloader is not resumable.*",  # it is: a batch is a function of its number
    ".*found in eval mode at the start of training.*",
    ".*have no `val_dataloader`.*",  # an experiment that trains measures by itself
)


# What is told where a process of the run was lost, by what torch and lightning say of it.
_LOST = {
    r"DataLoader worker \(pid.*?\) (?:is killed|exited)": (
        "a loader process was killed, most often because memory ran out (in a container: /dev/shm): lower data.n_worker"
    ),
    r"process \d+ terminated with|Child process with PID \d+ terminated": (
        "a process of this run was killed, most often because memory ran out, or failed (see above); so all end"
    ),
    r"Connection (?:closed|reset) by peer|Broken pipe|NCCL": (
        "another process of this run is gone: it was killed, most often because memory ran out, or failed (see above); "
        "so all end"
    ),
}


_OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"  # ends a run of which a process ended


def fault(error: BaseException) -> str | None:
    """What to tell of an error that came from another process; None of any other error."""
    text = str(error)
    if (lost := lost_process(text)) is not None:
        return lost
    if isinstance(error, ProcessRaisedException) or "in DataLoader worker process" in text:
        # What a process told comes with its traceback, whose last line it is.
        name, _, told = text.strip().rpartition("\n")[2].partition(": ")
        if name.rpartition(".")[2] in ("ConfigError", "NonFiniteLoss"):
            return told
    return None


def lost_process(text: str) -> str | None:
    """What to tell where ``text`` says that a process was lost."""
    for pattern, told in _LOST.items():
        if re.search(pattern, text):
            return told
    return None


def then(run: Path) -> str:
    """How to go on with a run that failed."""
    if (run / FOLDER).is_dir() and checkpoints(run):
        return "; what was saved is whole, go on with resume=auto"
    return "; no checkpoint was written yet, give the command again"


class _TellLost(logging.Handler):
    """Tells that a process was lost, before the others are killed.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        if (told := lost_process(record.getMessage())) is not None:
            print(f"error: {told}{then(self.run)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(run: Path | None = None) -> Iterator[None]:
    """Silence what says nothing to a user of memlm, but tell where a process of a run is lost."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    observer, tell = logging.getLogger(_OBSERVER), _TellLost(run or Path())
    observer.addHandler(tell)
    observer.setLevel(logging.INFO)
    observer.propagate = False
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        try:
            logging.getLogger("lightning.pytorch.callbacks.model_summary").setLevel(logging.INFO)  # where asked for
            for logger in loggers:
                logger.setLevel(logging.WARNING)
                if logging.getLogger().hasHandlers():  # those of the job; lightning's own would say each line again
                    logger.handlers.clear()
                    logger.propagate = True
            yield
        finally:
            observer.removeHandler(tell)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
