"""Hydra: composing the configs of `configs/`, and running them from a command line.

- `compose`: do the overrides name settings and options that exist?
- `check_command_line` and `cli`: that, and whether what is composed fits what it builds (`memlm.config.validate`), for
  every job of a command line, ahead of the first one.

All that comes before anything heavy is imported or built. Every mistake is a `ConfigError`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks  # those that a config names, which have no public home
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, configure_log, run_job
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict, read_write

from memlm import threads
from memlm.app.command_line import check_command_line
from memlm.app.errors import (
    STOPPED,
    again,
    end_of_failed,
    exit_code,
    is_sweep,
    is_user_error,
    job_failed,
    report,
    wants_traceback,
)
from memlm.compose import config_dir, run_dir, session, to_dict
from memlm.config_files import bound_files
from memlm.files import ERROR
from memlm.output import open_streams, output_lost
from memlm.quoting import nothing, quote_texts
from memlm.training.stopping import OUT_OF_TIME, UNREAD


def cli(
    config_name: str,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    *,
    directory: str | Path | None = None,
) -> Callable[[Callable[[Mapping[str, Any]], Any]], Any]:
    """Make a function of a config the main function of a script.

        @cli("train")
        def main(config: Mapping[str, Any]) -> float | None: ...

        if __name__ == "__main__":
            main()

    The command line is checked first. A mistake of the user ends the program with `error: <sentence>` on stderr and
    exit code 2; `MEMLM_TRACEBACK=1` (or Hydra's `HYDRA_FULL_ERROR=1`) shows the traceback instead. Of a sweep the
    other jobs still run; the failed ones are reported when they fail, and listed at the end. A run that leaves
    nothing leaves no directory. The function gets the config as plain dicts and lists, every reference resolved.
    Called with a config, composed or plain, `main(cfg)` is the bare function; a command line gets the threads that
    `memlm.threads` chooses.

    Args:
        config_name: the primary config.
        check: what refuses a config before anything is run, see `check_command_line`.
        directory: the config tree; the shipped one by default.
    """

    def decorate(function: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def plainly(cfg: Any) -> Any:
            return function(to_dict(cfg))

        @functools.wraps(function)
        def command(cfg: DictConfig) -> Any:
            threads.take()
            return plainly(cfg)

        @functools.wraps(function)
        def job(cfg: DictConfig) -> Any:
            # What _quiet_hydra() sets must not reach the processes that this job starts.
            os.environ.pop("HYDRA_FULL_ERROR", None)
            ended = False  # before it was done
            try:
                if is_sweep():
                    (Path(run_dir()) / ERROR).unlink(missing_ok=True)
                return command(cfg)
            except Exception as error:
                if isinstance(error, OSError) and output_lost():
                    raise SystemExit(UNREAD) from error
                if is_sweep():
                    raise job_failed(error) from error
                if is_user_error(error):
                    ended = True
                    report(error)
                    # Not an Exception, so Hydra adds no report of its own.
                    raise SystemExit(2) from error
                raise
            except (KeyboardInterrupt, SystemExit) as stop:
                ended = True
                if is_sweep() and exit_code(stop) == OUT_OF_TIME:
                    return None
                if is_sweep() and (code := exit_code(stop)) in STOPPED:
                    print(f"The sweep was stopped. {again(HydraConfig.get().sweep.dir)}", file=sys.stderr)
                    raise SystemExit(code) from stop
                raise
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1"
                _remove_if_bare(Path(run_dir()), ended)

        @functools.wraps(function)
        def main(cfg: DictConfig | dict[str, Any] | None = None) -> Any:
            if cfg is not None:
                return plainly(cfg)
            threads.wait_passively()
            open_streams()
            bound_files()
            sys.argv[1:] = quote_texts([nothing(argument) for argument in sys.argv[1:]])
            path = str(Path(directory or config_dir()).resolve())

            def run(task: Callable[[DictConfig], Any]) -> None:
                JobRuntime.instance().set("name", _name_of(function))
                composed = check_command_line(sys.argv[1:], config_name, directory=directory, check=check)
                if composed is None:
                    hydra.main(version_base="1.3", config_path=path, config_name=config_name)(task)()
                else:
                    _run_composed(composed, task, path, config_name)

            if wants_traceback():
                os.environ["HYDRA_FULL_ERROR"] = "1"
                return run(command)
            try:
                with _quiet_hydra():
                    run(job)
                if output_lost():
                    raise SystemExit(UNREAD)
            except (KeyboardInterrupt, SystemExit) as stop:
                raise SystemExit(exit_code(stop)) from None
            except Exception as error:
                if isinstance(error, OSError) and output_lost():
                    raise SystemExit(UNREAD) from None
                raise SystemExit(end_of_failed(error)) from None

        return main

    return decorate


def _name_of(function: Callable[..., Any]) -> str:
    """What Hydra calls the job of a script's function."""
    module = function.__module__.rpartition(".")[2]
    return Path(function.__code__.co_filename).stem if module == "__main__" else module


def _run_composed(config: DictConfig, task: Callable[[DictConfig], Any], directory: str, config_name: str) -> None:
    """Run a job as `hydra.main` does, on a config that is composed already."""
    with session(directory) as loader:
        with read_write(config), open_dict(config):
            config.hydra.mode = RunMode.RUN
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        callbacks = Callbacks(config)
        callbacks.on_run_start(config=config, config_name=config_name)
        context = HydraContext(config_loader=loader, callbacks=callbacks)
        done = run_job(task, config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
        callbacks.on_run_end(config=config, config_name=config_name, job_return=done)
        _ = done.return_value  # raises what the job has raised


def _remove_if_bare(run: Path, ended: bool) -> None:
    """Remove a run directory in which there is nothing but what a start has put there.

    Args:
        run: The directory.
        ended: Whether it was refused or stopped: what loggers and evaluations begin with is nothing either then.
    """
    if run.resolve() == Path.cwd() or not (run / ".hydra").is_dir():
        return
    started = {".hydra", ".lock", f"{HydraConfig.get().job.name}.log"}
    if ended:
        started |= {"csv", "wandb", "evaluation.json", "watch.html"}
    with contextlib.suppress(OSError):
        if {path.name for path in run.iterdir()} <= started:
            shutil.rmtree(run, ignore_errors=True)


class CompareHint(Callback):
    """Says at the end of a sweep how its jobs are put side by side."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the command."""
        print(f"\nTo compare the jobs: memlm compare {shlex.quote(config.hydra.sweep.dir)}")


@contextmanager
def _quiet_hydra() -> Iterator[None]:
    """Let Hydra pass errors on instead of printing them and leaving."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
