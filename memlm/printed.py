"""Text of unknown origin, made fit to be shown: names, labels and contents of files may hold anything."""

from __future__ import annotations

import re

# What a terminal or a browser obeys instead of showing it: control characters but for tab and line feed, what turns the
# direction of text or hides in it, line separators that are none in a file, halves of characters.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_MARKUP = re.compile(r"([|*_\\`\[\]~#])")


def printable(text: object) -> str:
    r"""A text with every character that would be obeyed instead of shown written out, as ``\x1b``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """A text, `printable`, on one line."""
    return " ".join(printable(text).split())


def in_markdown(text: object) -> str:
    """A text as it stands within a line of Markdown: no markup, no HTML."""
    line = one_line(text)
    return _MARKUP.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def in_csv(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would calculate gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text
