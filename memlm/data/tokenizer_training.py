"""Tokenizers made of a corpus: characters, bytes, words or byte-level BPE."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memlm.config import ConfigError, did_you_mean
from memlm.data.tokenizer import CHAR_PATTERN, PAD, PIECE_CHARS, UNK, WORD_PATTERN, Tokenizer, pieces
from memlm.files import checked_file, read_checked

if TYPE_CHECKING:
    import tokenizers

    from memlm.data.corpora.base import Corpus

log = logging.getLogger(__name__)

KINDS = ("char", "byte", "word", "bpe")
# Raise it when training changes: tokenizers trained before are then ignored.
VERSION = 1

# Of a word that is longer than `PIECE_CHARS`, as the letters of a genome are, this many are trained on in one piece.
_WORD_CHARS = 1_000


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer; id 0 is always `<pad>`.

    Args:
        kind: `char`: every character of the documents, and `<unk>`. `byte`: the 256 bytes of UTF-8, lossless.
            `word`: the most frequent words and signs, each with the space before it, and `<unk>`; text of known words
            decodes exactly. `bpe`: byte-level byte-pair encoding as in GPT-2, lossless for any text.
        documents: The training text.
        vocab_size: Tokens of `word` and `bpe`, `<pad>` and `<unk>` counted. It is an upper bound: a small text
            has fewer. `char` and `byte` ignore it.

    Returns:
        The trained tokenizer; the same documents give the same one.

    Raises:
        ConfigError: Unknown kind, too small a vocabulary, or no text.
    """
    _check_kind(kind)
    least, most = {"word": 3, "bpe": 257}.get(kind, 0), 2**24
    if not least <= vocab_size <= most:
        raise ConfigError(f"vocab_size must be {least} to {most} for tokenizer kind {kind!r}, not {vocab_size}.")
    train = {"char": _train_char, "byte": _train_byte, "word": _train_word, "bpe": _train_bpe}[kind]
    return Tokenizer(train(documents, vocab_size))


def get_tokenizer(
    kind: str, vocab_size: int, path: str | None, corpus: Corpus, cache_dir: Path, also: Sequence[str] = ()
) -> Tokenizer:
    """Return the tokenizer that a config asks for: read from a file, taken from the cache, or trained.

    Several processes may ask at once: files appear whole, and training is deterministic, so all get the same one.

    Args:
        kind: As in `train_tokenizer`.
        vocab_size: As in `train_tokenizer`.
        path: A `tokenizer.json` to use instead; `kind` and `vocab_size` then have no say.
        corpus: Its train split is the training text.
        cache_dir: Where trained tokenizers are kept.
        also: More training text.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: A setting is wrong, or `path` cannot be read.
    """
    if path is not None:
        return Tokenizer.from_file(path)
    _check_kind(kind)
    if kind == "byte":
        return train_tokenizer(kind, (), vocab_size)  # the same for any text, which may take seconds to be read
    fingerprint = corpus.fingerprint()
    if also:
        fingerprint = hashlib.sha256("\0".join([fingerprint, *also]).encode()).hexdigest()
    name = f"{kind}-{vocab_size}-v{VERSION}-{fingerprint[:32]}.json"
    cached = Path(cache_dir) / "tokenizers" / name
    if (content := read_checked(cached)) is not None:
        try:
            return Tokenizer.from_json(str(content, "utf-8"))
        except ConfigError as error:  # of another version of the library
            log.warning("training tokenizer %s again: the cached file cannot be read (%s)", name, error)
    tokenizer = train_tokenizer(kind, [*corpus.documents("train"), *also], vocab_size)
    with checked_file(cached) as file:
        file.write(tokenizer.to_json().encode())
    log.info("trained a %s tokenizer of %d tokens on %s", kind, tokenizer.vocab_size, corpus.name)
    return tokenizer


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(
            f"unknown tokenizer kind {kind!r}: expected one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
        )


def _train_char(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import decoders

    characters: set[str] = set()
    for document in documents:
        characters.update(document)
    if not characters:
        raise ConfigError("a char tokenizer needs some text to train on; the documents are empty.")
    backend = _word_level([PAD, UNK, *sorted(characters)], CHAR_PATTERN)
    backend.decoder = decoders.Fuse()
    return backend


def _train_word(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, trainers

    counter = _word_level([UNK], WORD_PATTERN)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size - 2, min_frequency=1, show_progress=False)
    counter.train_from_iterator(_training_pieces(documents), trainer)
    vocab = counter.get_vocab()
    if not vocab:
        raise ConfigError("a word tokenizer needs some text to train on; the documents are empty.")
    backend = _word_level([PAD, UNK, *sorted(vocab, key=vocab.__getitem__)], WORD_PATTERN)
    # An unknown word has lost its space: give it one, except at the start of a line or of the text.
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(rf"(?<=\S){UNK}"), f" {UNK}")])
    return backend


def _word_level(words: list[str], pattern: str) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return backend


def _train_byte(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    return _byte_level(_byte_letters(), [])


def _train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import pre_tokenizers, trainers

    backend = _byte_level(_byte_letters(), [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one is <pad>
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_training_pieces(documents), trainer)
    model = json.loads(backend.to_str())["model"]
    words = sorted((word for word in model["vocab"] if word != PAD), key=model["vocab"].__getitem__)
    return _byte_level(words, [tuple(merge) for merge in model["merges"]])


def _byte_level(words: list[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Build a byte-level tokenizer with `<pad>` before `words`.

    `<pad>` is a plain entry of the vocabulary, out of reach of the merges, and not a special token: a text in which the
    letters "<pad>" happen to occur is encoded like any other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {word: i for i, word in enumerate([PAD, *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_letters() -> list[str]:
    """Return the letter by which GPT-2 writes each byte 0..255: itself if it is visible, else one from 256 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _training_pieces(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for piece in pieces(document):
            # Without a space in it: training takes time that grows with the square of the longest word.
            step = max(len(piece), 1) if len(piece) <= PIECE_CHARS else _WORD_CHARS
            yield from (piece[start : start + step] for start in range(0, len(piece), step))
