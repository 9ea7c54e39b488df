"""Each file of examples/ does what it says, on models of a second."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.programs import loaded
from tests.training.small import overrides

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.rglob("*.ipynb"))
MAIN = "https://github.com/memlm/memlm/blob/main/"
NEEDLE = [
    "needle.n_document=2",
    "needle.n_fact=4",
    "needle.distance=64",
    "needle.n_row=2",
    "needle.facts_per_segment=0.5",
]


def example(name: str) -> Any:
    return loaded(EXAMPLES / f"{name}.py")


def run(folder: Path, *arguments: str, path: Path = ROOT) -> str:
    """What a command prints, run in a directory of its own."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def small(folder: Path, memory: str = "ltm") -> list[str]:
    """Overrides of a model of a second, without those of training."""
    return [
        line
        for line in overrides(folder, memory)
        if line.split(".")[0] in ("data", "model", "memory") or "data=" in line
    ]


def test_every_example_is_named_in_the_list() -> None:
    listed = set(re.findall(r"^\| `(.+?)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    files = [*EXAMPLES.rglob("*.py"), *NOTEBOOKS]
    assert listed == {path.relative_to(EXAMPLES).as_posix() for path in files}


def test_store_and_forget(tmp_path: Path) -> None:
    known = "Where does Ann live? Ann lives in Fean. Ann lives in Oslo. Bob was born in Pickwell.\n"
    (tmp_path / "text.txt").write_text(200 * known)
    held = example("store_and_forget").main(None, *small(tmp_path), "memory.ltm.write_budget=16")
    assert held == ["Ann lives in Oslo."]


def test_the_plain_loop_learns(tmp_path: Path) -> None:
    losses = example("plain_loop").main(*small(tmp_path), "model.segment_len=64", "model.overlap=8", steps=15)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_train_and_recall(tmp_path: Path) -> None:
    settings = [line for line in overrides(tmp_path) if not line.startswith("watch")]
    said = run(tmp_path, str(EXAMPLES / "train_and_recall.py"), *settings, "watch=null", *NEEDLE)
    found = json.loads((tmp_path / "outputs/example/needle/result.json").read_text())["metrics"]
    assert f"with its memory                {found['exact_match/on']:.0%} of 8 facts" in said
    assert "asked for what was never told" in said


@pytest.mark.slow
def test_a_sweep_is_compared_and_not_done_twice(tmp_path: Path) -> None:
    tiny = [
        "curriculum.phases=[{steps: 3, n_row: 2, n_segment: 2, task: {n_pair: 2}}]",
        "associative_recall.n_document=4",
    ]
    command = [
        str(EXAMPLES / "sweep.py"),
        *tiny,
        "seed=0",
        "associative_recall.n_row=4",
        "logger=csv",
        f"paths.root={tmp_path}",
    ]
    said = run(tmp_path, *command)
    assert "delta" in said
    assert "stm" in said
    assert run(tmp_path, *command).count("skipped") == 2


@pytest.mark.slow
def test_ones_own_memory_keeps_every_law(tmp_path: Path) -> None:
    own = EXAMPLES / "own_memory"
    said = run(tmp_path, "-m", "memlm", "check", f"--config-dir={own}", "memory=running_mean", path=own)
    assert re.search(r"All \d+ hold", said)


@pytest.mark.slow
def test_a_pretrained_model_reads_what_was_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.models import bases

    folder = bases.with_tokenizer(bases.make_base("llama", tmp_path))
    on, off = example("pretrained").main(str(folder), "model.segment_len=16", "model.overlap=4")
    assert on != off, "the memory was read"


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_its_outputs(path: Path) -> None:
    assert cells(path, "code")
    assert [cell for cell in cells(path, "code") if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_to_files(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    links = re.findall(r"\]\((.+?)\)", text)
    assert links
    for link in links:
        file = ROOT / link.removeprefix(MAIN) if link.startswith(MAIN) else path.parent / link
        assert file.is_file(), link


SEEN = {
    "see_a_memory_work": """
assert right["memory on"] > 0.9
assert max(share for name, share in right.items() if name != "memory on") < 0.3
assert by_slot[:3, :n_filled].max(dim=1).values.min() > 0.5
assert model.list_memory() == []
""",
    "invent_a_memory": """
assert len(first_try) == 1 and "a context is closed once" in first_try[0]
assert second_try == []
assert min(curves["with memory"][:4]) > 0.8
assert max(curves["memory wiped"] + curves["no memory"]) < 0.15
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    program = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    (tmp_path / "cells.py").write_text(f"{program}\n{SEEN[path.stem]}\nassert plt.get_fignums() == [1]\n")
    run(tmp_path, "cells.py")
