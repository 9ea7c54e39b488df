"""What holds of the figure of any record: a check holds it to its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memlm.app import results
from memlm.config import ConfigError


def check_holds_figure(name: str, files: Sequence[str], record: list[Any], told: str, other: list[Any]) -> None:
    """In an empty project: ``files`` tell the record ``name``, and a check refuses them beside ``other``."""
    for folder in ("docs/figures", "results"):
        Path(folder).mkdir(parents=True)
    Path("README.md").write_text("# A page\n")
    path = Path(f"results/{name}.json")
    path.write_text(json.dumps({"entries": record}))
    results.main([])
    results.main(["--check"])
    for file in files:
        before = Path(file).read_bytes()
        assert told in before.decode()
        results.main([])
        assert Path(file).read_bytes() == before, "drawn again it is the same file"
    path.write_text(json.dumps({"entries": other}))
    with pytest.raises(ConfigError, match=f"^{files[0]}, {files[1]} does not say"):
        results.main(["--check"])
