"""Multi-query associative recall: key-value pairs, told once, and a question for each key later.

Source: S. Arora, S. Eyuboglu et al., "Zoology: Measuring and improving recall in efficient language models" (2023);
`multiquery_ar` of the project zoology.

A document of N tokens begins with ``n_pair`` pairs ``key value``. The rest is a row of places two tokens wide; each key
is asked at one of them. The place of a question, counted from the end of the pairs, is drawn from a power law, without
replacement: place i has weight (i + 1) ** (power_a - 1). All other tokens are random symbols. Keys are from the first
half of the vocabulary (its first symbol is left out), values from the second; within a document all keys differ, and
all values. Only answers count in the loss.

One thing differs from zoology. There the token after a question is random like all others, and the answer is a label
beside the text; here it is the next token, as for any text, so the value stands after the question.

Every segment begins a new context, so a pair of an earlier segment can be recalled from memory alone.

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


class Recall(NamedTuple):
    """A document.

    Attributes:
        tokens: Token ids, (N,).
        key: Token id of the key of each pair, in the order of telling, (P,).
        value: Token id of its value, (P,).
        told: Place where its key was told, (P,).
        place: Place of the question for it, (P,); its answer stands at place + 1.
    """

    tokens: np.ndarray
    key: np.ndarray
    value: np.ndarray
    told: np.ndarray
    place: np.ndarray


class MQAR:
    """The task of multi-query associative recall; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Text of `memlm.data.corpora.symbols.Symbols`.
        power_a: Exponent of the power law of gaps; 1 for places that are all as likely.

    Attributes:
        keys: Token ids that may be keys.
        values: Token ids that may be values.

    Raises:
        ConfigError: If the text is no list of symbols, or the power law has no meaning.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus, power_a: float = 0.01) -> None:
        if not power_a > 0:
            raise ConfigError(f"curriculum.task.power_a must be positive, got {power_a}")
        self.symbols = symbols_of(tokenizer, train)
        half = len(self.symbols) // 2
        self.keys, self.values = self.symbols[1:half], self.symbols[half:]
        self.power_a = power_a

    def document(self, rng: np.random.Generator, passage: np.ndarray, segment_len: int, n_pair: int = 64) -> Planted:
        """A training document.

        Args:
            rng: Source of randomness.
            passage: Only its length counts, (N + 1,).
            segment_len: Tokens per segment, even.
            n_pair: Pairs told, and questions asked.
        """
        n_token = len(passage) - 1
        drawn = self.draw(rng, n_token, segment_len, n_pair)
        answer = np.zeros(n_token, dtype=bool)
        answer[drawn.place] = True
        breaks = np.arange(n_token // segment_len) > 0
        tokens = np.append(drawn.tokens, rng.choice(self.symbols))
        return Planted(tokens, answer, breaks, answer.astype(np.float32))

    def draw(self, rng: np.random.Generator, n_token: int, segment_len: int, n_pair: int) -> Recall:
        """A document of ``n_token`` tokens.

        Raises:
            ConfigError: If pairs and questions do not fit, a pair would be cut by a segment, or symbols are too few.
        """
        if 4 * n_pair > n_token:
            raise ConfigError(
                f"{n_pair} pairs and their questions need {4 * n_pair} tokens, but a document has {n_token}: change "
                "n_pair, or the segments of a document"
            )
        key, value = self.choose(rng, n_pair, segment_len)
        n_place = n_token // 2 - n_pair
        chance = np.arange(1, n_place + 1) ** (self.power_a - 1)
        place = 2 * (n_pair + rng.choice(n_place, size=n_pair, replace=False, p=chance / chance.sum()))
        told = 2 * np.arange(n_pair)
        tokens = rng.choice(self.symbols, size=n_token)
        for at in (told, place):
            tokens[at], tokens[at + 1] = key, value
        return Recall(tokens, key, value, told, place)

    def choose(self, rng: np.random.Generator, n_pair: int, segment_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the pairs of a document, (P,) each.

        Raises:
            ConfigError: If there is no pair, a pair would be cut by a segment, or symbols are too few.
        """
        if n_pair < 1:
            raise ConfigError(f"a document needs at least 1 pair, got n_pair={n_pair}")
        if segment_len % 2:
            raise ConfigError(f"pairs must not be cut: model.segment_len must be even for this task, got {segment_len}")
        if n_pair > len(self.keys):
            raise ConfigError(
                f"{n_pair} pairs need as many keys, but the vocabulary has {len(self.keys)}: use fewer pairs, or a "
                "larger data.corpus.n_symbol"
            )
        key = rng.choice(self.keys, size=n_pair, replace=False)
        return key, rng.choice(self.values, size=n_pair, replace=False)
