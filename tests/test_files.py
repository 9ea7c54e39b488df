"""Files that are whole or absent, and whose damage is noticed."""

import json
import multiprocessing
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from memlm import files
from memlm.config import ConfigError
from memlm.files import (
    atomic_file,
    cache_dir,
    checked_file,
    from_home,
    open_regular,
    read_checked,
    read_json,
    regular,
    remove_leftovers,
    unfinished,
)  # fmt: skip


def test_atomic_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def fail():
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    def write(name: str, killed: bool) -> None:
        with atomic_file(tmp_path / name) as file:
            file.write(b"half")
            file.flush()
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write, args=("one", True))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_file(tmp_path / "two") as slow:  # a writer that is alive
        write("two", killed=False)
        slow.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    assert (tmp_path / "two").read_bytes() == b"whole"


def test_only_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    mine = unfinished(tmp_path / "step=1.ckpt").name
    host = mine.split(".")[-4]
    assert host in platform.node()
    dead = mine.replace(f".{os.getpid()}.", f".{child}.")
    far = dead.replace(f".{host}.", ".elsewhere.")
    old = far.replace("step=1", "step=2")
    others = [".step=1.ckpt.tmp", f"step=1.ckpt.{host}.{child}.00000000.tmp", f".a.{host}.{child}.0000000z.tmp"]
    for name in (mine, dead, far, old, *others):
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine, far, *others}
    remove_leftovers(tmp_path / "missing")


def test_names_of_any_length_find_room_for_a_temporary_one(tmp_path: Path) -> None:
    for name in ("n" * 255, "\N{SNOWMAN}" * 85):
        with atomic_file(tmp_path / name) as file:
            file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    for unset in (lambda: monkeypatch.setenv("MEMLM_CACHE", ""), lambda: monkeypatch.delenv("MEMLM_CACHE")):
        unset()
        assert cache_dir() == Path.home() / ".cache" / "memlm"


def test_a_path_may_begin_with_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/mine")
    assert from_home("~/a/b") == Path("/home/mine/a/b")
    for path in ("a/~b", "./~nobody.of.this.name/x", "~notes.txt"):
        assert from_home(path) == Path(path)
    with pytest.raises(ConfigError, match=r"user who is not here: ~nobody\.of\.this\.name"):
        from_home("~nobody.of.this.name/x")
    Path("~nobody.of.this.name").mkdir()
    assert from_home("~nobody.of.this.name/x") == Path("~nobody.of.this.name/x")


@pytest.mark.parametrize("most", [0, 2**30])  # mapped, read
def test_a_checked_file_ends_with_its_checksum_and_any_damage_is_noticed(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_IN_MEMORY", most)
    path, body = tmp_path / "f", random.Random(0).randbytes(300)
    assert read_checked(path) is None
    with checked_file(path) as file:
        file.write(body[:100])
        file.write(body[100:])
    whole = path.read_bytes()
    assert whole == body + f"\ncrc32 {zlib.crc32(body):08x}\n".encode()
    assert bytes(read_checked(path) or b"") == body
    damages = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for damage in [*damages, whole[:-1], whole[5:], whole + b"x", body, b"x" * 10]:
        path.write_bytes(damage)
        assert read_checked(path) is None


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "astray").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path, told in (
        (tmp_path / "pipe", "is a pipe"), (tmp_path / "socket", "is a socket"), (Path("/dev/null"), "is a device"),
        (tmp_path, "is a directory"),
    ):  # fmt: skip
        for function in (open_regular, regular):
            with pytest.raises(ConfigError, match=f"{told}: a regular file is expected there"):
                function(path)
    with pytest.raises(ConfigError, match="loop cannot be read"):
        open_regular(tmp_path / "loop")
    with pytest.raises(ConfigError, match="leads nowhere"):
        regular(tmp_path / "astray")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")
    assert read_checked(tmp_path / "pipe") is None
    with checked_file(tmp_path / "pipe") as file:
        file.write(b"x")
    assert bytes(read_checked(tmp_path / "pipe") or b"") == b"x"


def test_json_that_is_none_or_no_object_is_told_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ("", "{", "null", "[1]", "5", "\xff", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"a\.json cannot be read: it") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"a": "é"}))
    assert read_json(path) == {"a": "é"}


def test_a_mapped_file_that_is_cut_short_ends_with_a_line(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from memlm import files
path = Path(sys.argv[1])
with files.checked_file(path) as file:
    file.write(bytes(100_000))
files.MOST_IN_MEMORY = 0
found = files.read_checked(path)
os.truncate(path, 0)
bytes(found)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
