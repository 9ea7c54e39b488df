"""Checkpoints: one file that holds everything, written whole or not at all.

A checkpoint is Lightning's, with an entry ``memlm`` that holds the configuration and the tokenizer as plain data.

It may come from a stranger. It is read with ``weights_only=True``, so no code in it is run; of what its configuration
names only classes of memlm are imported and built, and those of packages that the caller trusts
(`memlm.assemble.check_saved`).
"""

from __future__ import annotations

import os
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memlm import exported
from memlm.config import ConfigError
from memlm.files import atomic_file, open_regular, regular
from memlm.machine import no_space
from memlm.memory import state as states
from memlm.memory.records import RecordKeeper
from memlm.printed import one_line
from memlm.saved import check_size, plain

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData
    from memlm.models.base import LanguageModel

Trust = Sequence[str] | str | None
"""Names of packages: one, several or none."""

FOLDER = "checkpoints"
_NAME = re.compile(r"(?:.*-)?step=(\d+)(?:-v\d+)?\.ckpt")  # also as Lightning names them: epoch=0-step=100.ckpt


def load(path: str | os.PathLike[str], *, trust: Trust = None, base: str | None = None) -> LanguageModel:
    """Load a trained model; nothing but the path is needed.

    Args:
        path: A run directory (its newest checkpoint is taken), a checkpoint file, or the directory of an export.
        trust: Names of packages, beside memlm, of which the file may name classes of models and memories. Importing
            them runs their code; nothing else that a file names is imported or called.
        base: Folder or name of the pretrained model that it stands on, if not where it was in training.

    Returns:
        The model in eval mode, with its tokenizer.

    Raises:
        ConfigError: If there is no checkpoint, it is damaged or not one of memlm, or names what is not trusted.
    """
    path = find(path)
    content = read(path)
    return _restore(path, content if base is None else _on_base(content, base), trust)


def _on_base(content: dict[str, Any], base: str) -> dict[str, Any]:
    """The contents of a checkpoint whose pretrained model is elsewhere."""
    entry, config = content["memlm"], content["memlm"]["config"]
    if not isinstance(config.get("model"), dict) or "sha256" not in config["model"]:
        raise ConfigError("base is of models that stand on a pretrained one, and this does not: leave it out")
    model = {**config["model"], "path": base, "revision": None}
    return {**content, "memlm": {**entry, "config": {**config, "model": model}}}


def load_run(
    path: str | os.PathLike[str],
    *,
    paths: dict[str, Any] | None = None,
    text: str | None = None,
    trust: Trust = None,
) -> tuple[LanguageModel, TextData]:
    """Load a trained model and the data it was trained on; see `load`.

    The text is read, once it is asked for, from where the configuration says: files of this machine, or a data set of
    the Hugging Face hub. Nothing is written but the cache of its tokens.

    Args:
        path: A run directory or a checkpoint file.
        paths: Settings of ``paths``: ``cache_dir``, by default that of this user, wherever the file would have it.
        text: Where the text it was trained on is now (``data.path``); None for where it was.
        trust: As for `load`; also of classes of corpora, curricula and tasks.

    Raises:
        ConfigError: Also if the text it was trained on cannot be read here, or ``text`` is another one.
    """
    from memlm.assemble import build_data

    path = find(path)
    content = read(path)
    model = _restore(path, content, trust, data=True)
    config = model.config | {"paths": paths or {}}
    known = content["memlm"].get("text")
    if text is None:
        with _told(path):
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
    if not os.path.isdir(path):
        try:
            return regular(path)
        except FileNotFoundError:
            raise ConfigError(
                f"there is no run or checkpoint at {one_line(path)}: give the directory that training named"
            ) from None
    if os.path.lexists(path / exported.WEIGHTS):
        return path / exported.WEIGHTS
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
    content = exported.read(path.parent) if path.name == exported.WEIGHTS else read_plain(path, peek)
    entry = content.get("memlm") if isinstance(content, dict) else None
    if not isinstance(entry, dict) or not {"config", "tokenizer"} <= set(entry) or "state_dict" not in content:
        raise ConfigError(f"{path} is not a checkpoint of memlm: it has no entry 'memlm' that describes a model")
    texts = ("tokenizer", "version", *(name for name in ("text", "wandb_id") if entry.get(name) is not None))
    for name in texts:
        if not isinstance(entry.get(name), str):
            raise ConfigError(f"{path} is not a checkpoint of memlm: {name} is no text in its entry 'memlm'")
    for name, value in {"memlm.config": entry["config"], "state_dict": content["state_dict"]}.items():
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path} is not a checkpoint of memlm: {name} is no mapping, but a {type(value).__name__}"
            )
    _check_version(entry["version"], path)
    try:
        return content | {"memlm": entry | {"config": plain(entry["config"])}}
    except ConfigError as error:
        raise ConfigError(f"{path} was refused: of its configuration, {error}") from error


def _check_version(version: str, path: Path) -> None:
    """Refuse what another version has written that comes after this one."""
    from memlm.version import __version__

    found, own = (re.match(r"\d{1,4}(?:\.\d{1,4}){1,3}(?!\d)", text) for text in (version, __version__))
    if found is None or own is None or len(version) > 30 or not version.isprintable():
        raise ConfigError(f"{path} is not a checkpoint of memlm: its version is {reprlib.repr(version)}")
    if _numbers(found[0]) > _numbers(own[0]):
        raise ConfigError(
            f"{path} was written by memlm {one_line(version)}, and this is {__version__}: install that version"
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def export(model: LanguageModel, directory: str | os.PathLike[str]) -> list[Path]:
    """Write a model for others to read, as a folder of Hugging Face: see `memlm.exported.write`.

    `load` reads it, and so does ``transformers.AutoModelForCausalLM.from_pretrained`` (`memlm.hf`).

    Args:
        model: The model; the banks of its shared memories are among the weights.
        directory: Where to; it must not exist yet, or be empty.

    Returns:
        The files.

    Raises:
        ConfigError: If something is there already.
    """
    return exported.write(model, describe(model), Path(directory))


def config_of(model: LanguageModel) -> dict[str, Any]:
    """What the ``config.json`` of an export says of ``model``."""
    return exported.about(model, describe(model))


def read_plain(path: Path, peek: bool = False) -> Any:
    """Contents of any file of plain data that torch has written; see `read`.

    The checksums of all that is read are verified, which torch does not do itself.
    """
    regular(path)
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as parts:
            _check_parts(parts, os.fstat(file.fileno()).st_size)
            for name in parts.namelist():
                if not (peek and "/data/" in name):  # where torch keeps the values of tensors
                    _verify(parts, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused in a moment
            content = torch.load(path, map_location="meta" if peek else "cpu", weights_only=True)
        check_size(content)
        return content
    except ConfigError as error:
        raise ConfigError(f"{path} was refused: {error}") from error
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


def _verify(parts: zipfile.ZipFile, name: str) -> None:
    """Read a part to its end, where its checksum is compared."""
    try:
        with parts.open(name) as part:
            while part.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        raise ConfigError(f"it is damaged ({one_line(name)} is not as written); use an earlier checkpoint") from error


def _check_parts(parts: zipfile.ZipFile, n_byte: int) -> None:
    """Refuse an archive that torch does not write, and that could grow when it is read."""
    found = parts.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in found):
        raise ConfigError("its parts are compressed, which those of a checkpoint never are")
    if len({part.filename for part in found}) < len(found):
        raise ConfigError("a part of it is there twice; use an earlier checkpoint")
    if sum(part.file_size for part in found) > n_byte:
        raise ConfigError("its parts overlap, which those of a checkpoint never do")


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
    from memlm.version import __version__

    return {"version": __version__, "config": model.config, "tokenizer": model.tokenizer.to_json()}


def blank(path: Path, content: Mapping[str, Any], trust: Trust = None, *, data: bool = False) -> LanguageModel:
    """The model that a checkpoint describes, on the device ``meta``: it has sizes, but no numbers, and takes no memory.

    Args:
        path: The file, for the errors.
        content: What `read` gave of it.
        trust: As for `load`.
        data: Whether what its data is built of is checked too.

    Raises:
        ConfigError: If it names what is not trusted, or the weights are not of the model that it describes.
    """
    from memlm.assemble import build_model, check_saved
    from memlm.data.tokenizer import Tokenizer

    entry, config = content["memlm"], content["memlm"]["config"]
    with _told(path, entry["version"]):
        check_saved(config, trust, data=data)
        weights, n_layer = _weights(content), config["model"].get("n_layer")
        if isinstance(n_layer, int) and n_layer > len(weights):
            raise ConfigError(f"model.n_layer is {n_layer:,}, but there are no more than {len(weights)} weights")
        with torch.device("meta"):
            model = build_model(config, Tokenizer.from_json(entry["tokenizer"]))
            _check_fit(model, weights)
    return model


def _restore(path: Path, content: Mapping[str, Any], trust: Trust, data: bool = False) -> LanguageModel:
    """The model of a checkpoint; with ``data``, what its data is built of is checked too."""
    from memlm.assemble import build_model, check_tokenizer

    sizes = blank(path, content, trust, data=data)
    with _told(path, content["memlm"]["version"]):
        wanted = sum({id(part): part.nbytes for part in (*sizes.parameters(), *sizes.buffers())}.values())
        wanted += sum(states.n_byte(module.init_state(1)) for modules in sizes.memory.values() for module in modules)
        if wanted > (free := _free_memory()):
            raise ConfigError(f"the model wants {wanted / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} are free")
        check_tokenizer(sizes.config, sizes.tokenizer)
        model = build_model(sizes.config, sizes.tokenizer)
        try:
            model.load_state_dict(_weights(content))
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise ConfigError(f"the weights cannot be loaded: {reasons or error}") from error
        for name, value in model.state_dict().items():
            if not value.isfinite().all():
                raise ConfigError(f"the weights {name} are not all finite; use an earlier checkpoint of the run")
    return model.eval()


@contextmanager
def _told(path: Path, version: str | None = None) -> Iterator[None]:
    """Tell in a sentence what is wrong with the contents of a file."""
    from memlm.version import __version__

    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    except Exception as error:  # there is no end of what constructors may raise on settings that were never theirs
        written = "" if version in (None, __version__) else f", which memlm {version} has written"
        raise ConfigError(
            f"{path}{written}: memlm {__version__} cannot build what it describes: "
            f"{type(error).__name__}: {one_line(error)[:300]}"
        ) from error


def _weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the model in a checkpoint, each with numbers of its own."""
    weights = {}
    held: dict[int, int] = {}
    for name, value in content["state_dict"].items():
        if not isinstance(name, str) or not name.startswith("model."):
            continue
        if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ConfigError(f"{name} is no array of real numbers; use an earlier checkpoint of the run")
        storage = value.untyped_storage()
        if storage.nbytes() < value.nbytes:
            raise ConfigError(f"{name} has fewer numbers than its size says; use an earlier checkpoint of the run")
        held[storage._cdata] = storage.nbytes()
        weights[name.removeprefix("model.")] = value
    if sum(value.nbytes for value in weights.values()) > 2 * sum(held.values()):  # the embedding may be the head too
        raise ConfigError("most weights are the same numbers in the file; use an earlier checkpoint of the run")
    return weights


def _check_fit(model: LanguageModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are not those of a model on the device ``meta``, which gets the banks that are among them."""
    for name, modules in model.memory.items():
        for i, module in enumerate(modules):
            start = f"memory.{name}.{i}."
            has_bank = any(found.startswith(f"{start}bank.") and found != f"{start}bank.slot_uses" for found in weights)
            if has_bank != module.bank.exists:
                if module.bank.exists or not isinstance(module, RecordKeeper):
                    raise ConfigError(
                        f"memory.{name}.scope is {module.scope} in the configuration, but {'a' if has_bank else 'no'} "
                        "shared bank is among the weights: they were trained with another scope"
                    )
                module.bank.create()
            if f"{start}bank.slot_uses" in weights:
                module.bank.uses()
    own = model.state_dict()
    parts = {
        "lacking are": [name for name in own if name not in weights and ".bank." not in name],
        "not of the model are": [name for name in weights if name not in own],
        "of another size or type are": [
            name
            for name, value in weights.items()
            if name in own
            and (value.shape != own[name].shape or value.is_floating_point() != own[name].is_floating_point())
        ],
    }
    if told := [f"{kind} {', '.join(names[:3])}" for kind, names in parts.items() if names]:
        raise ConfigError(f"the weights do not fit the model that is described: {'; '.join(told)}")


def _free_memory() -> float:
    """Bytes that can still be asked for."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return float("inf")
