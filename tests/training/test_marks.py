"""Who trains a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memlm.config import ConfigError
from memlm.training import marks
from memlm.training.marks import LOCK, is_alive, running


@contextmanager
def elsewhere(run: Path, seconds: float = 60.0) -> Iterator[int]:
    """Another process trains the run."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with running(run):
            os.write(told, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)


def test_a_run_is_alive_while_a_process_has_it(tmp_path: Path) -> None:
    assert not is_alive(tmp_path / "none")
    with elsewhere(tmp_path):
        assert is_alive(tmp_path)
        with pytest.raises(ConfigError, match="is being trained by another process"), running(tmp_path):
            pass
    assert not is_alive(tmp_path)  # killed
    with running(tmp_path):
        pass


def test_who_looks_needs_no_right_to_write_and_keeps_nobody_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elsewhere(tmp_path):
        (tmp_path / LOCK).chmod(0o444)
        assert is_alive(tmp_path)
    (tmp_path / LOCK).chmod(0o644)
    looks = iter([BlockingIOError, None])  # one who looks has it for a moment
    real = marks.fcntl.lockf

    def lockf(*arguments: object) -> None:
        if (error := next(looks)) is not None:
            raise error
        real(*arguments)

    monkeypatch.setattr(marks.fcntl, "lockf", lockf)
    with running(tmp_path):
        pass


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, put: object) -> None:
    put(tmp_path / LOCK)  # type: ignore[operator]
    assert not is_alive(tmp_path)
