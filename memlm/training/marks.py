"""What a run has in its directory that says where it stands.

`LOCK` is held by the process that trains it, however that ends; `FINISHED` is written when all is trained and measured.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from memlm.config import ConfigError
from memlm.files import ERROR, atomic_file, read_json
from memlm.printed import printable

LOCK = ".lock"


FINISHED = "finished.json"

_WAITS = (0.02, 0.2)  # seconds until it is tried again: one who looks whether a run is alive holds it for a moment


@contextlib.contextmanager
def running(run: Path) -> Iterator[None]:
    """Mark a run as alive; the mark goes with the process, however it ends.

    Raises:
        ConfigError: If another process trains it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with _open_lock(run, os.O_RDWR | os.O_CREAT) as lock:
        for wait in (*_WAITS, None):
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: that would live on in loader workers
                break
            except (BlockingIOError, PermissionError):
                if wait is None:
                    raise ConfigError(
                        f"{run} is being trained by another process: give another hydra.run.dir"
                    ) from None
                time.sleep(wait)
        yield


def is_alive(run: Path) -> bool:
    """Whether another process is training a run, as far as this machine can tell."""
    with contextlib.suppress(OSError, ConfigError), _open_lock(run, os.O_RDONLY) as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def _open_lock(run: Path, flags: int) -> io.FileIO:
    """The file that is held by the process that trains a run; a pipe in its place would hang it for ever."""
    path = run / LOCK
    try:
        lock = io.FileIO(os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), _mode(flags))
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    else:
        if stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
            return lock
        lock.close()
    raise ConfigError(f"{path} is no regular file: remove what is in its place")


def _mode(flags: int) -> str:
    return "r+" if flags & os.O_RDWR else "r"


class Finished(NamedTuple):
    """A run that is trained and measured.

    Attributes:
        run: The run directory.
        value: What it returned, see ``main`` of ``train.py``.
    """

    run: Path
    value: float | None


def mark_finished(run: Path, config: Mapping[str, Any], value: float | None) -> None:
    """Write into a run directory that all is done, and no longer why another start of it failed."""
    (run / ERROR).unlink(missing_ok=True)
    with atomic_file(run / FINISHED) as file:
        file.write((json.dumps({"config": config, "value": value}, indent=1) + "\n").encode())


def read_finished(run: Path) -> Finished | None:
    """What a run that is trained and measured has returned; None for any other."""
    content = finished_content(run)
    return None if content is None else Finished(run, content["value"])


def forget_finished(run: Path) -> None:
    """Take back that all is done."""
    (run / FINISHED).unlink(missing_ok=True)


def finished_content(run: Path) -> dict[str, Any] | None:
    """What is written of a run that is finished; one whose file is damaged is taken for unfinished."""
    try:
        content = read_json(run / FINISHED)
        config = content.get("config")
        known = isinstance(config, dict) and isinstance(config.get("trainer"), dict)
        if not known or not isinstance(content.get("value", ""), float | int | None):
            raise ConfigError(f"{run / FINISHED} is not what a finished run writes")
        return content
    except FileNotFoundError:
        return None
    except (ConfigError, OSError) as error:
        leave_out(error)
        return None


def leave_out(error: Exception) -> None:
    """Say that a file is left out, and why."""
    print(printable(f"left out: {' '.join(str(error).split()) or type(error).__name__}"), file=sys.stderr)
