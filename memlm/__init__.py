"""memlm: language models with memory.

The public interface is small; everything is imported when first used, so that `import memlm` costs nothing:

    import memlm

    model = memlm.build("model=lmcode", "memory=ltm")
    model = memlm.load("outputs/lmcode-ltm/...")

transformers knows the models that memlm exports: see `memlm.hf`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlm import hf
from memlm.version import __version__

if TYPE_CHECKING:
    from memlm.assemble import build as build
    from memlm.checkpoint import load as load
    from memlm.config import ConfigError as ConfigError

__all__ = ["ConfigError", "__version__", "build", "load"]

_HOME = {"build": "memlm.assemble", "load": "memlm.checkpoint", "ConfigError": "memlm.config"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'memlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


hf.announce()
