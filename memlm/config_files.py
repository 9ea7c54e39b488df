"""Config files as Hydra reads them, of which those of a user may be anything.

YAML lets a value stand in many places under one name (`&name`, `*name`). A few lines can so stand for more values than
any machine holds, and Hydra fills them all in. Such a file is refused before.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source  # they have no public home
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from memlm.config import ConfigError
from memlm.saved import check_size

_MOST_VALUES = 10_000  # of a file with aliases; a config has some hundreds


_READ: dict[tuple[Any, ...], bytes] = {}


class FileConfigSource(file_config_source.FileConfigSource):
    """Directories of config files.

    It has the name of Hydra's own: Hydra takes that to be registered then, also in a process that a launcher starts.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file, or take what was read of it before if it is unchanged: a config is made of dozens of files.

        Raises:
            ConfigError: If it stands for too many values, or is nested too deeply.
        """
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        if not os.path.exists(path):
            return super().load_config(config_path)  # which tells
        file = os.stat(path)
        key = (self.path, self.provider, path, file.st_mtime_ns, file.st_size, file.st_ino)
        if key not in _READ:
            _check_aliases(path)
            _READ[key] = pickle.dumps(super().load_config(config_path))
        return pickle.loads(_READ[key])  # Hydra changes what it gets; a copy by pickle is the quickest


def bound_files() -> None:
    """Have Hydra read files in this way, in this process."""
    Plugins.instance()  # which registers Hydra's own way
    SourcesRegistry.instance().types["file"] = FileConfigSource


def _check_aliases(path: str) -> None:
    """Raise ConfigError if a file, with all aliases filled in, is too large or too deep."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if "&" not in text or "*" not in text:
        return
    try:
        check_size(_outline(yaml.compose(text, Loader=yaml.SafeLoader), {}), _MOST_VALUES)
    except ConfigError as error:
        raise ConfigError(f"{path}, with its aliases (*name) filled in, cannot be read: {error}") from error


def _outline(node: Any, known: dict[int, list[Any]]) -> Any:
    """A node of YAML as lists of lists, one for each, however often it occurs."""
    if not isinstance(node, yaml.CollectionNode):
        return None
    if id(node) not in known:
        known[id(node)] = outline = []
        for part in node.value:
            outline += [_outline(child, known) for child in (part if isinstance(part, tuple) else (part,))]
    return known[id(node)]
