"""Standard output that stops nothing where it cannot be written."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class _Output:
    """Standard output that stops nothing where it cannot be written: neither a program nor its log.

    Args:
        stream: What it was.

    Attributes:
        lost: Whether it could not be written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self.lost = stream, False

    def write(self, text: str) -> int:
        """Write, or let it go nowhere."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Write what waits, or let it go nowhere."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self.lost:
            self.lost = True
            _go_nowhere(self._stream, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def output_lost() -> bool:
    """Whether standard output cannot be written, since what read it is gone or a disk is full.

    What is printed from then on goes nowhere.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        _go_nowhere(sys.stdout, error)
        return True
    return getattr(sys.stdout, "lost", False)


def _go_nowhere(stream: Any, error: OSError) -> None:
    """Let what is written to a stream go nowhere from now on, and say why."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not isinstance(error, BrokenPipeError):  # which what closed it knows of
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)


def open_streams() -> None:
    """Give a program standard streams that it can rely on.

    Where it was started without, the next files that are opened would be taken for them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    sys.stdout = _Output(sys.stdout)
