"""Intervals and effective numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % Student-t interval.

    Args:
        values: One value per seed.

    Returns:
        The mean and the half-width: mean ± half-width covers 95 %. The half-width of a single value is NaN. Beyond
        30 degrees of freedom the normal quantile 1.96 is used (up to 4 % too narrow).

    Raises:
        ValueError: If there are no values.
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("mean_interval got no values; expected one per seed")
    mean = math.fsum(values) / len(values)
    df = len(values) - 1
    if df == 0:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / df)
    quantile = _T95[df - 1] if df <= len(_T95) else 1.96
    return mean, quantile * deviation / math.sqrt(len(values))


def interval(values: Iterable[float], least: float = -math.inf, most: float = math.inf) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % Student-t interval, as far as the measure goes.

    Args:
        values: One per seed or document.
        least: Smallest value that there can be, such as 0 for a rate.
        most: Greatest one.

    Returns:
        The mean, the lower and the upper end; both ends of a single value are NaN.
    """
    mean, half = mean_interval(values)
    if math.isnan(half):
        return mean, math.nan, math.nan
    return mean, max(mean - half, least), min(mean + half, most)


def ratio_interval(weights: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Weighted mean and half the width of its 95 % interval.

    A weighted mean is a ratio of two sums. Linearised (the usual standard error of a ratio estimator) it is the plain
    mean of the numbers below, each of which belongs to one item.

    Args:
        weights: Of each item, such as the tokens of a document.
        values: One per item.

    Returns:
        The mean and the half-width, NaN for a single item.
    """
    total = math.fsum(weights)
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    return mean, mean_interval(
        mean + len(weights) * w * (v - mean) / total for w, v in zip(weights, values, strict=True)
    )[1]


def wilson(k: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a rate: honest near 0 and 1, where the normal interval collapses to a point.

    Args:
        k: Number of successes, 0 <= k <= n.
        n: Number of trials; with none the interval is (0, 1), as nothing is known.
        z: Normal quantile of the coverage; the default covers 95 %.

    Returns:
        Lower and upper bound, both within [0, 1].

    Raises:
        ValueError: If k is not between 0 and n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson(k={k}, n={n}): k counts successes among n trials, so 0 <= k <= n is expected")
    if n == 0:
        return 0.0, 1.0
    rate = k / n
    scale = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    # At the ends the bound is exactly 0 or 1; subtraction would leave a rounding error there.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return low, high


def effective(weights: np.ndarray) -> float:
    """How many equal shares would be spread as evenly: exp of the entropy of ``weights`` (>= 0); 0 if all are 0."""
    share = weights[weights > 0] / weights.sum() if weights.sum() > 0 else np.empty(0)
    return math.exp(-float((share * np.log(share)).sum())) if len(share) else 0.0
