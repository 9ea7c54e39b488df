"""Models of Hugging Face that memories are attached to: found on this machine, checked, read.

transformers and peft are imported here alone, and only when a base is wanted: they are the extra ``pretrained``.
Nothing is fetched: a base is a folder, or a model that the cache of the hub has.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memlm.config import ConfigError
from memlm.files import read_json
from memlm.printed import one_line

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DECODERS = ("ForCausalLM", "LMHeadModel")


def folder_of(path: str | None, revision: str | None = None) -> Path:
    """The folder of a base.

    Args:
        path: A folder, or the name of a model that the cache of the hub has.
        revision: Branch, tag or commit of a model of the hub.

    Raises:
        ConfigError: If there is no such model on this machine.
    """
    if path is None:
        raise ConfigError("model.path is missing: give the folder of a model, or its name on the Hugging Face hub")
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        if folder.is_absolute() or path[:1] in ".~" or folder.exists() or not _HUB_NAME.fullmatch(path):
            raise ConfigError(
                f"model.path: there is no folder {one_line(path)}: give that of a model, with config.json"
            )
        folder = _cached(path, revision)
    elif revision is not None and folder.name != revision:
        raise ConfigError(f"model.revision is of models of the hub, and {one_line(path)} is a folder: leave it null")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {one_line(path)} is no model of Hugging Face: it has no config.json")
    return folder


def _cached(name: str, revision: str | None) -> Path:
    """The folder of a model in the cache of the hub."""
    _transformers()
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # of many kinds, for what is one thing to the user
        which = "" if revision is None else f" --revision {revision}"
        raise ConfigError(
            f"model.path: {name} is neither a folder nor a model in the cache of the hub: fetch it with "
            f"'hf download {name}{which}', or give a folder"
        ) from error


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model with what tells its base apart from any other: ``path``, ``revision`` and ``sha256``.

    Raises:
        ConfigError: If there is no such base, or it is another one than the settings say.
    """
    path, revision = settings.get("path"), settings.get("revision")
    folder = folder_of(path, revision)
    if not Path(os.path.expanduser(str(path))).is_dir():
        revision = folder.name if _COMMIT.fullmatch(folder.name) else revision
    else:
        path = os.path.abspath(os.path.expanduser(str(path)))
    check_hash(folder, settings.get("sha256"))
    return {**settings, "path": path, "revision": revision, "sha256": hash_of(folder)}


def check_hash(folder: Path, sha256: str | None) -> None:
    """Refuse a base whose weights are not those that are meant.

    Raises:
        ConfigError: If the hash differs.
    """
    if sha256 is not None and (found := hash_of(folder)) != sha256:
        raise ConfigError(
            f"model.sha256: the weights in {one_line(folder)} have the hash {found[:12]}..., not {sha256[:12]}...: "
            "they are of another base, with which this memory was not trained; give model.path of that one"
        )


def hash_of(folder: Path) -> str:
    """sha256 of all files of weights of a base, in hex.

    Raises:
        ConfigError: If there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ConfigError(f"model.path: {one_line(folder)} has no weights: expected *.safetensors")
    total = hashlib.sha256()
    for path in files:
        about = path.stat()
        total.update(_hash_of_file(path, about.st_size, about.st_mtime_ns))
    return total.hexdigest()


@functools.lru_cache(maxsize=64)
def _hash_of_file(path: Path, size: int, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_base(folder: Path, dtype: torch.dtype, trained: bool) -> Any:
    """A decoder of transformers; without its numbers where tensors have none (the device ``meta``).

    Args:
        folder: Where it is.
        dtype: Type of its weights.
        trained: Whether its weights are to be trained.

    Raises:
        ConfigError: If it is no decoder, or one that cannot be taken.
    """
    transformers = _transformers()
    with _told(folder), _quiet(transformers):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check(folder, config, trained)
        for name, value in vars(config).items():  # what stays as it is has no dropout
            if not trained and isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_prob")):
                setattr(config, name, 0.0)
        if torch.get_default_device().type == "meta":
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        causal, about = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(about["missing_keys"]):
        raise ConfigError(f"model.path: {one_line(folder)} lacks weights: {', '.join(missing[:3])}")
    return causal


def _check(folder: Path, config: Any, trained: bool) -> None:
    """Refuse what is no decoder, or has memories already."""
    if config.model_type == "memlm":
        raise ConfigError(f"model.path: {one_line(folder)} is an export of memlm, no base: load it with memlm.load")
    names = list(config.architectures or ())
    kind = names[0] if names else config.model_type
    if config.is_encoder_decoder or (names and not any(name.endswith(_DECODERS) for name in names)):
        raise ConfigError(
            f"model.path: {one_line(folder)} is a {kind}, no decoder that predicts the next token: give a model whose "
            "config.json names a ...ForCausalLM or ...LMHeadModel"
        )
    if trained and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.path: the weights in {one_line(folder)} are quantised, so they cannot be trained: "
            "leave model.freeze true"
        )


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Tell in a sentence what transformers refuses."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # there is no end of what it may raise on files that are none of a model
        first = one_line(str(error).strip().partition("\n")[0])[:300]
        raise ConfigError(f"model.path: {one_line(folder)} cannot be read as a model: {first}") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and warnings of transformers."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def add_lora(causal: Any, settings: Mapping[str, Any]) -> None:
    """Put adapters of low rank beside the weights of a base.

    Args:
        causal: The base.
        settings: What `peft.LoraConfig` takes.

    Raises:
        ConfigError: If peft is missing or refuses a setting.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"model.lora needs peft: pip install 'memlm[pretrained]' ({one_line(error)})") from error
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), causal)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora: peft refuses {dict(settings)}: {one_line(error)[:300]}") from error
    for name, parameter in causal.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def without_lora(*parts: nn.Module) -> Iterator[None]:
    """Leave the adapters of some modules out for a while."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for part in parts for module in part.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def tokenizer_of(folder: Path) -> str:
    """The text of the `tokenizer.json` of a base.

    Raises:
        ConfigError: If it has none.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        with _quiet(_transformers()) as _:
            made = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return made.backend_tokenizer.to_str()
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, for what is one thing to the user
        raise ConfigError(f"model.path: {one_line(folder)} has no tokenizer.json, nor what one is made of") from error


def begin_of(folder: Path) -> list[int]:
    """Ids of the tokens that the tokenizer of a base puts before every text, such as ``<s>``."""
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        bare, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    except Exception as error:  # the library raises bare ones
        raise ConfigError(f"model.path: {one_line(file)} cannot be read: {one_line(error)[:200]}") from error
    added = whole[: len(whole) - len(bare)] if bare and whole[-len(bare) :] == bare else []
    return added or _add_bos(folder, backend)


def _add_bos(folder: Path, backend: Any) -> list[int]:
    """What ``add_bos_token`` of an older tokenizer says."""
    about = _json_of(folder / "tokenizer_config.json")
    found = _named(about, "bos_token", backend) if about.get("add_bos_token") else None
    return [] if found is None else [found]


def start_of(folder: Path) -> int | None:
    """Id of the token after which a text of a base begins: that for beginnings, or else for ends."""
    import tokenizers

    file, about = folder / "tokenizer.json", _json_of(folder / "tokenizer_config.json")
    if not file.is_file():
        return None
    backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    found = (_named(about, name, backend) for name in ("bos_token", "eos_token"))
    return next((i for i in found if i is not None), None)


def _named(about: Mapping[str, Any], name: str, backend: Any) -> int | None:
    """Id of a token that has a name in the settings of a tokenizer."""
    token = about.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(token) if isinstance(token, str) else None


def ends_of(folder: Path) -> list[int]:
    """Ids of the tokens that end a text of a base."""
    for name in ("generation_config.json", "config.json"):
        found = _json_of(folder / name).get("eos_token_id")
        if found is not None:
            return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]
    return []


def chat_template_of(folder: Path) -> str | None:
    """How the tokenizer of a base writes a chat, in Jinja; None if it has no way."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    found = _json_of(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((part.get("template") for part in found if part.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def chat_of(folder: Path, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """The text of a chat as the tokenizer of a base writes it, without what the model itself begins texts with."""
    with _told(folder), _quiet(_transformers()):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        told = [dict(message) for message in messages]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=add_generation_prompt)
    begin = tokenizer.convert_ids_to_tokens(begin_of(folder))
    return text.removeprefix("".join(begin))


def _json_of(file: Path) -> dict[str, Any]:
    """Settings of a base; none where there is no such file."""
    return read_json(file) if file.is_file() else {}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model=pretrained needs transformers: pip install 'memlm[pretrained]' ({one_line(error)})"
        ) from error
    return transformers
