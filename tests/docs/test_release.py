"""What a release says of itself agrees."""

import re
from pathlib import Path

import yaml

import memlm

ROOT = Path(__file__).resolve().parents[2]


def test_citation_and_changelog_know_the_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == memlm.__version__
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert memlm.__version__ in versions
