"""Hides the extra `pretrained`: a Python with this folder on its PYTHONPATH is as one where it is not installed."""

import importlib.metadata
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

HIDDEN = {"accelerate", "peft", "transformers"}


class _Hiding(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args: Any, **kwargs: Any) -> Iterable[importlib.metadata.Distribution]:
        found = importlib.metadata.MetadataPathFinder.find_distributions(*args, **kwargs)
        return (part for part in found if part.metadata["Name"] not in HIDDEN)


sys.meta_path = [_Hiding if finder is PathFinder else finder for finder in sys.meta_path]
