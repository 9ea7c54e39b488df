"""Which token comes next, and when a text ends.

Arguments have the names and meanings of ``generate`` of Hugging Face.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.data.tokenizer import Tokenizer


class Sampling(NamedTuple):
    """How a text goes on; see `memlm.models.generation.generate` for what each means."""

    max_new_tokens: int = 100
    do_sample: bool = True
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = 0.9
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None

    @property
    def draws(self) -> bool:
        """Whether chance decides."""
        return self.do_sample and self.temperature > 0

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text."""
        return _listed(self.eos_token_id)

    @property
    def stop_texts(self) -> list[str]:
        """Strings that end a text."""
        return _listed(self.stop_strings)

    def choose(self, logits: Tensor, said: Tensor | None = None) -> Tensor:
        """One token (B,) for each row of ``logits`` (B, V).

        Args:
            logits: The logits.
            said: Which tokens stand in each row, (B, V); needed for a penalty.
        """
        if self.repetition_penalty != 1:
            assert said is not None
            penalty = self.repetition_penalty
            logits = torch.where(said, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        if not self.draws:
            return logits.argmax(dim=-1)
        logits, index = logits.float() / self.temperature, None
        if self.top_k is not None:
            logits, index = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        elif self.top_p is not None and self.top_p < 1:
            logits, index = logits.sort(dim=-1, descending=True)
        mass = logits.softmax(dim=-1)
        if self.top_p is not None and index is not None:
            mass = mass.masked_fill(mass.cumsum(dim=-1) - mass >= self.top_p, 0)  # the mass before it already suffices
        drawn = torch.multinomial(mass, 1)
        return (drawn if index is None else index.gather(1, drawn))[:, 0]


def _listed(given: Any) -> list[Any]:
    """One or several, as a list."""
    return [] if given is None else [given] if isinstance(given, str) or not isinstance(given, Sequence) else [*given]


class Ends:
    """When the texts of rows end.

    Args:
        how: How texts go on.
        tokenizer: What makes text of tokens; needed for ``stop_strings``.
        device: Where tokens are.

    Attributes:
        pad_id: What follows a text that has ended.
    """

    def __init__(self, how: Sampling, tokenizer: Tokenizer | None, device: torch.device) -> None:
        ids = how.eos_ids
        own = ids[0] if ids else tokenizer.pad_id if tokenizer is not None and how.stop_texts else 0
        self.pad_id = own if how.pad_token_id is None else how.pad_token_id
        self._ids = torch.tensor(ids, device=device) if ids else None
        self._strings, self._tokenizer = how.stop_texts, tokenizer
        self._reach = max((len(text.encode()) for text in how.stop_texts), default=0)  # a token has a byte at least

    def __bool__(self) -> bool:
        """Whether there is anything that ends a text."""
        return self._ids is not None or bool(self._strings)

    def ended(self, new: Tensor) -> list[int]:
        """The rows of ``new`` tokens (B, n) that end with the last one."""
        if self._ids is None:
            ended = torch.zeros(len(new), dtype=torch.bool)
        else:
            ended = torch.isin(new[:, -1], self._ids).cpu()
        if self._strings:
            assert self._tokenizer is not None
            for row, tail in enumerate(new[:, -self._reach :].tolist()):
                text = self._tokenizer.decode(tail)
                if any(string in text for string in self._strings):
                    ended[row] = True
        return ended.nonzero()[:, 0].tolist()
