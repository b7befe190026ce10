"""Tables of the runs: every method's mIoU in every domain over seeds, and paired differences between methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.summary import difference, spread
from rein.dgss.evaluation.results import text_table

UNSEEN = "mean of unseen"


def evaluated(content: Mapping[str, Any]) -> dict[str, dict[int, dict[str, float]]]:
    """Contender -> seed -> domain -> mIoU in per cent; `UNSEEN` holds the mean of the unseen domains."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in content["rows"]:
        if row["purpose"] == "evaluate":
            unseen = [value for domain, value in row["miou"].items() if domain != content["source"]]
            found.setdefault(row["contender"], {})[row["seed"]] = {**row["miou"], UNSEEN: fmean(unseen)}
    return found


def covered(content: Mapping[str, Any]) -> str:
    """The domains that the mean of the unseen covers; the domain of the source shows held-out frames."""
    row = next(row for row in content["rows"] if row["purpose"] == "evaluate")
    return ", ".join(domain for domain in row["miou"] if domain != content["source"])


def of_domain(runs: Mapping[int, Mapping[str, float]], domain: str) -> dict[int, float]:
    """Seed -> mIoU in one domain."""
    return {seed: values[domain] for seed, values in runs.items()}


def table(content: Mapping[str, Any], against: tuple[str, ...] = ("freeze", "full")) -> tuple[list[str], list[list[str]]]:
    """Header and rows: trainable parameters, rates of head and method, every domain, and differences in the mean of unseen domains.

    A run that diverged counts as 0; its row says so.
    """
    runs = evaluated(content)
    rows = {}
    for row in sorted((row for row in content["rows"] if row["purpose"] == "evaluate"), key=lambda row: "diverged" not in row):
        rows[row["contender"]] = row  # the last one wins: a run that did not diverge, if there is one
    lost = Counter(row["contender"] for row in content["rows"] if row["purpose"] == "evaluate" and "diverged" in row)
    domains = list(next(iter(rows.values()))["miou"])
    source = content["source"]
    header = [
        "method",
        "tuned",
        "rates",
        *(f"{domain} (held-out source)" if domain == source else domain for domain in domains),
        UNSEEN,
    ]
    against = tuple(name for name in against if name in runs)
    lines = []
    for name, found in runs.items():
        title = f"{name} ({lost[name]} of {len(found)} diverged)" if lost[name] else name
        lines.append([title, f"{rows[name]['tuned_parameters']:,}", _rates(rows[name]), *cells(runs, name, against)])
    return [*header, *(f"minus {name}" for name in against)], lines


def cells(runs: Mapping[str, Mapping[int, Mapping[str, float]]], name: str, against: Sequence[str]) -> list[str]:
    """Spread over seeds in every domain, then differences to other methods in the mean of unseen domains.

    Args:
        runs: method -> seed -> domain -> mIoU in per cent, with `UNSEEN` among the domains.
        name: the method.
        against: the methods to compare it with; the cell of the method itself is empty.
    """
    unseen = {method: of_domain(seeds, UNSEEN) for method, seeds in runs.items()}
    spreads = [str(spread(of_domain(runs[name], domain).values())) for domain in next(iter(runs[name].values()))]
    return [*spreads, *("" if name == other else str(difference(unseen[name], unseen[other])) for other in against)]


def _rates(row: Mapping[str, Any]) -> str:
    return f"{row['head_rate']:g}" + (f", {row['rate']:g}" if row["tuned_parameters"] else "")


def as_text(content: Mapping[str, Any]) -> str:
    """The table for a terminal, and the domains that its mean covers."""
    return f"{text_table(*table(content))}\n\n{UNSEEN}: {covered(content)}"
