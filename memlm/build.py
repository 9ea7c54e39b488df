"""From a config to objects: tokenizer, data, memories, model. Explicit, and in this order."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from memlm.config import ConfigError, instantiate, validate
from memlm.data.corpus import Corpus
from memlm.data.curriculum import Curriculum
from memlm.data.task import Task
from memlm.data.tokenizer import Tokenizer, get_tokenizer
from memlm.data.tokens import cache_dir
from memlm.memory.base import Memory
from memlm.models.base import LanguageModel
from memlm.saved import find_class

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


def build(*overrides: str) -> LanguageModel:
    """Build an untrained model from Hydra overrides of ``configs/train.yaml``.

    The tokenizer of the chosen data is loaded from the cache, or trained and cached.

    Args:
        *overrides: For example ``"model=lmcode", "memory=ltm", "model.n_layer=2"``.

    Returns:
        The model, with ``tokenizer``, ``segment_len``, ``memory`` and ``config``.

    Raises:
        ConfigError: If a name or value is wrong; the message says which and what was expected.
    """
    from memlm.cli import compose, to_dict  # here, as a trained model is built without Hydra

    config = to_dict(compose(overrides))
    validate({name: config[name] for name in ("seed", "n_parameter")})
    for part in ("model", "memory", "data", "curriculum"):
        validate(config[part], key=part)
    return build_model(config, build_tokenizer(config))


def build_corpus(config: dict[str, Any]) -> Corpus:
    """The text of ``config["data"]``."""
    return instantiate(config["data"]["corpus"], "data.corpus")


def build_tokenizer(config: dict[str, Any], corpus: Corpus | None = None) -> Tokenizer:
    """The tokenizer of ``config["data"]``, loaded from the cache or trained on ``corpus`` (by default its text)."""
    settings = config["data"]["tokenizer"]
    return get_tokenizer(
        settings["kind"], settings["vocab_size"], settings["path"], corpus or build_corpus(config), _cache(config)
    )


def build_data(config: dict[str, Any], tokenizer: Tokenizer, corpus: Corpus | None = None) -> TextData:
    """Batches of ``corpus`` (by default the chosen text), encoded with ``tokenizer``."""
    from memlm.data.datamodule import TextData

    return TextData(
        corpus=corpus or build_corpus(config),
        tokenizer=tokenizer,
        segment_len=config["model"]["segment_len"],
        curriculum=instantiate(config["curriculum"], "curriculum"),
        cache_dir=_cache(config),
        seed=config["seed"],
        n_worker=config["data"]["n_worker"],
    )


def build_model(config: dict[str, Any], tokenizer: Tokenizer) -> LanguageModel:
    """The model with its memories; initial values depend on ``config["seed"]`` alone.

    With ``config["n_parameter"]`` the width of the feed-forward is what gives the whole about so many parameters.
    """
    settings = dict(config["model"])
    n_vocab = config["data"]["tokenizer"]["n_vocab"] or tokenizer.vocab_size
    if n_vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"data.tokenizer.n_vocab ({n_vocab}) is smaller than the tokenizer's vocabulary ({tokenizer.vocab_size}): "
            "leave it null, or lower data.tokenizer.vocab_size"
        )
    memories = {name: _memory(name, dict(node)) for name, node in config["memory"].items()}

    def make(**more: Any) -> LanguageModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config["seed"])
            return instantiate(settings | more, "model", n_vocab=n_vocab, memories=memories)

    wanted = config.get("n_parameter")
    model = make() if wanted is None else make(d_ff=_width(settings, wanted, make))
    model.tokenizer, model.config = tokenizer, config
    return model


def check_saved(config: dict[str, Any], trust: Sequence[str] | str | None = None, *, data: bool = False) -> None:
    """Check the configuration of a saved model, before anything that it names is imported.

    The settings of a command line may name whatever their user likes. Those that come with a file may name subclasses
    of `LanguageModel` and `Memory`, and for the data of `Corpus`, `Curriculum` and `Task`, which memlm or a trusted
    package defines; see `memlm.saved.find_class`.

    Args:
        config: Plain configuration.
        trust: Names of packages of which classes may be taken too.
        data: Whether data is to be built of it too, and not the model alone.

    Raises:
        ConfigError: Naming the setting, and what was expected.
    """
    for name in ("model", "memory", "data", *(("curriculum",) if data else ())):
        _mapping(config.get(name), name)
    n_vocab = _mapping(config["data"].get("tokenizer"), "data.tokenizer").get("n_vocab")
    numbers = {"n_parameter": config.get("n_parameter"), "data.tokenizer.n_vocab": n_vocab}
    numbers = {name: value for name, value in numbers.items() if value is not None} | {"seed": config.get("seed")}
    for name, value in (numbers | ({"data.n_worker": config["data"].get("n_worker")} if data else {})).items():
        if type(value) is not int or (value < 0 and name != "seed"):
            raise ConfigError(f"{name} must be a whole number, got {reprlib.repr(value)}")
    parts: list[tuple[str, Any, type]] = [("model", config["model"], LanguageModel)]
    parts += [(f"memory.{name}", node, Memory) for name, node in config["memory"].items()]
    if data:
        parts += [
            ("data.corpus", config["data"].get("corpus"), Corpus),
            ("curriculum", config["curriculum"], Curriculum),
        ]
        task = config["curriculum"].get("task")
        parts += [("curriculum.task", task, Task)] if task is not None else []
    for key, node, base in parts:
        find_class(_mapping(node, key).get("_target_"), base, f"{key}._target_", trust, itself=base is Curriculum)
    keys = {key for key, _, _ in parts}
    for key, node, _ in parts:
        for inner in _targets(node, key):
            if inner not in keys:
                raise ConfigError(f"{inner}._target_: nothing is built there, so no class may be named")
        validate(node, key=key)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} must be a mapping of settings, got {reprlib.repr(value)}")
    return value


def _targets(value: Any, key: str) -> Iterator[str]:
    """Full names of all nodes with a ``_target_``."""
    if isinstance(value, dict) and "_target_" in value:
        yield key
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _targets(part, f"{key}.{name}")


def check_model(config: dict[str, Any]) -> None:
    """Build the model and its memories without their numbers, for what their constructors refuse.

    The vocabulary of the text is not known yet, so the smallest stands for it.

    Raises:
        ConfigError: If a value is refused; the message names it.
    """
    tokenizer: Any = SimpleNamespace(vocab_size=2)
    with torch.device("meta"):
        build_model(config, tokenizer)


def _width(settings: dict[str, Any], n_parameter: int, make: Callable[..., LanguageModel]) -> int:
    """The ``d_ff`` with which a model comes closest to ``n_parameter`` parameters, memories included."""
    if settings.get("d_ff") is not None:
        raise ConfigError(f"n_parameter sets model.d_ff, which is set to {settings['d_ff']}: leave one of them null")
    least, more = (sum(parameter.numel() for parameter in make(d_ff=width).parameters()) for width in (1, 2))
    if n_parameter < least:
        raise ConfigError(f"n_parameter must be at least {least:,} with this model and memory, got {n_parameter:,}")
    return 1 + round((n_parameter - least) / (more - least))


def untrained(model: LanguageModel) -> LanguageModel:
    """A model of the same configuration with initial values of another seed, in eval mode on the same device."""
    other = build_model(model.config | {"seed": model.config["seed"] + 1}, model.tokenizer)
    return other.to(model.head_weight.device).eval()


def _memory(name: str, node: dict[str, Any]) -> Callable[..., Any]:
    """A constructor of one memory module."""
    return functools.partial(instantiate, node, f"memory.{name}")


def _cache(config: dict[str, Any]) -> Path:
    path = config.get("paths", {}).get("cache_dir")
    return Path(path) if path else cache_dir()
