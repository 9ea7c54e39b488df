"""How a wrong, odd or hostile input is tried: in a process of its own, in an empty directory, with a limit of time.

A module ``tests/hostile/<subject>.py`` has functions ``settings``, ``files`` or ``faults`` that return cases;
``python -m tests.hostile`` tries them all and prints the counts.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKOUT = Path(__file__).parents[2]
CANARY = "EXECUTED"  # a file of this name in the case's directory means that a file of a stranger ran something

PRINTED = ".printed"  # what a case prints, in its directory

# A run of a second; add trainer.max_steps=N and whatever is tried.
TINY = (
    "model=lmcode",
    "model.n_layer=2",
    "model.d_model=32",
    "model.n_head=2",
    "model.segment_len=16",
    "model.overlap=4",
    "watch=null",
    "experiment=[]",
    "logger=csv",
    "trainer=cpu",
    "trainer.max_steps=1",
    "curriculum=plain",
    "data.tokenizer.vocab_size=300",
)

Answer = Literal["right", "sentence", "traceback", "silent", "hang", "crash", "executed"]


class Silent(Exception):
    """Raised by a case that finds wrong values taken without a word."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: What is tried, unique within its subject.
        do: Tries it in the current directory, which is empty. It returns where memlm did what it should, lets the error
            of memlm pass where memlm refuses, and raises `Silent` where memlm takes what it should not.
        wanted: The right answers: ``right`` (does what it should, or goes on unharmed), ``sentence`` (one clear line).
        seconds: After how long it counts as a hang.
    """

    name: str
    do: Callable[[], object]
    wanted: tuple[Answer, ...] = ("sentence",)
    seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: The case.
        answer: What memlm did.
        text: The end of what was printed.
        seconds: How long it took.
    """

    case: Case
    answer: Answer
    text: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether memlm did what was wanted."""
        return self.answer in self.case.wanted


def command(script: str, *overrides: str) -> None:
    """Run ``train.py`` (``"train"``) or a script of ``scripts/`` in this process, as its command line would.

    Raises:
        SystemExit: With the exit code, as the command does.
    """
    path = CHECKOUT / ("train.py" if script == "train" else f"scripts/{script}.py")
    sys.argv = [str(path), *overrides]
    runpy.run_path(str(path), run_name="__main__")


def preload() -> None:
    """Load once what forked processes need, and make the cache that they share; starts no threads."""
    import torch
    from hydra.core.plugins import Plugins

    for folder in ("experiments", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            importlib.import_module(".".join(path.relative_to(CHECKOUT).with_suffix("").parts))
    for name in ("memlm.assemble", "memlm.checkpoint", "memlm.app.cli", "memlm.training.fit", "train"):
        importlib.import_module(name)
    Plugins.instance()  # looks through all packages
    torch.set_num_threads(1)
    cache = tempfile.mkdtemp(prefix="memlm-hostile-cache-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["MEMLM_CACHE"] = cache


def collect(kinds: Iterable[str], part: str = "", most: int | None = None) -> Iterator[tuple[str, str, Case]]:
    """Kind, subject and case of all cases.

    Args:
        kinds: ``settings``, ``files``, ``faults``.
        part: Of "subject: name".
        most: Of each kind and subject, evenly spread; None for all.
    """
    subjects = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "base")
    for kind in kinds:
        for subject in subjects:
            module = importlib.import_module(f"tests.hostile.{subject}")
            named = part.partition(":")[0]
            if not hasattr(module, kind) or (named in subjects and named != subject and ":" in part):
                continue  # without building its cases
            cases = [case for case in getattr(module, kind)() if part in f"{subject}: {case.name}"]
            for case in cases[:: 1 if most is None else max(-(-len(cases) // most), 1)]:
                yield kind, subject, case


def attempts(cases: Iterable[Case], n_job: int = 1) -> Iterator[Outcome]:
    """Try cases, each in a forked process, several at a time; in the order in which they end."""
    waiting = iter(cases)
    running: dict[int, tuple[Case, Path, float]] = {}
    try:
        while True:
            while len(running) < n_job and (case := next(waiting, None)) is not None:
                folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-"))
                sys.stdout.flush()
                sys.stderr.flush()
                child = os.fork()
                if child == 0:
                    _child(case, folder)
                running[child] = (case, folder, time.monotonic())
            if not running:
                return
            for child, (case, folder, start) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                taken = time.monotonic() - start
                if done or taken > case.seconds:
                    _end(child, waited_for=bool(done))
                    del running[child]
                    yield _outcome(case, status if done else None, folder, taken)
            time.sleep(0.005)
    finally:
        for child, (_, folder, _) in running.items():
            _end(child, waited_for=False)
            shutil.rmtree(folder, ignore_errors=True)


def _end(child: int, waited_for: bool) -> None:
    """End a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not waited_for:
        os.waitpid(child, 0)


def _outcome(case: Case, status: int | None, folder: Path, seconds: float) -> Outcome:
    try:
        printed = folder / PRINTED
        text = printed.read_text(encoding="utf-8", errors="replace") if printed.exists() else ""
        return Outcome(case, _answer(case, status, text, folder), text[-2000:], seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(case: Case, folder: Path) -> None:
    """Do the case; never returns. 0: it returned, 2: refused in a sentence, 3: silent, 1: any other exception."""
    code = 1
    try:
        os.setsid()  # so that all that it starts can be ended with it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, or under nohup, they are ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        out = os.open(folder / PRINTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        from memlm.config import ConfigError

        try:
            case.do()
            code = 0
        except Silent as error:
            print(f"silent: {error}", flush=True)
            code = 3
        except ConfigError as error:
            print(f"ConfigError: {error}", flush=True)
            code = 2 if "\n" not in str(error) else 1
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _answer(case: Case, status: int | None, text: str, folder: Path) -> Answer:
    if any(path.name == CANARY for path in folder.rglob("*")):
        return "executed"
    if status is None:
        return "hang"
    if os.WIFSIGNALED(status):
        return "crash"
    code = os.WEXITSTATUS(status)
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if code == 3 or (code == 0 and "right" not in case.wanted):
        return "silent"
    return {0: "right", 2: "sentence"}.get(code, "traceback")
