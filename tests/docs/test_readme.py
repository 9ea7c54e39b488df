"""The first page: short, its links lead somewhere, its pictures are what their commands draw, its commands exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from memlm.app.command_line import check_command_line
from tests.docs.programs import loaded

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\]\(([^)#]+)|src(?:set)?=\"(.+?)\"", TEXT)


@pytest.fixture(scope="module")
def draw() -> Any:
    return loaded(ROOT / "docs/figures/draw.py")


def test_it_is_short_and_its_tables_are_narrow() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines if line.startswith("|")) <= 120


def test_its_links_lead_somewhere() -> None:
    paths = ["".join(link) for link in LINKS]
    assert [path for path in paths if ":" not in path and not (ROOT / path).exists()] == []
    pictures = [path for path in paths if path.endswith(".svg")]
    assert sorted(path.replace("-dark", "-light") for path in pictures if "-dark" in path) == sorted(
        path for path in pictures if "-light" in path
    )


def test_its_pictures_are_as_drawn(draw: Any) -> None:
    for name, picture in draw.PICTURES.items():
        for theme, colors in draw.SURFACES.items():
            assert (ROOT / f"docs/figures/{name}-{theme}.svg").read_text(encoding="utf-8") == str(picture(colors))


def test_a_terminal_shows_what_was_not_written_over(draw: Any) -> None:
    log = "Script started\r\n\rstep 1/2\rstep 2/2\x1b[A\r\n\nrow\r\nbar 1\r\n"
    log += "\x1b[1A\x1b[2K\x1b[1A\x1b[2K\x1b[38;5;7mdone\x1b[0m\r\n"
    assert draw.screen(log) == ["Script started", "step 2/2", "done", "", ""]
    kept = draw.recorded(log + "/home/someone/outputs/run: ready\r\nScript done\r\n")
    assert kept == f"$ {draw.COMMAND}\nstep 2/2\ndone\noutputs/run: ready\n"


def test_the_recording_is_of_the_command_that_is_shown(draw: Any) -> None:
    assert f"    {draw.COMMAND}\n" in TEXT
    recorded = (ROOT / "docs/figures/terminal.txt").read_text(encoding="utf-8").splitlines()
    shown = draw.shortened("\n".join(recorded))
    assert recorded[0] == shown[0] == f"$ {draw.COMMAND}"
    assert {line.strip() for line in shown} - {line.strip() for line in recorded} == {"⋮"}
    (on,) = (line for line in shown if line.startswith("memory on ") and " 256 " in line)
    assert f"recalls {float(on.split()[2]) * 2.56:.0f} of 256" in TEXT


def test_its_commands_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples/own_memory")
    lines = [line.removeprefix("    ") for line in TEXT.splitlines() if line.startswith("    ")]
    commands = [shlex.split(line.replace("python train.py", "memlm train")) for line in lines]
    commands = [words[1:] for words in commands if words[0] == "memlm"]
    assert [command for command, *_ in commands] == [
        *("train", "train", "generate", "check", "train", "train", "evaluate", "report"),
    ]
    for command, *settings in commands:
        if command != "report":
            check_command_line(settings, command)
