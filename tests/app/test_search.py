"""Searches whose trials are no training runs: what a run returns is a known function of its settings."""

import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from memlm.app import command_line, search
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError
from memlm.training.stopping import Stopped

pytestmark = pytest.mark.slow

LR = "training.lr=interval(0.001, 0.01)"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What each trial was started with; its result is the learning rate, and a step of 2 fails."""
    seen: list[dict[str, str]] = []

    def run_apart(script: str, overrides: Sequence[str], run: Path) -> float:
        assert Path(script).name == "train.py"
        given = dict(line.split("=", 1) for line in overrides)
        seen.append(given | {"run": run.name})
        if given.get("training.warmup_steps") == "2":
            raise ConfigError("2 is unlucky")
        return float(given["training.lr"])

    monkeypatch.setattr("memlm.training.apart.run_apart", run_apart)
    monkeypatch.chdir(tmp_path)
    return seen


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=found", "memory=none"]
    monkeypatch.setattr(sys, "argv", ["search.py", *search.apart([*quiet, *arguments])])
    try:
        search.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_settings_with_several_values_are_the_space() -> None:
    words = {
        "training.lr": "tag(log, interval(1e-4, 1e-2))",
        "memory.ltm.top_k": "range(8, 65, 8)",
        "training.warmup_steps": "int(interval(1, 100))",
        "model.dropout": "choice(0, 0.1)",
        "training.betas": "[0.9,0.95],[0.8,0.9]",
    }
    lines = search.apart(["memory=ltm", *(f"{name}={text}" for name, text in words.items()), "seed=1"])
    assert [line for line in lines if not line.startswith("+search.space=")] == ["memory=ltm", "seed=1"]
    space = to_dict(compose(lines, "search"))["search"]["space"]
    assert space == words
    assert search.distributions(space) == {
        "training.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "memory.ltm.top_k": IntDistribution(8, 64, step=8),
        "training.warmup_steps": IntDistribution(1, 100),
        "model.dropout": CategoricalDistribution(["0", "0.1"]),
        "training.betas": CategoricalDistribution(["[0.9,0.95]", "[0.8,0.9]"]),
    }
    assert search.apart(["--help", "seed=[1,2]"]) == ["--help", "seed=[1,2]"]
    with pytest.raises(ConfigError, match=r"search\.space: seed=3 has nothing to choose from"):
        search.distributions({"seed": "3"})


@pytest.mark.parametrize("name", sorted(p.stem for p in (config_dir() / "hparams_search").glob("*.yaml")))
def test_shipped_spaces_fit_the_configuration(name: str) -> None:
    space = to_dict(compose([f"hparams_search={name}"], "search"))["search"]["space"]
    assert search.distributions(space)
    command_line.check_command_line(["-m", *(f"{key}={text}" for key, text in space.items())], check=search.train.check)


def test_a_search_goes_on_and_lists_what_failed(
    calls: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [LR, "training.warmup_steps=1,2", "seed=3"]
    assert start(monkeypatch, *lines, "search.n_trial=4") == 0
    out, err = capsys.readouterr()
    assert [call["run"] for call in calls] == [f"trial-{i}" for i in range(4)]
    assert all(call["seed"] == "3" and call["memory"] == "none" and call["resume"] == "auto" for call in calls)
    good = {int(c["run"][6:]): float(c["training.lr"]) for c in calls if c["training.warmup_steps"] == "1"}
    assert 0 < len(good) < 4, "the seed draws both"
    shown = [int(line.split()[0]) for line in out.splitlines() if line.split()[0:1] and line.split()[0].isdigit()]
    assert shown == sorted(good, key=good.__getitem__, reverse=True)  # the best first
    assert err.count("2 is unlucky") == 2 * (4 - len(good))  # as it happens, and at the end

    assert start(monkeypatch, *lines, "search.n_trial=6") == 0  # two more
    assert [call["run"] for call in calls[4:]] == ["trial-4", "trial-5"]
    drawn = [call["training.lr"] for call in calls]
    assert len(set(drawn)) == 6
    assert start(monkeypatch, LR, "seed=3", "search.n_trial=6") == 2
    assert "found holds another search (settings" not in (told := capsys.readouterr().err)
    assert "found holds another search (space is" in told
    assert len(calls) == 6


def test_trials_find_configs_of_the_users_own(
    calls: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own" / "memory").mkdir(parents=True)
    (tmp_path / "own" / "memory" / "mine.yaml").write_text((config_dir() / "memory" / "stm.yaml").read_text())
    assert start(monkeypatch, "memory=mine", "search.n_trial=1", LR, f"--config-dir={tmp_path / 'own'}") == 0
    assert [(call["--config-dir"], call["memory"]) for call in calls] == [(str(tmp_path / "own"), "mine")]


def test_a_trial_in_which_the_search_was_stopped_is_made_again(
    calls: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> float:
        raise Stopped(128 + 15)

    with monkeypatch.context() as patch:
        patch.setattr("memlm.training.apart.run_apart", stop)
        assert start(patch, LR, "search.n_trial=1") == 128 + 15
    (stopped,) = optuna.load_study(study_name="search", storage="sqlite:///found/study.db").trials
    assert start(monkeypatch, LR, "search.n_trial=2") == 0
    assert len(calls) == 2
    assert float(calls[0]["training.lr"]) == stopped.params["training.lr"]


def test_a_trial_is_judged_by_a_number() -> None:
    assert search.measured("needle/exact_match/on", 0.5) == 0.5
    for value, told in {None: "was not measured", nan: "is no number"}.items():
        with pytest.raises(ConfigError, match=f"optimized_metric=perplexity/nll/on {told}"):
            search.measured("perplexity/nll/on", value)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("search.direction=up", "search.direction must be 'maximize' or 'minimize', got 'up'"),
        ("search.n_trial=0", "search.n_trial must be at least 1, got 0"),
        ("training.warmup_steps=1,-1", "training.warmup_steps must not be negative, got -1"),
        ("search.seed=-1", "search.seed must be in 0..2,147,483,647, got -1"),
        ("optimized_metric=perplexty/nll/on", "but trials measure perplexity, needle. Did you mean 'perplexity'?"),
        ("experiment=perplexity", "exact_match/on is a number of experiment=needle, but trials measure perplexity"),
        ("model.dropout=interval(0.5,0.1)", "search.space: nothing can be drawn from model.dropout=interval(0.5,0.1)"),
        ("training.warmup_steps=range(9,5)", "search.space: nothing can be drawn from training.warmup_steps="),
        ("seed=3", "nothing to search over"),
    ],
)
def test_mistakes_are_told_before_the_first_trial(
    argument: str, told: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, *([] if argument == "seed=3" else [LR]), argument) == 2
    assert told in capsys.readouterr().err
    assert calls == []
    assert not Path("found").exists()


def test_a_damaged_study_is_told_with_its_file(tmp_path: Path) -> None:
    settings = {"direction": "maximize", "sampler": "tpe", "seed": 0}
    (tmp_path / "study.db").write_bytes(b"no study" * 1000)
    with pytest.raises(ConfigError, match=r"study\.db cannot be read: it is damaged") as caught:
        search.open_study(tmp_path, settings, {})
    assert "\n" not in str(caught.value)
