"""What the tutorial and the concepts show, in a copy of the project where the tutorial's files are all that is new."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.small import overrides

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files of the tutorial, the pieces of each one after the other."""
    house = tmp_path_factory.mktemp("house")
    for name in ("memlm", "configs", "experiments", "tests"):
        shutil.copytree(ROOT / name, house / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, house)
    files: dict[str, str] = {}
    for _, title, body in BLOCK.findall(TEXT):
        if title:
            files[title] = f"{files[title]}\n{body}" if title in files else body
    assert sorted(files) == ["configs/memory/echo.yaml", "memlm/memory/echo.py"]
    for title, body in files.items():
        assert not (house / title).exists()
        (house / title).write_text(body)
    return house


def run(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(house)}
    return subprocess.run([sys.executable, *arguments], cwd=house, env=environment, text=True, capture_output=True)


def laws(house: Path, names: str) -> tuple[int, str]:
    """Exit code and output of `pytest tests/conformance -k <names>`."""
    done = run(house, "-m", "pytest", "tests/conformance", "-k", names, "-q", "-n", "0", "-p", "no:cacheprovider")
    return done.returncode, done.stdout + done.stderr


def test_its_memory_keeps_every_law(house: Path) -> None:
    code, out = laws(house, "echo")
    assert code == 0, out
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 20, out


def test_a_law_sees_what_it_breaks(house: Path) -> None:
    (diff,) = (body for kind, _, body in BLOCK.findall(TEXT) if kind == "diff")
    old, new = (line[1:] for line in diff.splitlines())
    path = house / "memlm/memory/echo.py"
    source = path.read_text()
    assert source.count(old) == 1
    try:
        path.write_text(source.replace(old, new))
        code, out = laws(house, "echo and chunk_invariant")
    finally:
        path.write_text(source)
    assert code == 1, out
    assert "test_3_chunk_invariant[echo]" in out


@pytest.mark.parametrize("page", ["tutorial", "concepts"])
def test_its_code_runs(house: Path, page: str) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
    (code,) = (body for kind, title, body in blocks if kind == "python" and not title)
    assert "assert " in code
    done = run(house, "-c", code)
    assert done.returncode == 0, done.stderr


def line(pattern: str) -> str:
    """The group of the one line of the tutorial that matches."""
    (found,) = re.findall(pattern, TEXT, re.MULTILINE)
    return found


def test_it_trains_is_measured_and_refuses_what_cannot_work(house: Path, tmp_path: Path) -> None:
    command = shlex.split(line(r"^    python (train\.py .*curriculum\.phases=.*)$"))
    command += [setting for setting in overrides(tmp_path, "none") if setting != "memory=none"]
    command += ["model.segment_len=128", "experiment=[needle]"]
    command += ["needle.n_document=2", "needle.n_fact=2", "needle.distance=64"]
    done = run(house, *command, "memory.echo.n_slot=64")
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.rglob("needle/result.json")
    assert json.loads(result.read_text())["metrics"]["n/on"] == 4
    refused = run(house, *command, "memory.echo.n_slot=0")
    assert (refused.returncode, refused.stderr.strip()) == (2, line(r"^`(error: .+)`\."))
