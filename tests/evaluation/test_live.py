"""A run while it trains, as a page: numbers of a directory made by hand, read by a parser."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from memlm.analysis.page import Live
from memlm.config import ConfigError
from memlm.evaluation import live
from memlm.evaluation.live import LiveRun, Standing
from memlm.training.marks import FINISHED, LOCK
from tests.analysis.test_page import EVIL, Page

CSV = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger"}}
CONFIG = {
    "trainer": {"max_steps": -1, "accumulate_grad_batches": 1},
    "curriculum": {"phases": [{"steps": 20, "n_row": 2, "n_segment": 4}, {"steps": 30, "n_row": 1, "n_segment": 16}]},
    "model": {"segment_len": 8},
    "logger": CSV,
    "name": "a run",
}
HEADS = (
    "step,train/loss,train/tokens_per_second,val/nll,recall/on,recall/off,recall/swapped,memory/ltm/write_gate,"
    "memory/ltm/1/read_entropy"
)
ROWS = ("9,3.5,100,,,,,0.75,0.6931471805599453", "9,,,0,0.625,0.125,0,,", "19,2.25,50,,,,,0.5,0")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "csv").mkdir(parents=True)
    (folder / LOCK).touch()
    start(folder)
    log(folder, *ROWS)
    return folder


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a process trains the run, to be set."""
    answer = [True]
    monkeypatch.setattr(live, "is_alive", lambda run: answer[0])
    return answer


def start(folder: Path, **settings: Any) -> None:
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CONFIG | settings))


def log(folder: Path, *rows: str, heads: str = HEADS) -> None:
    (folder / "csv" / "metrics.csv").write_text("".join(f"{line}\n" for line in (heads, *rows)))


def finish(folder: Path) -> None:
    (folder / FINISHED).write_text(json.dumps({"config": CONFIG, "value": 0.5}))


def long_ago(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 1000,) * 2)


def seen(folder: Path, every: float | None = 5.0) -> tuple[Standing, Page, str]:
    watched = LiveRun(folder)
    standing = watched.look()
    html = watched.page(standing, None if standing.over or every is None else Live(time.time(), every))
    parsed = Page(html)
    return standing, parsed, " ".join("".join(parsed.text).split())


def refreshes(parsed: Page) -> list[str]:
    return [entry["content"] for entry in parsed.all("meta", **{"http-equiv": "refresh"})]


def test_it_says_where_the_run_is_and_what_it_logged(run: Path, alive: list[bool]) -> None:
    standing, parsed, text = seen(run)
    assert standing == ("training", 20, 50, "Training: step 20 of 50.")
    assert parsed.all("progress") == [{"max": "50", "value": "20", "aria-labelledby": "c1-1"}]
    assert refreshes(parsed) == ["5"]
    assert "training loss 2.25" in text
    assert "held-out perplexity 1 " in text
    assert "facts recalled 62.5 % reads off 12.5 %; another document's memory 0 %" in text
    # 30 steps of 1 * 16 * 8 tokens are left, at the median of 100 and 50 tokens per second
    assert "training left 51 s" in text
    frames = {entry["aria-label"].partition(":")[0]: entry for entry in parsed.all("div", role="img")}
    assert json.loads(frames["Loss"]["data-points"]) == [[[10, "3.5"], [20, "2.25"]], [[10, "0"]]]
    assert json.loads(frames["Recall of held-out facts"]["data-points"]) == [
        [[10, "62.5 %"]],
        [[10, "12.5 %"]],
        [[10, "0 %"]],
    ]
    assert json.loads(frames["What memory does"]["data-points"]) == [[[10, "0.75"], [20, "0.5"]]]
    assert json.loads(frames["Slots that a read is spread over"]["data-points"]) == [[[10, "2"], [20, "1"]]]
    assert json.loads(frames["Speed"]["data-points"]) == [[[10, "100"], [20, "50"]]]
    assert {entry["data-span"] for entry in frames.values()} == {"[0.0,20.0]"}


def test_a_rate_without_a_control_is_not_shown(run: Path, alive: list[bool]) -> None:
    log(run, "9,0.5", heads="step,recall/on")
    _, parsed, text = seen(run)
    assert "facts recalled" not in text
    assert not parsed.all("div", role="img")


def test_half_a_line_is_not_shown_until_it_is_whole(run: Path, alive: list[bool]) -> None:
    watched = LiveRun(run)
    with open(run / "csv" / "metrics.csv", "a") as file:
        file.write("29,1.1")
        file.flush()
        assert watched.look().step == 20
        file.write("25,10,,,,,,\n")
        file.flush()
        assert watched.look().step == 30
    assert "training loss</dt> <dd><b>1.125</b>" in watched.page(watched.look(), None)


def test_it_ends_when_the_run_is_finished(run: Path, alive: list[bool]) -> None:
    log(run, ROWS[0], "49,1,100,,,,,,")
    assert seen(run)[0].name == "measuring"
    finish(run)
    assert not seen(run)[0].over  # as long as a process has it
    alive[0] = False
    standing, parsed, text = seen(run)
    assert (standing.name, standing.over) == ("finished", True)
    assert not refreshes(parsed)
    assert not parsed.all("p", **{"class": "stale"})
    assert "Finished: step 50 of 50; trained and measured." in text
    assert f"memlm report {run}" in text


def test_a_killed_run_is_said_to_be_killed(run: Path, alive: list[bool]) -> None:
    alive[0] = False
    assert seen(run)[0].name == "training"  # it may be on another machine, or about to say that it is finished
    long_ago(run)
    standing, parsed, text = seen(run)
    assert (standing.name, standing.over) == ("ended", True)
    assert not refreshes(parsed)
    assert "Stopped or killed at step 20 of 50" in text
    assert f"resume={run} goes on" in text
    assert "training left" not in text
    (run / "error.txt").write_text("the disk is full\n\nTraceback ...\n")
    assert seen(run)[0].told == "Failed at step 20 of 50: the disk is full"
    (run / FINISHED).write_text("{")  # damaged: not finished
    assert seen(run)[0].name == "ended"
    os.utime(run / "csv" / "metrics.csv")
    alive[0] = True
    assert seen(run)[0].name == "training"  # somebody goes on with it


def test_a_run_that_begins_is_waited_for(tmp_path: Path) -> None:
    start(tmp_path)
    long_ago(tmp_path)
    standing, parsed, _ = seen(tmp_path)
    assert (standing.name, standing.step, standing.total) == ("waiting", 0, 50)
    assert refreshes(parsed) == ["5"]
    (tmp_path / "csv").mkdir()
    log(tmp_path, *ROWS)
    assert seen(tmp_path)[0].name == "training"


@pytest.mark.parametrize("settings", [{"name": EVIL}, {"name": EVIL, "curriculum": EVIL, "trainer": [EVIL]}])
def test_names_and_settings_of_anybody_are_only_shown(run: Path, alive: list[bool], settings: dict[str, Any]) -> None:
    start(run, **settings)
    evil = "<img src=x onerror=alert(2)>&amp;\u202e"
    log(run, "9,1,2,3,4", heads=f"step,memory/{evil}/x,memory/{evil}/write_gate,memory/{evil}/1/{evil},{evil}")
    _, parsed, text = seen(run)
    assert len(parsed.all("script")) == 1
    assert not parsed.all("img")
    assert EVIL in text
    assert evil.replace("\u202e", r"\u202e") in text
    assert not [key for _, attributes in parsed.found for key in attributes if key.startswith("on")]


def test_numbers_that_are_none_are_told(run: Path, alive: list[bool]) -> None:
    log(run, ROWS[0], "19,nan,100,,,,,,inf", "29,nan,100,inf,,,,,800")
    _, parsed, text = seen(run)
    assert "train/loss is no finite number at 2 logged steps, first at step 20." in text
    assert "training loss nan" in text
    assert not re.search("nan|inf", "".join(entry["d"] for entry in parsed.all("path")))


@pytest.mark.parametrize("damage", ["", "[1, 2]", "a: [", "&a [*a]", "trainer: {max_steps: x}", "\x00"])
def test_settings_that_cannot_be_read_leave_the_curves(run: Path, alive: list[bool], damage: str) -> None:
    (run / ".hydra" / "config.yaml").write_text(damage)
    standing, parsed, text = seen(run)
    assert (standing.name, standing.step, standing.total) == ("training", 20, None)
    assert "Training: step 20." in text
    assert not parsed.all("progress")
    assert len(parsed.all("div", role="img")) == 5


def test_of_many_layers_the_mean_is_shown(run: Path, alive: list[bool]) -> None:
    heads = "step," + ",".join(f"memory/ltm/{i}/read_gate" for i in range(8))
    log(run, "9," + ",".join(str(i) for i in range(8)), heads=heads)
    _, parsed, text = seen(run)
    assert "ltm, mean of 8 layers" in text
    assert [json.loads(e["data-points"]) for e in parsed.all("div", role="img")] == [[[[10, "3.5"]]]]


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    start(tmp_path / "evaluation")
    (tmp_path / "evaluation" / ".hydra" / "config.yaml").write_text("checkpoint: x")
    start(tmp_path / "quiet", logger={"wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger"}})
    start(tmp_path / "none", logger=None)
    for name, told in {
        "missing": "there is no run at .*missing",
        "file": "file is a file: give the directory of a run",
        "empty": "empty is no run: expected a directory that memlm train has made",
        "evaluation": "evaluation is no run",
        "quiet": "quiet keeps no metrics.csv.*: it was started without the logger csv; start it with logger=csv",
        "none": "none keeps no metrics.csv",
    }.items():
        with pytest.raises(ConfigError, match=told):
            LiveRun(tmp_path / name)
    long_ago(tmp_path)
    os.utime(run)
    with pytest.raises(ConfigError, match=f"holds 3: give one of them, such as the newest, {run}"):
        LiveRun(tmp_path)


def test_a_run_that_is_removed_is_told(run: Path, alive: list[bool]) -> None:
    watched = LiveRun(run)
    run.rename(run.with_name("away"))
    with pytest.raises(ConfigError, match="run is gone"):
        watched.look()
