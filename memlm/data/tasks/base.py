"""What training documents hold beside text: questions that only memory can answer.

A curriculum names one task, and each of its phases the task's settings at that time. Everything random comes from the
generator that is handed in, so that a document is a function of seed, phase, row and number.

Shapes: N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from memlm.config import ConfigError


class Planted(NamedTuple):
    """A document of a task.

    Attributes:
        tokens: Token ids, (N + 1,): the document and the token after it.
        answer: Targets that answer a question, (N,), bool.
        breaks: Segments that begin a new context, (N / segment_len,), bool.
        weight: Weight of each target in the loss, (N,); None for 1 everywhere.
        targets: What is to be predicted at each token, (N,); None for the token after it.
        told: Targets that are worth to be remembered, (N,), bool, as answers are where they are told. None if the task
            does not say.
    """

    tokens: np.ndarray
    answer: np.ndarray
    breaks: np.ndarray
    weight: np.ndarray | None = None
    targets: np.ndarray | None = None
    told: np.ndarray | None = None


@runtime_checkable
class Task(Protocol):
    """Makes training documents. Constructors get ``tokenizer`` and ``train`` (the training text), then settings.

    A task with text of its own may have a class method ``own_text(settings)``: what a tokenizer learns from beside the
    training text, a list of strings. The words of a task that a text hardly has are so whole tokens.
    """

    def document(self, rng: np.random.Generator, passage: np.ndarray, segment_len: int, *settings: Any) -> Planted:
        """A training document.

        Args:
            rng: Source of randomness.
            passage: Text to mix into the document, (N + 1,); what does not fit any more is dropped.
            segment_len: Tokens per segment; divides N.
            *settings: Those of a phase of the curriculum, by the names of the parameters.
        """


class Item(Protocol):
    """A statement, or a question with its answer."""

    @property
    def cue(self) -> tuple[int, ...]:
        """Token ids up to the answer."""

    @property
    def answer(self) -> tuple[int, ...]:
        """Token ids of the answer to the question."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids."""


class Teller(Protocol):
    """What a document says and asks; it learns where each statement ended.

    Attributes:
        item_len: Tokens of a usual statement.
    """

    item_len: int

    def statement(self) -> Any | None:
        """The statement that would come next, an `Item`; None if there is none left."""

    def tell(self, statement: Any, segment: int) -> None:
        """``statement`` was told; it ended in this segment."""

    def questions(self, segment: int) -> Sequence[Any]:
        """Questions (each an `Item`) that memory can answer in this segment: what they ask for was told earlier."""

    def asked(self, question: Any) -> None:
        """``question`` was asked. Unless a teller minds, it may be asked again."""
        return


def contexts(rng: np.random.Generator, n_segment: int, new_context: float = 0.5) -> np.ndarray:
    """Segments that begin a new context, (n_segment,), bool: a share ``new_context`` of them, never the first."""
    breaks = rng.random(n_segment) < new_context
    breaks[0] = False
    return breaks


def mix(
    rng: np.random.Generator,
    teller: Teller,
    passage: np.ndarray,
    segment_len: int,
    items: float,
    breaks: np.ndarray,
) -> Planted:
    """Mix statements and questions into a passage.

    About half of the items are statements, the others questions about what was told in earlier segments. A new context
    begins with a question, at its very beginning or within its first few tokens.

    Args:
        rng: Source of randomness.
        teller: What is told and asked.
        passage: Text to mix them into, (N + 1,); what does not fit any more is dropped.
        segment_len: Tokens per segment.
        items: Statements and questions per segment, on average.
        breaks: Segments that begin a new context, (N / segment_len,), bool; see `contexts`.

    Raises:
        ConfigError: If there are to be no items.
    """
    if not items > 0:
        raise ConfigError(f"items per segment must be above 0, got {items}; a phase without them has task: null")
    n_token = len(passage)
    gap = max(segment_len / items - teller.item_len, 0.0)
    tokens = np.empty(n_token, dtype=np.int64)
    answer, told = np.zeros(n_token, dtype=bool), np.zeros(n_token, dtype=bool)
    place = taken = 0
    for end in [*(np.flatnonzero(breaks) * segment_len).tolist(), n_token]:  # one context after the other
        first = place > 0
        while place < end:
            space = int(rng.integers(4)) * int(rng.random() < 0.5) if first else int(rng.integers(2 * round(gap) + 1))
            questions = teller.questions((place + space) // segment_len)
            ask = bool(questions) and (first or rng.random() < 0.5)
            item = questions[int(rng.integers(len(questions)))] if ask else teller.statement()
            n_item = teller.item_len if item is None else len(item.tokens)
            fits = place + space + n_item <= end
            if item is None or not fits:
                space = min(max(space, n_item), end - place)
            tokens[place : place + space] = passage[taken : taken + space]
            place, taken, first = place + space, taken + space, False
            if item is not None and fits:
                tokens[place : place + n_item] = item.tokens
                told[place + len(item.cue) : place + n_item] = True
                if ask:
                    answer[place + len(item.cue) : place + n_item] = True
                    teller.asked(item)
                else:
                    teller.tell(item, (place + n_item - 1) // segment_len)
                place += n_item
    return Planted(tokens, answer[1:], breaks, told=told[1:])
