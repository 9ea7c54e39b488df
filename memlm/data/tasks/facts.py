"""Planted facts: random names with random values, told once and asked later.

A fact reads ``name1 name2 is value1 value2 value3``, its cue is the name, its answer the rest; or it is an English
sentence, whose cue is all before the value, and which can be asked for in other words. Names and values are ordinary
words in combinations that the text nowhere contains. A hash of the words decides for every name and value whether it
belongs to training or to evaluation, so that none is ever used for both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from memlm.config import ConfigError
from memlm.data.tasks.base import Planted, Teller, contexts, mix
from memlm.data.tasks.makers import KINDS, Fact, FactMaker, Maker, check_kind
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus


class Facts:
    """The task of telling facts once and asking for them later, mixed into text; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text.

    Attributes:
        maker: Where ``random`` facts come from.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        self._tokenizer, self._train = tokenizer, train
        self.maker = FactMaker(tokenizer, train)
        self._makers: dict[str, Maker] = {"random": self.maker}

    def maker_of(self, kind: str) -> Maker:
        """Where facts of a kind come from; made when they are first asked for.

        Raises:
            ConfigError: If there is no such kind, or the tokenizer or text does not suit it.
        """
        check_kind(kind)
        if kind not in self._makers:
            self._makers[kind] = KINDS[kind](self._tokenizer, self._train)
        return self._makers[kind]

    def document(
        self,
        rng: np.random.Generator,
        passage: np.ndarray,
        segment_len: int,
        items: float = 2.0,
        hard: float = 0.0,
        kinds: Mapping[str, float] | None = None,
        paraphrase: float = 0.0,
        strangers: float = 0.0,
    ) -> Planted:
        """A document with facts and questions.

        Args:
            rng: Source of randomness.
            passage: Text around them.
            segment_len: Tokens per segment.
            items: Facts and questions per segment, on average.
            hard: Share of documents whose names are drawn from few words, so that they look alike.
            kinds: By kind of facts (see `KINDS`), the share of documents that have them; None for ``random`` alone.
            paraphrase: Share of facts that are asked for in other words than they were told in, where the kind has any.
            strangers: Share of questions that ask the same as could be asked of a fact, but of a name that nobody was
                told of. Their answers are as good as any, so who gives what was told of another pays for it.

        Raises:
            ConfigError: If a kind does not exist, the shares of kinds are none, or ``strangers`` is no share below 1.
        """
        if not 0 <= strangers < 1:
            raise ConfigError(f"strangers must be a share of the questions, at least 0 and below 1, got {strangers}")
        alike = bool(rng.random() < hard)
        maker: Maker = self.maker
        if kinds is not None:
            for kind in kinds:
                check_kind(kind)
            share = np.array(list(kinds.values()), dtype=float)
            if not share.sum() > 0 or (share < 0).any():
                raise ConfigError(f"kinds must have shares that are not negative, and one above 0; got {dict(kinds)}")
            maker = self.maker_of(list(kinds)[int(rng.choice(len(share), p=share / share.sum()))])
        return plant(rng, maker, passage, segment_len, items, alike, paraphrase=paraphrase, strangers=strangers)


def plant(
    rng: np.random.Generator,
    maker: Maker,
    passage: np.ndarray,
    segment_len: int,
    items: float,
    hard: bool,
    new_context: float = 0.5,
    paraphrase: float = 0.0,
    strangers: float = 0.0,
) -> Planted:
    """Mix facts and questions into a passage.

    About half of the items are facts, told once; the others ask for a fact that was told in an earlier segment. Some
    segments begin a new context, with a question at its very beginning or within its first few tokens.

    Args:
        rng: Source of randomness.
        maker: Where facts come from.
        passage: Text to mix them into, (N + 1,); what does not fit any more is dropped.
        segment_len: Tokens per segment.
        items: Facts and questions per segment, on average.
        hard: Whether names look alike.
        new_context: Share of segments that begin a new context.
        paraphrase: Share of facts that are asked for with the cue of one of their paraphrases, if they have any.
        strangers: Share of questions about names that nobody was told of.
    """
    n_segment = (len(passage) - 1) // segment_len
    breaks = contexts(rng, n_segment, new_context)
    facts = maker.draw(rng, max(int(np.ceil(n_segment * items)), 1), "train", n_word=8 if hard else None)
    teller = _Once(rng, maker, facts, paraphrase, strangers)
    return mix(rng, teller, passage, segment_len, items, breaks)


class _Once(Teller):
    """Tells each fact once, and asks a stranger at most once; see `memlm.data.tasks.base.Teller`."""

    def __init__(
        self, rng: np.random.Generator, maker: Maker, facts: list[Fact], paraphrase: float, strangers: float
    ) -> None:
        self.rng, self.maker, self.facts = rng, maker, facts
        self.paraphrase, self.strangers = paraphrase, strangers
        self._taken = {fact.name for fact in facts}
        self.item_len = round(sum(len(fact.tokens) for fact in facts) / len(facts))
        self._told: list[tuple[int, Fact]] = []  # the segment where each ended, and how it is asked for

    def statement(self) -> Fact | None:
        """The next fact."""
        return self.facts[len(self._told)] if len(self._told) < len(self.facts) else None

    def tell(self, statement: Fact, segment: int) -> None:
        """Remember where the fact ended, and decide how it is asked for from now on."""
        self._told.append((segment, self._question(statement)))

    def questions(self, segment: int) -> list[Fact]:
        """Facts told before the segment, or in their stead one about a stranger."""
        told = [fact for told, fact in self._told if told < segment]
        if told and self.strangers and self.rng.random() < self.strangers:
            known = told[int(self.rng.integers(len(told)))]
            return [self._question(self.maker.of_another(self.rng, known, "train", self._taken, new_value=True))]
        return told

    def asked(self, question: Fact) -> None:
        """Whoever was asked about is a stranger no more: the question came with an answer."""
        self._taken.add(question.name)

    def _question(self, fact: Fact) -> Fact:
        """The fact as it is asked for."""
        if self.paraphrase and fact.paraphrases and self.rng.random() < self.paraphrase:
            return fact.asked(fact.paraphrases[int(self.rng.integers(len(fact.paraphrases)))])
        return fact
