"""Corpora: where text comes from, as documents in a train, a val and a test split."""

from __future__ import annotations

import ast
import codecs
import contextlib
import glob
import hashlib
import inspect
import itertools
import json
import logging
import os
import platform
import re
import sysconfig
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from memlm.config import ConfigError, did_you_mean
from memlm.data.tokens import TokenizedCorpus
from memlm.files import cache_dir, checked_file, read_checked

if TYPE_CHECKING:
    from memlm.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# Share of the text held out for val, and again for test.
HELD_OUT = 0.05
# With fewer documents each one is split by position, so that every split sees every document's kind of text.
FEW_DOCUMENTS = 20
# What data sets of the hub call their held-out splits.
OWN_NAMES = {"val": ("validation", "valid", "val", "dev"), "test": ("test",)}
# How rows of a table become documents.
Document = Literal["auto", "row", "join", "heading"]
_TITLE = re.compile(r" ?= [^=\n]*[^=\s] =[ \r\n]*")  # of an article of WikiText; its parts have more signs
# Seconds to find out whether a server can be reached.
PROBE_SECONDS = 5.0


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
        digest = _content_hash(self._splits)
        sizes = ", ".join(f"{split} {sum(map(len, self._splits[split])):,}" for split in SPLITS)
        log.info("corpus %s: characters: %s; sha256 %s", self.name, sizes, digest)
        return digest


class Builtin(Corpus):
    """English text that every Python has: the help topics of `pydoc` and the docstrings of the standard library.

    Nothing is downloaded. One document is one topic, or the docstrings (80 or more characters) of one top-level
    module or package. No paragraph occurs twice, and no 13 words in a row of val or test occur in train. The text
    differs between Python versions: never compare losses across them (the log tells the sha256).
    """

    # Raise it when the text or the splits change: what was cached before is then ignored.
    VERSION = 1

    def __init__(self) -> None:
        self.name = "builtin"

    def _load(self) -> dict[str, list[str]]:
        path = cache_dir() / f"builtin-v{self.VERSION}-python{platform.python_version()}.json"
        if (content := read_checked(path)) is not None:
            return json.loads(bytes(content))
        splits = _disjoint_splits({**_docstrings(), **_topics()})
        with checked_file(path) as file:
            file.write(json.dumps(splits).encode())
        return splits


class TextFiles(Corpus):
    r"""Text files on disk.

    With 20 or more different documents, 5 % of them are val and 5 % test, chosen by a hash of their text; with fewer,
    each document is cut by position into 90 % train, 5 % val and 5 % test.

    Args:
        path: A file or a glob pattern (`**` matches folders): `.txt` (UTF-8, a document per file), `.jsonl` (a
            row per line) or `.parquet`. Line ends of `.txt` become `\n`.
        column: Where jsonl and parquet keep the text; rows without text (null) are left out and counted.
        document_separator: Splits a `.txt` file into documents, e.g. `"\n\n\n"`; `\n`, `\t`, `\r` and `\\` may be
            written with a backslash.
        document: How rows of jsonl and parquet, or lines of `.txt`, become documents; see `as_documents`. With `auto`
            a `.txt` file is one document, but for `document_separator`.

    Raises:
        ConfigError: Also if the separator is nowhere in the text.
    """

    def __init__(
        self, path: str, column: str = "text", document_separator: str | None = None, document: Document = "auto"
    ):
        _check_document(document)
        if document_separator == "":
            raise ConfigError("document_separator is empty: give the text between two documents, or null for none.")
        if document_separator is not None and document != "auto":
            raise ConfigError(
                f"document_separator and document={document} both say where a document ends: leave one of them alone "
                "(document_separator=null, document=auto)."
            )
        self.name = str(path)
        self._column = column
        self._separator = None if document_separator is None else _unescaped(document_separator)
        self._separated = False  # whether any file was split
        self._document = document

    def _load(self) -> dict[str, list[str]]:
        paths = _find(self.name)
        documents = [document for path in paths for document in self._read(path)]
        if self._separator is not None and not self._separated:
            raise ConfigError(
                f"document_separator {self._separator!r} occurs nowhere in {_shown(self.name)}: write it as it stands "
                "in the .txt files, or give null for a document per file."
            )
        return split_documents(documents)

    def _read(self, path: Path) -> list[str]:
        """Return the documents of one file."""
        readers: dict[str, Callable[[Path], list[str]]] = {
            ".txt": self._read_txt,
            ".jsonl": self._read_jsonl,
            ".parquet": self._read_parquet,
        }
        if path.suffix.lower() not in readers:
            raise ConfigError(
                f"cannot read {str(path)!r}: its name must end in {', '.join(readers)}."
                f"{did_you_mean(path.suffix, readers)}"
            )
        documents = [document for document in readers[path.suffix.lower()](path) if document.strip()]
        if not documents:
            raise ConfigError(f"{str(path)!r} holds no text; remove it from data.path or fill it.")
        return documents

    def _read_txt(self, path: Path) -> list[str]:
        text = _unix(_decode(path))
        if self._separator is not None:
            documents = text.split(self._separator)
            self._separated = self._separated or len(documents) > 1
            return documents
        if self._document in ("row", "heading"):
            return as_documents(text.splitlines(keepends=True), self._document, str(path))
        return [text]

    def _read_jsonl(self, path: Path) -> list[str]:
        rows: list[str | None] = []
        # Not splitlines: a JSON string may contain other line separators, such as U+2028.
        for number, line in enumerate(_decode(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); expected one object per line.") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: expected a JSON object, not {type(row).__name__}.")
            if self._column not in row:
                raise ConfigError(_no_column(f"{path}, line {number}", self._column, row))
            rows.append(_checked(row[self._column], f"{path}, line {number}", self._column))
        return as_documents(rows, self._document, str(path))

    def _read_parquet(self, path: Path) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            if self._column not in file.schema_arrow.names:
                raise ConfigError(_no_column(str(path), self._column, file.schema_arrow.names))
            values = file.read(columns=[self._column])[self._column].to_pylist()
        except ConfigError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:  # also text that is not UTF-8
            raise ConfigError(
                f"{str(path)!r} cannot be read as parquet ({_first_line(error)}); write it again."
            ) from None
        rows = [_checked(value, f"{path}, row {i}", self._column) for i, value in enumerate(values)]
        return as_documents(rows, self._document, str(path))


class Shakespeare(Corpus):
    """Tiny Shakespeare: 1.1 MB of plays, cut by position into 90 % train, 5 % val and 5 % test.

    Source: Karpathy, char-rnn. The text is downloaded once and then kept in the cache folder.

    Args:
        path: A `.txt` file to read instead of downloading.
    """

    URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

    def __init__(self, path: str | None = None):
        self.name = "shakespeare"
        self._path = path

    def _load(self) -> dict[str, list[str]]:
        if self._path is not None:
            return TextFiles(self._path)._load()
        cached = cache_dir() / "shakespeare.txt"
        content = read_checked(cached)
        text = self._download() if content is None else str(content, "utf-8")
        if content is None:
            with checked_file(cached) as file:
                file.write(text.encode())
        return split_documents([text])

    def _download(self) -> str:
        advice = "connect to the network once, or put the text in a file and give data.path=FILE."
        if not _reachable(self.URL):
            raise ConfigError(f"Tiny Shakespeare is not in the cache and {self.URL} cannot be reached; {advice}")
        import datasets

        try:
            rows = datasets.load_dataset("text", data_files=self.URL, sample_by="document", split="train")
        except _load_errors() as error:
            raise ConfigError(f"Tiny Shakespeare cannot be downloaded ({_first_line(error)}); {advice}") from error
        return "".join(rows["text"])


class Hub(Corpus):
    """Any text data set of the Hugging Face hub, or a local folder that `datasets.load_dataset` understands.

    Train is `split`. Val and test are the data set's own validation and test splits; where it has none, they are
    carved from train (5 % each) like those of `TextFiles`. What was downloaded once works without a network.

    Args:
        name: The data set, e.g. `roneneldan/TinyStories`.
        config: Which of its configurations, e.g. `wikitext-2-raw-v1`.
        column: Where it keeps the text.
        split: The split to train on; slices such as `train[:10%]` are allowed.
        max_documents: Read at most this many rows of each split, streaming instead of downloading all.
        document: How rows become documents; see `as_documents`.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        column: str = "text",
        split: str = "train",
        max_documents: int | None = None,
        document: Document = "auto",
    ):
        _check_document(document)
        if max_documents is not None and max_documents < 1:
            raise ConfigError(f"max_documents must be at least 1, or null for all; not {max_documents}.")
        self.name = name
        self._config = config
        self._column = column
        self._split = split
        self._max = max_documents
        self._document = document

    def _load(self) -> dict[str, list[str]]:
        import datasets

        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        online = Path(self.name).exists() or _reachable(endpoint)
        with contextlib.nullcontext() if online else _offline():
            try:
                loaded = datasets.load_dataset(self.name, self._config, streaming=self._max is not None)
                source, bracket, _ = self._split.partition("[")
                if source not in loaded:
                    raise ConfigError(
                        f"data set {self.name!r} has no split {source!r}: expected one of {', '.join(loaded)}."
                        f"{did_you_mean(source, loaded)}"
                    )
                if bracket and self._max is not None:
                    raise ConfigError(f"split {self._split!r} cannot be streamed: drop the slice or max_documents.")
                rows = datasets.load_dataset(self.name, self._config, split=self._split) if bracket else loaded[source]
                train = self._texts(rows, source)
                own = {
                    split: self._texts(loaded[theirs], theirs)
                    for split, names in OWN_NAMES.items()
                    if (theirs := next((n for n in names if n in loaded and n != source), None)) is not None
                }
            except ConfigError:
                raise
            except _load_errors() as error:
                configs = re.search(r"(?:available configs|Available): \[(.*)\]", str(error))
                if configs is not None:
                    problem = "its configuration is missing" if self._config is None else f"no {self._config!r} in it"
                    advice = f"give data.corpus.config=NAME, one of {configs[1].replace(chr(39), '')}"
                elif online:
                    problem, advice = _first_line(error), "check data.name and data.corpus.config"
                else:
                    problem = f"not in the cache, and {endpoint} cannot be reached"
                    advice = "connect to the network once, or use a file with data=text data.path=FILE"
                raise ConfigError(f"data set {self.name!r} cannot be loaded: {problem}; {advice}.") from error
        if not train:
            raise ConfigError(f"data set {self.name!r} holds no text in column {self._column!r} of {self._split!r}.")
        missing = [split for split in ("val", "test") if not own.get(split)]
        return {**own, **split_documents(train, missing)}

    def _texts(self, rows: Any, split: str) -> list[str]:
        """Return the documents of a split."""
        texts: list[str | None] = []
        of = f"data set {self.name!r}, split {split!r}"
        for i, row in enumerate(itertools.islice(rows, self._max)):
            where = f"{of}, row {i}"
            if self._column not in row:
                raise ConfigError(_no_column(where, self._column, row))
            texts.append(_checked(row[self._column], where, self._column))
        documents = as_documents(texts, self._document, of, of_lines=rows.info.builder_name == "text")
        return [document for document in documents if document.strip()]


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


def _check_document(document: str) -> None:
    options = get_args(Document)
    if document not in options:
        raise ConfigError(
            f"document must be one of {', '.join(options)}, not {document!r}.{did_you_mean(document, options)}"
        )


def split_documents(documents: list[str], held_out: Sequence[str] = ("val", "test")) -> dict[str, list[str]]:
    """Hold out 5 % of the text for each split of `held_out`; the rest is `train`.

    With `FEW_DOCUMENTS` or more different documents whole documents are chosen, by a hash of their text, so equal ones
    stay together. With fewer, each document is cut by position, at the end of a line or between two words where
    there is one near; the parts joined in the order train, val, test are the document.

    Args:
        documents: The text.
        held_out: Names of the splits to make beside `train`.

    Returns:
        The documents of each split. Splits of a very short text may be empty.
    """
    splits: dict[str, list[str]] = {"train": [], **{name: [] for name in held_out}}
    digests = [hashlib.sha256(document.encode()).digest() for document in documents]
    distinct = sorted(set(digests))
    if len(distinct) < FEW_DOCUMENTS:
        for document in documents:
            shares = [1 - HELD_OUT * (len(held_out) - i) for i in range(len(held_out))]
            cuts = [0, *(_cut_near(document, share) for share in shares), len(document)]
            for name, (start, stop) in zip(splits, itertools.pairwise(cuts), strict=True):
                if document[start:stop].strip():
                    splits[name].append(document[start:stop])
        return splits
    n_held = max(1, round(HELD_OUT * len(distinct)))
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


def _content_hash(splits: dict[str, list[str]]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in splits[split]:
            data = document.encode()
            digest.update(f"{split} {len(data)}\n".encode())
            digest.update(data)
    return digest.hexdigest()


# --- text files ---------------------------------------------------------------------------------------------------


def _find(pattern: str) -> list[Path]:
    """Return the file, or the files that match the pattern, sorted."""
    path, shown = Path(os.path.expanduser(pattern)), _shown(pattern)
    if os.path.isfile(path):  # not of Path, which raises where a name is too long
        return [path]
    if os.path.isdir(path):
        raise ConfigError(f"{shown} is a folder; give a file, or a pattern such as {_shown(path / '*.txt')}.")
    if os.path.exists(path):
        raise ConfigError(f"{shown} is no file that can be read twice, such as a pipe or device; write a file.")
    if not glob.has_magic(pattern):
        raise ConfigError(f"text file {shown} does not exist; check data.path (now in {os.getcwd()}).")
    paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if not paths:
        raise ConfigError(f"no file matches the pattern {shown}; check data.path (now in {os.getcwd()}).")
    return paths


def _shown(path: str | Path) -> str:
    """A path as an error shows it."""
    text = repr(str(path))
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]} ({len(str(path))} characters)"


def _decode(path: Path) -> str:
    """Read a UTF-8 file, without its byte order mark if it has one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror or error}; check data.path.") from None
    if (encoding := _wide_encoding(data)) is not None:
        raise ConfigError(f"{str(path)!r} looks like {encoding}, not UTF-8; convert the file to UTF-8.")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert the file to UTF-8."
        ) from None
    if "\0" in text:
        raise ConfigError(
            f"{str(path)!r} is no text, or damaged: it has {text.count(chr(0))} NUL characters, the first at byte "
            f"{data.index(0)}; take them out, or convert the file to UTF-8."
        )
    return text


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


def _wide_encoding(data: bytes) -> str | None:
    """Name the encoding that has two or four bytes for each letter, if it looks like one."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return name
    start = data[:4096]
    zeros = tuple(2 * start[i::4].count(0) > len(start[i::4]) for i in range(4))
    return _MANY_ZEROS.get(zeros)


def _unix(text: str) -> str:
    """A text whose lines end in a line feed, however they did."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unescaped(separator: str) -> str:
    """A separator in which line ends and tabs may be written with a backslash."""
    signs = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return _unix(re.sub(r"\\([ntr\\])", lambda found: signs[found[1]], separator))


def _checked(value: Any, where: str, column: str) -> str | None:
    """Return `value` if it is text that can be encoded, or null."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: column {column!r} must be text, not {type(value).__name__}; choose another column."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: character {error.start} of column {column!r} is half of a surrogate pair; repair the text."
        ) from None
    if value.count("\0") * 100 > len(value):
        raise ConfigError(
            f"{where}: column {column!r} is full of NUL characters, as UTF-16 is that was read as UTF-8; convert it."
        )
    return value


def _no_column(where: str, column: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    return f"{where}: no column {column!r}; there are: {', '.join(columns) or 'none'}.{did_you_mean(column, columns)}"


# --- the network --------------------------------------------------------------------------------------------------


def _reachable(url: str) -> bool:
    """Whether a server answers at all within `PROBE_SECONDS`; an error status is an answer too.

    Asked first because `datasets` retries for minutes. In a thread because looking up a name knows no time limit.
    With `HF_HUB_OFFLINE=1` nothing is asked and the answer is no.
    """
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep `datasets` to its cache; the switches are read from the environment only once, at import."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _load_errors() -> tuple[type[Exception], ...]:
    """Return what `datasets` raises when a data set cannot be had."""
    import datasets

    return (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)  # RuntimeError: a script


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


# --- the builtin text ---------------------------------------------------------------------------------------------

_MIN_DOCSTRING = 80
# Folders of the standard library that are tests, tools, data or not part of it.
_SKIPPED = {
    *("test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
}
_MIN_HELD_OUT = 75_000  # characters of val, and again of test
_MAX_HELD_OUT_DOCUMENT = 25_000  # so that val and test are made of several documents
_SHARED_WORDS = 13  # as in Brown et al. 2020 (GPT-3), appendix C


def _topics() -> dict[str, list[str]]:
    """Return the help topics of pydoc, as paragraphs."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError(
            "this Python comes without pydoc_data.topics; install the full standard library, or use "
            "data=text data.path=FILE."
        ) from None
    return {f"topic {name}": _paragraphs(text) for name, text in topics.items()}


def _docstrings() -> dict[str, list[str]]:
    """Return the docstrings of each top-level module or package, as paragraphs.

    The sources are parsed and never imported: importing some modules has side effects.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as invalid escapes in old sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # in the order of the file, the module first
        for node in nodes:
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= _MIN_DOCSTRING:
                found.setdefault(f"module {parts[0]}", []).extend(_paragraphs(docstring))
    if not found:
        raise ConfigError(f"no Python sources in {root}; use data=text data.path=FILE instead.")
    return found


def _paragraphs(text: str) -> list[str]:
    """Split a text at blank lines; inside a paragraph every run of whitespace becomes one space."""
    lines = (line.strip() for line in inspect.cleandoc(text).splitlines())
    # A line of signs only is the underline of a title.
    kept = "\n".join(line for line in lines if not re.fullmatch(r"([*=\-~^#+_.])\1{2,}", line))
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n{2,}", kept) if paragraph.strip()]


def _disjoint_splits(named: dict[str, list[str]]) -> dict[str, list[str]]:
    """Split documents, given as paragraphs, and drop what is repeated: first from train, then from val.

    No paragraph occurs twice anywhere, and no `_SHARED_WORDS` words in a row occur in two splits.
    """
    by_hash = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())
    sizes = {name: sum(map(len, named[name])) for name in named}
    target = max(_MIN_HELD_OUT, HELD_OUT * sum(sizes.values()))
    home = dict.fromkeys(named, "train")
    for split in ("test", "val"):
        held = 0
        for name in by_hash:
            if held < target and home[name] == "train" and sizes[name] <= _MAX_HELD_OUT_DOCUMENT:
                home[name] = split
                held += sizes[name]

    splits: dict[str, list[str]] = {}
    seen: set[str] = set()
    taken: set[tuple[str, ...]] = set()  # word sequences of the splits made so far
    for split in ("test", "val", "train"):
        documents: list[str] = []
        new: set[tuple[str, ...]] = set()
        for name in sorted(name for name in named if home[name] == split):
            paragraphs = []
            for paragraph in named[name]:
                if paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
            paragraphs = _without_shared(paragraphs, taken)
            if paragraphs:
                documents.append("\n".join(paragraphs))
                new.update(sequence for sequence, _ in _word_sequences(paragraphs))
        taken |= new
        splits[split] = documents
    return {split: splits[split] for split in SPLITS}


def _without_shared(paragraphs: list[str], taken: set[tuple[str, ...]]) -> list[str]:
    """Drop every paragraph that has a part in a word sequence of `taken`."""
    while True:
        shared: set[int] = set()
        for sequence, touched in _word_sequences(paragraphs):
            if sequence in taken:
                shared.update(touched)
        if not shared:
            return paragraphs
        # What stood apart is now side by side: look again.
        paragraphs = [paragraph for i, paragraph in enumerate(paragraphs) if i not in shared]


def _word_sequences(paragraphs: list[str]) -> Iterator[tuple[tuple[str, ...], set[int]]]:
    """Yield every `_SHARED_WORDS` words in a row, and the indices of the paragraphs that they lie in."""
    words = [(word, i) for i, paragraph in enumerate(paragraphs) for word in re.findall(r"\w+", paragraph.lower())]
    for start in range(len(words) - _SHARED_WORDS + 1):
        window = words[start : start + _SHARED_WORDS]
        yield tuple(word for word, _ in window), {i for _, i in window}
