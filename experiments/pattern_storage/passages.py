"""The patterns of `pattern_storage`: passages of held-out text that occur once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.tokens import TokenizedCorpus


class Passage(NamedTuple):
    """A span of text, as a pattern.

    Attributes:
        cue: Token ids it begins with.
        answer: Token ids of the rest.
    """

    cue: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole span."""
        return self.cue + self.answer


class Passages:
    """What `experiments.needle.draw` asks of data, with passages in place of facts.

    The first half of the text gives the passages, which occur nowhere else; the second half is what they are told in.

    Args:
        text: Held-out text.
        passage_len: Tokens of a passage.
    """

    def __init__(self, text: TokenizedCorpus, passage_len: int) -> None:
        self.passage_len, self.n_cue = passage_len, passage_len // 3
        half = text.n_token // 2
        if passage_len > half:
            raise ConfigError(
                f"pattern_storage.passage_len is {passage_len}, but half of the text has {half} tokens: use shorter "
                "passages or more text"
            )
        self._source, self._rest = text.tokens[:half], text.tokens[half:]
        self._once = _occur_once(text.tokens, passage_len)
        self.maker = self

    def tokens(self, split: str) -> TokenizedCorpus:
        """The text around the passages."""
        return TokenizedCorpus(self._rest, np.array([0, len(self._rest)]))

    def draw(self, rng: np.random.Generator, n: int, split: str) -> list[Passage]:
        """``n`` passages with different cues, which do not overlap."""
        found: dict[tuple[int, ...], Passage] = {}
        for place in rng.permutation(len(self._source) // self.passage_len) * self.passage_len:
            if not self._once[place]:
                continue
            span = tuple(self._source[place : place + self.passage_len].tolist())
            found.setdefault(span[: self.n_cue], Passage(span[: self.n_cue], span[self.n_cue :]))
            if len(found) == n:
                return list(found.values())
        raise ConfigError(
            f"{n} passages of {self.passage_len} tokens are asked for, but half of the text has {len(found)} that "
            "occur once and begin differently: use fewer patterns (n_stored, n_document), shorter ones or more text"
        )


def _occur_once(tokens: np.ndarray, length: int) -> np.ndarray:
    """Whether the span of ``length`` tokens from a place on is at no other place, (N,), by a hash of it."""
    spans = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int64), length)
    weights = np.random.default_rng(length).integers(1, 2**62, size=length)
    _, index, count = np.unique((spans * weights).sum(axis=1), return_inverse=True, return_counts=True)
    return np.pad(count[index] == 1, (0, length - 1))
