"""What tests of models share."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import bases


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a tiny base of a family is."""
    return functools.cache(lambda family: bases.make_base(family, tmp_path_factory.mktemp("bases")))
