"""What the tutorials and the concepts show, in a copy of the project where the tutorials' files are all that is new."""

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
TEXTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("tutorial", "attention_memory", "concepts")}
TEXT = TEXTS["tutorial"]
BLOCK = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files of the tutorials, the pieces of each one after the other."""
    house = tmp_path_factory.mktemp("house")
    for name in ("memlm", "configs", "experiments", "tests"):
        shutil.copytree(ROOT / name, house / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, house)
    files: dict[str, str] = {}
    for _, title, body in BLOCK.findall("\n".join(TEXTS.values())):
        if title:
            files[title] = f"{files[title]}\n{body}" if title in files else body
    names = ("echo", "infini_lite")
    assert set(files) == {f"configs/memory/{name}.yaml" for name in names} | {
        f"memlm/memory/{name}.py" for name in names
    }
    for title, body in files.items():
        assert not (house / title).exists()
        (house / title).write_text(body)
    return house


def run(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(house)}
    return subprocess.run([sys.executable, *arguments], cwd=house, env=environment, text=True, capture_output=True)


def laws(house: Path, names: str) -> tuple[int, str]:
    """Exit code and output of `pytest tests/laws -k <names>`."""
    done = run(house, "-m", "pytest", "tests/laws", "-k", names, "-q", "-n", "0", "-p", "no:cacheprovider")
    return done.returncode, done.stdout + done.stderr


# The law about slots asks memories of slots alone.
@pytest.mark.parametrize(("name", "n_law"), [("echo", 20), ("infini_lite", 19)])
def test_its_memory_keeps_every_law(house: Path, name: str, n_law: int) -> None:
    code, out = laws(house, name)
    assert code == 0, out
    assert int(re.findall(r"(\d+) passed", out)[0]) >= n_law, out


@pytest.mark.parametrize(
    ("page", "name", "law"),
    [("tutorial", "echo", "3_chunk_invariant"), ("attention_memory", "infini_lite", "3_contexts_end_within_a_call")],
)
def test_a_law_sees_what_it_breaks(house: Path, page: str, name: str, law: str) -> None:
    (diff,) = (body for kind, _, body in BLOCK.findall(TEXTS[page]) if kind == "diff")
    (names,) = re.findall(r"^`pytest tests/laws -k \"(.+)\"` now fails", TEXTS[page], re.MULTILINE)
    old, new = (line[1:] for line in diff.splitlines())
    path = house / f"memlm/memory/{name}.py"
    source = path.read_text()
    assert source.count(old) == 1
    try:
        path.write_text(source.replace(old, new))
        code, out = laws(house, names)
    finally:
        path.write_text(source)
    assert code == 1, out
    assert re.search(rf"FAILED .*test_{law}\w*\[{name}\]", out), out


@pytest.mark.parametrize("page", TEXTS)
def test_its_code_runs(house: Path, page: str) -> None:
    (code,) = (body for kind, title, body in BLOCK.findall(TEXTS[page]) if kind == "python" and not title)
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
