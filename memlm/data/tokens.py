"""Tokenised text on disk: every corpus is encoded once, into arrays whose files end with a checksum.

Shapes: N = tokens of one split, n_doc = its documents.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.files import checked_file, read_checked

if TYPE_CHECKING:
    from memlm.data.corpora.base import Corpus
    from memlm.data.tokenizer import Tokenizer


log = logging.getLogger(__name__)


# Raise it when the meaning of the cached arrays changes: old files are then ignored.
FORMAT = 1


# Characters encoded in one go: bounds the memory that the encodings need.
BATCH_CHARS = 2_000_000


# Below this many characters encoding is over before a progress bar is read.
PROGRESS_CHARS = 20_000_000


class TokenizedCorpus(NamedTuple):
    """The tokens of one split, all documents one after the other.

    Attributes:
        tokens: (N,) int32, read-only when it comes from the cache, and mapped when it is large.
        offsets: (n_doc + 1,) int64; document `i` is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def n_token(self) -> int:
        """Number of tokens in all documents."""
        return len(self.tokens)

    @property
    def n_document(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document `i`, (length,) int32, without copying.

        Raises:
            IndexError: `i` is not in `[0, n_document)`.
        """
        if not 0 <= i < self.n_document:
            raise IndexError(f"document {i} does not exist: there are {self.n_document}, counted from 0")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def tokenize(corpus: Corpus, tokenizer: Tokenizer, split: str, cache_dir: Path) -> TokenizedCorpus:
    """Encode one split of a corpus, or take it from the cache.

    The cache is keyed by the content of the corpus, the tokenizer and the split. A cache file in which any bit has
    changed is built again.

    Args:
        corpus: The text.
        tokenizer: What encodes it.
        split: `train`, `val` or `test`.
        cache_dir: Where the arrays are kept, usually `memlm.files.cache_dir()`.

    Returns:
        The tokens; mapped if they are large, see `memlm.files.read_checked`.

    Raises:
        ConfigError: The split does not exist or holds no token.
    """
    key = hashlib.sha256(f"{FORMAT} {corpus.fingerprint()} {tokenizer.fingerprint()}".encode()).hexdigest()[:32]
    folder = Path(cache_dir) / "tokens"
    tokens_path, offsets_path = folder / f"{key}-{split}-tokens.npy", folder / f"{key}-{split}-offsets.npy"
    cached = _load(tokens_path, offsets_path)
    if cached is not None:
        return cached

    tokens, offsets = _encode(corpus.documents(split), tokenizer, split)
    if not len(tokens):
        raise ConfigError(f"split {split!r} of corpus {corpus.name!r} holds no token; give a longer text.")
    for path, array in ((tokens_path, tokens), (offsets_path, offsets)):
        with checked_file(path) as file:
            np.save(file, array)
    log.info("%s, %s: tokenized", corpus.name, split)
    cached = _load(tokens_path, offsets_path)
    # Another process may be clearing the cache: what is in memory is right in any case.
    return TokenizedCorpus(tokens, offsets) if cached is None else cached


def _load(tokens_path: Path, offsets_path: Path) -> TokenizedCorpus | None:
    """Return the cached arrays, or None when they are missing, damaged or do not fit together."""
    contents = read_checked(tokens_path), read_checked(offsets_path)
    if contents[0] is None or contents[1] is None:
        return None
    tokens, offsets = _array(contents[0]), _array(contents[1])
    if (
        (tokens.dtype, tokens.ndim, offsets.dtype, offsets.ndim) == (np.int32, 1, np.int64, 1)
        and len(offsets) > 1
        and offsets[0] == 0
        and offsets[-1] == len(tokens)
        and bool((np.diff(offsets) >= 0).all())
    ):
        return TokenizedCorpus(tokens, offsets)
    log.warning("%s does not fit to its offsets: made again", tokens_path)
    return None


def _array(content: memoryview) -> np.ndarray:
    """Return the array that `np.save` has written, without copying it."""
    head = io.BytesIO(content[:1024])
    np.lib.format.read_magic(head)
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    return np.frombuffer(content, dtype, math.prod(shape), head.tell()).reshape(shape)


def _encode(documents: list[str], tokenizer: Tokenizer, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents in batches of bounded size; returns `(tokens, offsets)`."""
    from tqdm import tqdm

    n_char = sum(map(len, documents))
    arrays: list[np.ndarray] = []
    with tqdm(total=n_char, desc=f"tokenizing {split}", unit="char", disable=n_char < PROGRESS_CHARS) as bar:
        start = 0
        while start < len(documents):
            stop, size = start, 0
            while stop < len(documents) and (stop == start or size + len(documents[stop]) <= BATCH_CHARS):
                size += len(documents[stop])
                stop += 1
            arrays += [np.asarray(ids, dtype=np.int32) for ids in tokenizer.encode_batch(documents[start:stop])]
            bar.update(size)
            start = stop
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, dtype=np.int32), *arrays]), offsets
