"""Text of tokens that come one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from memlm.data.tokenizer import Tokenizer

_MOST_BYTES = 4  # of a character, and so the most tokens of one


class GrowingText:
    """The text of a row of tokens, piece by piece; all pieces together are the text of all tokens.

    Args:
        tokenizer: What makes text of tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context, self._given = 0, 0  # tokens whose text was given before the last piece, and with it

    def add(self, ids: Sequence[int]) -> str:
        """What ``ids`` add to the text; of a character that is not whole nothing yet."""
        self._ids += ids
        return self._piece(whole=True)

    def end(self) -> str:
        """What is left."""
        return self._piece(whole=False)

    def _piece(self, whole: bool) -> str:
        """Text that was not given. What stands before it is decoded with it, as it may decide on a space between."""
        before, text = (self._tokenizer.decode(self._ids[self._context : end]) for end in (self._given, None))
        if whole and text.endswith("\ufffd") and len(self._ids) - self._given < _MOST_BYTES:
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(before) :]
