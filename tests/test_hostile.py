"""The harness for hostile input, `python -m tests.hostile`: what it says of a case, and a few of its cases."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CASES = """
import time
from pathlib import Path

from memlm.config import ConfigError
from tests.hostile.base import CANARY, Case, Silent, attempts

def refuse(text):
    raise ConfigError(text)

def mute():
    raise Silent("wrong values were taken")

cases = [
    Case("right", lambda: None, ("right",)),
    Case("sentence", lambda: refuse("no")),
    Case("traceback", lambda: 1 / 0),
    Case("traceback", lambda: refuse("two\\nlines")),
    Case("silent", mute),
    Case("silent", lambda: None),
    Case("hang", lambda: time.sleep(60), seconds=0.5),
    Case("crash", lambda: __import__("os").abort()),
    Case("executed", lambda: (Path(CANARY).touch(), refuse("no"))),
]
for outcome in attempts(cases, n_job=3):
    print(outcome.case.name, outcome.answer, outcome.good)
"""


def run(*arguments: str) -> str:
    """What it prints; not in this process, whose threads must not be forked."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_came_of_a_case_is_told() -> None:
    found = [line.split() for line in run("-c", CASES).splitlines()]
    assert len(found) == 9
    for expected, answer, good in found:
        assert answer == expected
        assert good == str(expected in ("right", "sentence"))


@pytest.mark.parametrize(("part", "most"), [("trust: load_run: ", 12), ("memfile:", 8)])
def test_some_cases_are_answered_as_they_should_be(part: str, most: int) -> None:
    table = run("-m", "tests.hostile", "files", part, "--sample", str(most), "--jobs", "2")
    tried, right, sentence, *wrong = map(int, re.findall(r"\d+", table.splitlines()[-1]))
    assert most / 2 < tried <= most
    assert right + sentence == tried
    assert not any(wrong)
