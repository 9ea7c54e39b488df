"""What is checked: settings of a model, what its memories ask of it, and the arguments of its calls."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memlm.config import ConfigError, whole
from memlm.models.sampling import Sampling
from memlm.models.stack import Stack

_COLDEST = 1e-6  # temperature; below, logits would overflow


def memory_layers(choice: str | Sequence[int], n_layer: int) -> list[int]:
    """Indices of the layers with memory, ascending.

    Raises:
        ValueError: If there are no such layers.
    """
    if choice == "middle":
        return [n_layer // 2]
    if choice == "all":
        return list(range(n_layer))
    if isinstance(choice, str):
        raise ValueError(f"model.memory_layers must be 'middle', 'all' or a list of layers, got {choice!r}")
    layers = sorted(choice)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < n_layer for layer in layers):
        raise ValueError(f"model.memory_layers must name different layers of 0..{n_layer - 1}, got {list(choice)}")
    return layers


def needs(model: Stack) -> None:
    """Refuse memories that ask for what a model cannot give, or for the same place.

    Raises:
        ValueError: With the name of the memory.
    """
    around: dict[str, str] = {}
    for name, modules in model.memory.items():
        module, asks = modules[0], modules[0].needs
        if asks.lookback > model.segment_len:
            raise ValueError(
                f"memory {name!r} looks back {asks.lookback} tokens, more than a segment: "
                f"set model.segment_len to at least {asks.lookback}, got {model.segment_len}"
            )
        asked = [what for what in ("heads", "context", "tail") if getattr(asks, what)]
        if asked and not model.layers[0].n_head:
            raise ValueError(
                f"memory {name!r} needs {asked[0]} of attention, which {type(model).__name__} does not have: "
                "choose model=lmcode, or another memory"
            )
        if asks.tail and module.around != "stack":
            raise ValueError(f"memory {name!r} needs cells behind a segment, so it must stand around the stack")
        if asks.each_layer and module.around != "stack":
            raise ValueError(f"memory {name!r} needs each layer, so it must stand around the stack")
        if asks.nll and (module.around != "stack" or not asks.context):
            raise ValueError(f"memory {name!r} runs the model, so it must stand around the stack and need a context")
        if asks.heads and (module.around != "layer" or module.reads_beside):
            raise ValueError(f"memory {name!r} needs heads, so it must stand around a layer, with a mix of its own")
        place = "the stack" if module.around == "stack" else None if module.reads_beside else "a layer"
        if place is not None and place in around:
            raise ValueError(f"memories {around[place]!r} and {name!r} both stand around {place}: choose one of them")
        if place is not None:
            around[place] = name


def token_ids(ids: Any, n_vocab: int) -> Tensor:
    """Token ids (B, L) of a call, as 64-bit numbers.

    Args:
        ids: What was given.
        n_vocab: Size of the vocabulary. Ids beyond it are looked for on a CPU alone: elsewhere that would wait.

    Raises:
        ConfigError: If they are no tensor of 32- or 64-bit whole numbers of two dimensions, or beyond the vocabulary.
    """
    if not isinstance(ids, Tensor):
        raise ConfigError(f"ids must be a tensor (rows, tokens), got {type(ids).__name__}: use torch.tensor([ids])")
    if ids.dtype not in (torch.long, torch.int32):
        kind = str(ids.dtype).removeprefix("torch.")
        raise ConfigError(f"ids must be whole numbers of 64 or 32 bits (int64, int32), got {kind}: use ids.long()")
    if ids.dim() != 2 or not len(ids):
        raise ConfigError(f"ids must be (rows, tokens) with at least one row, got shape {tuple(ids.shape)}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        least, most = (int(part) for part in ids.aminmax())
        if least < 0 or most >= n_vocab:
            raise ConfigError(f"ids must be below the size of the vocabulary, in 0..{n_vocab - 1}, got {least}..{most}")
    return ids.long()


def flags(name: str, given: Any) -> None:
    """Refuse what is no tensor of bools, nor None.

    Raises:
        ConfigError: If it is something else.
    """
    if given is not None and not (isinstance(given, Tensor) and given.dtype == torch.bool):
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ConfigError(f"{name} must be bool, got {got}: give a tensor of bools, or None")


def signals(model: Stack, asked: Mapping[str, Tensor], n_row: int) -> None:
    """Refuse signals that no memory uses, other shapes than (B, n), and NaN, which is looked for on a CPU alone.

    Raises:
        ConfigError: With the name of the signal.
    """
    known = {name: width for modules in model.memory.values() for name, width in modules[0].needs.signals.items()}
    if not isinstance(asked, Mapping) or not all(isinstance(given, Tensor) for given in asked.values()):
        raise ConfigError(f"signals must be tensors by name, got {reprlib.repr(asked)}")
    for name, given in asked.items():
        if name not in known:
            width = given.shape[-1] if given.dim() else 1
            raise ConfigError(
                f"signals: {name!r} is used by no memory of this model, which know {', '.join(known) or 'none'}: "
                f"leave it out, or choose a memory that takes signals, and name it there: signals={{{name}: {width}}}"
            )
        if given.shape != (n_row, known[name]):
            raise ConfigError(
                f"signals.{name} must be (rows, numbers) = {(n_row, known[name])}, got shape {tuple(given.shape)}"
            )
        if given.device.type == "cpu" and not torch.compiler.is_compiling() and bool(given.isnan().any()):
            raise ConfigError(f"signals.{name} holds NaN: give 0 where it is unknown")


def sampling(how: Sampling, model: Stack) -> None:
    """Refuse settings of generation that are out of range.

    Raises:
        ConfigError: With the name of the setting.
    """
    whole("max_new_tokens", how.max_new_tokens)
    temperature, top_p, penalty = how.temperature, how.top_p, how.repetition_penalty
    if not isinstance(how.do_sample, bool):
        raise ConfigError(f"do_sample must be true or false, got {reprlib.repr(how.do_sample)}")
    if not (_number(temperature) and (temperature == 0 or _COLDEST <= temperature < math.inf)):
        raise ConfigError(
            f"temperature must be 0 (the likeliest token) or a number of at least {_COLDEST}, got "
            f"{reprlib.repr(temperature)}"
        )
    if how.top_k is not None:
        whole("top_k, unless it is None,", how.top_k, least=1)
    if top_p is not None and not (_number(top_p) and 0 < top_p <= 1):
        raise ConfigError(f"top_p must be a number in (0, 1], or None, got {reprlib.repr(top_p)}")
    if not (_number(penalty) and 0 < penalty < math.inf):
        raise ConfigError(f"repetition_penalty must be a positive number, 1 for none, got {reprlib.repr(penalty)}")
    if whole("num_return_sequences", how.num_return_sequences, least=1) > 1 and not how.draws:
        raise ConfigError(
            f"num_return_sequences={how.num_return_sequences} would be copies, as the likeliest token is always taken: "
            "set do_sample=true and a temperature above 0, or num_return_sequences=1"
        )
    pad = () if how.pad_token_id is None else (("pad_token_id", how.pad_token_id),)
    for name, number in (*(("eos_token_id", number) for number in how.eos_ids), *pad):
        if whole(name, number) >= model.n_vocab:
            raise ConfigError(f"{name} must be below the size of the vocabulary, {model.n_vocab}, got {number}")
    if not all(isinstance(text, str) and text for text in how.stop_texts):
        raise ConfigError(f"stop_strings must be texts that are not empty, got {reprlib.repr(how.stop_strings)}")
    if how.stop_texts and not hasattr(model, "tokenizer"):
        raise ConfigError("stop_strings need a model with a tokenizer: set model.tokenizer, or use eos_token_id")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
