"""Summaries of repeated measurements and the tables that show them.

Repeats of a timing give a median with quartiles or range, seeds of a training run a mean with a deviation or a paired difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# -- over repeats


def median(values: Sequence[float], digits: int = 6) -> float:
    """The median, rounded."""
    return round(statistics.median(values), digits)


def median_and_range(values: Sequence[float], digits: int) -> tuple[float, float, float]:
    """Median, minimum and maximum, rounded."""
    return median(values, digits), round(min(values), digits), round(max(values), digits)


def quartiles(values: Sequence[float], digits: int = 2) -> list[float]:
    """First quartile, median and third quartile, rounded."""
    if len(values) == 1:
        return [round(values[0], digits)] * 3
    return [round(value, digits) for value in statistics.quantiles(values, n=4, method="inclusive")]


def median_interval(values: Sequence[float], digits: int = 2) -> list[float]:
    """Confidence interval of the true median at 95 %, from order statistics alone; the whole range if there are few values."""
    ordered = sorted(values)
    low = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))) - 1)
    return [round(ordered[low], digits), round(ordered[-1 - low], digits)]


# -- over seeds


@dataclass(frozen=True)
class Spread:
    """Mean of values over seeds, and their standard deviation."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Difference:
    """Mean of the differences seed by seed, and its 95 % confidence interval over seeds (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return with_range(self.mean, self.low, self.high, "+.1f")


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation over seeds; the deviation of one seed is NaN."""
    values = list(values)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """One method's values minus another's, over the seeds that both have; the interval of one seed is NaN."""
    from scipy import stats  # imported here: the pocket scripts do not need it

    values = [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]
    paired = spread(values)
    half = stats.t.ppf(0.975, len(values) - 1) * paired.deviation / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(paired.mean, paired.mean - half, paired.mean + half)


# -- as text


def with_range(middle: float, low: float, high: float, number_format: str = ".1f", unit: str = "") -> str:
    """A value with the limits around it, such as `1.5 ms [1.2, 1.9]`."""
    return f"{middle:{number_format}}{unit} [{low:{number_format}}, {high:{number_format}}]"


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)
