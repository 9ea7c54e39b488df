"""How many threads are taken, and that every command lets them sleep before torch can read how."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memlm import threads
from memlm.threads import busy_share, choose, core_limit, usable_cores

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.mark.parametrize(
    ("n_core", "limit", "busy", "n_process", "wanted"),
    [
        (2, math.inf, 0.0, 1, 2),
        (2, math.inf, 0.04, 1, 2),  # what any system does beside
        (2, math.inf, 0.5, 1, 1),  # one busy neighbour
        (2, math.inf, 1.0, 1, 1),
        (64, math.inf, 0.25, 1, 48),
        (64, math.inf, 1.0, 1, 32),  # it may end before the run does
        (1, math.inf, 1.0, 1, 1),
        (64, 4.0, 0.25, 1, 4),
        (64, 1.5, 0.0, 1, 1),  # no more threads than cores
        (64, 0.2, 0.0, 1, 1),
        (2, math.inf, 0.0, 2, 1),
        (16, math.inf, 0.0, 3, 5),
        (64, 8.0, 0.0, 4, 2),
        (4, math.inf, 0.0, 8, 1),
    ],
)
def test_no_more_threads_than_cores_are_free(
    n_core: int, limit: float, busy: float, n_process: int, wanted: int
) -> None:
    assert choose(n_core, limit, busy, n_process) == wanted


def write(root: Path, **files: str) -> Path:
    """Files below a directory; two underlines in a name stand for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_limit_of_control_groups_is_found(tmp_path: Path) -> None:
    assert core_limit(tmp_path) == math.inf
    # version 2: the least of a group and those around it
    two = write(tmp_path / "2", proc__self__cgroup="0::/user/job\n", sys__fs__cgroup__user__cpu_max="150000 100000\n")
    assert core_limit(two) == 1.5
    write(two, sys__fs__cgroup__user__job__cpu_max="max 100000\n")
    assert core_limit(two) == 1.5
    write(two, sys__fs__cgroup__user__job__cpu_max="50000 100000\n")
    assert core_limit(two) == 0.5
    # a container: its own group is all that there is to see, under the path of the host or none
    write(two, sys__fs__cgroup__cpu_max="20000 100000\n")
    assert core_limit(two) == 0.2
    # version 1, as a container sees it
    one = write(
        tmp_path / "1",
        proc__self__cgroup="5:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/\n",
        sys__fs__cgroup__cpu__cpu_cfs_quota_us="300000\n",
        sys__fs__cgroup__cpu__cpu_cfs_period_us="100000\n",
        sys__fs__cgroup__memory__cpu_cfs_quota_us="100000\n",  # of another controller
        sys__fs__cgroup__memory__cpu_cfs_period_us="100000\n",
    )
    assert core_limit(one) == 3.0
    write(one, sys__fs__cgroup__cpu__cpu_cfs_quota_us="-1\n")
    assert core_limit(one) == math.inf


def test_other_work_on_the_own_cores_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu 60 0 0 100 0 0 0 0 0 0\ncpu0 10 0 0 50 0 0 0 0 0 0\ncpu1 50 0 0 50 0 0 0 0 0 0\nintr 5\n")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        # of 20 ticks each core 0 was idle for 15 (5 of them it waited for a disk), core 1 for none, in five ways
        stat.write_text("cpu 90 5 5 115 5 1 1 3 9 0\ncpu0 15 0 0 60 5 0 0 0 9 0\ncpu1 55 5 5 50 0 1 1 3 0 0\nintr 9\n")

    monkeypatch.setattr(threads.time, "sleep", sleep)
    before = stat.read_text()
    for cores, wanted in (([0], 0.25), ([1], 1.0), ([0, 1], 0.625)):
        stat.write_text(before)
        assert busy_share(cores, 0.2, stat) == pytest.approx(wanted)
    assert slept == [0.2] * 3
    assert busy_share([0], 0.2, tmp_path / "none") == 0


class Machine:
    """Eight cores of which two are busy; what torch is told to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 8
        for name in (*SETTINGS, "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "")  # and put back what was there, whatever is set
            monkeypatch.delenv(name)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "taken", n))
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.taken)
        monkeypatch.setattr(threads, "busy_share", lambda cores: 0.25)
        monkeypatch.setattr(threads, "core_limit", lambda: math.inf)
        monkeypatch.setattr(threads, "_why", "")
        threads._n_own.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    yield
    threads._n_own.cache_clear()


def test_a_command_takes_what_is_free_and_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.take()
    assert machine.taken == 6
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_NUM_THREADS" not in os.environ  # a process that it starts chooses for itself
    told = threads.told()
    assert told.startswith("threads: 6 of 8 cores (other work takes 25 % of them), waiting passively")
    assert "OMP_NUM_THREADS" in told
    monkeypatch.setattr(threads, "busy_share", lambda cores: 0.0)
    threads.take()  # the next job of a sweep
    assert threads.told() == "threads: 8 of 8 cores, waiting passively (set OMP_NUM_THREADS to choose)"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_the_user_wins(machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "8")
    threads.take()
    threads.share(4)
    threads.keep(2)
    assert machine.taken == 8
    assert os.environ[name] == "8"
    assert threads.told() == f"threads: 8 by {name}=8, waiting passively"


@pytest.mark.parametrize("setting", ["OMP_WAIT_POLICY=ACTIVE", "GOMP_SPINCOUNT=5000", "KMP_BLOCKTIME=1"])
def test_a_way_to_wait_of_the_user_wins(machine: Machine, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)
    threads.take()
    assert {key: os.environ.get(key) for key in SETTINGS if os.environ.get(key)} == {name: value}
    assert f"waiting {setting}" in threads.told()


def test_processes_of_a_machine_share_its_cores(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads.take()
    threads.share(1)
    assert machine.taken == 6
    threads.share(4)
    assert machine.taken == 2  # whatever else the machine does: all have the same number
    assert os.environ["OMP_NUM_THREADS"] == "2"  # what those that are started get
    assert threads.told().startswith("threads: 2 of 8 cores in each of 4 processes, waiting passively")


def test_processes_that_something_else_started_share_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    threads.take()
    assert machine.taken == 4


def test_a_run_that_goes_on_keeps_its_number(machine: Machine) -> None:
    threads.take()
    threads.keep(3)
    assert machine.taken == 3
    assert threads.told().startswith("threads: 3 of 8 cores as before, ")
    for odd in (None, 0, -1, 9, "4", True, 2.0):  # of a larger machine, of several processes, of anybody
        threads.keep(odd)
        assert machine.taken == 3


def test_cores_are_those_that_may_be_used() -> None:
    assert len(usable_cores()) >= 1
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert usable_cores() == [min(before)]
        finally:
            os.sched_setaffinity(0, before)


# Each command begins in a fork of one process, and ends where torch is about to be imported.
_BEGIN = """
import importlib.abc, os, runpy, sys

class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), file=told, flush=True)
            os._exit(0)

told = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.meta_path.insert(0, Torch())
before = dict(os.environ)
import memlm.app.console, memlm.app.cli, memlm.app.evaluate, memlm.app.search
assert os.environ == before, "an import changes the environment"
for line in sys.stdin.read().splitlines():
    child = os.fork()
    if child == 0:
        sys.argv[:] = line.split(" ")
        sys.argv[0] = os.path.join(os.environ["PYTHONPATH"], sys.argv[0])
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        print(line, end=": ", file=told, flush=True)
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(1)
    os.waitpid(child, 0)
"""

_COMMANDS = """train.py memory=none
memlm/app/train.py memory=none
memlm/__main__.py train memory=none
memlm/__main__.py check memory=stm
scripts/benchmark.py exchange
scripts/chat.py checkpoint=RUN
scripts/compare.py RUN
scripts/evaluate.py checkpoint=RUN
scripts/export.py checkpoint=RUN output=DIR
scripts/generate.py checkpoint=RUN prompt=a
scripts/report.py RUN
scripts/results.py recall RUN
scripts/search.py training.lr=0.1,0.2
scripts/survival.py"""


@pytest.mark.slow
def test_every_command_lets_threads_sleep_before_torch_is_imported(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN], input=_COMMANDS, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)},
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{line}: PASSIVE" for line in _COMMANDS.splitlines()], done.stderr
    scripts = {line.split()[0] for line in _COMMANDS.splitlines()}
    assert {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")} <= scripts
