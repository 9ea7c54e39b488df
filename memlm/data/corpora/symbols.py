"""No text: symbols, for tasks that make all of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memlm.config import ConfigError
from memlm.data.tokens import TokenizedCorpus

if TYPE_CHECKING:
    from memlm.data.tokenizer import Tokenizer
from memlm.data.corpora.base import SPLITS, Corpus


class Symbols(Corpus):
    """A vocabulary of symbols for tasks that make their own documents: ` s0 s1 s2 ...`, over and over.

    The text says which symbols there are and nothing else; it is the same in every split. Tokenize it by words.

    Args:
        n_symbol: Symbols of the vocabulary.
    """

    LEAST = 4096  # symbols of a split, so that it is longer than a segment of any usual model

    def __init__(self, n_symbol: int):
        if not 2 <= n_symbol <= 10**6:
            raise ConfigError(f"data.corpus.n_symbol must be in 2..1000000, not {n_symbol}.")
        self.name = f"{n_symbol} symbols"
        self._n_symbol = n_symbol

    def _load(self) -> dict[str, list[str]]:
        symbols = "".join(f" s{i}" for i in range(self._n_symbol))
        return {split: [symbols * -(-self.LEAST // self._n_symbol)] for split in SPLITS}


def symbols_of(tokenizer: Tokenizer, train: TokenizedCorpus) -> np.ndarray:
    """Token ids of the symbols of a `Symbols` text, in their order, (n_symbol,), int64.

    Raises:
        ConfigError: If the text is another, or the tokenizer does not keep its symbols whole.
    """
    symbols = train.tokens[: len(np.unique(train.tokens))].astype(np.int64)
    if tokenizer.decode(symbols.tolist()) != "".join(f" s{i}" for i in range(len(symbols))):
        raise ConfigError(
            "this task makes documents of symbols, and the training text is no list of them: use data=symbols, whose "
            "tokenizer has kind word and a vocab_size above data.corpus.n_symbol + 1."
        )
    return symbols
