"""From a config to objects: tokenizer, data, memories, model. Explicit, and in this order."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memlm.config import ConfigError, check_arguments, check_kind, instantiate, target_of, validate, whole
from memlm.data.corpora.base import Corpus
from memlm.data.curriculum import Curriculum, build_curriculum
from memlm.data.tasks.base import Task
from memlm.data.tokenizer import Tokenizer, get_tokenizer
from memlm.files import cache_dir
from memlm.machine import available_memory, gib
from memlm.memory.contract import Memory, Sizes
from memlm.memory.state import n_byte
from memlm.models.base import LanguageModel
from memlm.saved import find_class

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


_DEEP = 1000


"""Layers from which on the size of a model is estimated before it is built."""


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
    from memlm.compose import compose, to_dict  # here, as a trained model is built without Hydra

    config = to_dict(compose(overrides))
    for part in ("model", "memory", "data", "curriculum"):
        validate(config[part], key=part)
    config = settled(config)
    return build_model(config, build_tokenizer(config))


def settled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration that says of its model all that tells it apart: see `LanguageModel.settled` and `sized`."""
    kind = _model_class(config)
    return sized(config if kind is None else {**config, "model": kind.settled(config["model"])})


def sized(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration whose memories are as large as ``config["state_bytes"]`` lets them be.

    The settings that they name (`Memory.sized`) grow or shrink together, in proportion to their values. Where even the
    least that the constructors take is larger, that is taken. Where nothing changes ``state_bytes`` is None in what is
    returned: it is the run that it would be without.
    """
    if (most := config.get("state_bytes")) is None or not config["memory"]:
        return {**config, "state_bytes": None} if "state_bytes" in config else config
    made: list[tuple[str, Sizes]] = []

    def noting(name: str, node: dict[str, Any]) -> Callable[..., Any]:
        def make(d_model: int, sizes: Sizes) -> Any:
            made.append((name, sizes))
            return _memory(name, node)(d_model, sizes)

        return make

    with torch.device("meta"):
        makers = {name: noting(name, dict(node)) for name, node in config["memory"].items()}
        model = instantiate(dict(config["model"]), "model", n_vocab=2, memories=makers)
        names = {name: modules[0].sized for name, modules in model.memory.items()}
        largest = max((config["memory"][name][key] for name, keys in names.items() for key in keys), default=0)

        def nodes(k: int) -> dict[str, Any]:
            """Settings of the memories where the largest of all sizes is k."""
            return {
                name: node | {key: max(1, round(node[key] * k / largest)) for key in names[name]}
                for name, node in config["memory"].items()
            }

        def fits(k: int, refused: bool = True) -> bool:
            """Whether memories of that size have so few bytes; what is refused is too small, or too large."""
            try:
                parts = [_memory(name, nodes(k)[name])(sizes.d_model, sizes).init_state(1) for name, sizes in made]
            except ConfigError:
                return refused and k < largest
            return sum(map(n_byte, parts)) <= most

        if not largest:
            return {**config, "state_bytes": None}
        k = _last(fits)
        if k == 0 or not fits(k, refused=False):
            k += 1  # too small to be built: the first that can be
    return {**config, "memory": nodes(k)} if nodes(k) != config["memory"] else {**config, "state_bytes": None}


def _last(holds: Callable[[int], bool]) -> int:
    """The greatest whole number of which something holds that holds up to there; 0 if not even of 1."""
    low, high = 0, 1
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _model_class(config: Mapping[str, Any]) -> type[LanguageModel] | None:
    """The class of ``config["model"]``; None if a function makes the model."""
    thing = target_of(config["model"], "model")
    return thing if isinstance(thing, type) and issubclass(thing, LanguageModel) else None


def build_corpus(config: Mapping[str, Any]) -> Corpus:
    """The text of ``config["data"]``."""
    node = config["data"]["corpus"]
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(
            f"data.corpus must be the settings of a corpus, with a _target_, got {node!r}: give data=NAME"
        )
    return instantiate(node, "data.corpus")


def build_tokenizer(config: Mapping[str, Any], corpus: Corpus | None = None) -> Tokenizer:
    """The tokenizer of ``config["data"]``, loaded from the cache or trained on ``corpus`` (by default its text).

    A model that comes with one of its own has that.
    """
    settings = config["data"]["tokenizer"]
    if not isinstance(settings, dict):
        raise ConfigError(f"data.tokenizer must be settings such as {{kind: bpe, vocab_size: 4096}}, got {settings!r}")
    if settings.get("n_vocab") is not None:
        whole("data.tokenizer.n_vocab", settings["n_vocab"], 1)
    check_arguments(
        "memlm.data.tokenizer.get_tokenizer",
        {name: settings.get(name) for name in ("kind", "vocab_size", "path")},
        "data.tokenizer",
        ("corpus", "cache_dir", "also"),
    )
    own = own_tokenizer(config)
    if own is not None:
        path = settings["path"]
        if path is not None and Tokenizer.from_file(path).bare().fingerprint() != own.fingerprint():
            raise ConfigError(
                f"data.tokenizer.path: {path} is another tokenizer than that of the model, which its "
                "weights know: leave it null"
            )
        return own
    return get_tokenizer(
        settings["kind"],
        settings["vocab_size"],
        settings["path"],
        corpus or build_corpus(config),
        _cache(config),
        [] if settings["path"] is not None else _text_of_task(config),
    )


def _text_of_task(config: Mapping[str, Any]) -> list[str]:
    """What ``config["curriculum"]`` trains on beside the text: see `Task.own_text`."""
    node = config["curriculum"].get("task")
    kind = target_of(node, "curriculum.task") if isinstance(node, dict) and "_target_" in node else None
    own_text = getattr(kind, "own_text", None)
    return [] if own_text is None else own_text(node)


def own_tokenizer(config: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that the model of ``config["model"]`` comes with; None if it takes any."""
    kind = _model_class(config)
    return None if kind is None else kind.own_tokenizer(config["model"])


def check_tokenizer(config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse a base whose tokenizer is not, or no more, the one that a saved model was trained with.

    Raises:
        ConfigError: If they differ, or the base has none.
    """
    own = own_tokenizer(config)
    if own is not None and own.fingerprint() != tokenizer.fingerprint():
        raise ConfigError(
            f"model.path: the tokenizer in {config['model']['path']} is another one than this model was trained with: "
            "give the base as it was then"
        )


def build_data(
    config: Mapping[str, Any], tokenizer: Tokenizer, corpus: Corpus | None = None, trained_on: str | None = None
) -> TextData:
    """Batches of ``corpus`` (by default the chosen text), encoded with ``tokenizer``; see `TextData`."""
    from memlm.data.datamodule import TextData

    return TextData(
        corpus=corpus or build_corpus(config),
        tokenizer=tokenizer,
        segment_len=config["model"]["segment_len"],
        curriculum=build_curriculum(config),
        cache_dir=_cache(config),
        seed=config["seed"],
        n_worker=whole("data.n_worker", config["data"]["n_worker"]),
        trained_on=trained_on,
    )


def build_model(config: Mapping[str, Any], tokenizer: Tokenizer) -> LanguageModel:
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
    model.tokenizer, model.config = tokenizer, dict(config)
    return model


def check_saved(config: Mapping[str, Any], trust: Sequence[str] | str | None = None, *, data: bool = False) -> None:
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


def check_model(config: Mapping[str, Any]) -> None:
    """Build the model and its memories without their numbers, for what their constructors refuse, and for their size.

    The vocabulary of the text is not known yet, so the smallest stands for it.

    Raises:
        ConfigError: If a value is refused, which the message names, or training needs more memory than there is.
    """
    check_kind(config["model"], "model", LanguageModel)
    if "segment_len" not in config["model"]:
        raise ConfigError("model.segment_len is missing: give it a value, as the data is cut by it too")
    for name, node in config["memory"].items():
        check_kind(node, f"memory.{name}", Memory)
    check_kind(config["data"]["corpus"], "data.corpus", Corpus)
    tokenizer: Any = SimpleNamespace(vocab_size=2)

    def needs(**more: Any) -> _Needs:
        try:
            with torch.device("meta"):
                return _Needs.of(build_model({**config, "model": config["model"] | more}, tokenizer), config)
        except (RuntimeError, OverflowError) as error:  # torch, of sizes beyond 64 bits
            raise ConfigError(f"the sizes of the model are beyond what can be counted: {_sizes(config)}") from error

    n_layer = config["model"].get("n_layer")
    if isinstance(n_layer, int) and n_layer > _DEEP:  # which takes long to build
        one, two = (needs(n_layer=n, memory_layers="middle") for n in (1, 2))
        _check_room(_Needs(*(a + (n_layer - 1) * (b - a) for a, b in zip(one, two, strict=True))), config)
    _check_room(needs(), config)


class _Needs(NamedTuple):
    """Bytes that training needs at least.

    Attributes:
        weights: Weights; where the memory of this machine is trained in, also gradients and two moments for each.
        banks: What the memories hold, of all rows.
        activations: One hidden state of each token of a batch for each layer.
    """

    weights: int
    banks: int
    activations: int

    @classmethod
    def of(cls, model: LanguageModel, config: Mapping[str, Any]) -> _Needs:
        """Those of a model on the meta device, which is the default device here."""
        trainer = config.get("trainer", {})
        here = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
        phases = config["curriculum"]["phases"] if here and "trainer" in config else []
        n_row = max((phase["n_row"] for phase in phases), default=0)
        n_token = max((phase["n_row"] * phase["n_segment"] for phase in phases), default=0) * model.segment_len
        weights = sum(part.numel() * part.element_size() for part in model.parameters())
        fixed = sum(part.numel() * part.element_size() for part in model.buffers())
        banks = 0
        for module in (module for modules in model.memory.values() for module in modules):
            banks += n_byte(module.init_state(1)) * (1 if module.scope == "shared" else n_row)
        width = config["model"].get("d_model", 0) * config["model"].get("n_layer", 1)
        return cls(weights * (4 if phases else 1) + fixed, banks, n_token * width * 4)


def _check_room(needs: _Needs, config: Mapping[str, Any]) -> None:
    """Refuse what cannot fit."""
    there = available_memory()
    if there is not None and sum(needs) > there:
        raise ConfigError(
            f"training needs at least {gib(sum(needs))} of memory ({gib(needs.weights)} for weights, gradients and the "
            f"optimizer, {gib(needs.banks)} for memory banks, {gib(needs.activations)} for the tokens of a batch), and "
            f"{gib(there)} can be had: make smaller what is largest of {_sizes(config)}"
        )


def _sizes(config: Mapping[str, Any]) -> str:
    """The settings that the size of a run depends on, with their values."""
    found = {f"model.{name}": config["model"].get(name) for name in ("d_model", "n_layer", "d_ff", "segment_len")}
    found |= {"n_parameter": config.get("n_parameter")}
    for name, node in config["memory"].items():
        found |= {f"memory.{name}.{key}": node.get(key) for key in ("n_slot", "d_key", "d_value")}
    for i, phase in enumerate(config.get("curriculum", {}).get("phases", [])):
        found |= {f"curriculum.phases.{i}.n_row": phase["n_row"]}
    return ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)


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

    def make(d_model: int, sizes: Any) -> Any:
        return instantiate(node, f"memory.{name}", d_model, offered={"sizes": sizes})

    return make


def _cache(config: Mapping[str, Any]) -> Path:
    path = config.get("paths", {}).get("cache_dir")
    return Path(path) if path else cache_dir()
