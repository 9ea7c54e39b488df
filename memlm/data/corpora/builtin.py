"""Text that every machine has: the documentation and docstrings of Python."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from memlm.config import ConfigError
from memlm.data.corpora.base import HELD_OUT, SPLITS, Corpus
from memlm.files import cache_dir, checked_file, read_checked


class Builtin(Corpus):
    """English text that every Python has: the help topics of `pydoc` and the docstrings of the standard library.

    Nothing is downloaded. One document is one topic, or the docstrings (80 or more characters) of one top-level
    module or package. No paragraph occurs twice, and no 13 words in a row of val or test occur in train. The text
    differs between Python versions: never compare losses across them (the log tells the sha256).
    """

    # Raise it when the text, the splits or the form of the cache change: what was cached before is then ignored.
    VERSION = 2

    def __init__(self) -> None:
        self.name = "builtin"

    def _load(self) -> dict[str, list[str]]:
        return kept(f"builtin-v{self.VERSION}", lambda: _disjoint_splits({**_docstrings(), **_topics()}))


_MIN_DOCSTRING = 80


# Folders beside the standard library that are no part of it.
_OUTSIDE = frozenset({"site-packages", "dist-packages", "lib-dynload", "__pycache__"})


# Folders of the standard library that are tests, tools or data.
_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
)


_MIN_HELD_OUT = 75_000  # characters of val, and again of test


_MAX_HELD_OUT_DOCUMENT = 25_000  # so that val and test are made of several documents


_SHARED_WORDS = 13  # as in Brown et al. 2020 (GPT-3), appendix C


def kept(name: str, make: Callable[[], dict[str, list[str]]]) -> dict[str, list[str]]:
    """Return what was made of the sources of this Python, from the cache if it was made before.

    Args:
        name: Of the file, with a number that rises when what is made changes.
        make: Makes the documents of all splits.
    """
    path = cache_dir() / f"{name}-python{platform.python_version()}.json"
    if (content := read_checked(path)) is not None:
        return json.loads(bytes(content))
    splits = make()
    with checked_file(path) as file:
        file.write(json.dumps(splits).encode())
    return splits


def sources(skipped: Collection[str]) -> list[tuple[tuple[str, ...], Path]]:
    """Return the modules of the standard library, each with its name by parts, sorted.

    Args:
        skipped: Names of folders and modules to leave out.

    Raises:
        ConfigError: If this Python comes without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = [(path.relative_to(root).with_suffix("").parts, path) for path in sorted(root.rglob("*.py"))]
    found = [(parts, path) for parts, path in modules if not _OUTSIDE.union(skipped).intersection(parts)]
    if not found:
        raise ConfigError(f"no Python sources in {root}; use data=text data.path=FILE instead.")
    return found


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
    found: dict[str, list[str]] = {}
    for parts, path in sources(_SKIPPED):
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
