"""What experiments on recall share: reading documents, and asking questions under every control.

Shapes: B rows (documents), L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from experiments.base import Row, wilson
from experiments.needle import CONDITIONS, answer

_WINDOW = 4  # segments read per call


def absorb(model: Any, texts: np.ndarray, progress: Callable[[int], None]) -> Any:
    """The memory of documents, with no local context.

    Args:
        model: A language model.
        texts: Token ids of the documents, (B, L).
        progress: Called with the number of tokens read so far, of all documents.
    """
    device = next(model.parameters(), torch.empty(0)).device
    state = None
    for place in range(0, texts.shape[1], _WINDOW * model.segment_len):
        ids = texts[:, place : place + _WINDOW * model.segment_len]
        state = model.absorb(torch.from_numpy(ids).long().to(device), state)
        progress(len(ids) * (place + ids.shape[1]))
    return model.new_context(state)


def ask(
    model: Any, state: Any, numbers: Sequence[int], told: Sequence[Sequence[Any]], never: Sequence[Sequence[Any]]
) -> list[Row]:
    """Ask every question of every document, and all its controls; nothing is written.

    Args:
        model: A language model.
        state: Memories of the documents ``numbers``, with no local context.
        numbers: Number of the document that each row of ``state`` has read.
        told: Questions of all documents, equally many of each, with ``cue``, ``answer`` and ``tokens``.
        never: As many of each, about what none was told.

    Returns:
        One row per condition, document and question, with ``correct`` and the answer's ``nll`` in nats per token. In a
        ``swapped`` row ``document`` is the one that the question is about, while the memory is that of the next.
    """
    wiped, rows = model.wipe(state), []
    before = [(number - 1) % len(told) for number in numbers]  # so that no other memory need be at hand
    asked = dict.fromkeys(CONDITIONS, (state, list(numbers), told))
    asked |= {"wiped": (wiped, list(numbers), told), "swapped": (state, before, told)}
    asked |= {"unseen": (state, list(numbers), never)}
    for condition in CONDITIONS:
        memory, documents, questions = asked[condition]
        for i in range(len(questions[0])):  # one question per row at a time, so that no bank has to be copied
            answers = answer(model, memory, [questions[d][i] for d in documents], condition != "off")
            rows += [
                {"condition": condition, "document": d, "question": i, "correct": correct, "nll": nll}
                for d, (correct, nll) in zip(documents, answers, strict=True)
            ]
    return rows


def is_shared(model: Any) -> bool:
    """Whether documents would write to one bank, so that they must be read one at a time."""
    return any(modules[0].scope == "shared" for modules in model.memory.values())


def rates(rows: Sequence[Row], suffix: str = "") -> dict[str, float]:
    """``exact_match/<condition>`` with ``low`` and ``high`` (95 % Wilson interval), ``n``, and ``nll``."""
    metrics: dict[str, float] = {}
    for condition in CONDITIONS:
        part = [row for row in rows if row["condition"] == condition]
        if part:
            k, n = sum(row["correct"] for row in part), len(part)
            low, high = wilson(k, n)
            numbers = {"exact_match": k / n, "low": low, "high": high, "n": n}
            numbers["nll"] = math.fsum(row["nll"] for row in part) / n
            metrics |= {f"{name}/{condition}{suffix}": value for name, value in numbers.items()}
    return metrics


def headline(label: str, condition: str, suffix: str = "", control: bool = False) -> dict[str, Any]:
    """A line of the terminal's table and of comparisons: a rate of `rates` with its interval."""
    keys = {key: f"{key}/{condition}{suffix}" for key in ("low", "high", "n")}
    metric = f"exact_match/{condition}{suffix}"
    return {"label": label, "metric": metric, **keys, "percent": True, "better": "higher", "control": control}


def chance_line(label: str) -> dict[str, Any]:
    """The same for ``chance``, which is known and has no interval."""
    nothing = {"low": None, "high": None, "n": None}
    return {"label": label, "metric": "chance", **nothing, "percent": True, "better": "higher", "control": True}
