"""Makers of facts: random, native and in sentences; those of evaluation are never trained on."""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple, Protocol

import numpy as np

from memlm.config import ConfigError, did_you_mean
from memlm.data.tasks.sentences import RELATIONS, Form, Level, Relation, invent, write
from memlm.data.tasks.words import decoded, frequent_words, is_plain, neighbours
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus

_EVALUATION_SHARE = 8  # one in so many names and values is kept for evaluation


_MIN_WORDS = 64


_MIN_RELATIONS = 4


_WORD = re.compile(r"\w+")


Split = Literal["train", "evaluation"]


class Paraphrase(NamedTuple):
    """Another way to ask for a fact.

    Attributes:
        cue: Token ids up to the value.
        level: How new the question is to a model trained on such facts; see `memlm.data.tasks.sentences.LEVELS`.
    """

    cue: tuple[int, ...]
    level: Level


class Fact(NamedTuple):
    """A fact in words and tokens.

    Attributes:
        name: Words of the name (subject).
        value: Words of the value.
        cue: Token ids of what comes before the answer: the name, or a sentence up to its value.
        answer: Token ids of what follows: ``is`` and the value, or the value and what ends the sentence.
        sentence: The fact as it is told, if that is a sentence.
        paraphrases: Other cues with the same answer.
        relation: Name of what a sentence says of its subject.
        phrasing: Which of the relation's phrasings that tell it is told in.
    """

    name: tuple[str, ...]
    value: tuple[str, ...]
    cue: tuple[int, ...]
    answer: tuple[int, ...]
    sentence: str = ""
    paraphrases: tuple[Paraphrase, ...] = ()
    relation: str = ""
    phrasing: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole fact."""
        return self.cue + self.answer

    @property
    def text(self) -> str:
        """The whole fact in words."""
        return self.sentence or " ".join([*self.name, "is", *self.value])

    def asked(self, paraphrase: Paraphrase) -> Fact:
        """The fact with the cue of a paraphrase; `tokens` is then a question and its answer."""
        return self._replace(cue=paraphrase.cue)


class Maker(Protocol):
    """Where facts of one kind come from."""

    def draw(self, rng: np.random.Generator, n: int, split: Split, n_word: int | None = None) -> list[Fact]:
        """``n`` different facts; see `FactMaker.draw`."""

    def of_another(
        self,
        rng: np.random.Generator,
        fact: Fact,
        split: Split,
        taken: Collection[tuple[str, ...]],
        new_value: bool = False,
    ) -> Fact:
        """The same said of another name; see `FactMaker.of_another`."""


class FactMaker:
    """Draws facts that fit a tokenizer and occur nowhere in the training text.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text; its frequent words become names and values, and no pair of neighbours in it becomes
            neighbours in a name or value.
        n_word: Words to draw from, at most.
        native: A text: words are drawn from it by their frequency there (common words end up somewhat rarer in facts
            than in the text, as names and values repeat no word and no pair of neighbours), and no pair of neighbours
            in it becomes neighbours in a name or value either, so that a name stands nowhere but in its fact.

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
            self.words, count, texts = frequent_words(tokenizer, train, n_word), None, [train]
        else:
            counts = Counter(word for word in tokenizer.decode(native.tokens.tolist()).split() if is_plain(word))
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
        self._neighbours = set().union(*(neighbours(tokenizer, text, set(self.words)) for text in texts))

    def draw(self, rng: np.random.Generator, n: int, split: Split, n_word: int | None = None) -> list[Fact]:
        """``n`` facts with different names.

        Args:
            rng: Source of randomness.
            n: Number of facts.
            split: Which names and values may be used.
            n_word: Draw all names from so few words that they look alike; None for all words.
        """
        pool = self._pool(rng, n, split, n_word)
        facts: dict[tuple[str, ...], Fact] = {}
        while len(facts) < n:
            name, name_tokens = self._combine(rng, pool, 2, split)
            value, value_tokens = self._combine(rng, np.arange(len(self.words)), 3, split)
            facts.setdefault(name, Fact(name, value, name_tokens, self._is + value_tokens))
        return list(facts.values())

    def of_another(
        self,
        rng: np.random.Generator,
        fact: Fact,
        split: Split,
        taken: Collection[tuple[str, ...]],
        new_value: bool = False,
    ) -> Fact:
        """The same said of another name.

        Args:
            rng: Source of randomness.
            fact: What is said.
            split: Which names and values may be used.
            taken: Names that it must not have.
            new_value: Whether it has another value, too.
        """
        while True:
            (other,) = self.draw(rng, 1, split)
            if other.name not in taken and other.name != fact.name:
                return other if new_value else other._replace(value=fact.value, answer=fact.answer)

    def _pool(self, rng: np.random.Generator, n: int, split: Split, n_word: int | None) -> np.ndarray:
        """Indices of the words that ``n`` names are made of."""
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
        return pool

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


class SentenceMaker(FactMaker):
    """Draws facts told as English sentences: an invented subject, a relation, an invented value.

    Names are pairs and compounds of frequent words (``Frame Codec``, ``Framecodec``) or invented words (``Mair Voss``),
    which the text nowhere contains, or numbers that it does not contain. What the tokenizer cannot write is left out,
    such as capital letters (names are then pairs of small words) or whole relations. Facts for training offer the
    paraphrases that training may ask; those for evaluation offer all.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text.
        n_word: Words to draw from, at most.

    Raises:
        ConfigError: If the training text has too few words, or the tokenizer lacks those of the sentences.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus, n_word: int = 3000) -> None:
        super().__init__(tokenizer, train, n_word)
        self._tokenizer = tokenizer
        # A word of the sentences beside a name might look like another name.
        own = {word.lower() for relation in RELATIONS for text in relation.phrasings for word in _WORD.findall(text)}
        # Capitals cost tokens: keep the half of the words that need the fewest.
        length = {word: len(tokenizer.encode(" " + word.title())) for word in self.words if word not in own}
        if len(length) < _MIN_WORDS:
            raise ConfigError(
                f"natural facts need at least {_MIN_WORDS} frequent words in the training text that their sentences do "
                f"not use, found {len(length)}; use more text, or facts of words"
            )
        shortest = sorted(length, key=lambda word: (length[word], word))
        self.words = sorted(shortest[: max(len(length) // 2, _MIN_WORDS)])
        self._tokens = [tuple(tokenizer.encode(" " + word)) for word in self.words]
        self._neighbours |= neighbours(tokenizer, train, set(self.words), lower=True)
        self._known = own | {word for text in decoded(tokenizer, train) for word in _WORD.findall(text.lower())}
        numbers = [str(number) for number in range(1400, 2100) if str(number) not in self._known]
        self._numbers = [number for number in numbers if self._encode(" " + number) is not None]
        sentences = [_Sentences.of(relation, self._encode) for relation in RELATIONS]
        self._sentences = [
            found
            for found in sentences
            if found is not None and (found.relation.value != "number" or len(self._numbers) >= _MIN_WORDS)
        ]
        if len(self._sentences) < _MIN_RELATIONS:
            raise ConfigError(
                f"natural facts need a tokenizer that can write English sentences, but it lacks the words of all but "
                f"{len(self._sentences)} of {len(RELATIONS)} relations: use data.tokenizer.kind=bpe, or facts of words"
            )

    def draw(self, rng: np.random.Generator, n: int, split: Split, n_word: int | None = None) -> list[Fact]:
        """``n`` facts; with ``n_word`` a subject may have several facts, else all subjects differ.

        Args:
            rng: Source of randomness.
            n: Number of facts.
            split: Which subjects and values may be used.
            n_word: Draw all subjects from so few words that they look alike; None for all words.
        """
        pool = None if n_word is None else self._pool(rng, n, split, n_word)
        facts: dict[tuple[str, ...], Fact] = {}
        while len(facts) < n:
            sentences = self._sentences[int(rng.integers(len(self._sentences)))]
            name, name_tokens = self._name(rng, pool, sentences.relation.subject, split)
            value, value_tokens = self._name(rng, None, sentences.relation.value, split)
            told = int(rng.integers(len(sentences.tell)))
            key = name if n_word is None else (*name, sentences.relation.name)
            facts.setdefault(key, self._fact(sentences, told, name, name_tokens, value, value_tokens, split))
        return list(facts.values())

    def _fact(
        self,
        sentences: _Sentences,
        told: int,
        name: tuple[str, ...],
        name_tokens: tuple[int, ...],
        value: tuple[str, ...],
        value_tokens: tuple[int, ...],
        split: Split,
    ) -> Fact:
        """The fact as the phrasing number ``told`` of those that tell has it."""
        before, after = sentences.phrasings[sentences.tell[told]]
        cue, answer = before + name_tokens + after, value_tokens + sentences.end
        paraphrases = []
        for asked, (before, after) in sentences.phrasings.items():
            level = sentences.relation.level(sentences.tell[told], asked)
            if asked != sentences.tell[told] and (split == "evaluation" or level == "trained"):
                paraphrases.append(Paraphrase(before + name_tokens + after, level))
        sentence = self._tokenizer.decode(cue + answer).strip()
        return Fact(name, value, cue, answer, sentence, tuple(paraphrases), sentences.relation.name, told)

    def of_another(
        self,
        rng: np.random.Generator,
        fact: Fact,
        split: Split,
        taken: Collection[tuple[str, ...]],
        new_value: bool = False,
    ) -> Fact:
        """The same said of another subject; who goes by the relation alone confuses them.

        See `FactMaker.of_another`.
        """
        (sentences,) = (found for found in self._sentences if found.relation.name == fact.relation)
        name, name_tokens = fact.name, fact.cue
        while name in taken or name == fact.name:
            name, name_tokens = self._name(rng, None, sentences.relation.subject, split)
        value, value_tokens = fact.value, fact.answer[: len(fact.answer) - len(sentences.end)]
        while new_value and value == fact.value:
            value, value_tokens = self._name(rng, None, sentences.relation.value, split)
        return self._fact(sentences, fact.phrasing, name, name_tokens, value, value_tokens, split)

    def _name(
        self, rng: np.random.Generator, pool: np.ndarray | None, form: Form, split: Split
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Words of a subject or value that belongs to ``split``, and its tokens.

        With a ``pool`` the words are of it; else they are frequent words or, as often, invented.
        """
        if form == "number":
            while True:
                number = (self._numbers[int(rng.integers(len(self._numbers)))],)
                if _held_out(number) == (split == "evaluation"):
                    return number, tuple(self._tokenizer.encode(" " + number[0]))
        while True:
            if invented := pool is None and rng.random() < 0.5:
                words = tuple(invent(rng) for _ in range(1 if form == "place" else 2))
                if any(word in self._known for word in words) or _held_out(words) != (split == "evaluation"):
                    continue
                if split == "train" and any(_held_out((word,)) for word in words):  # a place of evaluation
                    continue
            else:
                words, tokens = self._combine(rng, np.arange(len(self.words)) if pool is None else pool, 2, split)
            written = write(words, form)
            # A compound may be a word of the text, or two pairs the same compound.
            compound = (written.lower(),) if form == "place" else None
            if compound and (compound[0] in self._known or _held_out(compound) != (split == "evaluation")):
                continue
            encoded = self._encode(" " + written)
            if encoded or not invented:  # what cannot be written otherwise is a pair of small words
                return words, encoded or tokens

    def _encode(self, text: str) -> tuple[int, ...] | None:
        """Tokens of a text, or None if they do not give it back."""
        tokens = self._tokenizer.encode(text)
        return tuple(tokens) if self._tokenizer.decode(tokens) == text else None


class _Sentences(NamedTuple):
    """A relation in tokens.

    Attributes:
        relation: The relation.
        phrasings: By number, the tokens before and after the subject, for those that the tokenizer can write.
        tell: Numbers of those that tell.
        end: Tokens after the value.
    """

    relation: Relation
    phrasings: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]
    tell: list[int]
    end: tuple[int, ...]

    @classmethod
    def of(cls, relation: Relation, encode: Callable[[str], tuple[int, ...] | None]) -> _Sentences | None:
        """The relation as ``encode`` writes it; None if it cannot be told, or asked for in other words."""
        phrasings = {}
        for i, text in enumerate(relation.phrasings):
            before, after = (encode(part.rstrip()) for part in f" {text}".split("{}"))
            if before is not None and after is not None:
                phrasings[i] = (before, after)
        tell, end = [i for i in phrasings if i < len(relation.tell)], encode(relation.end)
        if not tell or len(phrasings) < 2 or end is None:
            return None
        return cls(relation, phrasings, tell, end)


def _held_out(words: tuple[str, ...]) -> bool:
    """Whether a name or value is kept for evaluation."""
    return zlib.crc32(" ".join(words).encode()) % _EVALUATION_SHARE == 0


def _native(tokenizer: Tokenizer, train: TokenizedCorpus) -> FactMaker:
    return FactMaker(tokenizer, train, native=train)


KINDS: dict[str, Callable[[Tokenizer, TokenizedCorpus], Maker]] = {
    "random": FactMaker,
    "native": _native,
    "natural": SentenceMaker,
}


"""Kinds of facts by name: two words that are three words, each word as likely as any other; the same of words as likely
as they are in the text; English sentences."""


def check_kind(kind: str) -> None:
    """Raise ConfigError unless there are facts of this kind."""
    if kind not in KINDS:
        raise ConfigError(
            f"there are no facts of kind {kind!r}: expected one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
        )
