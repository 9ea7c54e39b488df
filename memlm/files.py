"""Files: written whole or not at all, and read so that damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import logging
import mmap
import os
import platform
import re
import stat
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from memlm.config import (
    ConfigError,
)
from memlm.machine import written_to
from memlm.printed import one_line

ERROR = "error.txt"


"""File in the directory of a failed job: one sentence, and the traceback if it was no mistake of the user."""


log = logging.getLogger(__name__)


MOST_IN_MEMORY = 2**30


"""Bytes of a checked file above which it is mapped instead of read."""


_UNFINISHED = re.compile(r"\..*\.([\w-]*)\.(\d+)\.[0-9a-f]{8}\.tmp")  # name, machine, process, anything


_A_DAY = 24 * 3600  # seconds after which a file that another machine has not touched is taken for left


_SEAL = b"\ncrc32 %08x\n"  # the end of a checked file


def cache_dir() -> Path:
    """Return the folder for everything that can be built again: `$MEMLM_CACHE`, or else `~/.cache/memlm`."""
    return from_home(os.environ.get("MEMLM_CACHE") or "~/.cache/memlm")


def from_home(path: str | os.PathLike[str]) -> Path:
    """Return a path in which `~/` is the home of the user, and `~NAME/` that of another.

    Raises:
        ConfigError: There is no such user, and no such folder.
    """
    found = os.path.expanduser(path)
    home, below, _ = found.partition("/")
    if home.startswith("~") and below and not os.path.isdir(home):
        raise ConfigError(
            f"the path {one_line(found)} begins with the home of a user who is not here: {one_line(home)}"
        )
    return Path(found)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` only when it is complete and on the disk.

    Readers see the old file or the new one, never a part; of several writers the last one wins. When the body
    raises, `path` stays as it was. What writers in the same folder that were killed have left is removed.

    Args:
        path: The final name; missing parent folders are made.

    Yields:
        The open file, under a temporary name beside `path`.

    Raises:
        ConfigError: If a directory is in its place.
    """
    if path.is_dir():
        raise _special(path, stat.S_IFDIR)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = unfinished(path)
    try:
        with written_to(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def checked_file(path: Path) -> Iterator[BinaryIO]:
    """`atomic_file` with a checksum at its end, for `read_checked`."""
    with atomic_file(path) as file:
        yield file
        file.flush()
        crc = 0
        with open(file.name, "rb") as written:
            while block := written.read(1 << 20):
                crc = zlib.crc32(block, crc)
        file.write(_SEAL % crc)


def unfinished(path: Path) -> Path:
    """A new name for a file of this process that is not to be taken for ``path`` yet; see `remove_leftovers`."""
    return path.with_name(f".{path.name[:40]}.{_machine()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove from a folder what processes that were killed while they wrote have left there.

    Those of other machines cannot be asked: their files count as left when they were not touched for a day.
    """
    for path in folder.glob(".*.tmp"):
        found = _UNFINISHED.fullmatch(path.name)
        with contextlib.suppress(OSError):  # gone in the meantime, or not ours to remove
            if found is not None and _is_left(path, found[1], int(found[2])):
                path.unlink()


def _is_left(path: Path, machine: str, process: int) -> bool:
    if machine != _machine():
        return time.time() - path.stat().st_mtime > _A_DAY
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _machine() -> str:
    return re.sub(r"[^\w-]", "-", platform.node())[:30]


def regular(path: Path) -> Path:
    """Return the path of a file to read.

    Raises:
        ConfigError: It is a directory, a pipe, a device or a socket: reading it could take for ever.
        FileNotFoundError: There is nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise ConfigError(f"{one_line(path)} is a link that leads nowhere") from error
        raise
    except (OSError, ValueError) as error:  # such as a link to itself, too long a name
        raise ConfigError(f"{one_line(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise _special(path, mode)
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        ConfigError: If it is a pipe, a device, a socket or a directory.
        OSError: If it is missing or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link to itself, a socket
            regular(path)
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise _special(path, mode)


def _special(path: Path, mode: int) -> ConfigError:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return ConfigError(f"{one_line(path)} is {kind}: a regular file is expected there; remove what is in its place")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, not UTF-8, too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text if isinstance(text, str) else str(text, "utf-8"))
    except RecursionError:
        raise ValueError("lists and mappings are nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: If it is damaged, or holds anything else.
        OSError: If it is missing or cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: it is damaged or no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} cannot be read: it must hold a JSON object, got {type(found).__name__}")
    return found


def read_checked(path: Path) -> memoryview | None:
    """What `checked_file` has written, its checksum verified; None if there is nothing, or it is damaged.

    Up to `MOST_IN_MEMORY` bytes are read, so that nothing that happens to the file later matters. A larger file is
    mapped, and must not change; should it be cut short all the same, the system ends the process, and where is told.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size <= MOST_IN_MEMORY:
                content: bytes | mmap.mmap = file.read()
            else:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with contextlib.suppress(Exception):  # a stderr that is no file
                    faulthandler.enable()
    except FileNotFoundError:
        return None
    except ConfigError as error:
        log.warning("made again: %s", error)
        return None
    whole = memoryview(content)
    n_body = max(len(whole) - len(_SEAL % 0), 0)
    if whole[n_body:] == _SEAL % zlib.crc32(whole[:n_body]):
        return whole[:n_body]
    log.warning("%s is damaged: made again", path)
    return None
