"""The package memoria-pytorch as an oracle: either version, in either precision, with given random numbers.

Versions 1.0.0 and 1.1.0 cannot be installed together. They differ in one line of arithmetic, so the other version is
made of a copy of the installed one; `test_memoria.py` proves it by the numbers of the tutorial of 1.0.0.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

KERNEL = {"1.0.0": "return l2_square.neg().exp()\n", "1.1.0": "return l2_square.neg()\n"}


@functools.cache
def load(version: str, double: bool) -> Any:
    """The package as a module of its own; its ``memoria.draw(mask)`` gives random numbers shaped as ``mask``.

    Args:
        version: ``1.0.0`` or ``1.1.0``.
        double: Whether contents and lifespans are float64 instead of float32.
    """
    installed = distribution("memoria-pytorch")
    edits = {
        "memoria.py": [
            (KERNEL[installed.version], KERNEL[version], 1),
            ("torch.rand_like(max_mask.type(torch.float16))", "draw(max_mask)", 1),
        ],
        "engram.py": [("data.detach().float()", "data.detach().double()", 1), ("torch.float32", "torch.float64", 4)]
        if double
        else [],
    }
    name = f"memoria_{version.replace('.', '_')}_{'float64' if double else 'float32'}"
    root = Path(tempfile.mkdtemp()) / name
    try:
        shutil.copytree(str(installed.locate_file("memoria")), root, ignore=shutil.ignore_patterns("__pycache__"))
        for file, changes in edits.items():
            text = (root / file).read_text()
            for old, new, n in changes:
                assert text.count(old) == n, f"{file} of memoria-pytorch {installed.version} is not as expected: {old}"
                text = text.replace(old, new)
            (root / file).write_text(text)
        spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        shutil.rmtree(root.parent)
    return module
