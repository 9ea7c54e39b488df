"""Facts that change: told with a value, told again with others, and asked for the latest."""

from __future__ import annotations

from typing import Literal

import numpy as np

from memlm.data.tasks.base import Planted, Teller, contexts, mix
from memlm.data.tasks.makers import Fact, FactMaker
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus


class Overwrite:
    """The task of knowing the latest value of facts that are told again; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text.

    Attributes:
        maker: Where facts come from.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        self.maker = FactMaker(tokenizer, train)

    def document(
        self,
        rng: np.random.Generator,
        passage: np.ndarray,
        segment_len: int,
        items: float = 2.0,
        hard: float = 0.0,
        update: float = 0.5,
    ) -> Planted:
        """A document with facts, updates and questions.

        Args:
            rng: Source of randomness.
            passage: Text around them.
            segment_len: Tokens per segment.
            items: Facts, updates and questions per segment, on average.
            hard: Share of documents whose names are drawn from few words, so that they look alike.
            update: Share of tellings that give a new value to a fact that was told before.
        """
        n_segment = (len(passage) - 1) // segment_len
        breaks = contexts(rng, n_segment)
        n_fact = max(int(np.ceil(n_segment * items)), 1)
        facts = self.maker.draw(rng, n_fact, "train", n_word=8 if rng.random() < hard else None)
        return mix(rng, _Latest(rng, self.maker, facts, update), passage, segment_len, items, breaks)


def retell(rng: np.random.Generator, maker: FactMaker, fact: Fact, split: Literal["train", "evaluation"]) -> Fact:
    """``fact`` with a new value, which belongs to ``split``."""
    while True:
        other = maker.draw(rng, 1, split)[0]
        if other.value != fact.value:
            return fact._replace(value=other.value, answer=other.answer)


class _Latest(Teller):
    """Tells facts and updates of them, and asks for the latest values; see `memlm.data.tasks.base.Teller`."""

    def __init__(self, rng: np.random.Generator, maker: FactMaker, facts: list[Fact], update: float) -> None:
        self.rng, self.maker, self.facts, self.update = rng, maker, facts, update
        self.item_len = len(facts[0].tokens)
        self._latest: dict[tuple[str, ...], tuple[int, Fact]] = {}  # by name: segment where it ended, and the fact

    def statement(self) -> Fact | None:
        """A fact of the next name, or a new value of one that was told."""
        told = [fact for _, fact in self._latest.values()]
        if told and self.rng.random() < self.update:
            return retell(self.rng, self.maker, told[int(self.rng.integers(len(told)))], "train")
        return self.facts[len(told)] if len(told) < len(self.facts) else None

    def tell(self, statement: Fact, segment: int) -> None:
        """From now on this is the value of the name."""
        self._latest[statement.name] = (segment, statement)

    def questions(self, segment: int) -> list[Fact]:
        """Facts as they are, if told last before the segment."""
        return [fact for told, fact in self._latest.values() if told < segment]
