"""No room on a disk, no right to a file, limits of the system, no memory.

Cases that need a mount of their own, or capabilities to give up, are left out where the system does not allow it, and
how many is printed.
"""

from __future__ import annotations

import ctypes
import functools
import io
import json
import os
import resource
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile.base import TINY, Answer, Case, Silent, command

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_RDONLY, _REMOUNT, _REC, _PRIVATE = 1, 32, 16384, 1 << 18
_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _namespace() -> None:
    """Mounts of this process alone."""
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEWNS | (_NEWUSER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)


def _mount(place: str, size: str, flags: int = 0) -> None:
    Path(place).mkdir(exist_ok=True)
    _call("mount", b"none", os.fsencode(place), b"tmpfs", flags, f"size={size}".encode())


def _obey_permissions() -> None:
    """Without the capabilities by which root passes over the bits of files."""
    if os.getuid():
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (ctypes.c_uint32 * 6)()
    _call("capget", header, data)
    for i in (0, 1):  # effective, permitted
        data[i] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    _call("capset", header, data)


def _fork(do: Callable[[], object]) -> int:
    """The exit code of what is done in a process of its own, whose output is dropped."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in (1, 2):
                os.dup2(nowhere, number)
            do()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@functools.cache
def _works(do: Callable[[], object]) -> bool:
    def attempt() -> None:
        do()
        if do is _namespace:
            _mount(tempfile.mkdtemp(), "8k")

    return _fork(attempt) == 0


@functools.cache
def text() -> str:
    """A file of plain text."""
    folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-room-"))
    words = ["the", "a", "small", "old", "house", "river", "tree", "bird", "goes", "sees", "keeps", "under", "near"]
    lines = (" ".join(words[(i * j + j) % len(words)] for j in range(3, 14)) + "." for i in range(400))
    (folder / "text.txt").write_text("\n".join(lines))
    return str(folder / "text.txt")


def tiny(*more: str) -> list[str]:
    """The command line of a short training on `text`."""
    return [*TINY, "memory=ltm", "memory.ltm.n_slot=64", "data=text", f"data.path={text()}", *more]


@functools.cache
def trained() -> str:
    """A finished run, trained once."""
    folder = tempfile.mkdtemp(prefix="memlm-hostile-room-")

    def train() -> None:
        os.chdir(folder)
        command("train", *tiny("hydra.run.dir=run"))

    if _fork(train):
        raise RuntimeError("the tiny run failed")
    return f"{folder}/run"


def run(script: str, *arguments: str) -> None:
    """Run a command, then look for what is left half written."""
    try:
        command(script, *arguments)
    finally:
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS):
            limit(kind, resource.getrlimit(kind)[1])()
        for path in Path().rglob("*"):
            if path.name.endswith(".tmp") and path.parts[0] != "elsewhere":
                raise Silent(f"{path} is left")
            if path.suffix == ".json" and path.is_file() and os.access(path, os.R_OK):
                json.loads(path.read_text().partition("\ncrc32 ")[0])  # what follows is of a checked file
            if path.suffix == ".png" and path.is_file() and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
                raise Silent(f"{path} is half a picture")


# --- where the commands write -----------------------------------------------------------------------------------------


def outputs(place: str) -> dict[str, Callable[[], None]]:
    """Commands that write below or at ``place``."""
    found = {
        "train, run": lambda: run("train", *tiny(f"hydra.run.dir={place}/run")),
        "train, cache": lambda: run("train", *tiny(f"paths.cache_dir={place}/cache")),
        "evaluate": lambda: run(
            "evaluate", f"checkpoint={trained()}", "experiment=perplexity", f"hydra.run.dir={place}/evaluation"
        ),
        "export": lambda: run("export", f"checkpoint={trained()}", f"output={place}/exported"),
        "compare": lambda: run("compare", trained(), "--out", f"{place}/compared"),
        "report": lambda: run("report", trained(), "--out", f"{place}/report.html", "--prompt", "the old house"),
    }
    return found  # type: ignore[return-value]


def inputs(run_directory: str) -> dict[str, Callable[[], None]]:
    """Commands that read a run."""
    found = {
        "evaluate": lambda: run("evaluate", f"checkpoint={run_directory}", "experiment=perplexity"),
        "export": lambda: run("export", f"checkpoint={run_directory}", "output=exported"),
        "generate": lambda: run("generate", f"checkpoint={run_directory}", "prompt=the", "max_new_tokens=2"),
        "chat": lambda: run("chat", f"checkpoint={run_directory}"),
        "compare": lambda: run("compare", run_directory, "--out", "compared"),
        "report": lambda: run("report", run_directory, "--out", "report.html"),
        "resume": lambda: run("train", *tiny(f"resume={run_directory}", "trainer.max_steps=2")),
    }
    return found  # type: ignore[return-value]


def after(*steps: Callable[[], object]) -> Callable[[], None]:
    """Do the steps one after the other."""

    def do() -> None:
        for step in steps:
            step()

    return do


def limit(kind: int, soft: int) -> Callable[[], None]:
    """Set a limit of the process."""
    return lambda: resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


def _copy_of_run() -> None:
    import shutil

    shutil.copytree(trained(), "run")


def _read_only() -> None:
    _namespace()
    _mount("place", "1m")
    _call("mount", b"none", os.fsencode("place"), b"tmpfs", _REMOUNT | _RDONLY, None)


def _full(size: str) -> Callable[[], None]:
    def do() -> None:
        _namespace()
        _mount("place", size)

    return do


def _closed_directory() -> None:
    Path("place").mkdir()
    os.chmod("place", stat.S_IRUSR | stat.S_IXUSR)
    _obey_permissions()


def _unreadable() -> None:
    _copy_of_run()
    for path in Path("run/checkpoints").glob("*.ckpt"):
        path.chmod(0)
    _obey_permissions()


def _closed_run() -> None:
    _copy_of_run()
    os.chmod("run", 0)
    _obey_permissions()


def _loop() -> None:
    os.symlink("place", "place")


def _file() -> None:
    Path("place").write_text("a file")


def _little_memory(more: int) -> Callable[[], None]:
    """Let the process take so many bytes more than it has."""

    def do() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)()

    return do


def _grown_later(size: str) -> None:
    """A disk that fills in training; with more room it is gone on with from the last good checkpoint."""
    _full(size)()
    steps = ["hydra.run.dir=place/run", "checkpoint.every=1", "checkpoint.keep=null", "trainer.max_steps=6"]
    code = _fork(lambda: command("train", *tiny(*steps)))
    if code != 2:
        raise Silent(f"a full disk gave exit code {code}")
    if list(Path("place").rglob("*.tmp")):
        raise Silent("a temporary file is left")
    _call("mount", b"none", os.fsencode("place"), b"tmpfs", _REMOUNT, b"size=20m")
    command("train", *tiny(*steps, *(["resume=place/run"] if list(Path("place").rglob("*.ckpt")) else [])))
    if not Path("place/run/checkpoints/step=6.ckpt").exists():
        raise Silent("the run was not gone on with")


def _while_training(change: Callable[[], object]) -> Callable[[], None]:
    """Do something after the first checkpoint of a run; its next one then fails or is written."""

    def do() -> None:
        from memlm.training import callbacks

        save = callbacks.AtomicCheckpointIO.save_checkpoint

        def save_checkpoint(*arguments: object, **more: object) -> None:
            save(*arguments, **more)  # type: ignore[arg-type]
            callbacks.AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
            change()

        callbacks.AtomicCheckpointIO.save_checkpoint = save_checkpoint  # type: ignore[assignment,method-assign]
        run("train", *tiny("hydra.run.dir=run", "checkpoint.every=1", "trainer.max_steps=3", "paths.cache_dir=cache"))

    return do


def _remove(path: str) -> Callable[[], None]:
    import shutil

    return lambda: shutil.rmtree(path)


def _replace_by_file() -> None:
    os.rename("run", "elsewhere")
    Path("run").write_text("a file")


def _talk(line: str) -> Callable[[], None]:
    """Chat with one line of input."""

    def do() -> None:
        sys.stdin = io.StringIO(f"{line}\n")
        run("chat", f"checkpoint={trained()}")

    return do


def faults() -> Iterator[Case]:
    """Full, read-only and closed places, odd paths, limits."""
    text(), trained()
    mounts, rights = _works(_namespace), _works(_obey_permissions)
    left_out = 0

    def cases(
        possible: bool,
        what: str,
        before: Callable[[], None],
        commands: dict[str, Callable[[], None]],
        wanted: tuple[Answer, ...] = ("sentence",),
    ) -> list[Case]:
        nonlocal left_out
        if not possible:
            left_out += len(commands)
            return []
        return [Case(f"{what}: {name}", after(before, do), wanted) for name, do in commands.items()]

    yield from cases(mounts, "read-only disk", _read_only, outputs("place"))
    uploads = {"train, W&B": lambda: run("train", *tiny("logger=wandb", "logger.wandb.save_dir=place/wandb"))}
    yield from cases(mounts, "read-only disk", _read_only, uploads)
    yield from cases(mounts, "full disk of 8k", _full("8k"), outputs("place"))
    talks = {"chat, /save": _talk("/save place/notes.memory")}
    for what, before in (("read-only disk", _read_only), ("full disk of 8k", _full("8k"))):
        yield from cases(mounts, what, before, talks, ("right",))  # told, and the talk goes on
    for size in ("40k", "100k", "200k"):  # some commands need less
        yield from cases(mounts, f"full disk of {size}", _full(size), outputs("place"), ("sentence", "right"))
    yield from cases(rights, "directory without the right to write", _closed_directory, outputs("place"))
    yield from cases(rights, "checkpoint without the right to read", _unreadable, inputs("run"))
    yield from cases(rights, "run without the right to look into", _closed_run, inputs("run"))
    for place, what in (("place", "a file in the way"), ("place/below", "a file higher up")):
        yield from cases(True, what, _file, outputs(place))
    yield from cases(True, "a link to itself", _loop, outputs("place"))
    yield from cases(True, "a name too long", lambda: None, outputs("x" * 300))
    yield from cases(True, "files of 1 kB at most", limit(resource.RLIMIT_FSIZE, 1_000), outputs("."))
    some = ("sentence", "right")
    for size in (20_000, 100_000, 400_000):
        yield from cases(True, f"files of {size} bytes at most", limit(resource.RLIMIT_FSIZE, size), outputs("."), some)
    for n in (10, 14, 18):
        yield from cases(True, f"{n} open files at most", limit(resource.RLIMIT_NOFILE, n), outputs("."), some)
    if mounts:
        for size in ("100k", "300k", "600k"):
            yield Case(f"full disk of {size}, then room", functools.partial(_grown_later, size), ("right",))
    else:
        left_out += 3
    odd = {
        "checkpoints removed in training": _remove("run/checkpoints"),
        "cache removed in training": _remove("cache"),
        "run removed in training": _remove("run"),
        "run replaced by a file in training": _replace_by_file,
    }
    for name, change in odd.items():
        yield Case(name, _while_training(change), ("right", "sentence"))
    big = ["model.d_model=1024", "model.n_head=8"]
    yield Case("little memory: train", lambda: after(_little_memory(150 << 20), lambda: run("train", *tiny(*big)))())
    for name, do in inputs(trained()).items():
        for mib in (6, 20, 40):
            yield Case(f"{mib} MiB of memory: {name}", after(_little_memory(mib << 20), do), ("sentence", "right"))
    yield Case("huge paste: chat", _talk("the old house " * 50_000), ("right", "sentence"))
    prompt = "the old house sees the river. " * 700
    yield Case("huge prompt: report", lambda: run("report", trained(), "--out", "r.html", "--prompt", prompt), some)
    yield Case("huge prompt: generate", lambda: run("generate", f"checkpoint={trained()}", f"prompt='{prompt}'"), some)
    if left_out:
        print(f"room: {left_out} cases cannot be made on this machine and are left out", file=sys.stderr)


def settings() -> Iterator[Case]:
    """Sizes that cannot fit."""
    sizes = [
        "model.d_model=1000000",
        "model.d_model=100000000",
        "model.d_ff=10000000000",
        "model.d_ff=1000000000000000",
        "model.n_layer=100000",
        "model.n_layer=1000000000",
        "model.segment_len=10000000",
        "memory.ltm.n_slot=1000000000",
        "memory.ltm.n_slot=1000000000000",
        "memory.ltm.n_slot=1000000000000000000000",
        "memory.ltm.d_key=10000000000",
        "memory.ltm.d_value=10000000000",
        "n_parameter=1000000000000",
        "n_parameter=1000000000000000000",
        "data.tokenizer.n_vocab=100000000000",
        "curriculum.phases.0.n_row=100000000",
    ]
    for size in sizes:
        yield Case(size, functools.partial(command, "train", *tiny(size)))
    for memory, field in (("imm", "n_slot"), ("stm", "n_slot"), ("auto", "n_slot"), ("memoria", "n_slot")):
        more = [
            *TINY,
            f"memory={memory}",
            "data=text",
            f"data.path={text()}",
            f"memory.{memory}.{field}=10000000000000",
        ]
        yield Case(f"{memory}.{field}", functools.partial(command, "train", *more))
    for more in (
        ["memory.ltm.scope=shared", "memory.ltm.n_slot=10000000000"],
        ["model=lstm", "model.d_model=1000000"],
        ["training.consolidate_every=1", "memory.ltm.n_slot=100000000000"],
    ):
        yield Case(" ".join(more), functools.partial(command, "train", *tiny(*more)))
