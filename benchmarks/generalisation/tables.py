"""Tables of the runs: mean and spread over seeds, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy import stats

from rein.dgss.evaluation.results import text_table

UNSEEN = "mean of unseen"


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
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def evaluated(content: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Contender -> seed -> domain -> mIoU in per cent, with the mean of the unseen domains among them."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in content["rows"]:
        if row["purpose"] == "evaluate":
            unseen = [value for domain, value in row["miou"].items() if domain != content["source"]]
            found.setdefault(row["contender"], {})[row["seed"]] = {**row["miou"], UNSEEN: statistics.fmean(unseen)}
    return found


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation over seeds; the deviation of one seed is NaN."""
    values = list(values)
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """One contender's values minus another's, over the seeds that both have."""
    values = [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Difference(mean, math.nan, math.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean, mean - half, mean + half)


def of_domain(runs: Mapping[int, Mapping[str, float]], domain: str) -> dict[int, float]:
    """Seed -> mIoU in one domain."""
    return {seed: values[domain] for seed, values in runs.items()}


def table(content: Mapping[str, Any], against: tuple[str, ...] = ("freeze", "full")) -> tuple[list[str], list[list[str]]]:
    """Header and rows: trainable parameters, rates of head and method, every domain, and differences in the mean of the unseen.

    A run that diverged counts as 0; its row says so.
    """
    runs = evaluated(content)
    rows = {}
    for row in sorted((row for row in content["rows"] if row["purpose"] == "evaluate"), key=lambda row: "diverged" not in row):
        rows[row["contender"]] = row  # of one that did not diverge, if there is any
    lost = Counter(row["contender"] for row in content["rows"] if row["purpose"] == "evaluate" and "diverged" in row)
    domains = list(next(iter(rows.values()))["miou"])
    source = content["source"]
    head = ["method", "tuned", "rates", *(f"{domain} (source)" if domain == source else domain for domain in domains), UNSEEN]
    against = tuple(name for name in against if name in runs)
    lines = []
    for name, found in runs.items():
        cells = [str(spread(of_domain(found, domain).values())) for domain in (*domains, UNSEEN)]
        paired = [
            "" if name == other else str(difference(of_domain(found, UNSEEN), of_domain(runs[other], UNSEEN)))
            for other in against
        ]
        called = f"{name} ({lost[name]} of {len(found)} diverged)" if lost[name] else name
        lines.append([called, f"{rows[name]['tuned_parameters']:,}", _rates(rows[name]), *cells, *paired])
    return [*head, *(f"minus {name}" for name in against)], lines


def _rates(row: Mapping[str, Any]) -> str:
    return f"{row['head_rate']:g}" + (f", {row['rate']:g}" if row["tuned_parameters"] else "")


def as_text(content: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    return text_table(*table(content))
