"""How long sentences are and how large tables: `python docs/prose.py [FILE...]`, by default README.md and all of docs/.

A help for who writes a page; nothing fails by it. Sentences are those of paragraphs and of points of lists: no code, no
headings, no tables, and nothing that `memlm results` writes. A piece of code within a sentence counts as one word.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from markdown_it.token import Token

WIDE, MANY = 120, 15
"""Characters in a line of a table, and rows below its header, above which the table is shown."""

N_WORST = 10
"""Sentences that are shown."""

_GENERATED = re.compile(r"<!-- results/.*?<!-- end of results -->", re.DOTALL)
_GLUE = "\N{WORD JOINER}"  # before code, which may begin a sentence, and instead of its blanks: it is one word
# A full stop, what may close a sentence with it, and a blank. Not so after an initial, nor before a small letter.
_END = re.compile(r"(?<!\b[A-Z])[.!?][)\]\"'”]*\s+(?![a-z])")


class Sentence(NamedTuple):
    """One sentence of a page.

    Attributes:
        n_word: Its words.
        line: Where it begins, from 1.
        text: What it says, without links and marks.
    """

    n_word: int
    line: int
    text: str


class Table(NamedTuple):
    """One table of a page.

    Attributes:
        n_row: Rows below its header.
        width: Characters of its longest line.
        line: Where it begins, from 1.
    """

    n_row: int
    width: int
    line: int


def measured(page: str) -> tuple[list[Sentence], list[Table]]:
    """The sentences and the tables of ``page``, a text of Markdown."""
    page = _GENERATED.sub(lambda match: "\n" * match[0].count("\n"), page)
    lines = page.splitlines()
    sentences: list[Sentence] = []
    tables = []
    within = ""
    for token in MarkdownIt("commonmark").enable("table").parse(page):
        if token.type == "table_open" and token.map:
            table = lines[slice(*token.map)]
            tables.append(Table(len(table) - 2, max(map(len, table)), token.map[0] + 1))
        if token.type == "inline" and token.map and within == "paragraph_open":
            sentences += _sentences(_text(token.children or []), token.map[0] + 1)
        within = token.type
    return sentences, tables


def _text(tokens: Sequence[Token]) -> str:
    """What a reader sees, with the line breaks of the source."""
    parts = []
    for token in tokens:
        if token.type == "code_inline":
            parts.append(_GLUE + re.sub(r"\s", _GLUE, token.content))
        elif token.type in ("text", "softbreak", "hardbreak"):
            parts.append(token.content or "\n")
    return "".join(parts)


def _sentences(text: str, line: int) -> Iterator[Sentence]:
    begin = 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        words = [word for word in text[begin:end].split() if re.search(r"\w", word)]
        if words:
            yield Sentence(
                len(words), line + text.count("\n", 0, begin), " ".join(" ".join(words).replace(_GLUE, " ").split())
            )
        begin = end


def main(names: Sequence[str]) -> None:
    """Print the size of each page, the longest sentences, and the tables that are too large."""
    root = Path(__file__).resolve().parents[1]
    paths = [Path(name) for name in names] or [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    pages = {
        path.relative_to(root) if path.is_relative_to(root) else path: measured(path.read_text()) for path in paths
    }
    found = [(sentence, path) for path, (sentences, _) in pages.items() for sentence in sentences]
    print("mean  longest  sentences")
    for path, (sentences, _) in pages.items():
        _line([sentence.n_word for sentence in sentences], str(path))
    _line([sentence.n_word for sentence, _ in found], "all")
    print("\nThe longest:")
    for sentence, path in sorted(found, key=lambda item: -item[0].n_word)[:N_WORST]:
        print(f"{sentence.n_word:3} words  {path}:{sentence.line}  {sentence.text[:100]}")
    print(f"\nTables of more than {MANY} rows, or {WIDE} characters a line:")
    for path, (_, tables) in pages.items():
        for table in tables:
            if table.n_row > MANY or table.width > WIDE:
                print(f"{table.n_row:3} rows, {table.width} characters  {path}:{table.line}")


def _line(words: Sequence[int], name: str) -> None:
    print(f"{sum(words) / max(len(words), 1):4.1f}  {max(words, default=0):7}  {len(words):9}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
