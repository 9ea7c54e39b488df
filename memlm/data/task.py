"""What training documents hold beside text: questions that only memory can answer.

A curriculum names one task, and each of its phases the task's settings at that time. Everything random comes from the
generator that is handed in, so that a document is a function of seed, phase, row and number.

Shapes: N tokens of a document.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np


class Planted(NamedTuple):
    """A document of a task.

    Attributes:
        tokens: Token ids, (N + 1,): the document and the token after it.
        answer: Targets that answer a question, (N,), bool.
        breaks: Segments that begin a new context, (N / segment_len,), bool.
        weight: Weight of each target in the loss, (N,); None for 1 everywhere.
    """

    tokens: np.ndarray
    answer: np.ndarray
    breaks: np.ndarray
    weight: np.ndarray | None = None


class Task(Protocol):
    """Makes training documents. Constructors get ``tokenizer`` and ``train`` (the training text), then settings."""

    def document(self, rng: np.random.Generator, passage: np.ndarray, segment_len: int, *settings: Any) -> Planted:
        """A training document.

        Args:
            rng: Source of randomness.
            passage: Text to mix into the document, (N + 1,); what does not fit any more is dropped.
            segment_len: Tokens per segment; divides N.
            *settings: Those of a phase of the curriculum, by the names of the parameters.
        """
