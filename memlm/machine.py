"""What a machine refuses, in a sentence: no room on a disk, no right to a file, no memory."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What helps, by what the system says. Other errors of files are told without advice.
_ADVICE = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f) or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place or file that you have the right to",
    errno.EPERM: "choose a place or file that you have the right to",
    errno.EMFILE: "raise the limit on open files (ulimit -n) or lower data.n_worker",
    errno.ENFILE: "close programs that hold files open, or lower data.n_worker",
    errno.ELOOP: "a link leads back to itself: remove it or give another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EEXIST: "remove what is there or give another path",
    errno.ENOTDIR: "something on the path is a file: remove it or give another path",
    errno.EISDIR: "give the path of a file",
    errno.EAGAIN: "raise the limit on processes (ulimit -u) or lower data.n_worker",
}
_OUTPUT = (errno.ENOSPC, errno.EDQUOT)
_LONGEST = 300  # characters of a path that are told

# Libraries that write files themselves tell the number of the system's error in the text of their own.
_NUMBER = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)|\[Errno (\d+)\]")
# ... or no reason at all: torch, numpy and Pillow.
_SHORT = re.compile(r"file write failed|unexpected pos \d+|\d+ requested and \d+ written|encoder error -2 when writing")
_MEMORY = re.compile(
    r"can't allocate memory|Cannot allocate memory|std::bad_alloc|out of memory|unable to mmap|can't start new thread"
    r"|Unable to allocate|Resource temporarily unavailable|failed to map segment"
    r"|could not (?:create|execute) a primitive$|could not create a memory object$",  # oneDNN
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"(?:tried to allocate|Unable to allocate) ([\d.,]+ ?\w+)", re.IGNORECASE)


def refusal(error: BaseException) -> str | None:
    """What the machine refused, in one sentence with what to do; None if ``error`` is of another kind."""
    if is_out_of_memory(error):
        amount = _AMOUNT.search(str(error))
        tried = f" ({_size(amount[1])} more was asked for)" if amount else ""
        return (
            f"memory ran out{tried}: make the model, n_slot, the rows of a batch, data.n_worker or the text smaller, "
            "or give the program more memory (of a GPU: take a larger one)"
        )
    system = system_error(error)
    if system is None or system.errno is None:
        return None
    if system.filename is None and system.errno not in _ADVICE:
        return None
    what = system.strerror or os.strerror(system.errno)
    if system.filename is not None:
        name = " ".join(str(os.fsdecode(system.filename)).split())
        what += f": {name if len(name) <= _LONGEST else name[:_LONGEST] + '...'}"
    advice = _ADVICE.get(system.errno)
    return f"{what}; {advice}" if advice else what


def system_error(error: BaseException) -> OSError | None:
    """The error of the system that ``error`` is, stems from or tells of."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        if _SHORT.search(str(seen)) and isinstance(seen, OSError | RuntimeError):
            led = seen.__cause__ or seen.__context__
            found = None if led is None else system_error(led)
            return found or OSError(errno.ENOSPC, "No space left, or more than a file may hold")
        if not isinstance(seen, OSError | ValueError) and (told := _NUMBER.search(str(seen))) is not None:
            number = int(next(group for group in told.groups() if group))
            return OSError(number, os.strerror(number))
        seen = seen.__cause__
    return None


@contextmanager
def written_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors of the system inside the block name ``path``, which is written there under a temporary name."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: of torch
        found = system_error(error)
        if found is None:
            raise
        raise OSError(found.errno, found.strerror, os.fspath(path)) from error


def no_space(error: BaseException | None) -> bool:
    """Whether a full disk or an exhausted quota is what lies behind an error."""
    while error is not None:
        found = system_error(error)
        if found is not None and found.errno in _OUTPUT:
            return True
        error = error.__cause__ or error.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine, or of a GPU, has run out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ImportError) and _MEMORY.search(str(error)) is not None


def available_memory() -> int | None:
    """Bytes of main memory that a program may still take, swap included; None where the system does not tell.

    The least of what the machine has left, what the control group may take, and the limit of the process.
    """
    found: list[int] = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        swap = int(lines["SwapFree"].split()[0])
        found.append((int(lines["MemAvailable"].split()[0]) + swap) * 2**10)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit)
    except ImportError:
        pass
    return min(found, default=None)


def _size(amount: str) -> str:
    """An amount of memory with its unit; torch tells bytes without one."""
    number, _, unit = amount.replace(",", "").partition(" ")
    if unit.lower() in ("", "bytes") and number.isdigit():
        return gib(int(number))
    return amount


def gib(n_byte: float) -> str:
    """Bytes in words."""
    return f"{n_byte / 2**30:,.1f} GiB" if n_byte >= 2**28 else f"{n_byte / 2**20:,.1f} MiB"
