"""Kinds of tokens: parts of names seen far back in the document, of names new to it, and the rest.

A name is a word or identifier that is not among the most frequent ones of the training text. Kinds depend on text and
tokenizer alone, never on a model, so that they are the same for all that are compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from experiments.worth.settings import KINDS

if TYPE_CHECKING:
    from memlm.data.tokenizer import Tokenizer
    from memlm.data.tokens import TokenizedCorpus

FAR, NEW, REST = range(len(KINDS))

_WORD = re.compile(r"[^\W\d]\w*")
_COUNTED = 2_000_000  # tokens of training text, about, whose words are counted


def common_words(tokenizer: Tokenizer, train: TokenizedCorpus, share: float) -> set[str]:
    """The most frequent words of the training text, which make up a share of all of its words."""
    every = -(-train.n_token // _COUNTED)
    counts: Counter[str] = Counter()
    for i in range(0, train.n_document, every):
        counts.update(_WORD.findall(tokenizer.decode(train.document(i))))
    left, found = share * counts.total(), set()
    for word, count in counts.most_common():
        if left <= 0:
            break
        found.add(word)
        left -= count
    return found


def kinds_of(ids: np.ndarray, tokenizer: Tokenizer, common: Collection[str], distance: int) -> np.ndarray:
    """The kind of each token of a document, as an index into `KINDS`.

    Args:
        ids: The document from its beginning, (n,).
        tokenizer: What has encoded it.
        common: Words that are no names.
        distance: Tokens between a name and the end of its last mention beyond which it is far.

    Returns:
        (n,) int. All tokens of a name are of its kind; names mentioned within ``distance`` are rest.
    """
    texts = tokenizer.decode_each(ids.tolist())
    ends = np.cumsum([len(text) for text in texts])
    kinds = np.full(len(ids), REST)
    last: dict[str, int] = {}  # token with which the last mention ended
    for match in _WORD.finditer("".join(texts)):
        word = match[0]
        if word in common:
            continue
        first, final = (int(np.searchsorted(ends, at, side="right")) for at in (match.start(), match.end() - 1))
        if word not in last:
            kinds[first : final + 1] = NEW
        elif first - last[word] > distance:
            kinds[first : final + 1] = FAR
        last[word] = final
    return kinds
