"""Settings of memories that hold for a while: those of a curriculum's phases, and what benchmarks change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memlm.config import ConfigError, check_arguments, did_you_mean, instantiate
from memlm.models.base import LanguageModel


@contextlib.contextmanager
def memory_settings(model: LanguageModel, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of memories, ``name.attribute``, for one training step; memories the model lacks are skipped.

    Plain attributes are put back: a model is evaluated, saved and loaded with the settings it was built with. Buffers
    keep the value, as they are part of the model and its checkpoints.

    Raises:
        ConfigError: If a memory has no such attribute.
    """
    _check_attributes(model, settings)
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, attribute, value in _places(model, settings):
            old = getattr(module, attribute)
            if isinstance(old, Tensor):
                with torch.no_grad():
                    old.fill_(value)
            else:
                before.append((module, attribute, old))
                setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, old in before:
            setattr(module, attribute, old)


def check_memory_settings(model: LanguageModel, settings: Mapping[str, Any], key: str) -> None:
    """Check settings of memories, ``name.attribute``, as if the memories were built with them.

    Args:
        model: The model; of memories that it lacks nothing is checked.
        settings: The settings.
        key: Their place in the config, for the errors.

    Raises:
        ConfigError: If a memory has no such setting, refuses the value, or would need other weights for it.
    """
    nodes = model.config["memory"]
    for name in nodes:
        new = {k.partition(".")[2]: value for k, value in settings.items() if k.partition(".")[0] == name}
        new = {attribute: value for attribute, value in new.items() if attribute in nodes[name]}
        if not new:
            continue
        check_arguments(nodes[name]["_target_"], new, f"{key}.{name}", ())
        with torch.random.fork_rng(devices=[]):
            changed = instantiate(
                nodes[name] | new, f"{key}.{name}", model.sizes.d_model, offered={"sizes": model.sizes}
            )
        old = model.memory[name][0]
        shapes, known = ([part.shape for part in module.parameters()] for module in (changed, old))
        fixed = shapes != known or changed.needs.lookback != old.needs.lookback
        fixed = fixed or any(
            getattr(changed, part, None) != getattr(old, part, None) for part in ("scope", "shard", "around")
        )
        if fixed or not all(hasattr(old, attribute) for attribute in new):
            given = ", ".join(f"{name}.{attribute}" for attribute in new)
            raise ConfigError(f"{key}: {given} cannot be changed, as the model was built around it")
    _check_attributes(model, settings)


def _places(model: LanguageModel, settings: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Module, attribute and value of each setting that concerns the model."""
    for key, value in settings.items():
        name, _, attribute = key.partition(".")
        for module in model.memory[name] if name in model.memory else []:  # noqa: SIM401 - a ModuleDict has no get
            yield module, attribute, value


def _check_attributes(model: LanguageModel, settings: Mapping[str, Any]) -> None:
    """Raise unless the memories have what is to be set."""
    for module, attribute, _ in _places(model, settings):
        if not attribute or not hasattr(module, attribute):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise ConfigError(
                f"there is no setting {attribute!r} of a {type(module).__name__}.{did_you_mean(attribute, names)}"
            )
