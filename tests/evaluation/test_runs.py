"""Runs as they are found on disk: of training, of evaluations, of sweeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from memlm.checkpoint import find, load
from memlm.config import ConfigError
from memlm.evaluation import runs
from memlm.evaluation.emit import emit
from memlm.evaluation.result import Result
from memlm.evaluation.runs import describe, find_runs, write_evaluation
from memlm.memory import state as states
from tests.training.small import config, fit


def result(name: str = "loss", value: float = 1.0) -> Result:
    return Result(name, {"nll": value}, (), {"settings": {"limit": 3}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories a and b, of which a was measured."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        fit(config(folder, name, "trainer.max_steps=3"))
    emit(result(), {}, folder / "a/loss")
    return folder


def test_a_run_says_what_it_is(trained: Path) -> None:
    ((run,), left_out) = find_runs([trained / "a"])
    assert left_out == []
    assert run.results == {"loss": result()}
    told, model = run.trained, load(trained / "a")
    assert (told.step, told.checkpoint) == (3, str((trained / "a/checkpoints/step=3.ckpt").resolve()))
    assert told.config == model.config
    assert told.n_parameter == sum(parameter.numel() for parameter in model.parameters())
    (bank,) = model.init_state(1).memory["ltm"]
    assert told.state_bytes == states.n_byte(bank) > 64 * 16  # 64 slots with keys and values of 4 bytes a number
    lines = (trained / "a/csv/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/tokens_per_second")
    speeds = sorted(float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column])
    assert len(speeds) == 3
    assert told.tokens_per_second == speeds[1]  # the middle one
    column = lines[0].split(",").index("train/cpu_seconds")
    cpu = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert told.cpu_seconds == pytest.approx(sum(cpu))
    assert len(told.text or "") == 64


def test_cpu_time_is_that_of_all_steps_whatever_was_logged(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/metrics.csv").write_text("step,train/cpu_seconds\n9,4.0\n19,6.0\n29,8.0\n15,\n")
    history = runs.read_history(tmp_path / "csv/metrics.csv")
    assert runs._cpu_seconds(history, 25) == pytest.approx(10.0 * 25 / 20)  # of a checkpoint before the last log
    assert runs._cpu_seconds(history, 33) == pytest.approx(18.0 * 33 / 30)
    assert runs._cpu_seconds(history, 5) is None
    assert runs._cpu_seconds([], 5) is None


def test_an_evaluation_leads_to_its_run(trained: Path, tmp_path: Path) -> None:
    told = describe(find(trained / "b"))
    emit(result(value=2.0), {}, tmp_path / "evaluated/loss")
    write_evaluation(tmp_path / "evaluated", told)
    ((run,), _) = find_runs([tmp_path / "evaluated"])
    assert run.trained == told == find_runs([tmp_path / "evaluated"])[0][0].trained
    assert run.results == {"loss": result(value=2.0)}


def test_what_was_measured_of_a_checkpoint_in_two_places_is_put_together(trained: Path, tmp_path: Path) -> None:
    emit(result("recall", 5.0), {}, tmp_path / "more/recall")
    emit(result(), {}, tmp_path / "more/loss")
    write_evaluation(tmp_path / "more", describe(find(trained / "a")))
    ((run,), _) = find_runs([trained / "a", tmp_path / "more"])
    assert set(run.results) == {"loss", "recall"}
    emit(result(value=9.0), {}, tmp_path / "more/loss")
    assert [run.results["loss"].metrics["nll"] for run in find_runs([trained / "a", tmp_path / "more"])[0]] == [1, 9]


def test_a_sweep_stands_for_its_jobs_in_their_order(trained: Path, tmp_path: Path) -> None:
    told = describe(find(trained / "a"))
    for i in (0, 1, 2, 10):
        place = tmp_path / f"{i}-job"
        write_evaluation(place, told._replace(checkpoint=str(i)))
        if i != 1:
            emit(result(), {}, place / "loss")
    (tmp_path / "multirun.yaml").write_text("")
    runs, left_out = find_runs([tmp_path])
    assert [run.trained.checkpoint for run in runs] == ["0", "2", "10"]
    assert left_out == [str(tmp_path / "1-job")]
    runs, left_out = find_runs([tmp_path / "0-job", tmp_path / "1-job"])  # given one by one, too
    assert ([run.trained.checkpoint for run in runs], left_out) == (["0"], [str(tmp_path / "1-job")])


def test_what_is_no_run_is_told(trained: Path, tmp_path: Path) -> None:
    def told(path: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            find_runs([path])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert told("/no/such") == "there is no run at /no/such: give the directory that training named"
    assert "is a file: give the directory" in told(trained / "text.txt")
    assert f"there is no result in {trained / 'b'}: a run is measured at its end" in told(trained / "b")
    assert "there is no result in" in told(tmp_path)
    emit(result(), {}, tmp_path / "lost/loss")
    assert "there is no checkpoint in" in told(tmp_path / "lost")
    bare = {"label": "hit", "metric": "nll", "percent": True, "control": False}
    bare |= {"low": None, "high": None, "n": None, "better": "higher"}
    emit(Result("loss", {"nll": 1.0}, (), {"headline": [bare]}), {}, tmp_path / "bare/loss")
    assert "bare/loss/result.json: 'loss' claims a rate (hit) without any control" in told(tmp_path / "bare")
    (tmp_path / "bare/loss/result.json").write_text("{")
    assert "bare/loss/result.json cannot be read: it is damaged" in told(tmp_path / "bare")
    emit(result(), {}, tmp_path / "bare/loss")
    (tmp_path / "bare/evaluation.json").write_text(json.dumps({"checkpoint": "x"}))
    assert "evaluation.json is not what memlm evaluate writes" in told(tmp_path / "bare")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["config"], None), (["config", "model"], []), (["config", "curriculum", "phases"], 5), (["checkpoint"], 5),
        (["config", "memory"], ["ltm"]), (["config", "trainer", "accumulate_grad_batches"], "x"), (["step"], "3"),
        (["n_parameter"], 10**400), (["tokenizer"], None), (["memory"], {"ltmm.n_slot": 5}), (["memory"], [1]),
        (["config", "seed"], [1]), (["config", "curriculum", "phases", 0], None), (["tokens_per_second"], "fast"),
    ],
)  # fmt: skip
def test_an_evaluation_that_says_what_no_run_says_is_told_with_its_file(
    keys: list[Any], value: Any, trained: Path, tmp_path: Path
) -> None:
    emit(result(), {}, tmp_path / "loss")
    path = write_evaluation(tmp_path, describe(find(trained / "a")))
    told = json.loads(path.read_text())
    node = told
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=rf"^{path}: ") as caught:
        find_runs([tmp_path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", None), ("metrics", [1]), ("metrics", {"nll": 10**400}), ("metrics", {"nll": None}), ("rows", 5),
        ("rows", [5]), ("metadata", []), ("metadata", {"settings": 5}), ("metadata", {"headline": 5}),
        ("metadata", {"headline": [5]}), ("metadata", {"headline": [{"label": 5}]}),
    ],
)  # fmt: skip
def test_a_result_that_is_none_is_told_with_its_file(key: str, value: Any, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "loss" / "result.json"
    emit(result(), {}, path.parent)
    write_evaluation(tmp_path, describe(find(trained / "a")))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=rf"^{path}: ") as caught:
        find_runs([tmp_path])
    assert "\n" not in str(caught.value)
