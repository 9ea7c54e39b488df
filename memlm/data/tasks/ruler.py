"""RULER's tasks that need no data of others, as tasks to train: needles, variables, common words, frequent words.

Source: C.-P. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (2404.06654),
project NVIDIA/RULER. Texts, questions, sizes and the rule of scoring are RULER's:

    niah_single      one needle, "One of the special magic numbers for KEY is: VALUE.", in a repeated noise text
    niah_multikey    one needle among needles of other keys, which are all of the text
    niah_multivalue  four needles of one key; all four values are asked for
    niah_multiquery  four needles; all four are asked for
    vt               a variable, and four that get its value one from the other; all five are asked for
    cwe              a numbered list of words, ten of which occur 30 times, the others 3 (below 4,096 tokens: 6 and 1)
    fwe              coded words whose frequencies follow a Zeta law with alpha 2; the second to fourth are asked for

What differs: keys and words of lists are frequent words of the training text (RULER has word lists of its own);
niah_multivalue and niah_multiquery stand in the noise text too (there: in essays); there is no worked example before
the question, as models are trained on these tasks; the question begins a new context, so that only memory can answer.
Evaluation draws from another stream of random numbers than training.

Shapes: N tokens of a document, T tokens per segment.
"""

from __future__ import annotations

import bisect
import string
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from memlm.config import ConfigError, did_you_mean
from memlm.data.tasks.base import Planted
from memlm.data.tasks.words import frequent_words
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."
)  # fmt: skip
_ALPHA, _ZETA_2 = 2.0, np.pi**2 / 6
_LONG = 4096  # tokens from which on lists repeat words more often


class Puzzle(NamedTuple):
    """A text and a question about it.

    Attributes:
        pieces: The text, in pieces with a space before each.
        cue: The question, up to where the answer begins.
        answer: The answer in full.
        references: What must be in an answer, each of equal worth.
    """

    pieces: list[str]
    cue: str
    answer: str
    references: tuple[str, ...]


def needles(
    rng: np.random.Generator,
    words: Sequence[str],
    n_token: int,
    count: Callable[[str], int],
    n_key: int = 1,
    n_value: int = 1,
    n_query: int = 1,
    among_needles: bool = False,
) -> Puzzle:
    """Needles of ``n_key`` keys with ``n_value`` values each, of which ``n_query`` keys are asked for."""

    def drawn_key() -> str:
        return "-".join(words[int(i)] for i in rng.integers(len(words), size=2))

    def needle(key: str, value: str) -> str:
        return f"One of the special magic numbers for {key} is: {value}."

    def number() -> str:
        return str(int(rng.integers(10**6, 10**7)))

    keys: list[str] = []
    while len(keys) < n_key:
        if (key := drawn_key()) not in keys:
            keys.append(key)
    values = {key: [number() for _ in range(n_value)] for key in keys}
    told = [needle(key, value) for key in keys for value in values[key]]
    told = [told[i] for i in rng.permutation(len(told))]
    intro = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards."
    )
    left = n_token - count(intro) - sum(map(count, told))
    text: list[str] = []
    while True:
        piece, other = " ".join(NOISE), ""
        if among_needles:
            other = drawn_key()
            piece = needle(other, number())
        if other in keys:
            continue
        left -= count(piece)
        if left < 0:
            break
        text.append(piece)
    if len(text) < len(told):
        raise ConfigError(f"{n_token} tokens are too few for {len(told)} needles: give longer texts")
    for place, piece in zip(sorted(rng.permutation(len(text))[: len(told)])[::-1], told, strict=True):
        text.insert(int(place), piece)
    asked = [keys[i] for i in rng.permutation(n_key)[:n_query]]
    references = tuple(value for key in asked for value in values[key])
    query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
    one = len(references) == 1
    question = "What is the special magic number" if one else "What are all the special magic numbers"
    stem = "The special magic number" if one else "The special magic numbers"
    cue = (
        f"{question} for {query} mentioned in the provided text? {stem} for {query} mentioned in the provided text "
        f"{'is' if one else 'are'}"
    )
    return Puzzle([intro, *text], cue, f"{', '.join(references)}.", references)


def variables(
    rng: np.random.Generator,
    words: Sequence[str],
    n_token: int,
    count: Callable[[str], int],
    n_chain: int = 1,
    n_hop: int = 4,
) -> Puzzle:
    """Chains of variables, each with the value of the one before; those of the first chain's value are asked for."""
    names: list[str] = []
    while len(names) < n_chain * (n_hop + 1):
        name = "".join(rng.choice(list(string.ascii_uppercase), size=5))
        if name not in names:
            names.append(name)
    chains, values = [], []
    for i in range(0, len(names), n_hop + 1):
        own = names[i : i + n_hop + 1]
        values.append(str(int(rng.integers(10_000, 100_000))))
        chains.append([f"VAR {own[0]} = {values[-1]}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(own))])
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text."
    left = n_token - count(intro) - sum(count(piece) for chain in chains for piece in chain)
    n_noise = left // count(" ".join(NOISE)) if left > 0 else 0
    text = [" ".join(NOISE)] * n_noise
    if len(text) <= n_hop + 1:
        text = list(NOISE) * n_noise
    if len(text) <= n_hop + 1:
        raise ConfigError(f"{n_token} tokens are too few for chains of {n_hop + 1} variables: give longer texts")
    for chain in chains:
        for i, place in enumerate(sorted(rng.permutation(len(text))[: len(chain)])):
            text.insert(int(place) + i, chain[i])
    references = tuple(names[: n_hop + 1])
    cue = (
        f"Question: Find all variables that are assigned the value {values[0]} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {len(references)} variables are assgined the value "
        f"{values[0]}, they are:"
    )
    return Puzzle([intro, *text], cue, f"{' '.join(references)}.", references)


def common_words(
    rng: np.random.Generator,
    words: Sequence[str],
    n_token: int,
    count: Callable[[str], int],
    n_common: int = 10,
) -> Puzzle:
    """A numbered list of words, of which ``n_common`` occur more often than the others."""
    often, seldom = (30, 3) if n_token >= _LONG else (6, 1)
    order = [words[int(i)] for i in rng.permutation(len(words))]
    common, others = order[:n_common], order[n_common:]
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often."
    )
    wide = count(f"{9999 if n_token >= _LONG else 999}.")  # a number of the list, at most
    left = n_token - count(intro) - often * sum(wide + count(word) for word in common)
    chosen: list[str] = []
    for word in others:
        left -= seldom * (wide + count(word))
        if left < 0:
            break
        chosen.append(word)
    if not chosen:
        raise ConfigError(f"{n_token} tokens are too few for a list of {n_common} common words: give longer texts")
    listed = common * often + chosen * seldom
    listed = [listed[i] for i in rng.permutation(len(listed))]
    text = [part for i, word in enumerate(listed, start=1) for part in (f"{i}.", word)]
    cue = (
        f"Question: What are the {n_common} most common words in the above list? Answer: The top {n_common} words that "
        "appear most often in the list are:"
    )
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(common, start=1))
    return Puzzle([intro, *text], cue, answer, tuple(common))


def coded_words(
    rng: np.random.Generator,
    words: Sequence[str],
    n_token: int,
    count: Callable[[str], int],
) -> Puzzle:
    """Words of six random letters by a Zeta law; the most frequent one stands for nothing, the next three are asked."""
    coded: list[str] = ["..."]
    while len(coded) < max(n_token // 50, 5):
        word = "".join(rng.choice(list(string.ascii_lowercase), size=6))
        if word not in coded:
            coded.append(word)
    intro = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words."
    )
    share = np.arange(1, len(coded) + 1) ** -_ALPHA / _ZETA_2
    length = np.array([count(word) for word in coded])
    left = n_token - count(intro)
    sizes = range(1, max(left, 1) + 1)
    n_word = bisect.bisect_right(sizes, left, key=lambda n: int(((share * n).astype(int) * length).sum()))
    counts = (share * n_word).astype(int)
    if counts[3] < 1 or len(set(counts[:5].tolist())) < 5:
        raise ConfigError(
            f"{n_token} tokens are too few to tell the frequencies of coded words apart: give longer texts"
        )
    text = [word for word, n in zip(coded, counts.tolist(), strict=True) for _ in range(n)]
    text = [text[i] for i in rng.permutation(len(text))]
    cue = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    return Puzzle([intro, *text], cue, f"{', '.join(coded[1:4])}.", tuple(coded[1:4]))


Generator = Callable[[np.random.Generator, Sequence[str], int, Callable[[str], int]], Puzzle]
"""Makes a puzzle whose text has at most so many tokens, of words, with what tells the tokens of a piece."""


GENERATORS: dict[str, Generator] = {
    "niah_single": needles,
    "niah_multikey": partial(needles, among_needles=True),
    "niah_multivalue": partial(needles, n_value=4),
    "niah_multiquery": partial(needles, n_key=4, n_query=4),
    "vt": variables,
    "cwe": common_words,
    "fwe": coded_words,
}
"""RULER's names of the tasks, and what makes them."""


def check_tasks(tasks: Sequence[str], key: str) -> None:
    """Raise ConfigError unless each is a task, named once."""
    for name in tasks:
        if name not in GENERATORS:
            raise ConfigError(
                f"{key} must be some of {', '.join(GENERATORS)}, got {name!r}.{did_you_mean(name, GENERATORS)}"
            )
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"{key} must be some of {', '.join(GENERATORS)}, each once, got {list(tasks)}")


class Encoded(NamedTuple):
    """A puzzle in tokens.

    Attributes:
        puzzle: In words.
        text: Token ids of the text.
        cue: Token ids of the question.
        answer: Token ids of the answer.
    """

    puzzle: Puzzle
    text: np.ndarray
    cue: tuple[int, ...]
    answer: tuple[int, ...]


class Ruler:
    """The task of RULER's puzzles; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text, whose frequent words become keys and words of lists.

    Raises:
        ConfigError: If the text has too few words.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        self._tokenizer = tokenizer
        self._words = frequent_words(tokenizer, train, 3000)
        if len(self._words) < 50:
            raise ConfigError(
                f"lists need at least 50 different words of 3 to 12 letters, and the training text has "
                f"{len(self._words)}: use more text"
            )
        self._known: dict[str, np.ndarray] = {}

    def draw(self, rng: np.random.Generator, name: str, n_token: int) -> Encoded:
        """A puzzle of a task, whose text has at most ``n_token`` tokens.

        Raises:
            ConfigError: If that is too few for the task.
        """
        try:
            puzzle = GENERATORS[name](rng, self._words, n_token, lambda piece: len(self._encode(piece)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        text = np.concatenate([self._encode(piece) for piece in puzzle.pieces])
        cue, answer = self._encode(puzzle.cue).tolist(), self._encode(puzzle.answer).tolist()
        return Encoded(puzzle, text, tuple(cue), tuple(answer))

    def _encode(self, piece: str) -> np.ndarray:
        """Token ids of a piece, with a space before it."""
        if (known := self._known.get(piece)) is None:
            known = np.array(self._tokenizer.encode(f" {piece}"), dtype=np.int64)
            if len(self._known) < 100_000:  # words, numbers of lists and noise come again, needles do not
                self._known[piece] = known
        return known

    def document(
        self,
        rng: np.random.Generator,
        passage: np.ndarray,
        segment_len: int,
        tasks: Sequence[str] = tuple(GENERATORS),
    ) -> Planted:
        """A training document: a puzzle, and in the last segments its question and answer in a new context.

        Args:
            rng: Source of randomness.
            passage: Text that fills what the puzzle leaves free, (N + 1,).
            segment_len: Tokens per segment.
            tasks: Which tasks, each as often.
        """
        check_tasks(tasks, "task.tasks")
        n_token, n_segment = len(passage) - 1, (len(passage) - 1) // segment_len
        name = tasks[int(rng.integers(len(tasks)))]
        seed = int(rng.integers(2**31))
        n_last = 1
        while True:  # the question's length is known when it is drawn
            begin = (n_segment - n_last) * segment_len
            drawn = self.draw(np.random.default_rng(seed), name, begin)
            n_asked = len(drawn.cue) + len(drawn.answer)
            if n_asked <= n_last * segment_len:
                break
            n_last = -(-n_asked // segment_len)
        tokens = passage.copy()
        tokens[begin - len(drawn.text) : begin] = drawn.text
        tokens[begin : begin + n_asked] = drawn.cue + drawn.answer
        answer = np.zeros(n_token + 1, dtype=bool)
        answer[begin + len(drawn.cue) : begin + n_asked] = True
        return Planted(tokens, answer[1:], np.arange(n_segment) == n_segment - n_last)


def found(output: str, references: Sequence[str]) -> list[bool]:
    """RULER's rule (``string_match_all``): which references an output contains; case does not matter."""
    said = output.lower()
    return [reference.lower() in said for reference in references]
