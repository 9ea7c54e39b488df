"""Text cut into passages to be stored, each a segment at most, and read by a model.

Shapes: B rows (1 here), T tokens per segment, S segments of a call.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from memlm.config import ConfigError
from memlm.models.base import LanguageModel

_WINDOW = 2**13  # tokens that are stored by one call, at most
_BATCH = 1024  # sentences encoded at a time
_PROGRESS = 2.0  # seconds after which a progress bar appears
# Where a text may be cut without other tokens on either side: after a sentence or before a new line.
_SENTENCE = re.compile(r"(?<=[.!?])(?=\s)|(?<=\S)(?=\n)")


def progress_bar(parts: Iterable[Any], what: str) -> Iterable[Any]:
    """``parts`` with a progress bar on a terminal, if it takes long."""
    from tqdm import tqdm

    return tqdm(parts, desc=what, disable=None, delay=_PROGRESS, leave=False)


def encode_text(model: LanguageModel, text: str) -> list[int]:
    """Token ids of a text as the operations read it: it begins with a space, like a sentence inside of text.

    What is no text (halves of surrogate pairs, left by invalid bytes) becomes U+FFFD.

    Raises:
        ConfigError: If it is empty.
    """
    return list(itertools.chain.from_iterable(passages_of(model, text)))


def passages_of(model: LanguageModel, text: str) -> Iterator[list[int]]:
    """Token ids of passages of whole sentences of up to a segment; longer sentences are cut."""
    if not isinstance(text, str):
        raise ConfigError(f"a text must be a str, got {type(text).__name__}; decode bytes with errors='replace'")
    text = text if text[:1].isspace() else f" {text}"
    passages = _packed(model, _SENTENCE.split(text))
    first = next(passages, None) if text.strip() else None
    if first is None:
        raise ConfigError("the text is empty, or the tokenizer makes nothing of it: give some words")
    return itertools.chain([first], passages)


def _packed(model: LanguageModel, sentences: list[str]) -> Iterator[list[int]]:
    passage: list[int] = []
    for begin in range(0, len(sentences), _BATCH):
        for sentence in model.tokenizer.encode_batch(sentences[begin : begin + _BATCH]):
            if passage and len(passage) + len(sentence) > model.segment_len:
                yield passage
                passage = []
            passage, begins = passage + sentence, 0
            while len(passage) - begins > model.segment_len:
                yield passage[begins : begins + model.segment_len]
                begins += model.segment_len
            passage = passage[begins:]
    if passage:
        yield passage


def absorbed(model: LanguageModel, passages: Iterator[list[int]], state: Any, document: int) -> Iterator[Any]:
    """``state``, which is given away, after some passages and more, each in a context of its own.

    They are read without memory. A window ends with an empty segment, which closes the context of the last passage.
    """
    local = state.local
    state = state._replace(local=local._replace(document=torch.full_like(local.document, document)))
    n = max(1, _WINDOW // model.segment_len)
    for window in progress_bar(iter(lambda: list(itertools.islice(passages, n)), []), "storing"):
        rows = [torch.tensor(passage) for passage in window]
        ids = torch.stack([F.pad(row, (0, model.segment_len - len(row))) for row in rows])
        valid = torch.stack([torch.arange(model.segment_len) < len(row) for row in rows])
        ids, mask = (F.pad(part, (0, 0, 0, 1)).flatten()[None].to(local.ids.device) for part in (ids, valid))
        breaks = torch.ones(1, len(rows) + 1, dtype=torch.bool, device=ids.device)
        breaks[:, 0] = False
        state = model.absorb(ids, state, read=False, mask=mask, breaks=breaks, donate=True)
        yield state
