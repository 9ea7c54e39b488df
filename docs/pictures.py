"""Draws the pictures of the concepts, for light and dark: `python docs/pictures.py` writes docs/figures/*.svg."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

FIGURES = Path(__file__).resolve().parent / "figures"

_STYLE = """
  .page { fill: #ffffff } .ink { fill: #24292f } .dim { fill: #6e7781 }
  .reads { fill: #0969da } .writes { fill: #bc4c00 }
  .cell { fill: #eaeef2; stroke: #8c959f } .seen { fill: #b6c2cf; stroke: #8c959f } .box { fill: none; stroke: #8c959f }
  .bank { fill: #ddf4ff; stroke: #0969da } .gone { fill: none; stroke: #8c959f; stroke-dasharray: 4 3 }
  .read { stroke: #0969da } .write { stroke: #bc4c00 } .read, .write { fill: none; stroke-width: 2 }
  text { font: 14px system-ui, sans-serif } .small { font-size: 12px } .strong { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #161b22 } .ink { fill: #e6edf3 } .dim { fill: #9198a1 }
    .reads { fill: #58a6ff } .writes { fill: #f0883e }
    .cell { fill: #30363d; stroke: #6e7681 } .seen { fill: #6e7681; stroke: #8b949e } .box, .gone { stroke: #6e7681 }
    .bank { fill: #0c2d6b; stroke: #58a6ff } .read { stroke: #58a6ff } .write { stroke: #f0883e }
  }
"""


class Picture:
    """An SVG that is put together piece by piece; places are pixels from the upper left corner.

    Args:
        width: Of the whole.
        height: Of the whole.
        says: What it shows, for those who do not see it.
    """

    def __init__(self, width: int, height: int, says: str) -> None:
        tips = "".join(
            f'<marker id="{kind}-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto">'
            f'<path d="M0 0L8 4L0 8z" class="{kind}s"/></marker>'
            for kind in ("read", "write")
        )
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="{width}">',
            f"<title>{escape(says)}</title><style>{_STYLE}</style><defs>{tips}</defs>",
            f'<rect class="page" width="{width}" height="{height}" rx="8"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A rectangle of a class of the style."""
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="3"/>')

    def text(self, x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> None:
        """Words at a base line."""
        self._parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def arrow(self, kind: str, *points: tuple[float, float]) -> None:
        """A ``read`` or ``write`` along points."""
        path = "L".join(f"{x} {y}" for x, y in points)
        self._parts.append(f'<path class="{kind}" d="M{path}" marker-end="url(#{kind}-tip)"/>')

    def cells(self, x: float, y: float, kinds: str) -> None:
        """Tokens in a row: ``.`` one, ``#`` one that the next segment sees too, `` `` none yet."""
        for i, kind in enumerate(kinds):
            self.box(x + 18 * i, y, 15, 18, {".": "cell", "#": "seen", " ": "gone"}[kind])

    def svg(self) -> str:
        """The whole."""
        return "\n".join([*self._parts, "</svg>\n"])


def segments() -> Picture:
    """How text, segments and a memory follow each other."""
    picture = Picture(760, 260, "Each segment reads what earlier segments wrote, and is written when it is complete.")
    names = ("segment 1", "segment 2", "segment 3, still open")
    for i, (name, kinds) in enumerate(zip(names, ("......##", "......##", "...     "), strict=True)):
        x = 30 + 245 * i
        picture.text(x, 34, name, "ink strong")
        picture.box(x - 8, 44, 162, 34, "box")
        picture.cells(x, 52, kinds)
        if i:
            picture.text(x, 98, "attention: this segment", "dim small")
            picture.text(x, 114, "and the dark cells before it", "dim small")
        picture.box(x - 8, 172, 162, 30, "bank")
        for slot in range(8):
            full = slot < 3 * i
            picture.box(x + 18 * slot, 178, 15, 18, "seen" if full else "gone")
        picture.text(x, 222, ("memory: empty", "memory after segment 1", "memory after segment 2")[i], "ink small")
        picture.arrow("read", (x + 40, 170), (x + 40, 122 if i else 82))
        picture.text(x + 47, 152, "read", "reads")
        if i < 2:
            picture.arrow("write", (x + 156, 62), (x + 195, 62), (x + 195, 187), (x + 234, 187))
            picture.text(x + 188, 140, "write", "writes", "end")
    picture.text(30, 246, "time →", "dim small")
    return picture


def scopes() -> Picture:
    """Who shares a bank, and how long it lives."""
    picture = Picture(
        760, 250, "With scope sequence each document has a bank of its own; with scope shared all have one."
    )
    picture.text(20, 32, "scope=sequence", "ink strong")
    picture.text(162, 32, "a bank for each row, new for each document", "dim")
    for row in range(2):
        y = 48 + 44 * row
        picture.text(20, y + 20, f"row {row}", "dim")
        for x, width, document in ((70, 215, 1 + 2 * row), (295, 215, 2 + 2 * row)):
            picture.box(x, y, width, 30, "cell")
            picture.text(x + 10, y + 20, f"document {document}", "ink small")
            picture.box(x + width - 105, y + 5, 98, 20, "bank")
            picture.text(x + width - 99, y + 19, "its own bank", "ink small")
    picture.text(20, 162, "scope=shared", "ink strong")
    picture.text(150, 162, "one bank for all rows, kept from document to document", "dim")
    for row in range(2):
        y = 178 + 34 * row
        picture.text(20, y + 18, f"row {row}", "dim")
        for x, document in ((70, 1 + 2 * row), (295, 2 + 2 * row)):
            picture.box(x, y, 215, 26, "cell")
            picture.text(x + 10, y + 18, f"document {document}", "ink small")
        picture.arrow("write", (512, y + 8), (566, y + 8))
        picture.arrow("read", (566, y + 18), (512, y + 18))
    picture.box(568, 178, 170, 60, "bank")
    picture.text(653, 213, "one bank", "ink", "middle")
    picture.text(568, 68, "Kept apart: no row", "dim small")
    picture.text(568, 84, "knows of another.", "dim small")
    picture.text(568, 166, "Told to one, known to all.", "dim small")
    return picture


def controls() -> Picture:
    """A fact is told, much text goes by, and it is asked for with its memory and without."""
    picture = Picture(760, 330, "A fact is told once and asked for later, with the memory and under four controls.")
    picture.box(20, 44, 255, 34, "cell")
    picture.text(30, 66, "Frame Codec was born in Pickwell.")
    picture.box(285, 44, 200, 34, "gone")
    picture.text(385, 66, "thousands of other tokens", "dim", "middle")
    picture.box(505, 44, 235, 34, "cell")
    picture.text(515, 66, "Where was Frame Codec born?")
    for x, word in ((20, "told once"), (285, "then"), (505, "asked in a new context")):
        picture.text(x, 32, word, "ink strong")
    rows = (
        ("memory on", "told this fact", "Pickwell.", "memory, if the controls fail", "bank"),
        ("off", "there, but not read", "?", "the weights", "box"),
        ("wiped", "empty", "?", "reading as such", "gone"),
        ("swapped", "of another document", "?", "the memory of any text", "bank"),
        ("unseen", "of a text without the fact", "?", "a guess", "bank"),
    )
    for x, word in ((20, "condition"), (150, "memory"), (395, "answer"), (505, "a right answer comes from")):
        picture.text(x, 116, word, "dim")
    for i, (name, memory, answer, why, kind) in enumerate(rows):
        y = 130 + 38 * i
        picture.text(20, y + 20, name, "ink strong" if not i else "ink")
        picture.box(150, y, 205, 28, kind)
        picture.text(162, y + 19, memory, "ink")
        if kind != "box":
            picture.arrow("read", (358, y + 14), (388, y + 14))
        picture.text(395, y + 20, answer, "reads strong" if not i else "ink")
        picture.text(505, y + 20, why, "dim")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {"segments": segments, "scopes": scopes, "controls": controls}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
