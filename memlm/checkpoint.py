"""Checkpoints: one file that holds everything, written whole or not at all.

A checkpoint is Lightning's, with an entry ``memlm`` that holds the configuration and the tokenizer as plain data. It
loads with ``weights_only=True``: no code in it is ever run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from memlm.config import ConfigError
from memlm.files import atomic_file, open_regular, refuse_special
from memlm.machine import no_space, written_to
from memlm.printed import one_line

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData
    from memlm.models.base import LanguageModel

FOLDER = "checkpoints"
_WEIGHTS = "model.safetensors"  # of an export
_NAME = re.compile(r"(?:.*-)?step=(\d+)(?:-v\d+)?\.ckpt")  # also as Lightning names them: epoch=0-step=100.ckpt


def load(path: str | os.PathLike[str]) -> LanguageModel:
    """Load a trained model; nothing but the path is needed.

    Args:
        path: A run directory (its newest checkpoint is taken) or a checkpoint file.

    Returns:
        The model in eval mode, with its tokenizer.

    Raises:
        ConfigError: If there is no checkpoint, or it is damaged or not one of memlm.
    """
    return _restore(read(find(path)))[0]


def load_run(
    path: str | os.PathLike[str], *, paths: dict[str, Any] | None = None, text: str | None = None
) -> tuple[LanguageModel, TextData]:
    """Load a trained model and the data it was trained on; see `load`.

    Args:
        path: A run directory or a checkpoint file.
        paths: Settings of ``paths`` that differ here, such as ``cache_dir``.
        text: Where the text it was trained on is now (``data.path``); None for where it was.

    Raises:
        ConfigError: Also if the text it was trained on cannot be read here, or ``text`` is another one.
    """
    from memlm.build import build_data

    content = read(find(path))
    model, config = _restore(content)
    config = config | {"paths": config.get("paths", {}) | (paths or {})}
    known = content["memlm"].get("text")
    if text is None:
        return model, build_data(config, model.tokenizer, trained_on=known)
    data = build_data(_moved(config, text), model.tokenizer)
    if known is None:
        raise ConfigError(
            f"data.path: {path} does not say which text it was trained on (exports do not): leave it null"
        )
    if data.corpus.fingerprint() != known:
        raise ConfigError(
            f"data.path: {text} is another text than {path} was trained on: give that one, or leave it null"
        )
    return model, data


def _moved(config: dict[str, Any], text: str) -> dict[str, Any]:
    """A configuration whose text is elsewhere."""
    corpus = config["data"]["corpus"]
    name = next((name for name in ("path", "name") if name in corpus), None)
    if name is None:
        raise ConfigError(f"data.path: the text of this model is made by {corpus['_target_']}, no file: leave it null")
    return config | {"data": config["data"] | {"corpus": corpus | {name: text}}}


def place(model: LanguageModel, device: str) -> LanguageModel:
    """Move a model to a device; ``auto`` is the GPU if there is one.

    Raises:
        ConfigError: If the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] == "meta":  # of tensors without numbers
        raise ConfigError("device=meta cannot be used here: it computes nothing; use auto, cpu or cuda")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that ``path`` names: itself, the newest of a run directory, or the weights of an export.

    Raises:
        ConfigError: If there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / _WEIGHTS).is_file():
        return path / _WEIGHTS
    if not path.exists():
        raise ConfigError(f"there is no run or checkpoint at {path}")
    refuse_special(path)
    found = checkpoints(path)
    if not found:
        raise ConfigError(f"there is no checkpoint in {path}: expected {FOLDER}/step=N.ckpt in a run directory")
    return found[-1]


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint files of a run directory, oldest first."""
    folder = run / FOLDER if (run / FOLDER).is_dir() else run
    numbered = [(int(found[1]), path) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def read(path: Path, peek: bool = False) -> dict[str, Any]:
    """Contents of a checkpoint file, on the CPU.

    Args:
        path: The file.
        peek: Leave out the values of tensors, which is quick where only the rest is of interest: they are of the device
            ``meta``.

    Raises:
        ConfigError: If it is damaged, holds more than plain data, or is not one of memlm.
    """
    content = _read_export(path.parent) if path.name == _WEIGHTS else read_plain(path, peek)
    entry = content.get("memlm") if isinstance(content, dict) else None
    if not isinstance(entry, dict) or not {"config", "tokenizer"} <= set(entry) or "state_dict" not in content:
        raise ConfigError(f"{path} is not a checkpoint of memlm: it has no entry 'memlm' that describes a model")
    return content


def export(model: LanguageModel, directory: str | os.PathLike[str]) -> list[Path]:
    """Write a model for others to read: ``model.safetensors``, ``config.json``, ``tokenizer.json``.

    The three appear together or not at all; `load` reads the directory.

    Args:
        model: The model; the banks of its shared memories are among the weights.
        directory: Where to; it must not exist yet, or be empty.

    Returns:
        The files.

    Raises:
        ConfigError: If something is there already.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists already: give the name of a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_to(directory),
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder,
    ):
        whole = Path(folder) / "whole"  # renamed, so that what removes the folder does not find it
        whole.mkdir()
        entry = describe(model)
        # Not save_file, which makes files that nobody else can read.
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        (whole / _WEIGHTS).write_bytes(save(weights))
        (whole / "tokenizer.json").write_text(entry.pop("tokenizer"), encoding="utf-8")
        (whole / "config.json").write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        os.replace(whole, directory)
    return sorted(directory.iterdir())


def _read_export(directory: Path) -> dict[str, Any]:
    """What `export` has written, as the contents of a checkpoint."""
    for name in ("config.json", "tokenizer.json"):
        refuse_special(directory / name)
    try:
        entry = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tokenizer = (directory / "tokenizer.json").read_text(encoding="utf-8")
        weights = load_file(directory / _WEIGHTS)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, SafetensorError) as error:
        raise ConfigError(f"{directory} cannot be read: it is damaged or cut short; export the model again") from error
    weights = {f"model.{name}": value for name, value in weights.items()}
    return {"memlm": {**entry, "tokenizer": tokenizer}, "state_dict": weights}


def read_plain(path: Path, peek: bool = False) -> Any:
    """Contents of any file of plain data that torch has written; see `read`.

    The checksums of all that is read are verified, which torch does not do itself.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as parts:
            names = parts.namelist()
            for name in names:
                if not (peek and "/data/" in name):  # where torch keeps the values of tensors
                    _verify(path, parts, name)
            if len(set(names)) < len(names):
                raise ConfigError(
                    f"{path} was refused: a part of it is there twice; use an earlier checkpoint of the run"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused in a moment
            return torch.load(path, map_location="meta" if peek else "cpu", weights_only=True)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} was refused: it is damaged, or holds more than tensors and plain values (code is never loaded)"
        ) from error
    except Exception as error:  # there is no end of what a parser may raise on bytes that are none of its own
        if isinstance(error, OSError) and error.filename is not None:
            raise  # missing, or not to be read by this user
        raise ConfigError(
            f"{path} cannot be read: it is damaged or cut short; use an earlier checkpoint of the run"
        ) from error


def _verify(path: Path, parts: zipfile.ZipFile, name: str) -> None:
    """Read a part to its end, where its checksum is compared."""
    try:
        with parts.open(name) as part:
            while part.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"{path} is damaged ({one_line(name)} is not as written); use an earlier checkpoint of the run"
        ) from error


def write(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint file, whole or not at all.

    Raises:
        ConfigError: If no space is left.
    """
    path = Path(path)
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        if no_space(error):
            then = "earlier checkpoints are whole: free some space and go on with resume=auto"
            if not any(path.parent.glob("*.ckpt")):
                then = "none was written before: free some space and give the command again"
            raise ConfigError(f"no space is left to write the checkpoint {path}; {then}") from error
        raise


def describe(model: LanguageModel) -> dict[str, Any]:
    """The ``memlm`` entry of a checkpoint of ``model``."""
    from memlm import __version__

    return {"version": __version__, "config": model.config, "tokenizer": model.tokenizer.to_json()}


def _restore(content: dict[str, Any]) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint and its configuration."""
    from memlm.build import build_model
    from memlm.data.tokenizer import Tokenizer

    entry = content["memlm"]
    try:
        model = build_model(entry["config"], Tokenizer.from_json(entry["tokenizer"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"this version of memlm cannot build the model of a checkpoint of version {entry.get('version')}: {error}"
        ) from error
    weights = {
        name.removeprefix("model."): value for name, value in content["state_dict"].items() if name.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights do not fit the model that the checkpoint describes: {' '.join(str(error).split())}"
        ) from error
    return model.eval(), entry["config"]
