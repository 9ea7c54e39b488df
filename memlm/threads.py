"""How many threads torch takes, and how they wait for each other.

A thread of OpenMP that has nothing to do spins for milliseconds before it sleeps. Beside other work that is a core
taken from the thread that all wait for: training becomes many times slower. The commands of memlm let threads sleep at
once, and take no more of them than cores are free. What a user has set wins. Where memlm is imported nothing changes.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

# Read once by OpenMP, when torch is imported: GNU's (GOMP_), Intel's and LLVM's (KMP_).
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MOMENT = 0.2  # seconds for which other work is watched

_why = ""  # what is told of the number


def wait_passively() -> None:
    """Let threads sleep while they wait, in this process and those that it starts.

    It has to be called before torch is imported.
    """
    if _given(WAITING) is None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def take() -> None:
    """Give torch the threads of a command of memlm, unless the user has set their number."""
    global _why
    wait_passively()
    if _given(NUMBER) is not None:
        return
    n_process = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # Several processes must not differ, and would see each other start.
    busy = busy_share(usable_cores()) if n_process == 1 else 0.0
    n_thread = _set(choose(_n_own(), core_limit(), busy, n_process))
    spared = choose(_n_own(), core_limit(), 0.0, n_process) - n_thread
    _why = f" (other work takes {100 * busy:.0f} % of them)" if spared else ""


def share(n_process: int) -> None:
    """Share the cores among the processes of a run on this machine, those that it starts included.

    Args:
        n_process: How many there are, on this machine. All get the same number, whatever else the machine does.
    """
    global _why
    if n_process == 1 or _given(NUMBER) is not None:
        return
    os.environ["OMP_NUM_THREADS"] = str(_set(choose(_n_own(), core_limit(), 0.0, n_process)))
    _why = f" in each of {n_process} processes"


def keep(n_thread: object) -> None:
    """Take as many threads as a run had before it stopped: sums are then rounded as if it had not.

    Args:
        n_thread: As its checkpoint says. What is no number of threads for this machine changes nothing.
    """
    global _why
    if type(n_thread) is int and 1 <= n_thread <= _n_own() and _given(NUMBER) is None:
        _set(n_thread)
        _why = " as before"


def told() -> str:
    """The threads of this process, in a line."""
    import torch

    number, waiting = _given(NUMBER), _given(WAITING)
    of, how = f" of {_n_own()} cores{_why}", " (set OMP_NUM_THREADS to choose)"
    if number is not None and not _why:
        of, how = f" by {number}", ""
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        waiting = "passively"
    return f"threads: {torch.get_num_threads()}{of}{f', waiting {waiting}' if waiting else ''}{how}"


def choose(n_core: int, limit: float, busy: float, n_process: int = 1) -> int:
    """How many threads one of several processes takes.

    Args:
        n_core: Cores that there are.
        limit: Cores' worth of time that it gets at most, see `core_limit`.
        busy: Share of their time that other work takes. Half of them are taken in any case: that work may end before a
            run does.
        n_process: Processes that share the cores.
    """
    free = max(round(n_core * (1 - busy)), n_core // 2)
    return max(int(min(free, limit)) // n_process, 1)


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_limit(root: Path = Path("/")) -> float:
    """Cores' worth of time that control groups (version 1 or 2) leave to this process; infinite without a limit.

    Args:
        root: Where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            top = root / "sys/fs/cgroup" / mount
            place = top / path.lstrip("/")
            # In a container the path may be one of the host; what is mounted then is the group itself.
            limits += map(_limit, [place, *place.parents[: len(place.parts) - len(top.parts)]])
    return min(limits)


def _limit(group: Path) -> float:
    """Cores' worth of time of one control group."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
        return math.inf


def busy_share(cores: Sequence[int], seconds: float = _MOMENT, stat: Path = Path("/proc/stat")) -> float:
    """The share of the time of ``cores`` that other work takes; 0 where the system does not tell.

    Args:
        cores: Their numbers.
        seconds: For how long it is watched, while this process sleeps.
        stat: Where the system tells the time that each core has worked.
    """
    before = _times(stat, cores)
    time.sleep(seconds)
    after = _times(stat, cores)
    idle, whole = after[0] - before[0], after[1] - before[1]
    return (whole - idle) / whole if whole > 0 else 0.0


def _times(stat: Path, cores: Sequence[int]) -> tuple[int, int]:
    """Time of cores without work, and in all."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0, 0
    names = {f"cpu{core}" for core in cores}
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user
    times = [[int(number) for number in numbers[:8]] for name, *numbers in lines if name in names]
    return sum(sum(each[3:5]) for each in times), sum(map(sum, times))


@functools.cache
def _n_own() -> int:
    """How many threads torch takes by itself: one for each core that the process may run on, as torch counts them."""
    import torch

    return torch.get_num_threads()


def _set(n_thread: int) -> int:
    import torch

    _n_own()  # before it changes
    torch.set_num_threads(n_thread)
    return n_thread


def _given(names: Sequence[str]) -> str | None:
    """The first of some settings of the environment that is given, as ``NAME=value``."""
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), None)
