"""Tiny models beside a busy process; how fast they are does not matter here."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import busy
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import TINY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_candidates_are_measured_beside_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    quoted = ",".join(f'"{line}"' for line in TINY)
    settings = ["benchmark=busy", f"overrides=[{quoted}]", "memories=[ltm]", "neighbours=[1]", "n_row=2", "n_segment=2"]
    monkeypatch.setattr(busy, "_chosen", lambda n_own: 1)
    monkeypatch.setattr(busy, "CANDIDATES", {"spinning": "torch by itself", "memlm": "ours"})
    before = dict(os.environ)
    result, text = benchmark.run(to_dict(compose([*settings, "warmup=0", "rounds=2"], "benchmark")))
    assert os.environ == before
    found = [(row["round"], row["neighbours"], row["candidate"]) for row in result.rows]
    assert found == [(i, n, name) for i in range(2) for n in (0, 1) for name in busy.CANDIDATES]
    assert {row["tokens"] for row in result.rows} == {2 * 2 * 16}
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    taken = {row["candidate"]: row["threads"] for row in result.rows}
    assert taken["memlm"] == 1
    assert 1 <= taken["spinning"] <= own
    assert result.metrics["neighbours/1/cores"] > 0.01
    assert "of spinning, idle" in text
    with pytest.raises(ConfigError, match="neighbours must be in"):
        benchmark.check(to_dict(compose([*settings, "neighbours=[0]"], "benchmark")))


def test_ratios_are_taken_within_a_round_to_idle_spinning() -> None:
    def row(candidate: str, n: int, i: int, seconds: float) -> dict[str, object]:
        return {"memory": "none", "candidate": candidate, "neighbours": n, "round": i, "threads": i, "seconds": seconds,
                "tokens": 12}  # fmt: skip

    rows = [row("spinning", 0, i, seconds) for i, seconds in enumerate((1.0, 2.0, 4.0))]
    rows += [row("memlm", 3, i, seconds) for i, seconds in enumerate((2.0, 3.0, 4.0))]
    found = busy.summarise(rows)
    assert found["none/memlm/3/of_idle"] == pytest.approx(2 / 3)  # of 1/2, 2/3 and 1
    assert found["none/memlm/3/tokens_per_s"] == 4
    assert found["none/spinning/0/of_idle_low"] == 1


def test_neighbours_that_are_not_busy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_NEIGHBOUR", busy._NEIGHBOUR.replace("sum(range(10**5))", "time.sleep(0.05)"))
    with pytest.raises(ValueError, match="they were not busy"), busy._beside(1):
        time.sleep(0.3)


def test_how_threads_wait_is_told_before_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process gets torch's own way to wait, or ours; nothing that this one was told."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen: list[dict[str, str]] = []

    class Process:
        def __init__(self, **settings: object) -> None:
            pass

        def start(self) -> None:
            seen.append(dict(os.environ))

        def join(self) -> None:
            pass

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Process)
    for name in busy.CANDIDATES:
        with busy._training("none", name, None, 0):
            assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert [each.get("OMP_WAIT_POLICY") for each in seen] == [None, "PASSIVE", "PASSIVE"]
    assert not any("OMP_NUM_THREADS" in each for each in seen)


def test_a_neighbour_ends_with_what_started_it() -> None:
    code = (
        "import subprocess, sys; from benchmarks.busy import _NEIGHBOUR\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', _NEIGHBOUR], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline(); print(child.pid)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")
