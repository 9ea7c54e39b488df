"""Long text around what is told: read once as far as it goes, and only then again.

Shapes: N tokens of the text.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.tokenizer import Tokenizer

_PASSAGE = 256  # tokens of the passages in which a text is repeated
_ENDS = (".", "!", "?")  # of a sentence, before closing quotes and brackets
_CLOSING = "\"'\u201d\u2019)]_"


class Haystack:
    """Endless text: once round from some place, then round after round in passages of another order.

    Nothing is copied, so that documents of any length may share a text.

    Args:
        text: Token ids, (N,).
        seed: Of the place and of the orders.
        starts: Places where passages begin, ascending, such as those of `Sentences`; None for passages of 256 tokens.
    """

    def __init__(self, text: np.ndarray, seed: Sequence[int], starts: np.ndarray | None = None) -> None:
        self.text, self.seed, self._starts = text, list(seed), starts
        place = int(np.random.default_rng([*self.seed, 0]).integers(len(text if starts is None else starts)))
        self.begin = place if starts is None else int(starts[place])
        self._turn: tuple[int, np.ndarray, np.ndarray] | None = None

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part, (end - begin,)."""
        n = len(self.text)
        parts = [self.text[:0]]
        for turn in range(begin // n, -(-end // n)):
            first, last = max(begin - turn * n, 0), min(end - turn * n, n)
            if turn == 0:
                parts += self._once(first, last)
                continue
            if self._turn is None or self._turn[0] != turn:
                self._turn = (turn, *self._passages(turn))
            _, at, ends = self._turn
            for i in range(int(np.searchsorted(ends, first, side="right")), len(ends)):
                start = int(ends[i - 1]) if i else 0
                if start >= last:
                    break
                shift = int(at[i]) - start
                parts += self._once(max(first, start) + shift, min(last, int(ends[i])) + shift)
        return np.concatenate(parts)

    def cuts(self, n_token: int) -> np.ndarray:
        """Places below ``n_token`` where a passage begins, ascending."""
        n, found = len(self.text), []
        for turn in range(-(-n_token // n)):
            if turn == 0 and self._starts is not None:  # a few of many: by search
                wrapped = self._starts[: np.searchsorted(self._starts, min(self.begin + n_token - n, self.begin))]
                first, last = np.searchsorted(self._starts, [self.begin, self.begin + n_token])
                found += [self._starts[first:last] - self.begin, wrapped + n - self.begin]
                continue
            _, ends = self._passages(turn)
            found.append(turn * n + np.append(0, ends[:-1]))
        places = np.concatenate([np.empty(0, dtype=np.int64), *found])
        return places[: np.searchsorted(places, n_token)]

    def _once(self, begin: int, end: int) -> list[np.ndarray]:
        """A part of the text as it is read the first time, of at most N tokens."""
        n, place = len(self.text), self.begin + begin
        place -= n if place >= n else 0
        stop = place + end - begin
        return [self.text[place:stop]] if stop <= n else [self.text[place:], self.text[: stop - n]]

    def _passages(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the passages of a round stand in the first one, and where each ends in its own."""
        n = len(self.text)
        if self._starts is None:
            at = np.arange(0, n, _PASSAGE)
        else:
            at = np.roll((self._starts - self.begin) % n, -int(np.searchsorted(self._starts, self.begin)))
        length = np.diff(at, append=n)
        if turn:
            order = np.random.default_rng([*self.seed, turn]).permutation(len(at))
            at, length = at[order], length[order]
        return at, length.cumsum()


class Told(NamedTuple):
    """What is told in a text.

    Attributes:
        place: Of its first token.
        taken: Tokens of the text before it.
        tokens: Its token ids.
    """

    place: int
    taken: int
    tokens: np.ndarray

    @property
    def end(self) -> int:
        """Place of the token after it."""
        return self.place + len(self.tokens)


def weave(haystack: Haystack, told: Sequence[Told], begin: int, end: int) -> np.ndarray:
    """Token ids of a part of a text in which something is told, (end - begin,); ``told`` is in order."""
    parts, at, shift = [haystack.text[:0]], begin, 0
    for item in told[max(bisect.bisect_right(told, begin, key=attrgetter("place")) - 1, 0) :]:
        if item.place >= end:
            break
        if at < item.place:
            parts.append(haystack.tokens(item.taken - (item.place - at), item.taken))
            at = item.place
        parts.append(item.tokens[at - item.place : end - item.place])
        at, shift = max(at, min(end, item.end)), item.end - item.taken
    if at < end:
        parts.append(haystack.tokens(at - shift, end - shift))
    return np.concatenate(parts)


class Sentences(NamedTuple):
    """The sentences of a text that are not too short, one after the other.

    Attributes:
        tokens: Token ids, (N,).
        starts: Places where a sentence begins.
    """

    tokens: np.ndarray
    starts: np.ndarray


def sentences(tokens: np.ndarray, tokenizer: Tokenizer, least: int = 10) -> Sentences:
    """The sentences of a text with at least so many tokens.

    A sentence ends with a token that ends with `.`, `!` or `?` (and closing quotes or brackets), before a token that
    begins with white space, or is such a bracket. That is told by the tokens, so the text is never decoded.

    Raises:
        ConfigError: If there is none.
    """
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    closing = [bool(text) and not text.strip(_CLOSING) for text in texts]
    ending = [text.rstrip(_CLOSING).endswith(_ENDS) for text in texts]
    is_end, is_closing, is_begin = (
        np.array(part)[tokens] for part in (ending, closing, [text[:1].isspace() for text in texts])
    )
    is_end[1:] |= is_closing[1:] & is_end[:-1]  # one closing quote behind the full stop
    follows = np.append(is_begin[1:], True) if is_begin.any() else True  # some tokenizers decode no space alone
    cuts = np.append(0, np.flatnonzero(is_end & follows) + 1)
    cuts = cuts if cuts[-1] == len(tokens) else np.append(cuts, len(tokens))
    length = np.diff(cuts)
    keep = length >= least
    if not keep.any():
        raise ConfigError(
            f"the text of {len(tokens):,} tokens has no sentence of at least {least} tokens: give prose, with full "
            "stops, or a tokenizer of words or BPE"
        )
    kept = tokens[np.repeat(keep, length)]
    return Sentences(kept, np.append(0, length[keep].cumsum()[:-1]))
