"""Files of memories: what a model has stored, apart from its weights.

A file is safetensors, and says in its header for which memories and which tokenizer it was written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memlm.config import ConfigError
from memlm.data.tokens import atomic_file

FORMAT = "memlm.memory.1"
"""Changes when old files can no longer be read."""


class MemoryFile(NamedTuple):
    """Contents of a file.

    Attributes:
        tensors: Tensors by name.
        geometry: For each memory module and field of its state, by ``name/layer/field``, type and shape.
        tokenizer: Fingerprint of the tokenizer.
        weights: Fingerprint of the weights that wrote the memory.
        version: Version of memlm that wrote the file.
    """

    tensors: dict[str, Tensor]
    geometry: dict[str, str]
    tokenizer: str
    weights: str
    version: str


def write(path: str | os.PathLike[str], content: MemoryFile) -> None:
    """Write a file, and the directories above it; it appears whole or not at all.

    Raises:
        ConfigError: If the path is that of a directory.
    """
    path = _path(path)
    if not path.name or path.is_dir():
        raise ConfigError(f"{str(path)!r} is a directory: give the path of the file to write")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.tensors.items()}
    header = {name: json.dumps(part) for name, part in content._asdict().items() if name != "tensors"}
    with atomic_file(path) as file:
        save_file(tensors, file.name, {"format": FORMAT, **header})


def read(path: str | os.PathLike[str]) -> MemoryFile:
    """Read a file.

    Raises:
        ConfigError: If there is none, or it is cut short, damaged or no memory.
    """
    path = _path(path)
    if not path.is_file():
        raise ConfigError(f"there is no memory file at {path}: give the path of a file that save_memory has written")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ConfigError(
                    f"{path} is not a memory of this version of memlm: expected the format {FORMAT}, got "
                    f"{header.get('format')}; give a file that save_memory has written"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        parts: dict[str, Any] = {name: json.loads(header[name]) for name in MemoryFile._fields[1:]}
        if any(describe(tensors[name]) != told for name, told in parts["geometry"].items() if "/" in name):
            raise KeyError("a tensor is not what the header says")
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: it is damaged or cut short; save the memory again") from error
    return MemoryFile(tensors, **parts)


def _path(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser()


def describe(tensor: Tensor) -> str:
    """Type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check(content: MemoryFile, path: str | os.PathLike[str], geometry: dict[str, str], tokenizer: str) -> None:
    """Refuse the memory of another kind of model.

    Raises:
        ConfigError: If its geometry or tokenizer differs; the message says in what.
    """
    mine = {**geometry, "the tokenizer": tokenizer[:12]}
    theirs = {**content.geometry, "the tokenizer": content.tokenizer[:12]}
    for part in sorted(set(mine) | set(theirs), key=lambda name: (name in mine and name in theirs, name)):
        if mine.get(part) != theirs.get(part):
            raise ConfigError(
                f"{path} is the memory of another model: {part} is {theirs.get(part, 'absent')} there and "
                f"{mine.get(part, 'absent')} here; load it into a model of the same memory, d_model and tokenizer"
            )
