"""Corpora: where text comes from, as documents in a train, a val and a test split."""

from __future__ import annotations

import ast
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
from typing import TYPE_CHECKING, Any

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
            document per line) or `.parquet` (a document per row).
        column: Where jsonl and parquet keep the text.
        document_separator: Splits a `.txt` file into documents, e.g. `"\n\n\n"`.
    """

    def __init__(self, path: str, column: str = "text", document_separator: str | None = None):
        if document_separator == "":
            raise ConfigError("document_separator is empty: give the text between two documents, or null for none.")
        self.name = str(path)
        self._column = column
        self._separator = document_separator

    def _load(self) -> dict[str, list[str]]:
        return split_documents([document for path in _find(self.name) for document in self._read(path)])

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
        text = _decode(path).replace("\r\n", "\n")
        return [text] if self._separator is None else text.split(self._separator)

    def _read_jsonl(self, path: Path) -> list[str]:
        documents = []
        # Not splitlines: a JSON string may contain other line separators, such as U+2028.
        for number, line in enumerate(_decode(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); expected one object per line.") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: expected a JSON object, not {type(row).__name__}.")
            if self._column not in row:
                raise ConfigError(_no_column(f"{path}, line {number}", self._column, row))
            documents.append(_checked(row[self._column], f"{path}, line {number}", self._column))
        return documents

    def _read_parquet(self, path: Path) -> list[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            if self._column not in file.schema_arrow.names:
                raise ConfigError(_no_column(str(path), self._column, file.schema_arrow.names))
            values = file.read(columns=[self._column])[self._column].to_pylist()
        except pyarrow.ArrowException as error:
            raise ConfigError(f"{str(path)!r} cannot be read as parquet ({error}); write it again.") from None
        return [_checked(value, f"{path}, row {i}", self._column) for i, value in enumerate(values)]


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
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        column: str = "text",
        split: str = "train",
        max_documents: int | None = None,
    ):
        if max_documents is not None and max_documents < 1:
            raise ConfigError(f"max_documents must be at least 1, or null for all; not {max_documents}.")
        self.name = name
        self._config = config
        self._column = column
        self._split = split
        self._max = max_documents

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
                if online:
                    problem, advice = _first_line(error), "check data.name and data.corpus.config"
                else:
                    problem = f"not in the cache, and {endpoint} cannot be reached"
                    advice = "connect to the network once, or use a file with data=text data.path=FILE"
                raise ConfigError(f"data set {self.name!r} cannot be loaded: {problem}; {advice}.") from error
        missing = [split for split in ("val", "test") if not own.get(split)]
        return {**own, **split_documents(train, missing)}

    def _texts(self, rows: Iterable[dict[str, Any]], split: str) -> list[str]:
        """Return the texts of a split; empty ones and nulls are left out."""
        documents = []
        for i, row in enumerate(itertools.islice(rows, self._max)):
            where = f"data set {self.name!r}, split {split!r}, row {i}"
            if self._column not in row:
                raise ConfigError(_no_column(where, self._column, row))
            value = row[self._column]
            if value is not None and _checked(value, where, self._column).strip():
                documents.append(value)
        return documents


class Symbols(Corpus):
    """A vocabulary of symbols for tasks that make their own documents: ` s0 s1 s2 ...`, over and over.

    The text says which symbols there are and nothing else; it is the same in every split. Tokenize it by words.

    Args:
        n_symbol: Symbols of the vocabulary.
    """

    LEAST = 4096  # symbols of a split, so that it is longer than a segment of any usual model

    def __init__(self, n_symbol: int):
        if n_symbol < 2:
            raise ConfigError(f"n_symbol must be at least 2, not {n_symbol}.")
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
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError(f"{pattern!r} is a folder; give a file, or a pattern such as {str(path / '*.txt')!r}.")
    if not glob.has_magic(pattern):
        raise ConfigError(f"text file {pattern!r} does not exist; check data.path (now in {os.getcwd()}).")
    paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not paths:
        raise ConfigError(f"no file matches the pattern {pattern!r}; check data.path (now in {os.getcwd()}).")
    return paths


def _decode(path: Path) -> str:
    """Read a UTF-8 file, without its byte order mark if it has one."""
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; "
            f"convert the file to UTF-8."
        ) from None


def _checked(value: Any, where: str, column: str) -> str:
    """Return `value` if it is text that can be encoded."""
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

    return (OSError, ValueError, datasets.exceptions.DatasetsError)


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
