"""memlm: language models with memory.

The public interface is small; everything is imported when first used, so that `import memlm` costs nothing:

    import memlm

    model = memlm.build("model=lmcode", "memory=ltm")
    model = memlm.load("outputs/lmcode-ltm/...")
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.assemble import build as build
    from memlm.checkpoint import load as load
    from memlm.config import ConfigError as ConfigError

__version__ = "0.1.0"
__all__ = ["ConfigError", "__version__", "build", "load"]

_HOME = {"load": "memlm.checkpoint", "ConfigError": "memlm.config"}


def __getattr__(name: str) -> Any:
    if name == "build":
        return import_module("memlm.build")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'memlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


# `memlm.build` is both a module and the function everybody wants from it. Python binds the module under that name
# as soon as anything imports it, so the module itself is made callable; whatever the order of imports, both work.
class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.build(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "build" and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
