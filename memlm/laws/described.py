"""The law of description: YAML, constructor and documentation agree."""

from __future__ import annotations

import inspect

import torch

from memlm.config import INJECTED
from memlm.laws.builders import Nodes, builder, class_of, filled, nodes_of, settings_of
from memlm.memory import state as states
from memlm.memory.slots import Slots


def has_slots(name: str) -> bool:
    """Whether all memories of ``configs/memory/<name>.yaml`` can be looked into; false if there is none."""
    classes = [class_of(node) for node in nodes_of(name).values()]
    return bool(classes) and all(issubclass(cls, Slots) for cls in classes)


def described(nodes: Nodes) -> None:
    """YAML keys are the constructor's parameters, with their defaults; sizes and costs are reported."""
    for name, node in nodes.items():
        cls = class_of(node)
        parameters = inspect.signature(cls).parameters
        expected = set(parameters) - INJECTED
        assert set(settings_of(node)) == expected, f"{name}: YAML and constructor of {cls.__name__} differ"
        for key, value in settings_of(node).items():
            default = parameters[key].default
            assert default is inspect.Parameter.empty or default == value, (
                f"{name}.{key}: {value} in YAML, {default} in code"
            )
        assert cls.__doc__, f"{cls.__name__} has no description"
        for key in expected:
            assert f"{key}:" in (inspect.getdoc(cls) or ""), f"{cls.__name__} does not describe {key}"
    model = builder(nodes)()
    empty, full = model.init_state(2), filled(model, n_row=2)
    for name, modules in model.memory.items():
        for module, before, after in zip(modules, empty.memory[name], full.memory[name], strict=True):
            pairs = zip(states.tensors(before), states.tensors(after), strict=True)
            assert not all(torch.equal(a, b) for a, b in pairs), f"{name}: a memory that was written is as fresh"
            if not isinstance(module, Slots):
                continue
            assert not module.filled(before).any(), f"{name}: a fresh memory holds something"
            assert module.filled(after).any(dim=1).all(), f"{name}: a memory that was written holds nothing"
            assert module.filled(after).shape == module.filled(before).shape
    for name, parts in model.init_state(2).memory.items():
        one, two = (states.n_byte(model.init_state(n).memory[name]) for n in (1, 2))
        assert two > 0, f"{name} has no state"
        assert two in (one, 2 * one), f"{name}: {one} bytes for one row, {two} for two"
        assert len(parts) == len(model.memory[name])
        for module in model.memory[name]:
            assert isinstance(module.flops_per_token(), int)
            assert module.flops_per_token() > 0


SECRET, OTHERS = "zyx wvu.", ("abc def.", "ghi jkl mn.", "pqr st a.")
