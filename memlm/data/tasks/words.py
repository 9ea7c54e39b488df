"""Words of the training text, of which tasks make names and values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus

_CHUNK = 1_000_000  # tokens decoded at a time
_PIECE = re.compile(r"\w+|[^\w\s]")  # a word, or a mark of punctuation


def is_plain(word: str) -> bool:
    """Whether a word is lower-case letters alone."""
    return len(word) <= 12 and word.isascii() and word.isalpha() and word.islower()


def decoded(tokenizer: Tokenizer, corpus: TokenizedCorpus) -> Iterator[str]:
    """The text of a corpus in chunks, which overlap a little so that no pair of words is cut."""
    for start in range(0, corpus.n_token, _CHUNK):
        yield tokenizer.decode(corpus.tokens[start : start + _CHUNK + 64].tolist())


def neighbours(
    tokenizer: Tokenizer, train: TokenizedCorpus, words: set[str], lower: bool = False
) -> set[tuple[str, str]]:
    """Pairs of ``words`` that follow each other anywhere in the training text, or in its small letters."""
    found: set[tuple[str, str]] = set()
    for text in decoded(tokenizer, train):
        pairs = itertools.pairwise(_PIECE.findall(text.lower() if lower else text))
        found.update(pair for pair in pairs if pair[0] in words and pair[1] in words)
    return found


def frequent_words(tokenizer: Tokenizer, train: TokenizedCorpus, n_word: int) -> list[str]:
    """Frequent plain words of the text, those of the fewest tokens first, then alphabetically."""
    sample = tokenizer.decode(train.tokens[:2_000_000].tolist())
    counts: dict[str, int] = {}
    for word in sample.split():
        if len(word) >= 3 and is_plain(word):
            counts[word] = counts.get(word, 0) + 1
    frequent = [word for word, count in counts.items() if count > 1]
    length = {word: len(tokenizer.encode(" " + word)) for word in frequent}
    ranked = sorted(frequent, key=lambda word: (length[word], -counts[word], word))
    shortest = [word for word in ranked if length[word] == length[ranked[0]]]
    return sorted((shortest if len(shortest) >= 512 else ranked)[:n_word])
