"""Settings of every test run, made before torch is imported and inherited by subprocesses."""

import os
import tempfile
from pathlib import Path

# Spinning threads of several workers on few cores make a suite many times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test touches the network, opens a window or talks to a W&B server.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Triton's interpreter stands in for a GPU; some versions of Triton have to know when they are imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# Errors are tested as a user sees them.
os.environ.pop("HYDRA_FULL_ERROR", None)
os.environ.pop("MEMLM_TRACEBACK", None)

import logging
import shutil
from collections.abc import Iterator

import pytest

_CACHE = "MEMLM_TEST_CACHE"  # made by the first process of a run; xdist workers inherit it


def pytest_configure(config: pytest.Config) -> None:
    if _CACHE not in os.environ:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="memlm-test-cache-")
        config.add_cleanup(_remove_cache)
    os.environ["MEMLM_CACHE"] = os.environ[_CACHE]


def _remove_cache() -> None:
    shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True)


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """Take away the log handlers that a Hydra job leaves behind: they write to streams of a test that is over."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if handler not in before and type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)
