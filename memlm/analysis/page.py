"""A web page that needs nothing but itself: tables, figures, listings, and texts whose tokens tell what was read.

What a page holds is plain data; `page.html` beside this file says how it looks. Style, script and figures are in the
page, and it may not fetch anything. All text is escaped by the template engine, and made `printable`.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from memlm.analysis.chart import Chart
from memlm.config import ConfigError
from memlm.printed import printable


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Its heading.
        heads: Names of the columns.
        rows: Cells; numbers are aligned to the right.
        notes: Sentences below it.
        aside: Rows that are set back, such as controls.
        searchable: Whether its rows can be searched and sorted.
        column_runs: Which run each column is of, see `Chapter`; empty for none.
        row_runs: Which run each row is of; empty for none.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    notes: Sequence[str] = ()
    aside: frozenset[int] = frozenset()
    searchable: bool = False
    column_runs: Sequence[str] = ()
    row_runs: Sequence[str] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figures:
    """Figures.

    Attributes:
        title: Heading.
        images: What each shows, and its PNG.
        notes: Sentences below them.
        runs: Which run each is of, see `Chapter`; empty for none.
    """

    title: str
    images: Sequence[tuple[str, bytes]]
    notes: Sequence[str] = ()
    runs: Sequence[str] = ()
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Listings:
    """Long texts that can be opened.

    Attributes:
        title: Heading.
        items: Name and text of each.
        runs: Which run each is of, see `Chapter`; empty for none.
    """

    title: str
    items: Sequence[tuple[str, str]]
    runs: Sequence[str] = ()
    kind: ClassVar[str] = "listings"


class Source(NamedTuple):
    """A memory that a token read.

    Attributes:
        layer: Which memory and layer.
        weight: Weight times gate, in 0..1.
        text: Text it was made from; may be empty.
        where: Where it comes from.
        place: Index of the token in the same text that it was made from; None if there is none.
    """

    layer: str
    weight: float
    text: str
    where: str
    place: int | None


class Token(NamedTuple):
    """A token of a text.

    Attributes:
        text: What it says.
        place: Its index in the text.
        strength: How strongly memory was read, 0..1.
        gain: Nats by which memory lowered the loss of the prediction made here; NaN if there is none.
        told: Sentences about it.
        sources: What it read, the heaviest first.
        begins: What begins with it, such as a context; empty if nothing.
    """

    text: str
    place: int
    strength: float
    gain: float
    told: Sequence[str]
    sources: Sequence[Source]
    begins: str = ""


@dataclass(frozen=True)
class Tokens:
    """A text whose tokens are coloured by their use of memory, and tell what they read.

    Attributes:
        title: Heading.
        tokens: The text.
        notes: Sentences below it.
    """

    title: str
    tokens: Sequence[Token]
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "tokens"


@dataclass(frozen=True)
class Charts:
    """Charts side by side.

    Attributes:
        title: Heading.
        charts: See `memlm.analysis.chart.Chart`.
        notes: Sentences below them.
    """

    title: str
    charts: Sequence[Chart]
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "charts"


class Fact(NamedTuple):
    """A number that is to be seen first.

    Attributes:
        label: What it is.
        value: How much.
        note: What belongs to it.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Status:
    """Where something stands.

    Attributes:
        title: Heading.
        facts: Numbers.
        done: How much of how much is done; None if that is not known.
        notes: Sentences below them.
    """

    title: str
    facts: Sequence[Fact]
    done: tuple[int, int] | None = None
    notes: Sequence[str] = ()
    kind: ClassVar[str] = "status"


ALL = "all"
"""Key of what shows all runs at once: it is hidden where one is chosen."""

Part = Table | Figures | Listings | Tokens | Charts | Status


class Chapter(NamedTuple):
    """A part of a page with a heading of its own.

    Attributes:
        title: Heading.
        lead: Sentences at its beginning.
        parts: What it holds.
        run: Key of the run that it is of, hidden where another one is chosen; empty for none.
    """

    title: str
    lead: Sequence[str]
    parts: Sequence[Part]
    run: str = ""


class Live(NamedTuple):
    """A page that is written again and again.

    Attributes:
        written: When, in seconds since 1970.
        every: Seconds until it is written again.
    """

    written: float
    every: float

    @property
    def refresh(self) -> int:
        """Whole seconds after which a browser looks again."""
        return max(1, round(self.every))


def render(title: str, chapters: Sequence[Chapter], runs: Sequence[str] = (), live: Live | None = None) -> str:
    """The page as HTML.

    Args:
        title: Heading.
        chapters: What it holds.
        runs: Labels of the runs that a reader may choose from; their keys are "0", "1", ...
        live: If it will be written again.
    """
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    engine.filters["uri"] = lambda image: "data:image/png;base64," + base64.b64encode(image).decode()
    engine.filters["points"] = _points
    engine.filters["pixels"] = _pixels
    engine.tests["nan"] = lambda value: value != value
    return engine.get_template("page.html").render(title=title, chapters=chapters, runs=runs, live=live)


def _shown(value: object) -> object:
    """Text as it is shown; what a macro of the template has made is shown already."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pixels(image: bytes) -> tuple[int, int]:
    """Width and height of a PNG, as its first block says."""
    return int.from_bytes(image[16:20]), int.from_bytes(image[20:24])


def _points(chart: Chart) -> str:
    """The points of a chart's named series, with what each says, for the script of the page."""
    return json.dumps([[[x, chart.text(y)] for x, y in part.points] for part in chart.named], separators=(",", ":"))


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def refuse_other_than_png(image: bytes, name: object) -> None:
    """Refuse what is no whole PNG.

    Raises:
        ConfigError: If it is not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that of an image of enormous size
            with Image.open(io.BytesIO(image), formats=["PNG"]) as opened:
                opened.verify()
    except Exception as error:  # there is no end of what a parser may raise on bytes that are none of its own
        raise ConfigError(f"{name} is no PNG, or damaged") from error


def fewer_colors(image: bytes, n: int = 64) -> bytes:
    """A PNG with at most ``n`` colours, which takes about a third of the bytes for a plot."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.convert("RGB").quantize(n, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return min(file.getvalue(), image, key=len)
