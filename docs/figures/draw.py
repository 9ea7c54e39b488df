"""Draws the pictures of README.md and of the concepts, for light and dark pages: `python docs/figures/draw.py`.

segments-*.svg shows segment, read and write; scopes-*.svg who shares a bank; controls-*.svg how a question is
controlled. terminal-*.svg shows parts of terminal.txt, which is all that a terminal showed when the command of
README.md had ended. It was recorded, and is made anew, by

    script -c "stty cols 100; python train.py model=lmcode memory=ltm" LOG
    python docs/figures/draw.py LOG
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from memlm.analysis.style import SURFACES

HERE = Path(__file__).parent
COMMAND = "python train.py model=lmcode memory=ltm"
COLUMNS = 100
SANS = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Drawing:
    """An SVG that grows shape by shape.

    Args:
        width: In pixels.
        height: In pixels.
        colors: By name: paper, ink, soft, line, first, second.
        title: What it shows, for those who cannot see it.
    """

    def __init__(self, width: float, height: float, colors: dict[str, str], title: str) -> None:
        self.colors = colors
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img">',
            f"<title>{html.escape(title)}</title>",
        ]
        self.box(0, 0, width, height, "paper", radius=0)

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, edge: str | None = None, radius: float = 6
    ) -> None:
        """A rectangle."""
        line = f' stroke="{self.colors[edge]}" stroke-width="1.5"' if edge else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{self.colors[fill]}"{line}/>'
        )

    def text(self, x: float, y: float, text: str, color: str = "ink", size: int = 15, **more: str) -> None:
        """A line of text around x; `anchor` says what x is, `weight` and `style` how it looks."""
        anchor, weight, style = more.get("anchor", "middle"), more.get("weight", "400"), more.get("style", "normal")
        self.parts.append(
            f'<text x="{x}" y="{y}" font-family="{SANS}" font-size="{size}" font-weight="{weight}" '
            f'font-style="{style}" text-anchor="{anchor}" fill="{self.colors[color]}">{html.escape(text)}</text>'
        )

    def arrow(self, points: Sequence[tuple[float, float]], color: str, dashed: bool = False) -> None:
        """Straight lines through points, a head at the last, which is reached going along an axis."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        path = " ".join(f"{a},{b}" for a, b in [*points[:-1], (x - 6 * dx, y - 6 * dy)])
        head = f"{x},{y} {x - 9 * dx - 5 * dy},{y - 9 * dy - 5 * dx} {x - 9 * dx + 5 * dy},{y - 9 * dy + 5 * dx}"
        dash = ' stroke-dasharray="2 5"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{self.colors[color]}" stroke-width="2.5"{dash}/>'
            f'<polygon points="{head}" fill="{self.colors[color]}"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def segments(colors: dict[str, str]) -> Drawing:
    """Three segments, each between the memory before and after it."""
    title = "Text is cut into segments. Each reads what earlier segments wrote, and writes for later ones."
    drawing = Drawing(980, 350, colors, title)
    texts = ["“… Ann lives in Oslo. …”", "4,096 other tokens", "“Where does Ann live?”"]
    held = [(0, "empty"), (2, "holds Ann, Oslo"), (6, "still holds Ann, Oslo"), (7, "")]
    names = ["segment 1", "segments 2 to 33", "segment 34"]
    width, gap, slot, top, floor = 200, 70, 15, 36, 258
    lefts = [120 + i * (width + gap) for i in range(3)]
    drawing.text(lefts[2] + width / 2, 22, "answers “Oslo”", "first", 17, weight="600")
    for i, x in enumerate(lefts):
        drawing.box(x, top, width, 62, "paper", "line")
        drawing.text(x + width / 2, top + 25, names[i], weight="600")
        drawing.text(x + width / 2, top + 48, texts[i], "soft")
        drawing.arrow([(x + width / 2, top + 62), (x + width / 2, top + 84)], "soft")
        drawing.box(x, top + 84, width, 58, "paper", "ink")
        drawing.text(x + width / 2, top + 108, "model", weight="600")
        drawing.text(x + width / 2, top + 129, "attends to its segment", "soft", 14)
        read, write = x - gap / 2, x + width - 12
        drawing.arrow([(read, floor - 4), (read, top + 113), (x, top + 113)], "first")
        drawing.text(read + 9, 226, "read", "first", anchor="start", weight="600")
        drawing.arrow([(write, top + 142), (write, floor - 4)], "second")
        drawing.text(write - 9, 226, "write", "second", anchor="end", weight="600")
        drawing.arrow(
            [(read + 4 * slot + 4, floor + 13), (read + width + gap - 4 * slot - 4, floor + 13)], "soft", True
        )
    for i, (n_full, said) in enumerate(held):
        x = lefts[0] - gap / 2 + i * (width + gap)
        for k in range(8):
            fill = "paper" if k >= n_full else "second" if k < 2 else "soft"
            drawing.box(x + (k - 4) * slot + 1, floor, slot - 2, 26, fill, "line", 2)
        drawing.text(x, floor + 46, said, "soft", 14)
    drawing.text(490, 338, "memory: a fixed number of slots, as large after a million tokens as after one", "soft")
    return drawing


def scopes(colors: dict[str, str]) -> Drawing:
    """Four documents in two rows: with a bank each, and with one for all."""
    title = "With scope sequence each document has a bank of its own. With scope shared all have one."
    drawing = Drawing(980, 330, colors, title)
    left, width, bank = 90, 250, 700
    for top, name, said in (
        (28, "scope=sequence", "each document begins with an empty bank of its own; no row knows of another"),
        (188, "scope=shared", "one bank for all rows, kept from document to document: told to one, known to all"),
    ):
        drawing.text(20, top, name, anchor="start", weight="600")
        drawing.text(170, top, said, "soft", 14, anchor="start")
        for row in range(2):
            y = top + 20 + 56 * row
            drawing.text(20, y + 26, f"row {row}", "soft", anchor="start")
            for k in range(2):
                x = left + k * (width + 20)
                drawing.box(x, y, width, 40, "paper", "line")
                drawing.text(x + 14, y + 26, f"document {2 * row + k + 1}", anchor="start")
                if name == "scope=sequence":
                    drawing.box(x + 130, y + 6, 108, 28, "paper", "first")
                    drawing.text(x + 184, y + 25, "its own bank", "first", 14)
            if name == "scope=shared":
                end = left + 2 * width + 26
                drawing.arrow([(end, y + 13), (bank - 6, y + 13)], "second")
                drawing.arrow([(bank - 6, y + 29), (end, y + 29)], "first")
    drawing.box(bank, 208, 250, 96, "paper", "first")
    drawing.text(bank + 125, 262, "one bank", "first", weight="600")
    return drawing


def controls(colors: dict[str, str]) -> Drawing:
    """A fact is told, much text goes by, and it is asked for with its memory and under each control."""
    drawing = Drawing(980, 380, colors, "A fact is told once and asked for later, with the memory and under controls.")
    for x, width, head, text, color in (
        (20, 260, "told once", "“Ann lives in Oslo.”", "ink"),
        (300, 320, "then", "4,096 other tokens", "soft"),
        (640, 320, "asked in a new context", "“Where does Ann live?”", "ink"),
    ):
        drawing.text(x, 28, head, anchor="start", weight="600")
        drawing.box(x, 42, width, 42, "paper", "line")
        drawing.text(x + width / 2, 69, text, color)
    for x, head in ((20, "condition"), (180, "the memory"), (480, "answer"), (640, "a right answer would come from")):
        drawing.text(x, 124, head, "soft", anchor="start")
    for i, (name, memory, answer, source) in enumerate(
        (
            ("on", "was told this fact", "“Oslo”", "the memory, if all controls fail"),
            ("off", "is not read", "?", "the weights, or the question itself"),
            ("wiped", "is empty", "?", "the read, with nothing stored"),
            ("swapped", "is that of another document", "?", "the memory of any text"),
            ("unseen", "was never told the fact", "?", "a guess"),
        )
    ):
        y, color = 140 + 46 * i, "ink" if i else "first"
        drawing.text(20, y + 24, name, color, anchor="start", weight="600")
        drawing.box(180, y, 240, 36, "paper", "line" if i else "first")
        drawing.text(300, y + 24, memory, color)
        if name != "off":
            drawing.arrow([(424, y + 18), (468, y + 18)], "first")
        drawing.text(480, y + 24, answer, color, anchor="start", weight="600")
        drawing.text(640, y + 24, source, "soft", anchor="start")
    return drawing


_PIECE = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def screen(log: str) -> list[str]:
    """The lines of a terminal after what was printed; colours are left out.

    Args:
        log: Characters with line breaks, returns and sequences that move up (A) or empty a line (K).
    """
    lines, row, column = [""], 0, 0
    for number, sequence, control, text in _PIECE.findall(log):
        if control == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif control == "\r":
            column = 0
        elif sequence == "A":
            row = max(0, row - int(number or 1))
        elif sequence == "K":
            lines[row] = lines[row][:column] if number in ("", "0") else ""
        elif text:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + text + line[column + len(text) :], column + len(text)
    return [line.rstrip() for line in lines]


def recorded(log: str) -> str:
    """What terminal.txt keeps of a log of `script`: the screen, without where the checkout is."""
    text = "\n".join(line for line in screen(log) if not line.startswith(("Script started", "Script done")))
    text = re.sub(r"/\S*/(?=outputs/)", "", text)
    return f"$ {COMMAND}\n{text.strip()}\n"


def shortened(text: str) -> list[str]:
    """The lines that the picture shows, with a sign where others stand in the recording; wide ones are cut."""
    lines: list[str] = []
    for block in text.strip().split("\n\n"):
        head, *rest = block.split("\n")
        if head.startswith("$"):
            rest = ["⋮", *(line for line in rest if "parameters" in line or "training:" in line)]
        elif head.startswith("Main numbers"):
            head, rest = "⋮", []
        elif head == "Written:":
            rest = [*rest[:2], "⋮"]
        elif head.startswith("W&B"):
            continue
        lines += ["", head, *rest]
    return [line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…" for line in lines[1:]]


def terminal(colors: dict[str, str]) -> Drawing:
    """What the command printed, in short."""
    lines = shortened((HERE / "terminal.txt").read_text(encoding="utf-8"))
    across, down = 8.1, 18
    drawing = Drawing(COLUMNS * across + 40, len(lines) * down + 34, colors, "What the command prints, in short.")
    drawing.box(1, 1, COLUMNS * across + 38, len(lines) * down + 32, "paper", "line")
    for i, line in enumerate(lines):
        color = "soft" if line.strip() == "⋮" else "first" if i == 0 else "ink"
        # Any font of the reader's is stretched to the same columns.
        drawing.parts.append(
            f'<text x="20" y="{30 + i * down}" font-family="{MONO}" font-size="13.5" xml:space="preserve" '
            f'textLength="{len(line) * across:.1f}" lengthAdjust="spacingAndGlyphs" '
            f'fill="{colors[color]}">{html.escape(line)}</text>'
        )
    return drawing


PICTURES = {"segments": segments, "scopes": scopes, "controls": controls, "terminal": terminal}


def main(arguments: Sequence[str]) -> None:
    """Write the pictures, after what a log of a terminal has, if one is given."""
    if arguments:
        with open(arguments[0], encoding="utf-8", newline="") as file:  # a return is no line break
            (HERE / "terminal.txt").write_text(recorded(file.read()), encoding="utf-8")
    for name, draw in PICTURES.items():
        for theme, colors in SURFACES.items():
            path = HERE / f"{name}-{theme}.svg"
            path.write_text(str(draw(colors)), encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
