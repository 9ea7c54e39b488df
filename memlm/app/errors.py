"""How a command ends: what is said of an error, and the exit code."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from memlm.compose import run_dir, sentence_of
from memlm.config import (
    ConfigError,
)
from memlm.files import ERROR
from memlm.machine import refusal
from memlm.output import open_streams
from memlm.printed import one_line
from memlm.training.stopping import ASKING

# Packages whose ValueErrors are mistakes of a user.
_OURS = ("memlm", "experiments", "benchmarks", "scripts", "__main__")


STOPPED = frozenset(128 + signum for signum in ASKING)


_LAUNCHERS = ("joblib", "submitit")  # packages that start the jobs of a sweep, and tell when one of them dies


class JobFailed(Exception):
    """A job of a sweep has failed, and `ERROR` in its directory says why.

    Arguments are the first line of that, and the directory of the sweep.
    """


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Let a mistake of the user inside the block end the program with ``error: <sentence>`` and exit code 2.

    Nor does it end with a traceback where nobody reads what it prints, as behind ``| head``.
    """
    open_streams()
    try:
        yield
    except Exception as error:
        if wants_traceback() or not is_user_error(error):
            raise
        report(error)
        raise SystemExit(2) from None


def job_failed(error: Exception) -> JobFailed:
    """Report why a job of a sweep has failed, and write it into its directory."""
    sentence, user = _message(error), is_user_error(error)
    lines = sentence if user else f"{sentence}\n\n{''.join(traceback.format_exception(error))}"
    with suppress(OSError):  # such as of a full disk, which is what is told
        (Path(run_dir()) / ERROR).write_text(lines + "\n", encoding="utf-8")
    if user:
        report(error, f"job {HydraConfig.get().job.num}: ")
    else:
        sys.stdout.flush()
        print(lines.partition("\n\n")[2], file=sys.stderr)
    return JobFailed(sentence, HydraConfig.get().sweep.dir)


def end_of_failed(error: Exception) -> int:
    """Say what is not said yet of what ended a program; returns its exit code."""
    if isinstance(error, JobFailed):
        sweep = error.args[1]
        texts = {
            path.parent: path.read_text(encoding="utf-8", errors="replace").splitlines()
            for path in sorted(Path(sweep).rglob(ERROR))
        }
        lines = [f"  {place}: {one_line(text[0] if text else 'failed')}" for place, text in texts.items()]
        print(f"\nerror: {len(lines)} of the jobs in {sweep} failed:", *lines, again(sweep), sep="\n", file=sys.stderr)
        return 1 if any(len(text) > 1 for text in texts.values()) else 2
    if type(error).__module__.partition(".")[0] in _LAUNCHERS:
        print(f"error: the process of a job has died: {sentence_of(error)}", file=sys.stderr)
        return 1
    if is_user_error(error):
        report(error)
        return 2
    raise error


def exit_code(stop: KeyboardInterrupt | SystemExit) -> Any:
    """What a program that was stopped leaves with. Lightning exits with code 1 on Ctrl-C."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 130
    return stop.code


def again(sweep: str) -> str:
    """How a sweep is started again."""
    return f"To run what is left, repeat the command with hydra.sweep.dir={shlex.quote(sweep)}"


def wants_traceback() -> bool:
    """Whether tracebacks are asked for."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("HYDRA_FULL_ERROR", "MEMLM_TRACEBACK"))


def is_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def is_user_error(error: BaseException) -> bool:
    """Tell a mistake of the user, or what the machine refuses, from one of the program, which needs its traceback."""
    error = _root(error)
    if isinstance(error, ConfigError | HydraException | OmegaConfBaseException) or refusal(error) is not None:
        return True
    # By convention this project raises ValueError for what a user can get wrong; elsewhere it may mean anything.
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return isinstance(error, ValueError) and module.partition(".")[0] in _OURS


def _root(error: BaseException) -> BaseException:
    """Return what went wrong inside of `hydra.utils.instantiate`, which wraps every error."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _message(error: BaseException) -> str:
    """What an error says, on one line."""
    error = _root(error)
    if isinstance(error, ConfigError):
        return one_line(error)
    return one_line(refusal(error) or sentence_of(error))


def report(error: BaseException, prefix: str = "") -> None:
    """Print what an error says, on one line."""
    sys.stdout.flush()
    print(f"error: {prefix}{_message(error)}", file=sys.stderr)
    if not isinstance(_root(error), ConfigError):
        print("(MEMLM_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
