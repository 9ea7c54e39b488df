"""The command line; what it compares is tested beside `memlm.evaluation.compare.groups`."""

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memlm.app.compare import main
from memlm.app.errors import mistakes_told
from memlm.evaluation.emit import emit
from memlm.evaluation.runs import write_evaluation
from tests.evaluation.compare.test_groups import NONE, recall, run

ROOT = Path(__file__).resolve().parents[2]


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {"a": run(0, recall(0.9)), "b": run(0, recall(0.1), changes=NONE), "c": run(1, recall(0.9))}
    for name, one in made.items():
        write_evaluation(tmp_path / "sweep" / name, one.trained)
        emit(one.results["needle"], {}, tmp_path / "sweep" / name / "needle")
    main(["sweep/a", "sweep/b", "sweep/c"])
    out = capsys.readouterr().out
    (place,) = (tmp_path / "outputs/compare").iterdir()
    assert {path.name for path in place.iterdir()} == {"compare.csv", "compare.md", "compare.png"}
    assert all(f"  outputs/compare/{place.name}/compare.{ending}" in out for ending in ("csv", "md", "png"))
    assert "ltm (2 seeds)" in out
    assert "90.0 % (85.1 to 93.4) *" in out
    assert "memory.ltm: given (ltm); absent (none)" in out
    with open(place / "compare.csv", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["metric"] == "exact_match/on"]
    assert [(row["group"], row["mean"], row["n_seed"], row["best"]) for row in found] == [
        ("ltm", "0.9", "2", "True"), ("none", "0.1", "1", "False")
    ]  # fmt: skip
    main(["sweep", "--out", "there"])
    assert (tmp_path / "there/compare.csv").read_text() == (place / "compare.csv").read_text()


@pytest.mark.slow
def test_help_needs_nothing_slow_and_mistakes_are_a_sentence(tmp_path: Path) -> None:
    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip

    probe = (
        "import sys\nfrom memlm.app.compare import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    assert call("-c", probe).stdout.endswith("\nFalse\n")
    done = call(str(ROOT / "scripts/compare.py"), "no/such")
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no run at no/such: give the directory that training named\n",
    )
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for out in ("", str(tmp_path / "file")):
        with pytest.raises(SystemExit) as left, mistakes_told():
            main([str(tmp_path), "--out", out])
        assert left.value.code == 2
        assert f"error: --out {out!r} is no directory" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError])
def test_what_the_system_refuses_is_a_sentence_as_elsewhere(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, mistakes_told():
        raise kind(errno.ENOENT, "No way", "place\x1b")  # of which no advice is told
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: No way: place\\x1b\n")
    with pytest.raises(RuntimeError), mistakes_told():
        raise RuntimeError("a mistake of the program")
