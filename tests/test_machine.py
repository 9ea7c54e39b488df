"""What the machine refuses is told in one sentence."""

import errno
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from memlm.app.errors import is_user_error
from memlm.files import atomic_file
from memlm.machine import available_memory, no_space, refusal

_REFUSED = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ELOOP ENAMETOOLONG EEXIST ENOTDIR EISDIR EMFILE ENFILE ENOENT EIO"


@pytest.mark.parametrize("name", _REFUSED.split())
def test_what_the_system_refuses_is_named_with_the_file(name: str) -> None:
    number = getattr(errno, name)
    told = refusal(OSError(number, os.strerror(number), "some/file"))
    assert told is not None
    assert told.startswith(f"{os.strerror(number)}: some/file")
    assert "\n" not in told
    assert is_user_error(OSError(number, os.strerror(number), "some/file"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafetensorError('Error: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'), "No space"),
        (Exception("No space left on device (os error 28)"), "No space left on device; free some space"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . file write failed"), "No space left"),
        (OSError("11948 requested and 3040 written"), "No space left"),
        (OSError("encoder error -2 when writing image file"), "No space left"),
        (MemoryError(), "memory ran out: make"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out: make"),
        (RuntimeError("could not create a primitive"), "memory ran out: make"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes. Error"),
            r"memory ran out \(37.3 GiB more was asked for\)",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            r"memory ran out \(2.50 GiB more",
        ),
    ],
)
def test_what_libraries_tell_of_it(error: Exception, told: str) -> None:
    found = refusal(error)
    assert found is not None
    assert re.match(told, found), found
    assert "\n" not in found


def test_out_of_memory_as_it_is_raised_here() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**50)
    with pytest.raises(MemoryError) as of_numpy:
        np.ones(2**50)
    for raised in (of_torch, of_numpy):
        assert "more was asked for" in str(refusal(raised.value))


def test_other_errors_are_not_taken_for_it() -> None:
    for error in (RuntimeError("x"), KeyError("out"), ValueError("[Errno 28]"), OSError("x"), BrokenPipeError(32, "x")):
        assert refusal(error) is None
        assert not no_space(error)
    assert not is_user_error(RuntimeError("shapes cannot be multiplied"))


def test_an_error_is_told_by_what_led_to_it() -> None:
    error = ValueError("Unable to configure handler 'file'")
    error.__cause__ = OSError(errno.EROFS, "Read-only file system", "run/train.log")
    assert refusal(error) == "Read-only file system: run/train.log; choose a place that can be written to"


def test_a_file_that_cannot_be_written_whole_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised, atomic_file(path) as file:
            file.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal(raised.value) == f"File too large: {path}; raise the limit on the size of a file (ulimit -f) or " \
        "choose another place"  # fmt: skip
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("tokens.npy", b"before")]


def test_the_least_of_all_limits_of_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    there = available_memory()
    assert there is not None
    assert there > 2**20
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12_345, -1))
    assert available_memory() == 12_345
