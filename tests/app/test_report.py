"""The command line; the page it writes is tested beside `memlm.evaluation.webpage`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memlm.app.report import main
from memlm.config import ConfigError
from tests.evaluation.compare.test_groups import recall, run

ROOT = Path(__file__).resolve().parents[2]


def test_it_says_where_the_page_is(tmp_path, capsys, monkeypatch):
    from memlm.evaluation.emit import emit
    from memlm.evaluation.runs import write_evaluation

    monkeypatch.chdir(tmp_path)
    one = run(0, recall(0.9))
    write_evaluation(tmp_path / "a", one.trained)
    emit(one.results["needle"], {}, tmp_path / "a" / "needle")
    main(["a"])
    (page,) = (tmp_path / "outputs/report").iterdir()
    assert capsys.readouterr().out == f"Written:\n  outputs/report/{page.name}\n"
    assert "90.0 % (82.6 to 94.5)" in page.read_text()
    main(["a", "--out", "there.html"])
    assert (tmp_path / "there.html").read_text() == page.read_text()
    with pytest.raises(ConfigError, match=r"--out a is a directory: give the name of a file, such as a/report\.html"):
        main(["a", "--out", "a"])


@pytest.mark.slow
def test_help_needs_nothing_slow_and_mistakes_are_a_sentence(tmp_path):
    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip

    probe = (
        "import sys\nfrom memlm.app.report import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    assert call("-c", probe).stdout.endswith("\nFalse\n")
    done = call(str(ROOT / "scripts/report.py"), "no/such")
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no run at no/such: give the directory that training named\n",
    )
    assert not list(tmp_path.iterdir())
