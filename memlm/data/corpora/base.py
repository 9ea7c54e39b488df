"""Corpora: where text comes from, as documents in a train, a val and a test split."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from memlm.config import ConfigError, did_you_mean

log = logging.getLogger(__name__)


SPLITS = ("train", "val", "test")


# Share of the text held out for val, and again for test.
HELD_OUT = 0.05


# With fewer documents each one is split by position, so that every split sees every document's kind of text.
FEW_DOCUMENTS = 20


# How rows of a table become documents.
Document = Literal["auto", "row", "join", "heading"]


_TITLE = re.compile(r" ?= [^=\n]*[^=\s] =[ \r\n]*")  # of an article of WikiText; its parts have more signs


class Corpus:
    """Text in three splits. A subclass sets `name` and says in `_load` what the splits hold.

    Attributes:
        name: For logs and reports.
    """

    name: str

    def documents(self, split: str) -> list[str]:
        """Return the documents of a split, in the same order every time.

        Args:
            split: `train`, `val` or `test`.

        Raises:
            ConfigError: The split is unknown or empty, or the text cannot be had.
        """
        if split not in SPLITS:
            raise ConfigError(
                f"unknown split {split!r}: expected one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        documents = self._splits[split]
        if not documents:
            raise ConfigError(f"corpus {self.name!r} is too short to have a {split} split; give a longer text.")
        return list(documents)

    def fingerprint(self) -> str:
        """Return the sha256, in hex, of all documents and of which split each is in."""
        return self._sha256

    def _load(self) -> dict[str, list[str]]:
        """Return the documents of all splits; called once."""
        raise NotImplementedError

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        return self._load()

    @cached_property
    def _sha256(self) -> str:
        digest = content_hash(self._splits)
        sizes = ", ".join(f"{split} {sum(map(len, self._splits[split])):,}" for split in SPLITS)
        log.info("corpus %s: characters: %s; sha256 %s", self.name, sizes, digest)
        return digest


def as_documents(rows: Sequence[str | None], document: Document, where: str, of_lines: bool = False) -> list[str]:
    """Make documents of the rows of a table; rows without text (null) are left out, and counted in the log.

    A table is taken to be of lines if at most a hundredth of its rows has a line break inside, and most rows end in
    one or one in twenty is blank (WikiText is both).

    Args:
        rows: The text of each row.
        document: `row`: each is a document. `join`: all are one. `heading`: one begins at each title as WikiText
            writes it (` = Title = `). `auto`: `row`, but for a table of lines `heading`, or `join` if it has no titles.
        where: What the table is called.
        of_lines: Whether the table was made of the lines of a text file.

    Returns:
        The documents. Some may be blank.

    Raises:
        ConfigError: If there is no title to begin a document at.
    """
    texts = [row for row in rows if row is not None]
    if len(texts) < len(rows):
        log.warning("%s: %d of %d rows are null and left out", where, len(rows) - len(texts), len(rows))
    titles = [i for i, text in enumerate(texts) if _TITLE.fullmatch(text)]
    if document == "heading" and not titles:
        raise ConfigError(f"{where}: no row is a title such as ' = Title = ': give another document, such as join.")
    if document == "row" or (document == "auto" and not (_of_lines(texts, of_lines))):
        return texts
    starts = titles if titles and document != "join" else []
    end = "" if sum(text.endswith("\n") for text in texts) * 2 > len(texts) else "\n"
    cuts = [0, *(i for i in starts if i > 0), len(texts)]
    documents = [end.join(texts[start:stop]) + end for start, stop in itertools.pairwise(cuts) if stop > start]
    if document == "auto":
        log.info(
            "%s: its %d rows are lines, joined to %d documents; data.corpus.document=row makes a document of each",
            where, len(texts), sum(bool(text.strip()) for text in documents),
        )  # fmt: skip
    return documents


def _of_lines(texts: Sequence[str], known: bool) -> bool:
    """Whether rows are the lines of longer texts."""
    full = [text for text in texts if text.strip()]
    if known or not full:
        return known
    broken = sum("\n" in text.strip("\r\n") for text in full)
    ended = sum(text.endswith("\n") for text in full)
    return 100 * broken <= len(full) and (2 * ended > len(full) or 20 * (len(texts) - len(full)) >= len(texts))


def check_document(document: str) -> None:
    """Raise ConfigError unless there is such a way to make documents of rows."""
    options = get_args(Document)
    if document not in options:
        raise ConfigError(
            f"document must be one of {', '.join(options)}, not {document!r}.{did_you_mean(document, options)}"
        )


def split_documents(
    documents: list[str], held_out: Sequence[str] = ("val", "test"), share: float = HELD_OUT
) -> dict[str, list[str]]:
    """Hold out 5 % of the text for each split of `held_out`; the rest is `train`.

    With `FEW_DOCUMENTS` or more different documents whole documents are chosen, by a hash of their text, so equal ones
    stay together. With fewer, each document is cut by position, at the end of a line or between two words where
    there is one near; the parts joined in the order train, val, test are the document.

    Args:
        documents: The text.
        held_out: Names of the splits to make beside `train`.
        share: How much to hold out for each, in place of 5 %.

    Returns:
        The documents of each split. Splits of a very short text may be empty.
    """
    splits: dict[str, list[str]] = {"train": [], **{name: [] for name in held_out}}
    digests = [hashlib.sha256(document.encode()).digest() for document in documents]
    distinct = sorted(set(digests))
    if len(distinct) < FEW_DOCUMENTS:
        for document in documents:
            places = [1 - share * (len(held_out) - i) for i in range(len(held_out))]
            cuts = [0, *(_cut_near(document, place) for place in places), len(document)]
            for name, (start, stop) in zip(splits, itertools.pairwise(cuts), strict=True):
                if document[start:stop].strip():
                    splits[name].append(document[start:stop])
        return splits
    n_held = max(1, round(share * len(distinct)))
    home = {d: name for i, name in enumerate(held_out) for d in distinct[i * n_held : (i + 1) * n_held]}
    for document, digest in zip(documents, digests, strict=True):
        splits[home.get(digest, "train")].append(document)
    return splits


def _cut_near(text: str, share: float) -> int:
    """Return the place after the line end, else after the space, that is nearest to `share` of the text."""
    target, reach = round(share * len(text)), round(0.4 * HELD_OUT * len(text))
    for pattern in ("\n", r"\s"):
        places = [m.end() for m in re.compile(pattern).finditer(text, target - reach, target + reach)]
        if places:
            return min(places, key=lambda place: abs(place - target))
    return target


def content_hash(splits: dict[str, list[str]]) -> str:
    """A fingerprint of all documents and of how they are split."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in splits[split]:
            data = document.encode()
            digest.update(f"{split} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


def shown_path(path: str | Path) -> str:
    """A path as an error shows it."""
    text = repr(str(path))
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]} ({len(str(path))} characters)"


_BYTE_ORDER_MARKS = {  # the longer ones first
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}


_MANY_ZEROS: dict[
    tuple[bool, ...], str
] = {  # which bytes of four are zero in most places of a text of Latin, or any, letters
    (False, True, True, True): "UTF-32-LE",
    (True, True, True, False): "UTF-32-BE",
    (False, False, True, True): "UTF-32-LE",
    (True, True, False, False): "UTF-32-BE",
    (False, True, False, True): "UTF-16-LE",
    (True, False, True, False): "UTF-16-BE",
}


def wide_encoding(data: bytes) -> str | None:
    """Name the encoding that has two or four bytes for each letter, if it looks like one."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return name
    start = data[:4096]
    zeros = tuple(2 * start[i::4].count(0) > len(start[i::4]) for i in range(4))
    return _MANY_ZEROS.get(zeros)


def unix(text: str) -> str:
    """A text whose lines end in a line feed, however they did."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unescaped(separator: str) -> str:
    """A separator in which line ends and tabs may be written with a backslash."""
    signs = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return unix(re.sub(r"\\([ntr\\])", lambda found: signs[found[1]], separator))


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
