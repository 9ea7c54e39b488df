"""Documents read side by side, each with a memory of its own, and with that of another.

Where all rows share one bank, documents are read one by one, each with its own copy; else all in one batch.

Shapes: B documents, L tokens of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memlm.analysis.usage import banks
from memlm.evaluation.recall.reading import is_shared
from memlm.models.base import LanguageModel


def start(model: LanguageModel, n_document: int) -> list[Any]:
    """States before any text: one for all documents, or one for each where a bank is shared."""
    if is_shared(model):
        return [model.init_state(1) for _ in range(n_document)]
    return [model.init_state(n_document)]


def go_on(model: LanguageModel, ids: Tensor, states: list[Any], **options: Any) -> list[Any]:
    """The model's outputs, one for each state, for more text (B, L) of all documents; without logits.

    Of the ``options``, tensors hold one row per document.
    """
    device = model.head_weight.device
    n = len(states)
    parts = {key: value.to(device).chunk(n) if isinstance(value, Tensor) else [value] * n
             for key, value in options.items()}  # fmt: skip
    return [
        model(part, state=state, logits=False, **{key: values[i] for key, values in parts.items()})
        for i, (part, state) in enumerate(zip(ids.to(device).chunk(n), states, strict=True))
    ]


def hidden(outputs: list[Any]) -> Tensor:
    """Last hidden states of all documents, (B, L, D)."""
    return torch.cat([out.hidden for out in outputs])


def of_banks(model: LanguageModel, states: list[Any], function: Callable[[Any, Any], Tensor]) -> dict[str, Tensor]:
    """By bank (see `memlm.analysis.usage.banks`), ``function`` of its module and its state, (B, ...)."""
    return joined([{label: function(*pair) for label, pair in banks(model, state).items()} for state in states])


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows that belong to several states, one after the other."""
    return {label: torch.cat([part[label] for part in parts]) for label in parts[0]}


def swap(model: LanguageModel, states: list[Any], others: list[Any], n_document: int) -> list[Any]:
    """The states, each document with the memory that the next one has in ``others``; the first is next to the last."""
    if len(others) > 1:
        turned = others[1:] + others[:1]
    else:
        turned = [model.select_rows(others[0], torch.arange(n_document).roll(-1))]
    return [model.with_memory(state, other) for state, other in zip(states, turned, strict=True)]
