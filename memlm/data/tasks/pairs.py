"""Graded recall: few or many key-value pairs, told at the beginning of a document, asked for in later segments.

A document of N tokens begins with as many segments as ``n_pair`` pairs ``key value`` need, one or more. The pairs
stand there at places drawn at random. Each key is asked once in any of the segments behind, at a place drawn at random,
with its value behind it. Places are two tokens wide. All other tokens are one and the same blank, the first symbol, so
that the number of pairs is all there is to hold. Keys and values are drawn as in `memlm.data.tasks.mqar`, and only
answers count in the loss.

Every segment begins a new context, so each answer needs memory.

Shapes: P pairs, N tokens of a document, T tokens per segment.
"""

from __future__ import annotations

import numpy as np

from memlm.config import ConfigError
from memlm.data.tasks.base import Planted
from memlm.data.tasks.mqar import MQAR, Recall
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus


class Pairs(MQAR):
    """The task of graded recall; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Text of `memlm.data.corpora.symbols.Symbols`.

    Attributes:
        blank: Token id of what stands where no pair and no question does.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        super().__init__(tokenizer, train, power_a=1.0)
        self.blank = int(self.symbols[0])

    def document(  # type: ignore[override]
        self,
        rng: np.random.Generator,
        passage: np.ndarray,
        segment_len: int,
        n_pair: int | list[int] = 4,
        again: float = 0.0,
    ) -> Planted:
        """A training document.

        Args:
            rng: Source of randomness.
            passage: Only its length counts, (N + 1,).
            segment_len: Tokens per segment, even.
            n_pair: Pairs told, and questions asked; of a list each document takes one number by chance.
            again: Share of the blanks where a pair comes once more, any of them; it counts as an answer where its key
                stands before it. So more is learned from a document of few pairs, and what attention learns within a
                segment helps to find pairs beyond it.
        """
        number = n_pair if isinstance(n_pair, int) else int(rng.choice(n_pair))
        planted = super().document(rng, passage, segment_len, number)
        if not again:
            return planted
        tokens, answer = planted.tokens.copy(), planted.answer.copy()
        first, second = tokens[:-1:2], tokens[1::2]  # of each place
        blank = (first == self.blank) & (rng.random(len(first)) < again)
        told = np.flatnonzero(first != self.blank)
        chosen = rng.choice(told, size=blank.sum())
        first[blank], second[blank] = first[chosen], second[chosen]
        seen = np.unique(first, return_index=True)[1]  # where each key stands for the first time
        answer[::2] = first != self.blank
        answer[2 * seen] = False
        return planted._replace(tokens=tokens, answer=answer, weight=answer.astype(np.float32))

    def draw(self, rng: np.random.Generator, n_token: int, segment_len: int, n_pair: int) -> Recall:
        """A document of ``n_token`` tokens.

        Raises:
            ConfigError: If no segments are left for the questions, a pair would be cut by a segment, or symbols are too
                few.
        """
        key, value = self.choose(rng, n_pair, segment_len)
        n_told = -(-2 * n_pair // segment_len) * segment_len  # tokens before the first question may stand
        if n_told + 2 * n_pair > n_token:
            raise ConfigError(
                f"{n_pair} pairs are told in {n_told} tokens of segments of {segment_len}, and asked for in further "
                f"{2 * n_pair}, but a document has {n_token}: change n_pair, or the segments of a document"
            )
        told = 2 * np.sort(rng.choice(n_told // 2, size=n_pair, replace=False))
        place = n_told + 2 * rng.choice((n_token - n_told) // 2, size=n_pair, replace=False)
        tokens = np.full(n_token, self.blank)
        for at in (told, place):
            tokens[at], tokens[at + 1] = key, value
        return Recall(tokens, key, value, told, place)
