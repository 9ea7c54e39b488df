"""Programs that are no part of a package, loaded by their file."""

import importlib.util
from pathlib import Path
from typing import Any


def loaded(path: Path) -> Any:
    """The module that a file holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
