"""Code that every machine has: the source of Python's standard library."""

from __future__ import annotations

import hashlib
import tokenize

from memlm.data.corpora.base import SPLITS, Corpus
from memlm.data.corpora.builtin import kept, sources


class Code(Corpus):
    """The source of Python's standard library, a module a document; nothing is downloaded.

    Held out are whole top-level packages and modules, 8 % of the text (at least 1,000,000 characters) for `val` and
    again for `test`, so that no name of theirs need be known from training. Modules below 2,000 characters, tests and
    tables of data are left out, and of modules that are much alike (copies with changes) one stays. The text differs
    between Python versions: never compare losses across them (the log tells the sha256).
    """

    # Raise it when the text or the splits change: what was cached before is then ignored.
    VERSION = 1

    def __init__(self) -> None:
        self.name = "code"

    def _load(self) -> dict[str, list[str]]:
        return kept(f"code-v{self.VERSION}", lambda: split_packages(_modules()))


# Tests (which name what they test), and tables of numbers and of text.
_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data"})


_SHORTEST = 2_000  # characters of a module


_HELD_OUT, _MIN_HELD_OUT = 0.08, 1_000_000  # characters of val, and again of test, as a share of all and at least


_MAX_SHARE = 0.2  # of a split that one held-out package may be, so that there are several


_LONG, _ALIKE = 25, 0.2  # characters of a line that says something; share of them that two modules may have in common


def _modules() -> dict[tuple[str, ...], str]:
    """Return the text of each module by its name; what cannot be read as Python's encoding says is left out."""
    found = {}
    for parts, path in sources(_SKIPPED):
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) >= _SHORTEST:
            found[parts] = text
    return found


def split_packages(
    modules: dict[tuple[str, ...], str], least: int = _MIN_HELD_OUT, longest: float = _MAX_SHARE
) -> dict[str, list[str]]:
    """Split modules by top-level package, and drop those that are much like one before: test counts first, then val.

    Args:
        modules: Text by the parts of a module's name.
        least: Characters to hold out at least for each of `val` and `test`.
        longest: Largest held-out package, as a share of what is held out for a split.

    Returns:
        The documents of each split, by name of the module.
    """
    sizes: dict[str, int] = {}
    for parts, text in modules.items():
        sizes[parts[0]] = sizes.get(parts[0], 0) + len(text)
    target = max(least, _HELD_OUT * sum(sizes.values()))
    home = dict.fromkeys(sizes, "train")
    for split in ("test", "val"):
        held = 0
        for package in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if held < target and home[package] == "train" and sizes[package] <= longest * target:
                home[package] = split
                held += sizes[package]

    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    owner: dict[str, set[int]] = {}  # modules kept so far that have a line
    n_kept = 0
    for split in ("test", "val", "train"):
        for parts in sorted(parts for parts in modules if home[parts[0]] == split):
            lines = {line for line in map(str.strip, modules[parts].splitlines()) if len(line) >= _LONG}
            shared: dict[int, int] = {}
            for line in lines:
                for other in owner.get(line, ()):
                    shared[other] = shared.get(other, 0) + 1
            if max(shared.values(), default=0) > _ALIKE * len(lines):
                continue
            for line in lines:
                owner.setdefault(line, set()).add(n_kept)
            n_kept += 1
            splits[split].append(modules[parts])
    return splits
