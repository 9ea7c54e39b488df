"""BM25: texts ranked by the words that they share with a question, the rarer the better.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; with the idf of Lucene,
which is never negative.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())


class Bm25:
    """Texts that are searched.

    Args:
        texts: The texts.
        k1: How soon more of the same word counts no more.
        b: How far long texts are marked down, in 0..1.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        self.counts = [Counter(words_of(text)) for text in texts]
        lengths = [sum(count.values()) for count in self.counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self.k1 = k1
        self._norm = [k1 * (1 - b + b * length / mean) for length in lengths]
        n_with = Counter(word for count in self.counts for word in count)
        self._idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in n_with.items()}

    def scores(self, question: str) -> list[float]:
        """The score of each text for a question; 0 where they share no word."""
        words = words_of(question)
        return [
            sum(self._idf[w] * count[w] * (self.k1 + 1) / (count[w] + norm) for w in words if w in count)
            for count, norm in zip(self.counts, self._norm, strict=True)
        ]
