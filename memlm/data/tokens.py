"""Tokenised text on disk: every corpus is encoded once, into arrays whose files end with a checksum.

Shapes: N = tokens of one split, n_doc = its documents.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.corpora.base import shown_path
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
    return _cached(
        f"{corpus.fingerprint()} {tokenizer.fingerprint()}",
        split,
        lambda: corpus.documents(split),
        tokenizer,
        Path(cache_dir),
        f"split {split!r} of corpus {corpus.name!r}",
    )


def tokenize_file(path: str | Path, tokenizer: Tokenizer, cache_dir: Path, column: str = "text") -> TokenizedCorpus:
    """Encode a text of any length, piece by piece, or take it from the cache; it is never held as a whole.

    Args:
        path: See `memlm.data.corpora.streamed.pieces`.
        tokenizer: What encodes it.
        cache_dir: As for `tokenize`.
        column: Where `.jsonl` and `.parquet` keep the text.

    Returns:
        The tokens, in order of the file. Its "documents" are the pieces that were encoded in one go.

    Raises:
        ConfigError: The file is missing, empty, or no text.
    """
    from memlm.data.corpora.streamed import content, pieces

    return _cached(
        f"{content(path)} {column} {tokenizer.fingerprint()}",
        "file",
        lambda: pieces(path, column),
        tokenizer,
        Path(cache_dir),
        shown_path(path),
    )


def _cached(
    content: str,
    label: str,
    documents: Callable[[], Iterable[str]],
    tokenizer: Tokenizer,
    cache_dir: Path,
    where: str,
) -> TokenizedCorpus:
    """The tokens of documents, whose content and tokenizer ``content`` stands for."""
    key = hashlib.sha256(f"{FORMAT} {content}".encode()).hexdigest()[:32]
    folder = cache_dir / "tokens"
    tokens_path, offsets_path = folder / f"{key}-{label}-tokens.npy", folder / f"{key}-{label}-offsets.npy"
    cached = _load(tokens_path, offsets_path)
    if cached is not None:
        return cached

    tokens, offsets = _encode(documents(), tokenizer, label)
    if not len(tokens):
        raise ConfigError(f"{where} holds no token; give a longer text.")
    for path, array in ((tokens_path, tokens), (offsets_path, offsets)):
        with checked_file(path) as file:
            np.save(file, array)
    log.info("%s: tokenized", where)
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


def _encode(documents: Iterable[str], tokenizer: Tokenizer, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents in batches of bounded size; returns `(tokens, offsets)`."""
    from tqdm import tqdm

    n_char = sum(map(len, documents)) if isinstance(documents, list) else None  # how long a stream is nobody knows
    arrays: list[np.ndarray] = []
    hidden = n_char is not None and n_char < PROGRESS_CHARS
    with tqdm(total=n_char, desc=f"tokenizing {label}", unit="char", disable=hidden, delay=0 if n_char else 2) as bar:
        for batch in _batches(documents):
            arrays += [np.asarray(ids, dtype=np.int32) for ids in tokenizer.encode_batch(batch)]
            bar.update(sum(map(len, batch)))
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, dtype=np.int32), *arrays]), offsets


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in batches of at most `BATCH_CHARS`, or one."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if batch and size + len(document) > BATCH_CHARS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document)
    if batch:
        yield batch
