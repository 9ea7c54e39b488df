"""Multi-query associative recall as zoology has it: the answer is asked for beside the text, not told in it.

Source: `multiquery_ar` of the project zoology (S. Arora, S. Eyuboglu et al., "Zoology: Measuring and improving recall
in efficient language models", 2312.04927), by its rules: pairs first; each key is asked once, at a place of two tokens
that a power law draws; what follows a question is random as all other tokens are, or one and the same blank; the target
of a question is the value of its key; no other target counts; the document is one context.

In `memlm.data.tasks.mqar`, on which this is built, the value stands behind its question, and each segment begins a new
context.

Shapes: P pairs, N tokens of a document, T tokens per segment.
"""

from __future__ import annotations

import numpy as np

from memlm.data.tasks.base import Planted
from memlm.data.tasks.mqar import MQAR, Recall
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus


class ZoologyMQAR(MQAR):
    """The task of zoology's tables and figures; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Text of `memlm.data.corpora.symbols.Symbols`.
        power_a: Exponent of the power law of gaps; 1 for places that are all as likely.
        random_blanks: Whether places without a pair and a question hold random symbols, any of them, or the first
            symbol, which is neither key nor value.

    Raises:
        ConfigError: If the text is no list of symbols, or the power law has no meaning.
    """

    def __init__(
        self, tokenizer: Tokenizer, train: TokenizedCorpus, power_a: float = 0.01, random_blanks: bool = True
    ) -> None:
        super().__init__(tokenizer, train, power_a)
        self.random_blanks = random_blanks

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
        answer, targets = np.zeros(n_token, dtype=bool), np.zeros(n_token, dtype=np.int64)
        answer[drawn.place], targets[drawn.place] = True, drawn.value
        breaks = np.zeros(n_token // segment_len, dtype=bool)
        tokens = np.append(drawn.tokens, self.symbols[0])  # what stands behind the document is never a target
        return Planted(tokens, answer, breaks, answer.astype(np.float32), targets)

    def draw(self, rng: np.random.Generator, n_token: int, segment_len: int, n_pair: int) -> Recall:
        """A document of ``n_token`` tokens, in which the answer at each `Recall.place` is a label, and not told.

        Raises:
            ConfigError: If pairs and questions do not fit, a pair would be cut by a segment, or symbols are too few.
        """
        drawn = super().draw(rng, n_token, segment_len, n_pair)
        blank = np.ones(n_token, dtype=bool)
        blank[: 2 * n_pair] = blank[drawn.place] = False
        drawn.tokens[blank] = rng.choice(self.symbols, size=blank.sum()) if self.random_blanks else self.symbols[0]
        return drawn
