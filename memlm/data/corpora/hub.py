"""Data sets of the Hugging Face hub, or in its local cache."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlm.config import ConfigError, did_you_mean
from memlm.data.corpora.base import Corpus, Document, as_documents, check_document, first_line, split_documents
from memlm.data.corpora.files import TextFiles, checked, no_column
from memlm.files import cache_dir, checked_file, read_checked

# What data sets of the hub call their held-out splits.
OWN_NAMES = {"val": ("validation", "valid", "val", "dev"), "test": ("test",)}


# Seconds to find out whether a server can be reached.
PROBE_SECONDS = 5.0


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
            raise ConfigError(f"Tiny Shakespeare cannot be downloaded ({first_line(error)}); {advice}") from error
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
        check_document(document)
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
                loaded = datasets.load_dataset(
                    self.name, self._config, streaming=self._max is not None, cache_dir=(cache := _cache(self.name))
                )
                source, bracket, _ = self._split.partition("[")
                if source not in loaded:
                    raise ConfigError(
                        f"data set {self.name!r} has no split {source!r}: expected one of {', '.join(loaded)}."
                        f"{did_you_mean(source, loaded)}"
                    )
                if bracket and self._max is not None:
                    raise ConfigError(f"split {self._split!r} cannot be streamed: drop the slice or max_documents.")
                rows = loaded[source]
                if bracket:
                    rows = datasets.load_dataset(self.name, self._config, split=self._split, cache_dir=cache)
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
                    problem, advice = first_line(error), "check data.name and data.corpus.config"
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
                raise ConfigError(no_column(where, self._column, row))
            texts.append(checked(row[self._column], where, self._column))
        documents = as_documents(texts, self._document, of, of_lines=rows.info.builder_name == "text")
        return [document for document in documents if document.strip()]


def _cache(name: str) -> str | None:
    """Where `datasets` keeps what it makes of a local folder, None for what is no folder.

    By itself it tells folders with a README that names configurations apart by their names and that README alone, and
    would give what another one held, or this one before its files were changed.
    """
    if not os.path.isdir(name):
        return None
    files = (path for path in Path(name).resolve().rglob("*") if path.is_file())
    seen = sorted((str(path), (told := path.stat()).st_size, told.st_mtime_ns) for path in files)
    return str(cache_dir() / "folders" / hashlib.sha256(repr(seen).encode()).hexdigest()[:16])


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
