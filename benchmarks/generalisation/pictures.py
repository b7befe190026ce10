"""Plots of the tables: differences between methods with their confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.generalisation.tables import UNSEEN, evaluated, of_domain
from benchmarks.summary import difference


def differences(content: Mapping[str, Any], reference: str = "freeze") -> Any:
    """Plot every contender minus the reference, on the source and in the mean of unseen domains; dots are seeds, bars 95 % intervals.

    Contenders with random weights are left out, since they are far outside the range of the others.
    """
    from matplotlib import pyplot

    runs = evaluated(content)
    names = [name for name in runs if name != reference and content["contenders"][name]["pretrained"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.9 + 0.34 * len(names)), sharey=True)
    for axis, domain in zip(axes, (content["source"], UNSEEN), strict=True):
        base = of_domain(runs[reference], domain)
        for position, name in enumerate(names):
            found = of_domain(runs[name], domain)
            gap = difference(found, base)
            axis.plot([found[seed] - base[seed] for seed in found], [position + 0.3] * len(found), ".", color="0.5", markersize=5)
            axis.plot([gap.low, gap.high], [position, position], color="tab:blue", linewidth=2)
            axis.plot(gap.mean, position, "o", color="tab:blue", markersize=6)
        axis.axvline(0, color="black", linewidth=0.8)
        unseen = [name for name in next(iter(runs[reference].values())) if name not in (content["source"], UNSEEN)]
        title = f"{domain} (held-out source)" if domain == content["source"] else domain if len(unseen) > 1 else unseen[0]
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"mIoU minus {reference}'s, points", fontsize=9)
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top
    return figure
