"""Tokenizers: characters, bytes, words or byte-level BPE, all in the `tokenizer.json` format of `tokenizers`."""

from __future__ import annotations

import base64
import bisect
import hashlib
import itertools
import json
import logging
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.config import ConfigError, did_you_mean
from memlm.files import checked_file, from_home, open_regular, parse_json, read_checked
from memlm.printed import one_line

if TYPE_CHECKING:
    import tokenizers

    from memlm.data.corpora.base import Corpus

log = logging.getLogger(__name__)

KINDS = ("char", "byte", "word", "bpe")
PAD, UNK = "<pad>", "<unk>"
# Raise it when training changes: tokenizers trained before are then ignored.
VERSION = 1

# Characters encoded in one piece: the time that one string takes grows faster than its length.
PIECE_CHARS = 10_000
# Of a word that is longer than that, as the letters of a genome are, this many are trained on in one piece.
_WORD_CHARS = 1_000
# Characters on which it is measured whether a tokenizer keeps the text, and of a part of these.
SAMPLE_CHARS, _PART_CHARS = 32_000, 2_000
_HALF_WORD_BEFORE, _HALF_WORD_AFTER = re.compile(r"\A\S{1,200}(?=\s)"), re.compile(r"(?<=\s)\S{1,200}\Z")
# No kind trained here, nor GPT-2's, ever makes a token that goes from a visible character on to whitespace, so a
# document cut before such a whitespace encodes to the same tokens.
_LAST_CUT = re.compile(rf"(?s).{{1,{PIECE_CHARS}}}(?<=\S)(?=[ \n])")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEXT_CUT = re.compile(r"(?<=\S)(?=[ \n])")

_MOST_BYTES = 4  # of a character
MOST_IDS = 2**22
"""Ids of a vocabulary: the library counts them all, up to the largest."""

# One character each; words and signs each with the space before them (so that joining tokens gives the text back).
_CHAR_PATTERN = r"[\s\S]"
_WORD_PATTERN = r" ?\w+(?:['\u2019]\w+)*| ?[^\w\s]|\s"


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: What does the work. Truncation and padding are switched off: documents are encoded whole.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._json = backend.to_str()
        vocab = backend.get_vocab(with_added_tokens=True)
        self._size = max(vocab.values(), default=-1) + 1  # ids of a given tokenizer may have gaps
        self._unk = _unknown_id(json.loads(self._json)["model"])
        self._pad = next((vocab[name] for name in (PAD, "[PAD]", "<|pad|>", "<|padding|>") if name in vocab), None)
        self._cuttable = _is_cuttable(json.loads(self._json))
        self._adds_space = _adds_space(json.loads(self._json))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Rebuild a tokenizer from the text of a `tokenizer.json`.

        Raises:
            ConfigError: The text is not one.
        """
        import tokenizers

        with _refused("not a tokenizer.json of the tokenizers library ({}); save one with Tokenizer.save or to_json."):
            _check(parse_json(text))
            return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            ConfigError: The file is missing or is not a tokenizer.json.
        """
        path = from_home(path)
        try:
            with open_regular(path) as file:
                return cls.from_json(str(file.read(), "utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"tokenizer file {str(path)!r} does not exist; give the path of a tokenizer.json."
            ) from None
        except (ValueError, OSError) as error:  # ConfigError, or bytes that are not UTF-8
            raise ConfigError(f"tokenizer file {str(path)!r} cannot be read: {error}") from None

    def bare(self) -> Tokenizer:
        """Return the same tokenizer without what it would put around texts for others, such as ``<s>``."""
        return Tokenizer.from_json(json.dumps(json.loads(self._json) | {"post_processor": None}, ensure_ascii=False))

    def special_tokens(self) -> dict[str, str]:
        """Return its tokens for padding and for what it does not know, by the names they have in transformers."""
        found = {"pad_token": self._pad, "unk_token": self._unk}
        return {name: str(self._backend.id_to_token(i)) for name, i in found.items() if i is not None}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added before or after.

        Of a tokenizer that puts a space before every text, one that is there already counts as that space.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, encoded in parallel.

        What is no text (halves of surrogate pairs, left by invalid bytes) becomes U+FFFD.

        Raises:
            ConfigError: A given tokenizer has no token for what is in the text.
        """
        texts = [_SURROGATE.sub("\ufffd", text) for text in texts]
        if self._adds_space:
            texts = [text[1:] if text[:1] == " " and not text[1:2].isspace() else text for text in texts]
        pieces = [list(_pieces(text)) if self._cuttable else [text] for text in texts]
        flat = [piece for row in pieces for piece in row]
        with _refused("this tokenizer cannot encode the text ({}): use one that has a token for what it does not know"):
            encodings = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        return [[i for _ in row for i in next(encodings).ids] for row in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; padding is left out."""
        ids = [int(i) for i in ids if int(i) != self._pad]
        with _refused("the tokenizer cannot decode its own tokens ({}): use another one."):
            return self._backend.decode(ids, skip_special_tokens=False)

    def share_kept(self, documents: Sequence[str]) -> float:
        """Return the share of characters that are there again, in order, after encoding and decoding.

        What becomes the unknown token is lost. Measured on `SAMPLE_CHARS` characters from all over the documents.
        """
        parts = _sample(documents)
        found = (
            _n_common(part, self.decode(i for i in ids if i != self._unk))
            for part, ids in zip(parts, self.encode_batch(parts), strict=True)
        )
        return sum(found) / max(sum(map(len, parts)), 1)

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token; a character of several tokens stands with the last of them."""
        texts, begin = [], 0
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[begin:end])
            cut = text.endswith("\ufffd") and end < len(ids) and end - begin < _MOST_BYTES
            texts.append("" if cut else text)
            begin = begin if cut else end
        return texts

    @property
    def vocab_size(self) -> int:
        """Number of ids a model must know: the largest id plus one."""
        return self._size

    @property
    def pad_id(self) -> int:
        """Id to fill rows with. 0 where a given tokenizer has no padding token: padded places are masked anyway."""
        return 0 if self._pad is None else self._pad

    def to_json(self) -> str:
        """Return the text of a `tokenizer.json`."""
        return self._json

    def fingerprint(self) -> str:
        """Return the sha256, in hex, of the whole tokenizer."""
        return hashlib.sha256(self._json.encode()).hexdigest()


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


@contextmanager
def _refused(told: str) -> Iterator[None]:
    """Tell what the library refuses as a `ConfigError`, with its words in the place of ``{}``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and panics that are none
        raise ConfigError(told.format(one_line(error)[:300])) from None


def _check(content: Any) -> None:
    """Refuse a `tokenizer.json` on which the library would come to nothing, or take all memory.

    Raises:
        ValueError: What is wrong with it.
    """
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    vocab, unknown = model.get("vocab"), model.get("unk_token")
    if isinstance(vocab, dict):
        for token, i in vocab.items():
            if type(i) is not int or not 0 <= i < MOST_IDS:
                raise ValueError(f"the id of {reprlib.repr(token)} is {reprlib.repr(i)}, not in 0..{MOST_IDS - 1}")
        if unknown is not None and unknown not in vocab:
            raise ValueError(f"its unk_token {reprlib.repr(unknown)} is not in the vocabulary")
    for kind, part in _parts(content.get("normalizer")):
        if kind == "Precompiled":  # a table that begins with its length
            table = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
            if len(table) < 4 or int.from_bytes(table[:4], "little") > len(table) - 4:
                raise ValueError("the table of its normalizer is cut short")


def _parts(value: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """All mappings in a JSON value that say of which type they are."""
    if isinstance(value, dict) and "type" in value:
        yield value["type"], value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(part)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(
            f"unknown tokenizer kind {kind!r}: expected one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
        )


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about `PIECE_CHARS` characters, each but the first beginning with whitespace."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _LAST_CUT.match(text, start) or _NEXT_CUT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _is_cuttable(config: dict[str, Any]) -> bool:
    """Whether encoding piece by piece provably equals encoding the whole: GPT-2's way of splitting, or one of ours."""
    before = config["pre_tokenizer"] or {}
    if config["normalizer"] is not None:
        return False
    if before.get("type") == "ByteLevel":
        return before["use_regex"] and not before["add_prefix_space"]
    return before.get("type") == "Split" and before["pattern"].get("Regex") in (_CHAR_PATTERN, _WORD_PATTERN)


def _adds_space(config: dict[str, Any]) -> bool:
    """Whether a space is put before every text, as by the tokenizers of sentencepiece."""
    if any(kind == "Prepend" and part.get("prepend") == "\u2581" for kind, part in _parts(config["normalizer"])):
        return True
    return any(
        kind == "Metaspace" and part.get("prepend_scheme") in ("always", "first")
        for kind, part in _parts(config["pre_tokenizer"])
    )


def _unknown_id(model: dict[str, Any]) -> int | None:
    """Id of the token for what a model does not know; None if it has none."""
    vocab = model.get("vocab")
    return vocab.get(model.get("unk_token")) if isinstance(vocab, dict) else model.get("unk_id")


def _sample(documents: Sequence[str]) -> list[str]:
    """Parts of documents, about `SAMPLE_CHARS` in all, from places that are spread evenly."""
    ends = list(itertools.accumulate(map(len, documents)))
    if not ends or ends[-1] <= SAMPLE_CHARS:
        return list(documents)
    parts, n_part = [], SAMPLE_CHARS // _PART_CHARS
    for i in range(n_part):
        place, left = i * ends[-1] // n_part, _PART_CHARS
        index = bisect.bisect_right(ends, place)
        start = place - (ends[index - 1] if index else 0)
        while left > 0 and index < len(documents):
            part, whole = documents[index][start : start + left], documents[index]
            left -= len(part)
            # Words that are cut are none.
            if start > 0:
                part = _HALF_WORD_BEFORE.sub("", part)
            if start + len(part) < len(whole):
                part = _HALF_WORD_AFTER.sub("", part)
            parts.append(part)
            index, start = index + 1, 0
    return parts


def _n_common(text: str, other: str) -> int:
    """Length of the longest common subsequence, bit-parallel as in Hyyrö (2004)."""
    if text == other:
        return len(text)
    places: dict[str, int] = {}
    for i, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << i
    everywhere = (1 << len(text)) - 1
    row = everywhere
    for character in other:
        here = row & places.get(character, 0)
        row = ((row + here) | (row - here)) & everywhere
    return len(text) - row.bit_count()


def _train_char(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import decoders

    characters: set[str] = set()
    for document in documents:
        characters.update(document)
    if not characters:
        raise ConfigError("a char tokenizer needs some text to train on; the documents are empty.")
    backend = _word_level([PAD, UNK, *sorted(characters)], _CHAR_PATTERN)
    backend.decoder = decoders.Fuse()
    return backend


def _train_word(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, trainers

    counter = _word_level([UNK], _WORD_PATTERN)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size - 2, min_frequency=1, show_progress=False)
    counter.train_from_iterator(_training_pieces(documents), trainer)
    vocab = counter.get_vocab()
    if not vocab:
        raise ConfigError("a word tokenizer needs some text to train on; the documents are empty.")
    backend = _word_level([PAD, UNK, *sorted(vocab, key=vocab.__getitem__)], _WORD_PATTERN)
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
        for piece in _pieces(document):
            # Without a space in it: training takes time that grows with the square of the longest word.
            step = max(len(piece), 1) if len(piece) <= PIECE_CHARS else _WORD_CHARS
            yield from (piece[start : start + step] for start in range(0, len(piece), step))
