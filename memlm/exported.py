"""A model as a folder for others to read: safetensors and JSON, in the layout of Hugging Face.

``config.json``, ``model.safetensors`` and ``tokenizer.json`` are what a model is made of, and ``SHA256SUMS`` tells
damage to them. ``tokenizer_config.json`` and ``generation_config.json`` are for transformers. A pretrained base that
came from a folder goes along, in ``base``; one of the hub is known by its name, revision and hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from memlm.config import ConfigError
from memlm.files import parse_json, read_json, regular
from memlm.machine import written_to

if TYPE_CHECKING:
    from memlm.models.base import LanguageModel

WEIGHTS = "model.safetensors"
ARCHITECTURE = "MemlmForCausalLM"
"""Class of transformers for an export."""
MODEL_TYPE = "memlm"
"""What transformers calls it."""

_PARTS = ("config.json", WEIGHTS, "tokenizer.json")
_SUMS = "SHA256SUMS"  # of the parts, as sha256sum writes and checks it
_BASE = "base"
_OF_BASE = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def write(model: LanguageModel, entry: dict[str, Any], directory: Path) -> list[Path]:
    """Write a model. All files appear together or not at all.

    Args:
        model: The model.
        entry: What a checkpoint says of it: version, configuration and tokenizer.
        directory: Where to; it must not exist yet, or be empty.

    Returns:
        The files.

    Raises:
        ConfigError: If something is there already, or the weights of its base are no safetensors.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists already: give the name of a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_to(directory),
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder,
    ):
        whole = Path(folder) / "whole"  # renamed, so that what removes the folder does not find it
        whole.mkdir()
        config = entry["config"]
        if model.base_folder is not None and os.path.isdir(os.path.expanduser(config["model"]["path"])):
            _copy_base(model.base_folder, whole / _BASE)
            entry = {**entry, "config": {**config, "model": {**config["model"], "path": _BASE}}}
        # Not save_file, which makes files that nobody else can read.
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        (whole / WEIGHTS).write_bytes(save(weights, {"format": "pt"}))
        (whole / "tokenizer.json").write_text(entry["tokenizer"], encoding="utf-8")
        files = {"config.json": about(model, entry), **_for_transformers(model)}
        for name, content in files.items():
            (whole / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (whole / _SUMS).write_text("".join(f"{_sha256(whole / name)}  {name}\n" for name in _PARTS), encoding="ascii")
        os.replace(whole, directory)
    return sorted(path for path in directory.rglob("*") if path.is_file())


def about(model: LanguageModel, entry: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of an export; see `write`."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vocab_size": len(model.head_weight),
        "hidden_size": model.sizes.d_model,
        "num_hidden_layers": model.sizes.n_layer,
        "version": entry["version"],
        "config": entry["config"],
    }


def read(directory: Path) -> dict[str, Any]:
    """What `write` has written, as the contents of a checkpoint.

    Raises:
        ConfigError: If a part is missing, damaged or not as it was written.
    """
    try:
        for name in (*_PARTS, _SUMS):
            regular(directory / name)
        lines = (directory / _SUMS).read_text(encoding="ascii").splitlines()
        sums = {line.partition("  ")[2]: line.partition("  ")[0] for line in lines}
        for name in _PARTS:
            if sums[name] != _sha256(directory / name):
                raise ConfigError(
                    f"{directory / name} is not as it was exported: export the model again, or, if you have changed it "
                    f"yourself, write its new checksum: (cd {directory}; sha256sum {' '.join(_PARTS)} > {_SUMS})"
                )
        entry = parse_json((directory / "config.json").read_bytes())
        if not isinstance(entry, dict):
            raise ConfigError(f"{directory / 'config.json'} must hold a mapping, got {reprlib.repr(entry)}")
        tokenizer = (directory / "tokenizer.json").read_text(encoding="utf-8")
        weights = load_file(directory / WEIGHTS)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing: an export has {', '.join((*_PARTS, _SUMS))}") from error
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ConfigError(f"{directory} cannot be read: it is damaged or cut short; export the model again") from error
    weights = {f"model.{name}": value for name, value in weights.items()}
    return {"memlm": _with_own_base(entry, directory) | {"tokenizer": tokenizer}, "state_dict": weights}


def _with_own_base(entry: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What a folder says of its model, with the place of the base that goes along with it."""
    config = entry.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(model, dict) or model.get("path") != _BASE:
        return entry
    return {**entry, "config": {**config, "model": {**model, "path": str((directory / _BASE).absolute())}}}


def _copy_base(base: Path, directory: Path) -> None:
    """Copy the files of a base."""
    if not any(base.glob("*.safetensors")):
        raise ConfigError(
            f"model.path: the weights in {base} are no safetensors, and no others are exported: write them anew with "
            "save_pretrained of transformers"
        )
    directory.mkdir()
    for path in sorted({path for pattern in _OF_BASE for path in base.glob(pattern)}):
        shutil.copyfile(path, directory / path.name)


def _for_transformers(model: LanguageModel) -> dict[str, Any]:
    """What transformers wants to know of the tokenizer and of generation, by the name of the file.

    The model begins texts itself where its base wants it, so the tokenizer adds nothing.
    """
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if model.base_folder is None:
        # As in training, a text may hold the letters of these tokens.
        about |= model.tokenizer.special_tokens() | {"split_special_tokens": True}
        return {"tokenizer_config.json": about, "generation_config.json": {"pad_token_id": model.tokenizer.pad_id}}
    base = model.base_folder
    known = _json_of(base / "tokenizer_config.json")
    kept = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    about |= {name: known[name] for name in kept if known.get(name) is not None}
    if model.chat_template is not None:
        about["chat_template"] = model.chat_template
    return {"tokenizer_config.json": about, "generation_config.json": _json_of(base / "generation_config.json")}


def _json_of(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
