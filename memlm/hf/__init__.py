"""Models of memlm as models of Hugging Face transformers.

After ``import memlm`` the automatic classes of transformers know what `memlm.checkpoint.export` writes:

    import memlm
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained("my-export")
    pipeline("text-generation", model="my-export")("Once upon a time")

transformers is not imported for that, as it takes seconds and may not be there: `announce` waits until it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.hf.configuration import MemlmConfig as MemlmConfig
    from memlm.hf.modeling import MemlmCache as MemlmCache
    from memlm.hf.modeling import MemlmForCausalLM as MemlmForCausalLM

__all__ = ["MemlmCache", "MemlmConfig", "MemlmForCausalLM", "announce"]

_HOME = {"MemlmConfig": "memlm.hf.configuration"}
_HOME |= dict.fromkeys(("MemlmCache", "MemlmForCausalLM"), "memlm.hf.modeling")

# Modules of transformers that hold its automatic classes, and what registers ours with them when it is imported.
_AFTER = {
    "transformers.models.auto.configuration_auto": "memlm.hf.configuration",
    "transformers.models.auto.modeling_auto": "memlm.hf.modeling",
}


def announce() -> None:
    """Register the classes of memlm with transformers, now or once it is imported."""
    for name, ours in _AFTER.items():
        if name in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds modules of transformers as Python does, and has ours imported after them."""

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if name not in _AFTER or name in self._asked:
            return None
        self._asked.add(name)  # the same question then goes to the other finders
        try:
            spec = find_spec(name)
        finally:
            self._asked.discard(name)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return None
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            import_module(_AFTER[name])

        loader.exec_module = run_and_register
        return spec


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'memlm.hf' has no attribute {name!r}")
