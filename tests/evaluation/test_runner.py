"""Experiments that are chosen, that do not apply, and that run during training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments import needle, perplexity
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError, validate
from memlm.evaluation import runner
from memlm.evaluation.result import Result
from memlm.evaluation.share import Share

RATES = {"on": 0.75, "off": 0.125, "wiped": 0.25, "swapped": 0.0, "unseen": 0.5}
NODES = {
    "needle": {"_target_": "experiments.needle.Needle", "n_fact": 3},
    "far": {"_target_": "experiments.needle.Needle", "distance": 9000},
    "perplexity": {"_target_": "experiments.perplexity.Perplexity", "limit": 7},
}
HEADLINE = {"low": None, "high": None, "n": "n", "percent": True, "better": "higher"}


def data(has_task: bool = True) -> Any:
    return SimpleNamespace(curriculum=SimpleNamespace(has_task=has_task))


def found(model: Any, data: Any, cfg: Any, progress: Any = None) -> Result:
    """What the fake experiments answer."""
    if model == "unfit":
        raise ConfigError("the model lacks what is asked for")
    name = type(cfg).__name__.lower()
    metrics = {f"exact_match/{condition}": rate for condition, rate in RATES.items()}
    metrics |= {"n": 8, "n/on": 8, "chance": 0.01, "more": 1.0}
    lines = [
        {"label": name, "metric": f"exact_match/{name}", "control": name == "off", **HEADLINE} for name in ("on", "off")
    ]
    return Result(name, metrics, (), {"headline": lines})


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (needle, perplexity):
        monkeypatch.setattr(module, "run", found)
        monkeypatch.setattr(module, "plot", lambda result: {})


def test_during_training_any_experiment_is_measured() -> None:
    measure = runner.watch(runner.watched(NODES | {"nothing": None}), data())
    assert measure is not None
    recall = {f"recall/{condition}": rate for condition, rate in RATES.items()}
    others = {
        f"{name}/{metric}": value
        for name in ("far", "perplexity")
        for metric, value in {"exact_match/on": 0.75, "exact_match/off": 0.125, "n": 8}.items()
    }
    assert measure("model") == recall | {"recall/n": 8, "recall/chance": 0.01} | others


@pytest.mark.parametrize("nodes", [None, {}, {"needle": None}])
def test_nothing_is_measured_during_training_if_nothing_is_named(nodes: Any) -> None:
    assert runner.watch(runner.watched(nodes), data()) is None


def test_no_needle_is_sought_where_no_fact_is_planted() -> None:
    measure = runner.watch(runner.watched(NODES), data(has_task=False))
    assert measure is not None
    assert {name.partition("/")[0] for name in measure("model")} == {"perplexity"}
    assert runner.watch(runner.watched({"needle": NODES["needle"]}), data(has_task=False)) is None


def test_what_does_not_apply_is_told_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    measure = runner.watch(runner.watched({"needle": NODES["needle"]}), data())
    assert measure is not None
    assert measure("unfit") == {}
    assert capsys.readouterr().out == "watch.needle is left out: the model lacks what is asked for\n"
    assert measure("model") == {}
    assert capsys.readouterr().out == ""


def test_a_rate_without_controls_is_refused_during_training_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Result(
        "far", {"hit": 0.9, "n": 3}, (), {"headline": [{"label": "hit", "metric": "hit", "control": False, **HEADLINE}]}
    )
    monkeypatch.setattr(needle, "run", lambda *args, **kwargs: bare)
    measure = runner.watch(runner.watched({"far": NODES["far"]}), data())
    assert measure is not None
    with pytest.raises(ValueError, match="without any control"):
        measure("model")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"n_fact": 3}, r"watch\.mine must be the settings of an experiment, with _target_"),
        (3, r"watch\.mine must be the settings of an experiment"),
        ({"_target_": "experiments.needle.Needle", "n_document": 1}, "needle.n_document must be at least 2"),
        ({"_target_": "experiments.needle.Needle", "kind": "foo"}, "needle.kind must be one or several of random"),
    ],
)
def test_what_cannot_be_measured_during_training_is_told(node: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        runner.watched({"mine": node})


def test_watched_settings_are_checked_by_their_full_name() -> None:
    more = "+watch.far={_target_: experiments.needle.Needle, distanze: 100}"
    with pytest.raises(ConfigError, match=r"watch\.far\.distanze is not a setting of experiments\.needle"):
        validate(to_dict(compose([more])))
    config = to_dict(compose([]))
    assert set(config["watch"]) == {"needle"}
    assert set(runner.chosen(config)) == {"perplexity", "needle"}  # and not what is watched


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (config_dir() / "recipe").glob("*.yaml")))
def test_what_recipes_measure_exists(recipe: str) -> None:
    paths = {key: ["data.path=books", "data.babi=babi"] for key in ("babilong", "babilong_two")} | {
        key: ["data.path=text"] for key in ("contexts", "longmem", "memorag", "stories", "stories_adapters")
    }
    config = to_dict(compose([f"recipe={recipe}", *paths.get(recipe, [])]))
    assert runner.chosen(config)
    runner.watched(config["watch"])


def test_processes_that_would_write_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Share):
        def join(self, rows: list[Any]) -> list[Any]:
            return [*rows, "elsewhere"]

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    monkeypatch.setattr(Share, "here", classmethod(lambda cls: Other(0, 2)))
    with pytest.raises(ConfigError, match="several processes write into one directory"), runner.together(Path("here")):
        pass
    with runner.together(Path("elsewhere")) as share:
        assert share == Other(0, 2)


def test_a_run_may_measure_nothing() -> None:
    assert runner.chosen(to_dict(compose(["experiment=[]"]))) == {}


def test_one_that_does_not_apply_costs_no_other_its_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(model: Any, data: Any, cfg: Any, progress: Any = None) -> Result:
        raise ConfigError("no facts are planted in this text")

    monkeypatch.setattr(needle, "run", refuse)
    chosen = runner.chosen(NODES)
    results, written, skipped = runner.run_all("model", data(), chosen, tmp_path)
    assert [result.name for result in results] == ["perplexity"]
    assert skipped == dict.fromkeys(("needle", "far"), "no facts are planted in this text")
    assert {path.parent.name for path in written} == {"perplexity"} == {path.name for path in tmp_path.iterdir()}
