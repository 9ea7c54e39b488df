"""What is checked of the arguments of a model before it runs."""

from __future__ import annotations

import math
import reprlib
from typing import Any

import torch
from torch import Tensor

from memlm.config import ConfigError, whole

_COLDEST = 1e-6  # temperature; below, logits would overflow


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


def sampling(max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any) -> None:
    """Refuse settings of generation that are out of range.

    Raises:
        ConfigError: With the name of the setting.
    """
    whole("max_new_tokens", max_new_tokens)
    if not (_number(temperature) and (temperature == 0 or _COLDEST <= temperature < math.inf)):
        raise ConfigError(
            f"temperature must be 0 (the likeliest token) or a number of at least {_COLDEST}, got "
            f"{reprlib.repr(temperature)}"
        )
    if top_k is not None:
        whole("top_k, unless it is None,", top_k, least=1)
    if top_p is not None and not (_number(top_p) and 0 < top_p <= 1):
        raise ConfigError(f"top_p must be a number in (0, 1], or None, got {reprlib.repr(top_p)}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
