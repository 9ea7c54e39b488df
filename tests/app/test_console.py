"""The command ``memlm``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memlm
from memlm.app import console

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memlm", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
        capture_output=True,
    )


def test_every_command_is_a_module_with_a_start() -> None:
    modules = {path.stem for path in Path(console.__file__).parent.glob("*.py")}
    assert set(console.COMMANDS) == modules - {"__init__", "cli", "command_line", "console", "errors"}
    for name in console.COMMANDS:
        text = (Path(console.__file__).parent / f"{name}.py").read_text()
        assert "def start() -> None:" in text
        assert text.endswith('if __name__ == "__main__":\n    start()\n'), "other processes start it by its file"


def test_it_names_its_commands_and_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        monkeypatch.setattr(sys, "argv", ["memlm", *arguments])
        console.main()
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in console.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["memlm", "--version"])
    console.main()
    assert capsys.readouterr().out == f"memlm {memlm.__version__}\n"


def test_a_wrong_command_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memlm", "trian", "memory=ltm"])
    with pytest.raises(SystemExit) as stop:
        console.main()
    assert stop.value.code == 2
    assert "no command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_a_shell_completes_commands_groups_and_settings(tmp_path: Path) -> None:
    def completed(line: str) -> list[str]:
        done = run("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert completed("memlm ev") == ["evaluate"]
    assert {"memory=ltm", "memory=none"} <= set(completed("memlm train memory="))
    assert "model.n_layer=" in completed("memlm train model.n_l")
    assert completed("memlm compare outp") == []


MINE = '''"""A memory of somebody's own."""

from memlm.memory.stm import ShortTermMemory


class Mine(ShortTermMemory):
    """Short-term memory with another name, or one that sees all rows at once.

    Args:
        d_model: Width of the hidden states.
        n_slot: Number of slots.
        n_head: Attention heads.
        update_rate: Rate of the soft update.
    """

    def read(self, x, *rest):
        """Read."""
        return super().read({x}, *rest)
'''


@pytest.mark.parametrize("leaks", [False, True])
def test_a_memory_outside_of_the_project_is_judged(tmp_path: Path, leaks: bool) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(x="x + x.mean(dim=0, keepdim=True)" if leaks else "x"))
    (tmp_path / "configs" / "memory").mkdir(parents=True)
    (tmp_path / "configs" / "memory" / "mine.yaml").write_text(
        "mine:\n  _target_: mine.Mine\n  n_slot: 16\n  n_head: 4\n  update_rate: 0.01\n"
    )
    done = run("check", "memory=mine", "--config-dir", "configs", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    if leaks:
        assert done.returncode == 2, done.stdout + done.stderr
        assert "law 2, isolated" in done.stdout
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "hold." in done.stdout.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "configs", "__pycache__"}


@pytest.mark.parametrize("command", ["results", "watch RUN"])
def test_what_it_prints_may_be_read_by_nobody(command: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    record = {"entries": []}
    (tmp_path / "results/a.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("<!-- results/a.json -->\n<!-- end of results -->\n")
    line = f"{sys.executable} -m memlm {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "watch" in command else 0), done.stderr
