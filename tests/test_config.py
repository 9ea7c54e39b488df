from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from memlm.annotations import Node, Range
from memlm.config import ConfigError, check_settings, did_you_mean, slow_parts, validate, whole
from tests.targets import HERE, error


def model(**kwargs: Any) -> dict[str, Any]:
    return {"model": {"_target_": f"{HERE}.Model", "n_layer": 2, **kwargs}}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dropout": 0},
        {"dropout": 1e-3, "name": None},
        {"norm": "layer", "tied": False},
        {"layers": "all"},
        {"layers": [0, 1]},
        {"betas": [0.9, 1]},
        {"act": {"_target_": f"{HERE}.Anything", "n": 1, "more": 2}},
        {"act": [{"_target_": f"{HERE}.Anything.make", "n": 1, "sizes": {"a": 1}}]},
        {"_partial_": True, "_convert_": "all"},
    ],
)
def test_valid_values(kwargs: dict[str, Any]) -> None:
    validate(model(**kwargs))


def test_a_config_that_is_not_plain_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(TypeError, match="takes a plain config"):
        validate(OmegaConf.create(model(n_layer="two")))


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"n_layr": 2}, ["model.n_layr is not a setting of", "Did you mean 'n_layer'?", "dropout"]),
        ({"n_layer": "two"}, ["model.n_layer must be an int, got 'two' (a string)."]),
        ({"n_layer": 2.0}, ["model.n_layer must be an int, got 2.0 (a float)"]),
        ({"n_layer": 10**20}, ["model.n_layer must be an int, got 100000000000000000000 (too large)"]),
        ({"dropout": 10**20}, ["model.dropout must be a float, got 100000000000000000000 (too large)"]),
        ({"act": 5, "name": [1]}, ["model.name must be a string or null, got [1]"]),
        ({"n_layer": True}, ["model.n_layer must be an int, got true"]),
        ({"n_layer": None}, ["model.n_layer must be an int, got null"]),
        ({"dropout": True}, ["model.dropout must be a float, got true"]),
        ({"tied": 1}, ["model.tied must be true or false, got 1 (an int)"]),
        ({"name": 3}, ["model.name must be a string or null, got 3"]),
        ({"norm": "rsm"}, ["model.norm must be 'rms' or 'layer', got 'rsm'", "Did you mean 'rms'?"]),
        ({"layers": "none"}, ["model.layers must be a list of an int or 'all'"]),
        ({"layers": ["a"]}, ["model.layers must be"]),
        ({"betas": [0.9]}, ["model.betas must be a list of a float"]),
        ({"act": {"_target_": f"{HERE}.Anything", "n": "x"}}, ["model.act.n must be an int"]),
        ({"act": [{"_target_": f"{HERE}.Ltm", "k": 1}]}, ["model.act[0].k is not a setting"]),
        ({"_target_": f"{HERE}.Modle"}, ["model._target_", "has no 'Modle'", "Did you mean 'Model'?"]),
        ({"_target_": "no_such_package.Model"}, ["no module 'no_such_package'"]),
        ({"_target_": f"{HERE}.HERE"}, ["not a class or function"]),
        ({"_target_": 3}, ["model._target_ must be the dotted name"]),
    ],
)
def test_invalid_values(kwargs: dict[str, Any], parts: list[str]) -> None:
    message = error(validate, model(**kwargs))
    for part in parts:
        assert part in message


def test_required_and_injected_parameters() -> None:
    node = {"_target_": f"{HERE}.Model"}
    assert "model.n_layer is required by" in error(validate, {"model": node})
    validate({"model": {**node, "_partial_": True}})
    validate({"model": {**node, "_args_": [2]}})
    validate({"model": node}, injected=("n_layer",))
    validate({"memory": {"ltm": {"_target_": f"{HERE}.Ltm"}}})  # d_model is injected
    assert "memory.ltm.layers" in error(validate, {"memory": {"ltm": {"_target_": f"{HERE}.Ltm", "layers": "all"}}})


def test_names_below_a_part_of_a_config() -> None:
    config = model(n_layer="x")
    assert error(validate, config["model"], key="model").startswith("model.n_layer ")
    validate(config, skip=("model",))


def test_unreadable_annotations_cost_only_themselves() -> None:
    node = {"_target_": f"{HERE}.PartlyTyped", "price": 3, "paths": ["a"]}
    validate(node)
    assert error(validate, {**node, "count": "3"}) == "count must be an int, got '3' (a string)."
    assert "paths must be a list of a string" in error(validate, {**node, "paths": [1]})


class Part:
    every: Annotated[int, Range(1)]
    keep: Annotated[int, Range(1, 9)] | None


class Whole:
    name: str | None
    part: Part
    nodes: dict[str, Node]
    more: dict[str, Any] | None = None


def whole_settings(**changed: Any) -> dict[str, Any]:
    return {"name": None, "part": {"every": 2, "keep": None}, "nodes": {"a": {"_target_": "x"}}, **changed}


def test_settings_that_belong_to_no_target() -> None:
    check_settings(whole_settings(), Whole)
    check_settings(whole_settings(more=None, name="x", part={"every": 1, "keep": 9}), Whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": 5}, "name must be a string or null, got 5 (an int)."),
        ({"part": 5}, "part must be a mapping, with every, keep, got 5 (an int)."),
        ({"part": {"every": 2}}, "part.keep is missing: give it a value."),
        ({"part": {"every": 0, "keep": None}}, "part.every must be at least 1, got 0."),
        ({"part": {"every": 1, "keep": 10}}, "part.keep must be in 1..9, got 10."),
        ({"part": {"every": True, "keep": 1}}, "part.every must be an int, got true."),
        ({"nodes": {"a": 5}}, "nodes.a must be settings with a _target_, got 5 (an int)."),
        ({"nodes": None}, "nodes must be a mapping of settings with a _target_, got null."),
        ({"more": 5}, "more must be a mapping of Any or null, got 5 (an int)."),
    ],
)
def test_wrong_settings_that_belong_to_no_target(changed: dict[str, Any], message: str) -> None:
    assert error(check_settings, whole_settings(**changed), Whole) == message


def test_lightning_trainer_is_understood() -> None:
    node = {"_target_": "lightning.Trainer", "max_steps": 10, "precision": "32-true"}
    validate({"trainer": node})
    assert "Did you mean 'max_steps'?" in error(validate, {"trainer": {**node, "max_stepz": 10}})


def test_parts_that_are_slow_to_import() -> None:
    trainer = {"_target_": "lightning.Trainer"}
    config = {**model(), "trainer": trainer, "logger": {"csv": trainer}, "callbacks": [trainer], "seed": 0}
    assert slow_parts(config) == {"trainer", "logger", "callbacks"}


def test_whole_numbers() -> None:
    assert [whole("n", n) for n in (0, 7, np.int64(7))] == [0, 7, 7]
    for wrong in (-1, True, 7.0, "7", None, np.True_, np.array([7])):
        with pytest.raises(ConfigError, match="n must be a whole number of at least 0, got"):
            whole("n", wrong)
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        whole("n", 1, least=2)


def test_did_you_mean() -> None:
    assert did_you_mean("lmt", ["ltm", "stm"]) == " Did you mean 'ltm'?"
    assert did_you_mean("lmt", ["q"]) == ""
