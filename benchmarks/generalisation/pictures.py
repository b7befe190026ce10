"""What the tables look like: differences with their spread, and examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generalisation.data import Domains
from benchmarks.generalisation.tables import UNSEEN, difference, judged, of_domain
from rein.dgss import panel


def differences(content: Mapping[str, Any], reference: str = "freeze") -> Any:
    """A figure: every contender minus the reference, on the source and over the unseen domains; dots are seeds, bars 95 %."""
    from matplotlib import pyplot

    runs = judged(content)
    names = [name for name in runs if name != reference]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.9 + 0.34 * len(names)), sharey=True)
    for axis, domain in zip(axes, (content["source"], UNSEEN), strict=True):
        base = of_domain(runs[reference], domain)
        for place, name in enumerate(names):
            found = of_domain(runs[name], domain)
            gap = difference(found, base)
            axis.plot([found[seed] - base[seed] for seed in found], [place] * len(found), ".", color="0.65", markersize=5)
            axis.plot([gap.low, gap.high], [place, place], color="tab:blue", linewidth=2)
            axis.plot(gap.mean, place, "o", color="tab:blue", markersize=6)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{domain} (source)" if domain == content["source"] else domain, fontsize=10)
        axis.set_xlabel(f"mIoU minus {reference}'s, points", fontsize=9)
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def examples(content: Mapping[str, Any], data: Domains, kept: Mapping[str, Path], seed: int, path: Path) -> None:
    """Draw the middle pair of every domain, the truth, and what some contenders make of it.

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
    rows = []
    for domain, pairs in data.tests.items():
        image, label = pairs[len(pairs) // 2]
        rows.append(
            panel.Row(
                name=f"{domain} (source)" if domain == data.source else domain,
                image=image.permute(1, 2, 0).numpy(),
                label=label.numpy(),
                predictions={name: classes[domain] for name, classes in predictions.items()},
                miou={name: runs[name][seed][domain] / 100 for name in predictions},
            )
        )
    title = f"Fitted on {data.source}; no other domain was shown in fitting (mIoU of the domain, %)"
    panel.draw(rows, data.space, title).save(path)
