"""What the tables look like: differences with their spread, and examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generalisation.tables import UNSEEN, difference, judged, of_domain
from rein.dgss.domains import Domains
from rein.dgss.report import write_panel


def differences(content: Mapping[str, Any], reference: str = "freeze") -> Any:
    """A figure: every contender minus the reference, on the source and over the unseen domains; dots are seeds, bars 95 %.

    Those that start from random weights lie far off, and are left to the table.
    """
    from matplotlib import pyplot

    runs = judged(content)
    names = [name for name in runs if name != reference and content["contenders"][name]["pretrained"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.9 + 0.34 * len(names)), sharey=True)
    for axis, domain in zip(axes, (content["source"], UNSEEN), strict=True):
        base = of_domain(runs[reference], domain)
        for place, name in enumerate(names):
            found = of_domain(runs[name], domain)
            gap = difference(found, base)
            axis.plot([found[seed] - base[seed] for seed in found], [place + 0.3] * len(found), ".", color="0.5", markersize=5)
            axis.plot([gap.low, gap.high], [place, place], color="tab:blue", linewidth=2)
            axis.plot(gap.mean, place, "o", color="tab:blue", markersize=6)
        axis.axvline(0, color="black", linewidth=0.8)
        unseen = [name for name in next(iter(runs[reference].values())) if name not in (content["source"], UNSEEN)]
        title = f"{domain} (source)" if domain == content["source"] else domain if len(unseen) > 1 else unseen[0]
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"mIoU minus {reference}'s, points", fontsize=9)
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top
    return figure


def examples(content: Mapping[str, Any], data: Domains, kept: Mapping[str, Path], seed: int, path: Path) -> None:
    """Draw one pair of every domain, the truth, and what some contenders make of it.

    Args:
        content: of the results.
        data: of the seed.
        kept: contender -> the file of its predictions, domain by domain.
        seed: of the runs.
        path: where to.
    """
    predictions = {}
    for name, file in kept.items():
        with np.load(file) as found:
            predictions[name] = dict(found)
    runs = judged(content)
    miou = {name: {domain: value / 100 for domain, value in runs[name][seed].items()} for name in predictions}
    write_panel(path, data, miou, predictions)
