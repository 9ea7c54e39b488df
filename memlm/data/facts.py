"""Planted facts: random names with random values, told once and asked later.

A fact reads ``name1 name2 is value1 value2 value3``; its cue is the name, its answer the rest. Names and values are
ordinary words in combinations that the text nowhere contains. A hash of the words decides for every name and value
whether it belongs to training or to evaluation, so that none is ever used for both.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.task import Planted, contexts, mix
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus

_EVALUATION_SHARE = 8  # one in so many names and values is kept for evaluation
_MIN_WORDS = 64
_CHUNK = 1_000_000  # tokens decoded at a time


class Fact(NamedTuple):
    """A fact in words and tokens.

    Attributes:
        name: Two words.
        value: Three words.
        cue: Token ids of the name.
        answer: Token ids of what follows, ``is`` and the value.
    """

    name: tuple[str, ...]
    value: tuple[str, ...]
    cue: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole fact."""
        return self.cue + self.answer

    @property
    def text(self) -> str:
        """The whole fact in words."""
        return " ".join([*self.name, "is", *self.value])


class FactMaker:
    """Draws facts that fit a tokenizer and occur nowhere in the training text.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text; its frequent words become names and values, and no pair of neighbours in it becomes
            neighbours in a name or value.
        n_word: Words to draw from, at most.
        native: A text: words are drawn from it as often as they occur there, and no pair of neighbours in it becomes
            neighbours in a name or value either, so that a name stands nowhere but in its fact.

    Raises:
        ConfigError: If the training text has too few words.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        train: TokenizedCorpus,
        n_word: int = 3000,
        native: TokenizedCorpus | None = None,
    ) -> None:
        if native is None:
            self.words, count, texts = _frequent_words(tokenizer, train, n_word), None, [train]
        else:
            counts = Counter(word for word in tokenizer.decode(native.tokens.tolist()).split() if _is_plain(word))
            self.words, texts = sorted(counts), [train] if native is train else [train, native]
            count = np.array([counts[word] for word in self.words])
        if len(self.words) < _MIN_WORDS:
            raise ConfigError(
                f"planted facts need at least {_MIN_WORDS} different words of 3 to 12 letters in the training text, "
                f"found {len(self.words)}; use more text, or curriculum=plain"
            )
        self._share = None if count is None else count / count.sum()
        self._tokens = [tuple(tokenizer.encode(" " + word)) for word in self.words]
        self._is = tuple(tokenizer.encode(" is"))
        self._neighbours = set().union(*(_neighbours(tokenizer, text, set(self.words)) for text in texts))

    def draw(
        self, rng: np.random.Generator, n: int, split: Literal["train", "evaluation"], n_word: int | None = None
    ) -> list[Fact]:
        """``n`` facts with different names.

        Args:
            rng: Source of randomness.
            n: Number of facts.
            split: Which names and values may be used.
            n_word: Draw all names from so few words that they look alike; None for all words.
        """
        pool = np.arange(len(self.words))
        if n_word is not None:
            # Enough pairs must remain when only one in _EVALUATION_SHARE belongs to the split.
            pool = rng.choice(pool, size=min(max(n_word, 4 + 4 * int(n**0.5)), len(pool)), replace=False)
        n_name = len(pool) * (len(pool) - 1) // _EVALUATION_SHARE // 2  # about half of what there is, to be safe
        if split == "evaluation" and n > n_name:
            raise ConfigError(
                f"{n} facts of different names are asked for, but {len(pool)} words give {n_name} at most: "
                "use fewer facts (n_fact, n_document) or more text"
            )
        facts: dict[tuple[str, ...], Fact] = {}
        while len(facts) < n:
            name, name_tokens = self._combine(rng, pool, 2, split)
            value, value_tokens = self._combine(rng, np.arange(len(self.words)), 3, split)
            facts.setdefault(name, Fact(name, value, name_tokens, self._is + value_tokens))
        return list(facts.values())

    def _combine(
        self, rng: np.random.Generator, pool: np.ndarray, n: int, split: str
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """``n`` different words of ``pool`` in an order that belongs to ``split``, and their tokens."""
        while True:
            index = self._choose(rng, pool, n)
            if len(set(index.tolist())) < n:
                continue
            words = tuple(self.words[i] for i in index)
            pairs = list(itertools.pairwise(words))
            if _held_out(words) != (split == "evaluation") or any(pair in self._neighbours for pair in pairs):
                continue
            if split == "train" and any(_held_out(pair) for pair in pairs):  # a name of evaluation within a value
                continue
            return words, tuple(token for i in index for token in self._tokens[i])

    def _choose(self, rng: np.random.Generator, pool: np.ndarray, n: int) -> np.ndarray:
        """``n`` words of ``pool``, which may hold repetitions."""
        if self._share is not None and len(pool) == len(self.words):
            return rng.choice(len(pool), size=n, p=self._share)
        return rng.choice(pool, size=n, replace=False) if n > 2 else pool[rng.integers(len(pool), size=n)]


def _is_plain(word: str) -> bool:
    """Whether a word is lower-case letters alone."""
    return len(word) <= 12 and word.isascii() and word.isalpha() and word.islower()


def _held_out(words: tuple[str, ...]) -> bool:
    """Whether a name or value is kept for evaluation."""
    return zlib.crc32(" ".join(words).encode()) % _EVALUATION_SHARE == 0


def _neighbours(tokenizer: Tokenizer, train: TokenizedCorpus, words: set[str]) -> set[tuple[str, str]]:
    """Pairs of ``words`` that follow each other anywhere in the training text."""
    found: set[tuple[str, str]] = set()
    for start in range(0, train.n_token, _CHUNK):  # chunks overlap, so that no pair is cut
        text = tokenizer.decode(train.tokens[start : start + _CHUNK + 64].tolist()).split()
        found.update(pair for pair in itertools.pairwise(text) if pair[0] in words and pair[1] in words)
    return found


def _frequent_words(tokenizer: Tokenizer, train: TokenizedCorpus, n_word: int) -> list[str]:
    """Frequent plain words of the text, those of the fewest tokens first, then alphabetically."""
    sample = tokenizer.decode(train.tokens[:2_000_000].tolist())
    counts: dict[str, int] = {}
    for word in sample.split():
        if len(word) >= 3 and _is_plain(word):
            counts[word] = counts.get(word, 0) + 1
    frequent = [word for word, count in counts.items() if count > 1]
    length = {word: len(tokenizer.encode(" " + word)) for word in frequent}
    ranked = sorted(frequent, key=lambda word: (length[word], -counts[word], word))
    shortest = [word for word in ranked if length[word] == length[ranked[0]]]
    return sorted((shortest if len(shortest) >= 512 else ranked)[:n_word])


class Facts:
    """The task of telling facts once and asking for them later, mixed into text; see `memlm.data.task.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text.

    Attributes:
        maker: Where facts come from.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        self.maker = FactMaker(tokenizer, train)

    def document(
        self, rng: np.random.Generator, passage: np.ndarray, segment_len: int, items: float = 2.0, hard: float = 0.0
    ) -> Planted:
        """A document with facts and questions.

        Args:
            rng: Source of randomness.
            passage: Text around them.
            segment_len: Tokens per segment.
            items: Facts and questions per segment, on average.
            hard: Share of documents whose names are drawn from few words, so that they look alike.
        """
        return plant(rng, self.maker, passage, segment_len, items, bool(rng.random() < hard))


def plant(
    rng: np.random.Generator,
    maker: FactMaker,
    passage: np.ndarray,
    segment_len: int,
    items: float,
    hard: bool,
    new_context: float = 0.5,
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
    """
    n_segment = (len(passage) - 1) // segment_len
    breaks = contexts(rng, n_segment, new_context)
    facts = maker.draw(rng, max(int(np.ceil(n_segment * items)), 1), "train", n_word=8 if hard else None)
    return mix(rng, _Once(facts), passage, segment_len, items, breaks)


class _Once:
    """Tells each fact once; see `memlm.data.task.Teller`."""

    def __init__(self, facts: list[Fact]) -> None:
        self.facts, self.item_len = facts, len(facts[0].tokens)
        self._told: list[tuple[int, Fact]] = []  # the segment where each ended

    def statement(self) -> Fact | None:
        """The next fact."""
        return self.facts[len(self._told)] if len(self._told) < len(self.facts) else None

    def tell(self, statement: Fact, segment: int) -> None:
        """Remember where the fact ended."""
        self._told.append((segment, statement))

    def questions(self, segment: int) -> list[Fact]:
        """Facts told before the segment."""
        return [fact for told, fact in self._told if told < segment]
