"""Where the marks of a chart are, worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from memlm.analysis.chart import Chart, Series, size, thin, ticks


def places(chart: Chart) -> list[tuple[float, float]]:
    return [(round(chart.across(x), 3), round(chart.up(y), 3)) for part in chart.shown for x, y in part.points]


def test_points_stand_where_their_numbers_say() -> None:
    chart = Chart("t", "x", "y", [Series("a", [(0, 0), (50, 0.25), (100, 1)])], span=(0.0, 1.0))
    assert places(chart) == [(0, 100), (50, 75), (100, 0)]
    assert chart.path(chart.shown[0]) == "M0.00 100.00L50.00 75.00L100.00 0.00"
    assert [(tick.place, tick.text) for tick in chart.x_ticks] == [(20.0 * i, str(20 * i)) for i in range(6)]
    wider = Chart("t", "x", "y", [Series("a", [(50, 2.0)])], span=(0.0, 1.0), across_span=(0.0, 200.0), percent=True)
    assert places(wider) == [(25, 0)]  # beyond the frame: at its edge
    assert wider.text(0.25) == "25 %"


def test_bytes_count_by_factors_and_none_stands_apart() -> None:
    series = [Series(str(n), [(n, 1.0)]) for n in (0, 1e3, 1e5, 1e7)]
    chart = Chart("t", "bytes", "y", series, lines=False, log=True)
    at = [x for x, _ in places(chart)]
    assert at == sorted(at)
    assert 0 < at[0] < at[1]
    assert at[2] - at[1] == pytest.approx(at[3] - at[2])
    assert next(tick.text for tick in chart.x_ticks) == "0"
    assert {"1 k", "100 k", "10 M"} <= {tick.text for tick in chart.x_ticks}
    assert all(0 <= tick.place <= 100 for tick in chart.x_ticks)


def test_intervals_are_in_the_frame() -> None:
    chart = Chart("t", "x", "y", [Series("a", [(1, 5.0)], [(2.0, 11.0)])], lines=False)
    assert 0 < chart.up(11.0) < chart.up(5.0) < chart.up(2.0) < 100


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(1, math.inf), (math.nan, 2)]])
def test_what_has_no_finite_number_is_left_out(points: list[tuple[float, float]]) -> None:
    chart = Chart("t", "x", "y", [Series("a", points), Series("b", [(3, 7.0)])])
    assert [part.label for part in chart.shown] == ["b"]
    assert all(0 <= value <= 100 for place in places(chart) for value in place)
    assert Chart("t", "x", "y", [Series("a", points)]).y_ticks


def test_a_long_line_keeps_its_ends_and_extremes() -> None:
    rng = random.Random(0)
    points = [(float(i), rng.gauss(0, 1)) for i in range(100_000)]
    points[777], points[55_555] = (777.0, 50.0), (55_555.0, -50.0)
    found = thin(Series("a", points)).points
    assert len(found) <= 400
    assert found[-1] == points[-1]
    assert {points[777], points[55_555]} <= set(found)
    assert list(found) == sorted(found)
    assert set(found) <= set(points)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (9, 250, [50, 100, 150, 200, 250]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_sizes_have_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 11_100_000, 2.5e9)] == ["0", "999", "1 k", "11.1 M", "2.5 G"]


def test_a_series_has_the_colour_of_its_run_or_name() -> None:
    noise, trend, other = Series("a", [(1, 1)], faint=True), Series("a", [(1, 1)]), Series("b", [(1, 1)])
    chart = Chart("t", "x", "y", [noise, trend, other])
    assert [chart.color(part) for part in chart.shown] == ["s0", "s0", "s1"]
    assert [part.label for part in chart.named] == ["a", "b"]
