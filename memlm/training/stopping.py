"""Stopping in an orderly way: by the signals that ask for it, and where time is over or nobody reads what is told."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Ctrl-C, a terminal that was closed, and what a machine or its scheduler sends before it takes a process away.
ASKING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
OUT_OF_TIME = 124  # exit code where trainer.max_time is over, as that of timeout(1)
UNREAD = 128 + signal.SIGPIPE  # where output cannot be written, as of a program that SIGPIPE ends


class Stopped(SystemExit):
    """A run that was asked to stop.

    Args:
        code: The exit code; of a signal, that of a program which it ended.
        handler: What handled this signal before the run did.

    Attributes:
        told: Whether it was said what is left to do.
    """

    def __init__(self, code: int, handler: Any = None) -> None:
        super().__init__(code)
        self.handler, self.told = handler, False

    @classmethod
    def by_exit(cls, code: int | None) -> Stopped | None:
        """What to raise for a process that ended with an exit code, if that says that it was asked to stop."""
        known = code in (OUT_OF_TIME, UNREAD) or (code is not None and code - 128 in ASKING)
        return cls(code) if code is not None and known else None

    @property
    def why(self) -> str:
        """The reason, where it is none that the user gave."""
        return {
            OUT_OF_TIME: ", as trainer.max_time is over",
            UNREAD: ", as its output cannot be written (nobody reads it any more, or the disk is full)",
        }.get(int(str(self.code)), "")

    def hand_on(self) -> None:
        """Give the signal to what waits for it too: submitit puts the job in the queue again, and ends the process."""
        if self.code in (128 + signal.SIGUSR1, 128 + signal.SIGUSR2) and callable(self.handler):
            self.handler(int(str(self.code)) - 128, None)


class Signals:
    """Listens to what asks a process to stop; only its main thread can.

    Args:
        react: Called with every such signal.
    """

    def __init__(self, react: Callable[[int], None]) -> None:
        self.react = react
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over."""
        if threading.current_thread() is not threading.main_thread():
            return
        process = os.getpid()

        def handle(signum: int, frame: Any) -> None:
            if os.getpid() == process:  # not a loader worker, which ends with the process that it works for
                self.react(signum)

        self._before = {signum: signal.getsignal(signum) for signum in ASKING}
        if self._before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            del self._before[signal.SIGHUP]
        for signum in self._before:
            signal.signal(signum, handle)

    def stopped(self, code: int) -> Stopped:
        """What to raise for an exit code."""
        return Stopped(code, self._before.get(code - 128))

    def give_back(self) -> None:
        """Leave the signals to what handled them before."""
        for signum, handler in self._before.items():
            if handler is not None:  # None: a handler that is not Python's
                signal.signal(signum, handler)
        self._before = {}


class Answer:
    """What is left to do if a run is stopped now; changed as the run goes on.

    Attributes:
        text: A sentence.
    """

    text = "stopped before it began: give the command again"


@contextlib.contextmanager
def answering() -> Iterator[Answer]:
    """Let what asks a process to stop end the block at once, and say what is left; training itself listens otherwise.

    Yields:
        What to say.
    """
    process, before = os.getpid(), {signum: signal.getsignal(signum) for signum in ASKING}

    def stop(signum: int, frame: Any) -> None:
        if os.getpid() == process:
            raise Stopped(128 + signum)

    # What handles a signal otherwise is left alone, as are those that were told to be ignored.
    own = [signum for signum, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        own = []
    for signum in own:
        signal.signal(signum, stop)
    answer = Answer()
    try:
        yield answer
    except Stopped as stopped:
        if not stopped.told and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\n{answer.text}", file=sys.stderr)
            stopped.told = True
        raise
    finally:
        for signum in own:
            signal.signal(signum, before[signum])
