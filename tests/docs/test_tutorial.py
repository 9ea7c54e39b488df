"""What the tutorial and the concepts show, in a copy of the project where the tutorial's files are all that is new."""

import os
import re
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
    assert int(re.search(r"(\d+) passed", out)[1]) >= 19, out  # type: ignore[index]


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


def test_it_trains_and_refuses_what_cannot_work(house: Path, tmp_path: Path) -> None:
    tiny = overrides(tmp_path, "none")
    tiny = [setting for setting in tiny if setting != "memory=none"] + ["memory=echo", "experiment=[]"]
    done = run(house, "train.py", *tiny, "memory.echo.n_slot=64")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.ckpt"))
    refused = run(house, "train.py", *tiny, "memory.echo.n_slot=0")
    assert (refused.returncode, refused.stderr.strip()) == (2, re.search(r"^`(error: .+)`\.", TEXT, re.MULTILINE)[1])  # type: ignore[index]
