"""Stopping when asked to: the signals that end a run in an orderly way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

# Ctrl-C, and what a machine or its scheduler sends before it takes a process away.
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(SystemExit):
    """A run that was asked to stop, and has left a checkpoint to go on from.

    Args:
        signum: The signal that asked; the exit code is that of a program which it ended.
        handler: What handled this signal before the run did.
    """

    def __init__(self, signum: int, handler: Any = None) -> None:
        super().__init__(128 + signum)
        self.signum, self.handler = signum, handler

    @classmethod
    def by_exit(cls, code: int | None) -> Stopped | None:
        """What to raise for a process that ended with an exit code, if that says that it was asked to stop."""
        return cls(code - 128) if code is not None and code - 128 in _ASKING else None

    def hand_on(self) -> None:
        """Give the signal to what waits for it too: submitit puts the job in the queue again, and ends the process."""
        if self.signum in (signal.SIGUSR1, signal.SIGUSR2) and callable(self.handler):
            self.handler(self.signum, None)


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

        self._before = {signum: signal.getsignal(signum) for signum in _ASKING}
        for signum in _ASKING:
            signal.signal(signum, handle)

    def stopped(self, signum: int) -> Stopped:
        """What to raise for a signal."""
        return Stopped(signum, self._before.get(signum))

    def give_back(self) -> None:
        """Leave the signals to what handled them before."""
        for signum, handler in self._before.items():
            if handler is not None:  # None: a handler that is not Python's
                signal.signal(signum, handler)
        self._before = {}
