"""A chart as it stands on a page: lines over steps, or points with intervals, drawn by the page itself.

It follows the page's light or dark, fits any width, and is small. Only where things are is worked out here; `page.html`
beside this file draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

MOST_POINTS = 400
"""Points of a line at most; of more, the least and the greatest of each stretch are kept."""


N_COLOR = 6
"""Colours that the page has for series."""


class Series(NamedTuple):
    """Numbers of one kind.

    Attributes:
        label: What it is called.
        points: Where, and how much; NaN and infinite ones are not drawn.
        ends: Interval of each point; empty for none.
        control: Whether it is set back, such as a control.
        faint: Whether it is the noise around another series, which needs no name.
        run: Which run it is of, see `memlm.analysis.page.Chapter`.
        mark: What stands beside its points.
    """

    label: str
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float, float]] = ()
    control: bool = False
    faint: bool = False
    run: str = ""
    mark: str = ""


class Tick(NamedTuple):
    """A mark on an axis: where, in percent of its length, and what it says."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Series in one frame.

    Attributes:
        title: Heading.
        x: What is across.
        y: What is up, with its unit.
        series: See `Series`; what has no finite number is left out.
        lines: Whether points of a series are joined.
        percent: Whether numbers are rates, shown in percent.
        log: Whether what is across counts by factors; what is not above 0 stands to the left of it.
        span: Ends of what is up; None for those of the numbers.
        across_span: Ends of what is across; None for those of the numbers.
        notes: Sentences below it.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    lines: bool = True
    percent: bool = False
    log: bool = False
    span: tuple[float, float] | None = None
    across_span: tuple[float, float] | None = None
    notes: Sequence[str] = ()
    shown: list[Series] = field(init=False)

    def __post_init__(self) -> None:
        found = [(part, _finite(part)) for part in self.series]
        object.__setattr__(self, "shown", [thin(part) if self.lines else part for _, part in found if part.points])

    @property
    def named(self) -> list[Series]:
        """The series that a legend names."""
        return [part for part in self.shown if not part.faint]

    def color(self, part: Series) -> str:
        """Class of a series' colour on the page: as many as there are, told apart by colour-blind readers."""
        others = [other.run if other.run else other.label for other in self.shown if not other.faint]
        name = part.run if part.run else part.label
        return f"s{list(dict.fromkeys(others)).index(name) % N_COLOR}" if name in others else "s0"

    @cached_property
    def _low_high(self) -> tuple[float, float]:
        if self.span is not None:
            return self.span
        values = [y for part in self.shown for _, y in part.points]
        values += [end for part in self.shown for pair in part.ends for end in pair if math.isfinite(end)]
        return _widened(min(values, default=0.0), max(values, default=1.0))

    @cached_property
    def _left_right(self) -> tuple[float, float]:
        if self.across_span is not None:
            return self.across_span
        values = [x for part in self.shown for x, _ in part.points if x > 0 or not self.log]
        low, high = min(values, default=1.0), max(values, default=10.0)
        if self.log:
            return math.log10(low) - 0.15, math.log10(high) + 0.15
        return (low, high) if high > low else (low - 1, high + 1)

    def across(self, x: float) -> float:
        """Where a value is across, in percent."""
        low, high = self._left_right
        if not self.log:
            return 100 * (x - low) / (high - low)
        edge = 12.0 if any(at <= 0 for part in self.shown for at, _ in part.points) else 0.0
        return edge / 2 if x <= 0 else edge + (100 - edge) * (math.log10(x) - low) / (high - low)

    def up(self, y: float) -> float:
        """Where a value is up, in percent from the top; at an edge what lies beyond it."""
        low, high = self._low_high
        return min(max(100 * (high - y) / (high - low), 0.0), 100.0)

    def path(self, part: Series) -> str:
        """The line of a series, as SVG writes it, in a frame of 100 by 100."""
        return "M" + "L".join(f"{self.across(x):.2f} {self.up(y):.2f}" for x, y in part.points)

    @property
    def x_ticks(self) -> list[Tick]:
        """Marks across."""
        low, high = self._left_right
        if not self.log:
            return [Tick(self.across(at), shown(at)) for at in ticks(low, high, 5)]
        nothing = [Tick(self.across(0), "0")] if self.across(0) < self.across(10**low) - 1 else []
        powers = range(math.ceil(low), math.floor(high) + 1)
        few = list(powers)[:: -(-len(powers) // 5)] if powers else []
        places = [10.0**power for power in few] if len(few) > 1 else [10 ** (low + 0.15), 10 ** (high - 0.15)]
        return nothing + [Tick(self.across(at), size(at)) for at in dict.fromkeys(places)]

    @property
    def y_ticks(self) -> list[Tick]:
        """Marks up."""
        low, high = self._low_high
        return [Tick(self.up(at), self.text(at)) for at in ticks(low, high, 5)]

    def text(self, value: float) -> str:
        """A number of the chart."""
        return f"{100 * value:.3g} %" if self.percent else shown(value)


def _finite(part: Series) -> Series:
    keep = [i for i, point in enumerate(part.points) if all(map(math.isfinite, point))]
    ends = [part.ends[i] for i in keep] if part.ends else ()
    return part._replace(points=[part.points[i] for i in keep], ends=ends)


def thin(part: Series, most: int = MOST_POINTS) -> Series:
    """A line with at most so many points: of each stretch the least and the greatest, in their order, and the last."""
    n = len(part.points)
    if n <= most:
        return part
    n_stretch = (most - 1) // 2
    points: list[tuple[float, float]] = []
    for i in range(n_stretch):
        stretch = part.points[i * (n - 1) // n_stretch : (i + 1) * (n - 1) // n_stretch]
        least, greatest = (pick(stretch, key=lambda point: point[1]) for pick in (min, max))
        points += sorted({least, greatest})
    return part._replace(points=[*points, part.points[-1]])


def _widened(low: float, high: float) -> tuple[float, float]:
    """Ends a little beyond the numbers, so that none lies on the edge."""
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - room, high + room


def ticks(low: float, high: float, n: int) -> list[float]:
    """About so many round numbers from ``low`` to ``high``."""
    raw = (high - low) / n
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number in few characters."""
    if abs(value) >= 1e5 and math.isfinite(value):
        return size(value)
    return f"{float(f'{value:.4g}'):,g}"


def size(value: float) -> str:
    """A large number with a unit."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"
