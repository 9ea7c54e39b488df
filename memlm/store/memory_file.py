"""Files of memories: what a model has stored, apart from its weights.

A file is safetensors, and says in its header for which memories and which tokenizer it was written. A checksum there
covers all of it, as safetensors has none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import reprlib
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from memlm.config import ConfigError
from memlm.files import atomic_file, from_home
from memlm.memory.records import RecordKeeper
from memlm.memory.state import State, from_dict, move, n_byte, tensors, to_dict
from memlm.models.base import LanguageModel
from memlm.store.kept import Kept

log = logging.getLogger(__name__)

FORMAT = "memlm.memory.2"
"""Changes when old files can no longer be read."""

_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL",
    torch.uint8: "U8",
}  # fmt: skip


class MemoryFile(NamedTuple):
    """Contents of a file.

    Attributes:
        tensors: Tensors by name.
        geometry: For each memory module and field of its state, by ``name/layer/field``, type and shape; by other names
            what else must agree.
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
        ConfigError: If the path is none, or that of a directory or device, or the file cannot be written.
    """
    path = _path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.tensors.items()}
    header = {name: json.dumps(part) for name, part in content._asdict().items() if name != "tensors"}
    header |= {"format": FORMAT}
    try:
        if not path.name or path.is_dir():
            raise ConfigError(f"{str(path)!r} is a directory: give the path of the file to write")
        if path.exists() and not path.is_file():  # a device or a pipe, which the file would take the place of
            raise ConfigError(f"{str(path)!r} is no regular file: give the path of the file to write")
        with atomic_file(path) as file:
            _put(file, tensors, header | {"checksum": _checksum(tensors, header)})
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be written: {reason}; what was there is as before") from error


def read(path: str | os.PathLike[str], most: int = 2**40) -> MemoryFile:
    """Read a file.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        ConfigError: If there is none, or it is too large, cut short, damaged or no memory.
    """
    path = _path(path)
    try:
        if not path.is_file():
            raise ConfigError(
                f"there is no memory file at {path}: give the path of a file that save_memory has written"
            )
        with open(path, "rb") as file:
            if (n_byte := os.fstat(file.fileno()).st_size) > most:
                raise ConfigError(
                    f"{path} has {n_byte:,} bytes, and the memory of this model takes {most:,} at most: give a file "
                    "that save_memory has written for a model of the same memory"
                )
            # Not by its path, which is opened twice: another process may replace the file in between.
            with safe_open(f"/dev/fd/{file.fileno()}", "pt") as opened:
                header = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ConfigError(
                f"{path} is not a memory of this version of memlm: expected the format {FORMAT}, got "
                f"{reprlib.repr(header.get('format'))}; give a file that save_memory has written"
            )
        if header["checksum"] != _checksum(tensors, header):
            raise KeyError("the contents are not those that were written")
        parts: dict[str, Any] = {name: json.loads(header[name]) for name in MemoryFile._fields[1:]}
        for name, part in parts.items():
            plain = part.values() if name == "geometry" and isinstance(part, dict) else [part]
            if (name == "geometry") != isinstance(part, dict) or not all(isinstance(text, str) for text in plain):
                raise KeyError(f"{name} is of a wrong type")
        if {name: describe(tensor) for name, tensor in tensors.items()} != {
            name: told for name, told in parts["geometry"].items() if "/" in name
        }:
            raise KeyError("a tensor is not what the header says")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # there is no end of what a parser may raise on bytes of a stranger
        raise ConfigError(
            f"{path} cannot be read: it is no memory file, or damaged or cut short; save the memory again"
        ) from error
    return MemoryFile(tensors, **parts)


def _put(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file tensor by tensor, where the library would first have all of it in memory once more."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.unsqueeze(-1).view(torch.uint8).numpy().data


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        found = from_home(path)
        if "\0" in str(found):
            raise ValueError("there is a null byte in it")
        return found
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of a user who is not there
        raise ConfigError(f"a path of a file is expected, got {reprlib.repr(path)}: {error}") from error


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """CRC-32 of the header, but for the checksum itself, and of all tensors with their names, types and shapes."""
    told = {name: text for name, text in header.items() if name != "checksum"}
    crc = zlib.crc32(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {describe(tensor)}".encode(), crc)
        crc = zlib.crc32(_bytes(tensor), crc)
    return f"{crc:08x}"


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
            there, name = (repr(text[:200])[1:-1] for text in (theirs.get(part, "absent"), part))  # of a stranger
            raise ConfigError(
                f"{path} is the memory of another model: {name} is {there} there and {mine.get(part, 'absent')} here; "
                "load it into a model of the same memory, scope, d_model and tokenizer"
            )


def flat(state: State) -> dict[str, Tensor]:
    """Tensors of a state by the path of their field."""
    found: dict[str, Tensor] = {}

    def walk(plain: Any, path: str) -> None:
        if isinstance(plain, Tensor):
            found[path.removeprefix("/")] = plain
        elif isinstance(plain, dict):
            for name, part in plain.items():
                walk(part, f"{path}/{name}")

    walk(to_dict(state), "")
    return found


def restored(content: MemoryFile, part: Kept) -> State:
    """The bank of a module as the file holds it, on the module's device."""
    like = part.module.init_state(1)
    device = tensors(like)[0].device

    def fill(plain: Any, path: str) -> Any:
        if isinstance(plain, dict):
            return {name: fill(value, f"{path}/{name}") for name, value in plain.items()}
        if plain is None:
            return None
        return content.tensors[path]

    return move(from_dict(fill(to_dict(like), part.name), like), device)


def fingerprint(kept: list[Kept]) -> str:
    """Of the weights of the memories."""
    digest = hashlib.sha256()
    for part in kept:
        for parameter in part.module.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def geometry(model: LanguageModel, kept: list[Kept]) -> dict[str, str]:
    """Type and shape of all that a file of the memory holds, the model's width, and the scopes of the memories."""
    scopes = ", ".join(f"{part.name} {part.module.scope}" for part in kept)
    fields = {"d_model": str(model.sizes.d_model), "scope": scopes}
    for part in kept:
        fresh = part.module.init_state(1)
        holds = flat(fresh) | {"uses": part.module.filled(fresh)[0].long()}
        fields |= {f"{part.name}/{name}": describe(tensor) for name, tensor in holds.items()}
    return fields


def banks_of_file(
    model: LanguageModel, path: str | os.PathLike[str], kept: list[Kept]
) -> tuple[MemoryFile, dict[str, State]]:
    """A file for this model, and the banks in it by name; refuses what no text can have led to."""
    most = 2**30 + 4 * sum(n_byte(part.module.init_state(1)) for part in kept)  # far above, but there is an end
    content = read(path, most)
    check(content, path, geometry(model, kept), model.tokenizer.fingerprint())
    banks = {part.name: restored(content, part) for part in kept}
    for part in kept:
        try:
            _check_bank(model, part.module, banks[part.name], content.tensors[f"{part.name}/uses"])
        except ValueError as error:
            raise ConfigError(
                f"{path} cannot be read: {part.name} holds what no text can have written ({error}); "
                "save the memory again"
            ) from error
    if len({int(part.module.records(banks[part.name]).n_record) for part in kept}) > 1:
        raise ConfigError(
            f"{path} cannot be read: other numbers of records were written in one layer than in another; save the "
            "memory again"
        )
    if content.weights != fingerprint(kept):
        log.warning(
            "%s was written by a model with other weights: what it holds may be read badly, or not at all", path
        )
    return content, banks


def _check_bank(model: LanguageModel, module: RecordKeeper, bank: State, uses: Tensor) -> None:
    """`Memory.check`, and what the memory does not know: the vocabulary, and how often slots were shown."""
    module.check(bank)
    tokens, filled = module.tokens(bank), module.filled(bank)[0].to(uses.device)
    if tokens is not None and bool((tokens >= len(model.head_weight)).any()):
        raise ValueError("the id of a token is not in the vocabulary")
    if bool(((uses < 0) | (uses > 2**32) | ((uses > 0) & ~filled)).any()):
        raise ValueError("uses are out of range, or of a slot that is empty")
