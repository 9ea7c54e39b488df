"""Sorting: read a long sequence of symbols, then name them by how often they occurred, most frequent first.

Source: P. H. Martins, Z. Marinho and A. Martins, "∞-former: Infinite memory transformer" (ACL 2022); taken up by
S. Park and J. Bak, "Memoria" (ICML 2024). There, as here, 20 symbols are drawn from a mixture of two distributions
whose weight goes from 0 to 1 in the course of the sequence, so that its end says little about the whole. How the two
distributions are drawn is not told there; here each is uniform among all distributions (Dirichlet, all parameters 1).

The last symbol of the vocabulary asks for the order; all others are sorted. A symbol that never occurred is named as
well, after the others; of symbols that occurred equally often the one with the smaller number comes first. The sequence
fills all segments of a document but the last. The last one begins a new context, so that counts reach it through memory
alone; it holds the question, the answer, and then the question again until it is full. Only the answer counts in the
loss.

Shapes: K symbols to sort, N tokens of a document, T tokens per segment.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.corpora.symbols import symbols_of
from memlm.data.tasks.base import Planted
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus


class Sequence(NamedTuple):
    """A sequence and its order.

    Attributes:
        tokens: Token ids, (n_token,).
        order: Token ids of all symbols, most frequent first, (K,).
        counts: How often each of ``order`` occurred, (K,).
    """

    tokens: np.ndarray
    order: np.ndarray
    counts: np.ndarray


class Sorting:
    """The task of sorting symbols by frequency; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Text of `memlm.data.corpora.symbols.Symbols`.

    Attributes:
        symbols: Token ids to sort, (K,), by number.
        question: Token id that asks for the order.

    Raises:
        ConfigError: If the text is no list of symbols, or has fewer than 3.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        symbols = symbols_of(tokenizer, train)
        if len(symbols) < 3:
            raise ConfigError(f"sorting needs data.corpus.n_symbol of at least 3, got {len(symbols)}")
        self.symbols, self.question = symbols[:-1], int(symbols[-1])

    def document(self, rng: np.random.Generator, passage: np.ndarray, segment_len: int) -> Planted:
        """A training document.

        Args:
            rng: Source of randomness.
            passage: Only its length counts, (N + 1,).
            segment_len: Tokens per segment, more than there are symbols to sort.
        """
        n_token, n_symbol = len(passage) - 1, len(self.symbols)
        if n_token < 2 * segment_len or segment_len <= n_symbol:
            raise ConfigError(
                f"sorting needs segments of more than {n_symbol} tokens and at least 2 in a document, got "
                f"{n_token // segment_len} of {segment_len}: change model.segment_len, or n_segment of the phase"
            )
        begin = n_token - segment_len
        drawn = self.draw(rng, begin)
        tokens = np.full(n_token + 1, self.question)
        tokens[:begin] = drawn.tokens
        tokens[begin + 1 : begin + 1 + n_symbol] = drawn.order
        answer = np.zeros(n_token, dtype=bool)
        answer[begin : begin + n_symbol] = True
        breaks = np.arange(n_token // segment_len) == n_token // segment_len - 1
        return Planted(tokens, answer, breaks, answer.astype(np.float32))

    def draw(self, rng: np.random.Generator, n_token: int) -> Sequence:
        """A sequence of ``n_token`` symbols."""
        first, last = rng.dirichlet(np.ones(len(self.symbols)), size=2)
        part = np.arange(n_token) / max(n_token - 1, 1)
        late = rng.random(n_token) < part
        early = rng.choice(len(self.symbols), size=n_token, p=first)
        drawn = np.where(late, rng.choice(len(self.symbols), size=n_token, p=last), early)
        tokens = self.symbols[drawn]
        return Sequence(tokens, *self.sort(tokens))

    def sort(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The symbols by how often they occur in ``tokens``, and how often that is; (K,) each."""
        count = (tokens[:, None] == self.symbols).sum(axis=0)
        order = np.argsort(-count, kind="stable")
        return self.symbols[order], count[order]
