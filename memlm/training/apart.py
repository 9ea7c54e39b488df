"""A run in a process of its own: a trial of a search, or a job of a sweep that trains with several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from memlm.config import ConfigError
from memlm.quoting import quoted
from memlm.training.marks import read_finished
from memlm.training.stopping import OUT_OF_TIME, Signals

# What a job of a sweep was told that a run of its own must not be: how the sweep goes, and its place in it.
_OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra.run", "hydra.launcher", "hydra/launcher", "hydra/sweep")


def starts_processes(config: Mapping[str, Any]) -> bool:
    """Whether a run starts the processes it trains with itself, and so cannot be a job among others in one process.

    Each of those processes runs the command line of the first again. Of a sweep that would be the whole sweep.

    Args:
        config: Plain configuration.

    Raises:
        ConfigError: If a setting of the trainer does not work here, or the sweep was started by torchrun.
    """
    settings = {name: value for name, value in config["trainer"].items() if name != "_target_"}
    if settings["devices"] in (1, "1") and settings["num_nodes"] == 1:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("torchrun starts one run: start a sweep without it, each job starts its processes itself")
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:  # a task for each process, all with the overrides of the job
        return False
    from memlm.training.fit import count_processes

    return count_processes(settings) > 1


def job_overrides() -> list[str]:
    """The command line that makes the job of a sweep, in which this is called, a run of its own."""
    hydra: Any = HydraConfig.get()
    return [
        f"--config-name={hydra.job.config_name}",
        *config_dirs(),
        *hydra.overrides.task,
        *(line for line in hydra.overrides.hydra if not line.lstrip("+~").startswith(_OF_THE_SWEEP)),
    ]


def config_dirs() -> list[str]:
    """The options of this command line by which configs of a user's own are found."""
    sources: Any = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]


def run_apart(script: str | Path, overrides: Sequence[str], run: Path) -> float | None:
    """Start a script of this project and wait for it; signals that ask this process to stop are passed on to it.

    Args:
        script: ``train.py``.
        overrides: Its command line.
        run: Its run directory.

    Returns:
        What it returned.

    Raises:
        ConfigError: What it was refused for.
        RuntimeError: If it failed otherwise; what it said was shown.
        Stopped: If it was asked to stop.
    """
    command = [sys.executable, str(script), *overrides, f"hydra.run.dir={quoted(str(run.resolve()))}"]
    # In a SLURM job of one task, as in an interactive one, a run starts its processes itself.
    environment = os.environ | ({"SLURM_JOB_NAME": "interactive"} if "SLURM_JOB_NAME" in os.environ else {})
    asked: list[int] = []

    def pass_on(signum: int) -> None:
        asked.append(signum)
        if asked.count(signal.SIGINT) > 1:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.send_signal(signum)

    # A session of its own, or it would get Ctrl-C twice: from the terminal, and passed on.
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    signals = Signals(pass_on)
    signals.listen()
    try:
        refusal = ""
        for line in process.stderr:
            if line.startswith("error: "):
                refusal = line.removeprefix("error: ").strip()
            else:
                sys.stderr.write(line)
        code = process.wait()
        if asked and code != 0:
            raise signals.stopped(128 + asked[0])
    finally:
        signals.give_back()
    if code == OUT_OF_TIME:  # which it has told
        return None
    if code == 2 and refusal:
        raise ConfigError(refusal)
    if code != 0:
        raise RuntimeError(f"its process ended with exit code {code}" + (f": {refusal}" if refusal else ""))
    done = read_finished(run)
    return None if done is None else done.value
