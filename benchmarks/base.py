"""What benchmarks share: peers, the machine and the libraries, a process of its own, and checks of settings."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memlm.config import ConfigError

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

SHIFT = 41
"""Tokens by which a further reading of a text begins later."""

_LIBRARIES = ("torch", "transformers", "memoria-pytorch", "faiss-cpu")  # whose versions a result names


def check_least(given: Mapping[str, int | None], least: Mapping[str, int] | None = None) -> None:
    """Check that settings are not too small.

    Args:
        given: Settings by name; None is always right.
        least: By name, the least of those that may not be 1.

    Raises:
        ConfigError: If one is less.
    """
    for key, value in given.items():
        if value is not None and value < (number := (least or {}).get(key, 1)):
            raise ConfigError(f"{key} must be at least {number}, got {value}.")


def check_names(**given: Sequence[Any]) -> None:
    """Check that lists of what is measured have something, and nothing twice.

    Raises:
        ConfigError: If one is empty or repeats itself.
    """
    for key, names in given.items():
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"{key} must name at least one, and each once; got {list(names)}.")


def check_device(device: str) -> None:
    """Check that torch computes on a device.

    Raises:
        ConfigError: If it does not.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error


@contextmanager
def torch_threads(n: int | None) -> Iterator[int]:
    """Torch works with ``n`` threads inside the block (None: as many as before), whose number is handed out."""
    import torch

    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class Peer(NamedTuple):
    """A library that is compared with.

    Attributes:
        module: What is imported.
        needs: What a comparison needs it for, in words.
        without: How to do without.
    """

    module: str
    needs: str
    without: str


def peer_library(peer: Peer) -> Any:
    """The library of a peer.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(peer.module)
    except ImportError as error:
        raise ConfigError(
            f"The comparison with {peer.needs}: install it with pip install 'memlm[bench]' "
            f"(in a checkout: pip install -e '.[bench]'), or leave {peer.without}."
        ) from error


def trained_with_ltm(checkpoint: str, trust: list[str]) -> tuple[Any, TextData]:
    """The model of a run directory, and the data it was trained on.

    Args:
        checkpoint: The run directory.
        trust: As for `memlm.checkpoint.load`.

    Raises:
        ConfigError: If it has no long-term memory.
    """
    from memlm.checkpoint import load_run

    model, data = load_run(checkpoint, trust=trust)
    if "ltm" not in model.memory:
        raise ConfigError(f"checkpoint must name a model with memory=ltm; {checkpoint} has {', '.join(model.memory)}")
    return model, data


def quartiles(key: str, values: list[float]) -> dict[str, float]:
    """``key_low``, ``key`` and ``key_high``: lower quartile, median and upper quartile."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(zip((f"{key}_low", key, f"{key}_high"), quartiles, strict=True))


def in_own_process(function: Callable[..., dict[str, Any]], name: Any, *arguments: Any) -> dict[str, Any]:
    """Call a function of a module in a fresh process, for what is called ``name`` or has that size."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, name, *arguments).result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"the process that measures {name!r} was ended by the system, most likely for want of memory: "
                "lower n_row or n_segment, or leave out the largest of sizes"
            ) from error


def peak_rss() -> float:
    """Largest resident size of this process so far, in MiB; NaN where the system does not tell."""
    try:
        # Not getrusage: on Linux its value begins with the size of the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def surroundings(device: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    libraries = {name: _version(name) for name in _LIBRARIES}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (status := git("status", "--porcelain")) is None else bool(status),
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **libraries,
    }


def _version(library: str) -> str | None:
    """Version of an installed library."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(metrics: Mapping[str, float], key: str, digits: int = 2) -> str | None:
    """A median and its quartiles, as a table shows them; None if it was not measured."""
    if key not in metrics:
        return None
    low, middle, high = (metrics[f"{key}{end}"] for end in ("_low", "", "_high"))
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def conditions(metadata: Mapping[str, Any]) -> list[str]:
    """Lines on where, with what and when something was measured."""
    state = {True: " with uncommitted changes", False: "", None: ""}[metadata["uncommitted_changes"]]
    libraries = ", ".join(f"{name} {metadata[name]}" for name in _LIBRARIES if metadata[name] is not None)
    return [
        f"{metadata['accelerator'] or metadata['processor']}; {metadata['threads']} threads; load before "
        f"{metadata['load_before']}",
        f"{libraries}, Python {metadata['python']}; commit {metadata['commit']}{state}; {metadata['date']}",
    ]
