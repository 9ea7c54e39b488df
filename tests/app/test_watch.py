"""The command that watches a run; what its page says is tested beside `memlm.evaluation.live`."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlm.app import watch
from memlm.app.watch import main
from memlm.config import ConfigError
from tests.analysis.test_page import Page
from tests.evaluation.test_live import ROWS, alive, finish, log, long_ago, refreshes, run

__all__ = ["alive", "run"]  # fixtures


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What happens between two looks, to be filled; the seconds of each sleep are ignored."""
    events: list[object] = []

    def sleep(seconds: float) -> None:
        assert seconds == 5.0
        event = events.pop(0)
        if isinstance(event, BaseException):
            raise event
        event()  # type: ignore[operator]

    monkeypatch.setattr(watch.time, "sleep", sleep)
    return events


def page(run: Path) -> Page:
    return Page((run / watch.PAGE).read_text(encoding="utf-8"))


def test_it_writes_again_and_again_until_the_run_is_finished(
    run: Path, alive: list[bool], sleeps: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[str, list[str]]] = []

    def look() -> None:
        shown.append((page(run).all("progress")[0]["value"], refreshes(page(run))))

    def more() -> None:
        look()
        log(run, *ROWS, "29,1,100,,,,,,")

    def end() -> None:
        look()
        finish(run)
        alive[0] = False

    sleeps += [more, end]
    assert main([str(run)]) == 0
    assert shown == [("20", ["5"]), ("30", ["5"])]
    assert refreshes(page(run)) == []
    assert {path.name for path in run.iterdir()} == {".hydra", ".lock", "csv", "finished.json", watch.PAGE}
    told = capsys.readouterr().out.splitlines()
    assert told[0] == (run / watch.PAGE).resolve().as_uri()
    assert told[1:] == ["Training: step 20 of 50.", "Finished: step 30 of 50; trained and measured."]


def test_a_run_that_was_killed_ends_it_with_1(run: Path, alive: list[bool], sleeps: list[object]) -> None:
    def kill() -> None:
        alive[0] = False
        long_ago(run)

    sleeps += [kill]
    assert main([str(run), "--out", str(run.parent / "new" / "page.html")]) == 1
    html = (run.parent / "new" / "page.html").read_text()
    assert "Stopped or killed at step 20 of 50" in html
    assert not refreshes(Page(html))
    assert not (run / watch.PAGE).exists()


def test_ctrl_c_leaves_a_page_that_waits_for_nothing(
    run: Path,
    alive: list[bool],
    sleeps: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sleeps += [KeyboardInterrupt()]
    monkeypatch.setattr("sys.argv", ["watch", str(run)])
    with pytest.raises(SystemExit) as stop:
        watch.start()
    assert stop.value.code == 130
    assert not refreshes(page(run))
    said = capsys.readouterr()
    assert said.out.endswith("No longer watched; the run goes on.\n")
    assert not said.err


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "0.5", "3601"])
def test_an_interval_that_makes_no_sense_is_refused(run: Path, every: str) -> None:
    with pytest.raises(ConfigError, match=r"--every must be 1 to 3600 seconds, got "):
        main([str(run), f"--every={every}"])
    assert not (run / watch.PAGE).exists()


def test_a_place_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory: give the name of a file, such as watch\.html"):
        main([str(run), "--out", str(tmp_path)])
