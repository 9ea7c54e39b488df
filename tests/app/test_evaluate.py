"""The same numbers three ways: during training, by evaluating a checkpoint, in a sweep over checkpoints."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memlm
from experiments import perplexity
from memlm.analysis.run_log import read_history
from memlm.app import evaluate
from memlm.app.train import main
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.evaluation.recall import reading
from memlm.memory import state as states
from tests.training.small import FACTS, overrides
from tests.training.wandb_file import history, records

pytestmark = pytest.mark.slow

NEEDLE = {"n_document": 2, "n_fact": 3, "distance": 40}
MEASURED = [*(f"needle.{name}={value}" for name, value in NEEDLE.items()), "perplexity.limit=300"]
PHASES = f"curriculum.phases=[{json.dumps(FACTS)}]".replace('"', "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose path holds what Hydra has a meaning for, measured after its steps 4 and 8 and at its end."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [line for line in overrides(folder) if line != "watch=null"]
    watch = {
        "needle": {"_target_": "experiments.needle.Needle", **NEEDLE},
        "perplexity": {"_target_": "experiments.perplexity.Perplexity", "limit": 300},
    }
    more = ["trainer.max_steps=8", "checkpoint.every=4", "checkpoint.keep=null", f"paths.run_dir='{folder / 'a=1,b'}'"]
    cfg = compose([*lines, *MEASURED, PHASES, *more])
    cfg.watch = watch
    with torch.random.fork_rng():
        main(cfg)
    return folder


@pytest.fixture
def at(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *evaluate.name_all(list(arguments))])
    evaluate.main()


def metrics(place: Path, name: str) -> dict[str, float]:
    return json.loads((place / name / "result.json").read_text())["metrics"]


def test_three_ways_one_number(folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / "a=1,b"
    history = {row["step"]: row for row in read_history(run / "csv/metrics.csv") if row.get("recall/on") is not None}
    assert set(history) == {3, 7}
    # a sweep over a run directory and two checkpoints, whose paths hold = and a comma
    checkpoints = [str(run), *(str(run / f"checkpoints/step={step}.ckpt") for step in (4, 8))]
    command(monkeypatch, "-m", f"checkpoint={','.join(checkpoints)}", *MEASURED, "device=cpu")
    (sweep,) = (at / "outputs/evaluate").iterdir()
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", "2"]
    # one checkpoint
    command(monkeypatch, f"checkpoint={checkpoints[0]}", *MEASURED, "device=cpu")
    (single,) = set((at / "outputs/evaluate").iterdir()) - {sweep}
    for name in ("needle", "perplexity"):
        whole = metrics(run, name)
        assert whole == metrics(single, name) == metrics(sweep / "0", name) == metrics(sweep / "2", name)
    for job, step in (("1", 3), ("2", 7)):
        row = history[step]
        asking = metrics(sweep / job, "needle")
        assert {
            f"recall/{c}": asking[f"exact_match/{c}"] for c in ("on", "off", "wiped", "swapped", "unseen")
        }.items() <= row.items()
        assert (row["recall/n"], row["recall/chance"]) == (asking["n/on"], asking["chance"])
        loss = metrics(sweep / job, "perplexity")
        for metric in ("perplexity/on", "perplexity/off", "perplexity/wiped", "difference/on-off", "n_token"):
            assert row[f"perplexity/{metric}"] == loss[metric]
        assert loss["perplexity/on"] != loss["perplexity/off"]
    assert history[3]["perplexity/perplexity/on"] != history[7]["perplexity/perplexity/on"]


def test_an_evaluation_says_what_it_measured_and_where(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "a=1,b"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command(monkeypatch, f"checkpoint={run}", "experiment=perplexity", "perplexity.limit=300")
    out = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (place,) = (at / "outputs/evaluate").iterdir()
    assert list(at.iterdir()) == [at / "outputs"]
    assert f"{run}/checkpoints/step=8.ckpt: measured by perplexity into {place}" in out
    told = json.loads((place / "evaluation.json").read_text())
    assert (told["checkpoint"], told["step"]) == (str(run / "checkpoints/step=8.ckpt"), 8)
    model = memlm.load(run)
    assert told["n_parameter"] == sum(parameter.numel() for parameter in model.parameters())
    assert told["state_bytes"] == states.n_byte(model.init_state(1).memory)
    assert told["config"] == model.config
    assert f"{place}/evaluation.json" in out
    assert "scope=shared" not in out


def test_an_evaluation_of_a_memory_that_all_share_says_so_once(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "is_shared", lambda _: True)
    command(monkeypatch, f"checkpoint='{folder / 'a=1,b'}'", "experiment=perplexity", "perplexity.limit=300")
    assert capsys.readouterr().out.count("what one user told may be told to any other") == 1


def test_an_evaluation_can_be_logged_to_wandb(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["experiment=perplexity", "perplexity.limit=300", "hydra.run.dir=here", "logger=wandb"]
    command(monkeypatch, f"checkpoint='{folder / 'a=1,b'}'", *where)
    (run,) = [record.run for record in records(at / "here") if record.HasField("run")]
    assert (run.display_name, run.project) == ("evaluate-lmcode-ltm", "memlm")
    logged = {name: value for row in history(at / "here") for name, value in row.items()}
    expected = {name: float(value) for name, value in metrics(at / "here", "perplexity").items()}
    found = {name: json.loads(logged[f"perplexity/{name}"]) for name in expected}
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert {"perplexity/rows", "perplexity/perplexity"} <= {name.partition("/_type")[0] for name in logged}
    (offline,) = Path("here/wandb").glob("offline-run-*")
    assert f"W&B ran offline. To upload: wandb sync {at / offline}" in capsys.readouterr().out


def test_an_evaluation_has_no_other_logger(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, f"checkpoint='{folder / 'a=1,b'}'", "experiment=perplexity", "logger=csv")
    assert "beside them it logs to W&B: logger=wandb" in capsys.readouterr().err


def test_what_does_not_apply_is_an_error_by_name_and_listed_with_all(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: Any, data: Any, cfg: Any, progress: Any = None) -> Any:
        raise ConfigError("nothing like that was trained")

    monkeypatch.setattr(perplexity, "run", refuse)
    names = [f"checkpoint={folder / 'a=1,b'}", *(line for line in MEASURED if line.startswith("needle."))]
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *names, "experiment=[perplexity,needle]")
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err == "error: perplexity was not measured: nothing like that was trained\n"
    assert "Recall of facts told once" in out  # what does apply is not lost
    assert metrics(next((at / "outputs/evaluate").iterdir()), "needle")["n/on"] == 6
    # whatever other experiments there are may or may not apply
    monkeypatch.setattr(
        evaluate, "name_all", lambda arguments: [*names, "experiment=[perplexity,needle]", "skip_inapplicable=true"]
    )
    command(monkeypatch)
    out, err = capsys.readouterr()
    assert "Not measured:\n  perplexity: nothing like that was trained" in out
    assert err == ""


def test_settings_of_memories_can_be_changed_for_an_evaluation(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"checkpoint='{folder / 'a=1,b'}'"
    losses = []
    for change in ([], ["change={ltm.temperature_scale: 0.01, ltm.top_k: 1}"]):
        command(
            monkeypatch, run, "experiment=perplexity", "perplexity.limit=300", f"hydra.run.dir={len(change)}", *change
        )
        losses.append(metrics(at / str(len(change)), "perplexity"))
    assert losses[0]["nll/on"] != losses[1]["nll/on"]
    assert losses[0]["nll/off"] == losses[1]["nll/off"]
    about = [json.loads((at / place / "evaluation.json").read_text())["memory"] for place in "01"]
    assert about == [{}, {"ltm.temperature_scale": 0.01, "ltm.top_k": 1}]
    with pytest.raises(SystemExit):
        command(monkeypatch, run, "change={ltm.topk: 1}", "hydra.run.dir=2")
    assert "Did you mean 'top_k'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmt.top_k": 1}, r"no memory 'lmt' to set lmt\.top_k of\. Did you mean 'ltm'\? It has: ltm"),
        ({"ltm.importance": "fifoo"}, r"change\.ltm\.importance must be .*'fifo'"),
        ({"ltm.top_k": 0}, r"change\.ltm\.top_k must be at least 1"),
        ({"ltm.d_key": 3}, r"ltm\.d_key cannot be changed, as the model was built"),
        ({"ltm.span": 1}, r"ltm\.span cannot be changed, as the model was built"),
        ({"ltm.temperature": 3.0}, r"ltm\.temperature cannot be changed, as the model was built"),
        ("fifo", "change must be settings by name"),
    ],
)
def test_a_change_that_would_do_nothing_or_break_is_refused(change: Any, message: str, folder: Path) -> None:
    model = memlm.load(folder / "a=1,b")
    with pytest.raises(ConfigError, match=message):
        evaluate.changes(change, model)
    assert evaluate.changes(None, model) == {}


def test_several_processes_measure_one_checkpoint_together(
    folder: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = folder / "a=1,b"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", evaluate.__file__]
    settings = [f"checkpoint={run}", "experiment=[needle,pattern_storage]", *MEASURED[:-1], "device=cpu"]
    small = ["pattern_storage.n_stored=[8]", "pattern_storage.n_document=2", "pattern_storage.n_probe=2"]
    subprocess.run([*start, *settings, *small, "hydra.run.dir=both"], check=True)
    whole, both = metrics(run, "needle"), metrics(at / "both", "needle")
    assert both == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert (at / "both/pattern_storage/result.json").exists()  # which is left to the first process
    assert capfd.readouterr().out.count("measured by needle, pattern_storage") == 1
