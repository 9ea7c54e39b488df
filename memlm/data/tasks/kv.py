"""Key-value pairs written in characters, told in one context and asked for in another (RMT, GradMem).

Source: the task by which GradMem (2603.13875) and RMT were compared: keys and values of two letters or digits, drawn
anew in every document. A document tells N pairs as ``!kk:vv!`` and ends them with ``|``, 7 N + 1 characters. Then a new
context begins, in which a question of 5 characters, ``?!kk:``, is followed by its answer of 4, ``vv!|``. Only answers
count in the loss. The marks of question and answer are ours: known to us were their lengths.

Pairs fill whole segments, the last of which is filled up with blanks; each segment of them begins a new context too.
A longer document goes on with questions for other keys, each in a segment and a context of its own.

Shapes: P pairs, N tokens of a document, T tokens per segment.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.corpora.symbols import symbols_of
from memlm.data.tasks.base import Planted
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus

LETTERS = 62
"""Letters and digits, the first symbols; behind them ``!``, ``:``, ``|``, ``?`` and the blank."""

QUESTION, ANSWER = 5, 4
"""Tokens of a question, and of an answer."""


class Pairs(NamedTuple):
    """What a document tells.

    Attributes:
        context: Token ids of the pairs, whole segments, (M,).
        key: Numbers of the letters of each key, (P, 2).
        value: Those of its value, (P, 2).
    """

    context: np.ndarray
    key: np.ndarray
    value: np.ndarray


class KeyValues:
    """The task; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Text of `memlm.data.corpora.symbols.Symbols`, of 67 symbols.

    Attributes:
        symbols: Token ids of the symbols.

    Raises:
        ConfigError: If the text has other symbols.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        self.symbols = symbols_of(tokenizer, train)
        if len(self.symbols) != LETTERS + 5:
            raise ConfigError(
                f"pairs of characters are written in {LETTERS + 5} symbols, but the text has {len(self.symbols)}: set "
                f"data.corpus.n_symbol={LETTERS + 5}"
            )
        self.mark, self.colon, self.end, self.ask, self.blank = map(int, self.symbols[LETTERS:])

    def document(
        self, rng: np.random.Generator, passage: np.ndarray, segment_len: int, n_pair: int | list[int] = 4
    ) -> Planted:
        """A training document.

        Args:
            rng: Source of randomness.
            passage: Only its length counts, (N + 1,).
            segment_len: Tokens per segment.
            n_pair: Pairs told; of a list each document takes one number by chance. The segments left behind the pairs
                ask for a pair each, all different.

        Raises:
            ConfigError: If no segment is left for a question, or more are than there are pairs.
        """
        n_segment = (len(passage) - 1) // segment_len
        number = n_pair if isinstance(n_pair, int) else int(rng.choice(n_pair))
        pairs = self.draw(rng, number, segment_len)
        n_told = len(pairs.context) // segment_len
        n_question = n_segment - n_told
        if not 1 <= n_question <= number:
            raise ConfigError(
                f"{number} pairs are told in {n_told} segments of {segment_len} tokens, and asked for one by one in "
                f"further segments, 1 to {number} of them; a document has {n_segment} segments: change n_segment of "
                "the curriculum, or model.segment_len"
            )
        tokens = np.full(len(passage), self.blank)
        tokens[: len(pairs.context)] = pairs.context
        answer = np.zeros(len(passage) - 1, dtype=bool)
        for i, pair in enumerate(rng.permutation(number)[:n_question]):
            start = (n_told + i) * segment_len
            text = np.concatenate([self.question(pairs.key[pair]), self.answer(pairs.value[pair])])
            tokens[start : start + len(text)] = text
            answer[start + QUESTION - 1 : start + QUESTION + ANSWER - 1] = True
        breaks = np.arange(n_segment) > 0
        return Planted(tokens, answer, breaks, answer.astype(np.float32))

    def draw(self, rng: np.random.Generator, n_pair: int, segment_len: int) -> Pairs:
        """What a document tells.

        Raises:
            ConfigError: If there is no pair, keys are too few, or a question does not fit into a segment.
        """
        if not 1 <= n_pair <= LETTERS**2:
            raise ConfigError(f"pairs told must be in 1..{LETTERS**2:,}, the keys that there are, got n_pair={n_pair}")
        if segment_len < QUESTION + ANSWER:
            raise ConfigError(
                f"a question and its answer need {QUESTION + ANSWER} tokens, but model.segment_len is {segment_len}"
            )
        key = np.stack(divmod(rng.choice(LETTERS**2, size=n_pair, replace=False), LETTERS), axis=1)
        value = rng.integers(LETTERS, size=(n_pair, 2))
        one = np.full((n_pair, 7), self.mark)
        one[:, 1:3], one[:, 3], one[:, 4:6] = self.symbols[key], self.colon, self.symbols[value]
        told = np.append(one, self.end)
        context = np.full(-(-len(told) // segment_len) * segment_len, self.blank)
        context[: len(told)] = told
        return Pairs(context, key, value)

    def question(self, key: np.ndarray) -> np.ndarray:
        """Token ids of the question for a key (2,), (5,)."""
        return np.array([self.ask, self.mark, *self.symbols[key], self.colon])

    def answer(self, value: np.ndarray) -> np.ndarray:
        """Token ids of an answer (2,), (4,)."""
        return np.array([*self.symbols[value], self.mark, self.end])
