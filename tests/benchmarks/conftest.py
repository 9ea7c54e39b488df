"""What all tests of benchmarks share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    """A benchmark collects garbage before each measurement, but not what earlier tests have left: that takes long."""
    gc.freeze()
    yield
    gc.unfreeze()
