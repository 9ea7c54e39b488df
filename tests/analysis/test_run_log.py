"""A log that is read on while it grows, held to what reads it whole."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from memlm.analysis.run_log import Log, read_history, series_of
from memlm.training.logged import history_files


def text(columns: str, *rows: str) -> str:
    return "".join(f"{line}\n" for line in (columns, *rows))


def found(log: Log) -> dict[str, dict[int, float]]:
    log.read()
    return {name: dict(zip(part.steps, part.values, strict=True)) for name, part in log.columns.items()}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    (tmp_path / "csv").mkdir()
    return tmp_path / "csv"


def log_of(csv: Path) -> Log:
    return Log(lambda: history_files(csv.parent))


def test_whatever_it_is_cut_into_it_is_what_is_read_whole(csv: Path) -> None:
    rng = random.Random(0)
    rows = [f"{i},0,{rng.random()},{rng.choice(['', rng.random()])}" for i in range(200)]
    content = text("step,epoch,train/loss,val/nll", *rows)
    log, file = log_of(csv), csv / "metrics.csv"
    cuts = [0, *sorted(rng.sample(range(len(content)), 40)), len(content)]
    for begin, end in itertools.pairwise(cuts):
        with open(file, "a") as opened:
            opened.write(content[begin:end])
        log.read()
        # a number that is cut in half is no number yet
        whole = content[: content.rfind("\n", 0, end) + 1].count("\n") - 1
        assert len(log.columns["train/loss"].steps if log.columns else []) == max(whole, 0)
    history = read_history(file)
    assert found(log) == {name: series_of(history, name) for name in ("train/loss", "val/nll")}


def test_columns_that_come_later_and_runs_that_go_on_are_read_anew(csv: Path) -> None:
    log, file = log_of(csv), csv / "metrics.csv"
    assert found(log) == {}
    file.write_text(text("step,a", "9,1.5"))
    assert found(log) == {"a": {9: 1.5}}
    (csv / "new").write_text(text("step,a,b", "9,1.5,", "19,1,7"))
    (csv / "new").rename(file)
    assert found(log) == {"a": {9: 1.5, 19: 1.0}, "b": {19: 7.0}}
    file.rename(csv / "earlier-0.csv")
    assert found(log) == {"a": {9: 1.5, 19: 1.0}, "b": {19: 7.0}}
    file.write_text(text("step,a", "29,3"))
    assert found(log)["a"] == {9: 1.5, 19: 1.0, 29: 3.0}
    file.write_text("")  # as when a run begins anew in its place
    assert found(log)["a"] == {9: 1.5, 19: 1.0}


def test_what_is_damaged_is_left_out(csv: Path) -> None:
    (csv / "metrics.csv").write_bytes(
        b"step,a,b\n0,1,2\n1,x,3\n,4,5\n2,1\n3,1,2,3\nnan,1,1\n1e300,1,1\n\xff\xfe,1,1\n\0\0\n4,nan,inf\n5,6"
    )
    log = log_of(csv)
    log.read()
    assert list(log.columns["a"].steps) == [0, 4]
    assert list(log.columns["b"].steps) == [0, 1, 4]
    (csv / "metrics.csv").unlink()
    assert found(log) == {}
