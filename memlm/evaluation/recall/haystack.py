"""Documents in which facts are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memlm.data.haystack import Haystack, Told, weave
from memlm.data.tasks.makers import Fact

_CROSSING = 16  # one fact in so many is placed across a segment boundary on purpose; others get there by chance


class Document(NamedTuple):
    """Text with facts.

    Attributes:
        facts: What is told and will be asked for.
        begins: Place of the first token of each of them.
        told: All that is told, in order.
        haystack: The text around it.
        others: What is told too, but not asked for.
        n_token: Where it ends; None: it goes on without end.
    """

    facts: list[Fact]
    begins: list[int]
    told: list[Told]
    haystack: Haystack
    others: Sequence[Fact] = ()
    n_token: int | None = None

    @property
    def n_head(self) -> int:
        """Tokens up to the end of the last of what is told."""
        return self.told[-1].end

    @property
    def head(self) -> np.ndarray:
        """Token ids of these, (n_head,)."""
        return self.tokens(0, self.n_head)

    @property
    def taken(self) -> int:
        """Tokens of the text within the head."""
        return self.told[-1].taken

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part of the document, (end - begin,)."""
        return weave(self.haystack, self.told, begin, end)

    def end(self, fact: int) -> int:
        """Place of the token after a fact."""
        return self.begins[fact] + len(self.facts[fact].tokens)

    def straddles(self, fact: int, segment_len: int) -> bool:
        """Whether a fact begins in one segment and ends in another."""
        return self.begins[fact] // segment_len != (self.end(fact) - 1) // segment_len


class Stories(Document):
    """A document whose ``facts`` are questions; ``begins`` are the places of the statements that answer.

    A question says in ``said`` how many tokens of that statement it takes up to the end of the answer.
    """

    def end(self, fact: int) -> int:
        """Place of the token after the answer, as it was told."""
        return self.begins[fact] + self.facts[fact].said  # type: ignore[attr-defined]

    def straddles(self, fact: int, segment_len: int) -> bool:
        """Whether the statement that says the answer begins in one segment and goes on in another."""
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
    begins = [0] * len(facts)
    placed: list[Told] = []
    place = taken = lead
    for number in order.tolist():
        told = (facts[number] if number < len(facts) else others[number - len(facts)]).tokens
        space = int(rng.integers(2 * max(round(gap), 0) + 1))
        if number in across and len(told) > 1:
            before = int(rng.integers(1, len(told)))  # tokens of the fact that lie before the boundary
            space += -(place + space + before) % segment_len
        place, taken = place + space, taken + space
        placed.append(Told(place, taken, np.asarray(told, dtype=np.int64)))
        if number < len(facts):
            begins[number] = place
        place += len(told)
    return Document(list(facts), begins, placed, haystack, others)
