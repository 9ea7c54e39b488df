"""Documents in which facts are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memlm.data.tasks.makers import Fact

_CROSSING = 16  # one fact in so many is placed across a segment boundary on purpose; others get there by chance


_PASSAGE = 256  # tokens of the passages in which a text is repeated


class Haystack:
    """Endless held-out text: once round from some place, then round after round in passages of another order.

    Args:
        text: Token ids of a split.
        seed: Of the place and of the orders.
    """

    def __init__(self, text: np.ndarray, seed: Sequence[int]) -> None:
        self.text, self.seed = text, list(seed)
        self.begin = int(np.random.default_rng([*self.seed, 0]).integers(len(text)))
        self._round: tuple[int, np.ndarray] | None = None

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part, (end - begin,)."""
        n = len(self.text)
        parts = [self._turn(i)[max(begin - i * n, 0) : end - i * n] for i in range(begin // n, -(-end // n))]
        return np.concatenate([self.text[:0], *parts])

    def _turn(self, number: int) -> np.ndarray:
        """The whole text as it is read the ``number``-th time."""
        if self._round is None or self._round[0] != number:
            text = np.roll(self.text, -self.begin)
            if number:
                passages = [text[i : i + _PASSAGE] for i in range(0, len(text), _PASSAGE)]
                order = np.random.default_rng([*self.seed, number]).permutation(len(passages))
                text = np.concatenate([passages[i] for i in order])
            self._round = (number, text)
        return self._round[1]


class Document(NamedTuple):
    """Text with facts; it goes on without end.

    Attributes:
        facts: What is told and will be asked for.
        begins: Place of the first token of each of them.
        head: Token ids up to the end of the last fact.
        haystack: The text around facts.
        taken: Tokens of it within the head.
        others: What is told too, but not asked for.
    """

    facts: list[Fact]
    begins: list[int]
    head: np.ndarray
    haystack: Haystack
    taken: int
    others: Sequence[Fact] = ()

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part of the document, (end - begin,)."""
        head = self.head[begin:end]
        rest = max(begin, len(self.head)) - len(self.head) + self.taken
        return np.concatenate([head, self.haystack.tokens(rest, rest + end - begin - len(head))])

    def end(self, fact: int) -> int:
        """Place of the token after a fact."""
        return self.begins[fact] + len(self.facts[fact].tokens)

    def straddles(self, fact: int, segment_len: int) -> bool:
        """Whether a fact begins in one segment and ends in another."""
        return self.begins[fact] // segment_len != (self.end(fact) - 1) // segment_len


def tell(
    rng: np.random.Generator,
    facts: Sequence[Fact],
    others: Sequence[Fact],
    haystack: Haystack,
    segment_len: int,
    gap: float,
    crossing: bool = True,
    mixed: bool = True,
    lead: int = 0,
) -> Document:
    """A document that tells facts after random gaps.

    Args:
        rng: Source of randomness.
        facts: What will be asked for.
        others: What is told too, but not asked for.
        haystack: Text around them.
        segment_len: Tokens per segment.
        gap: Tokens of text before each fact, on average.
        crossing: Whether one asked fact in 16 is placed across a segment boundary on purpose.
        mixed: Whether the others are told among the facts, in random order, and not after them.
        lead: Tokens of text before the first gap.
    """
    n = len(facts) + len(others)
    order = rng.permutation(n) if others and mixed else np.arange(n)
    across = set(rng.choice(len(facts), size=-(-len(facts) // _CROSSING), replace=False).tolist() if crossing else ())
    parts = [haystack.tokens(0, lead)]
    begins = [0] * len(facts)
    place = taken = lead
    for number in order.tolist():
        told = (facts[number] if number < len(facts) else others[number - len(facts)]).tokens
        space = int(rng.integers(2 * max(round(gap), 0) + 1))
        if number in across and len(told) > 1:
            before = int(rng.integers(1, len(told)))  # tokens of the fact that lie before the boundary
            space += -(place + space + before) % segment_len
        parts += [haystack.tokens(taken, taken + space), np.asarray(told)]
        if number < len(facts):
            begins[number] = place + space
        place, taken = place + space + len(told), taken + space
    return Document(list(facts), begins, np.concatenate(parts), haystack, taken, others)
