"""What an experiment is: a module, or a folder of modules, with settings, ``run`` and ``plot``.

- The settings are a class that a ``_target_`` names.
- ``run(model, data, settings, progress=None, share=ALONE) -> Result`` takes a `memlm.models.base.LanguageModel` and its
  `memlm.data.datamodule.TextData`, and touches no files, loggers or global random state.
- ``plot(result) -> dict[str, Figure]`` draws it.
- ``applies(data) -> bool``, if there is one, says whether it is worth measuring while a model is trained on this data.
- ``logged(result) -> dict[str, float]``, if there is one, names the numbers that are logged while a model is trained,
  where the experiment is watched under its own name.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


def home_of(settings: Any) -> ModuleType:
    """The experiment that settings belong to: their module, or the folder around it, that has ``run`` and ``plot``.

    Raises:
        LookupError: If there is none.
    """
    name = type(settings).__module__
    while name:
        module = import_module(name)
        if hasattr(module, "run") and hasattr(module, "plot"):
            return module
        name = name.rpartition(".")[0]
    raise LookupError(f"{type(settings).__module__} and the packages around it have no run and plot")


def name_of(settings: Any) -> str:
    """The name of the experiment that settings belong to."""
    return home_of(settings).__name__.rpartition(".")[2]
