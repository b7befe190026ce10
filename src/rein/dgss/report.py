"""What a comparison gave: the figures of each method, as a table, as JSON, and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import torch

import rein
from rein.checkpoint import replace_file
from rein.dgss import panel
from rein.dgss.domains import Domains


@dataclass(frozen=True)
class Result:
    """How one method did.

    Attributes:
        method: `frozen`, `rein` or `full`; or what a run is called.
        backbone_parameters: of the bare backbone.
        tuned_parameters: that train besides the head: those of the adapter, or of the whole backbone.
        head_parameters: of the head, the same for every method.
        miou: domain -> mean IoU, 0 to 1.
        iou: domain -> class -> IoU, 0 to 1, NaN where the class does not occur (null in results.json).
        seconds: of training, where it is known.
        best_step: the step whose state was judged.
        source_validation_miou: by which that state was chosen, 0 to 1.
    """

    method: str
    backbone_parameters: int
    tuned_parameters: int
    head_parameters: int
    miou: dict[str, float]
    iou: dict[str, dict[str, float]]
    seconds: float | None = None
    best_step: int | None = None
    source_validation_miou: float | None = None


def mean_over_targets(result: Result, sources: Collection[str] = ()) -> float:
    """The number that matters: mean mIoU over the domains that were never shown, all but `sources`, 0 to 1."""
    known = [value for name, value in result.miou.items() if name not in sources and not isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:.1f}"


def table(results: Sequence[Result], sources: Collection[str] = ()) -> str:
    """The comparison as text: parameters that train, mIoU in per cent. A star marks a source, a dash that nothing was labelled."""
    domains = list(results[0].miou)
    names = [f"{name}*" if name in sources else name for name in domains]
    header = ["method", "head", "tuned in backbone", "%", *names, "mean of unseen"]
    rows = [
        [
            result.method,
            f"{result.head_parameters:,}",
            f"{result.tuned_parameters:,}",
            f"{100 * result.tuned_parameters / result.backbone_parameters:.1f}",
            *(_percent(result.miou[name]) for name in domains),
            _percent(mean_over_targets(result, sources)),
        ]
        for result in results
    ]
    return _aligned(header, rows)


def class_table(result: Result) -> str:
    """IoU of every class in every domain, in per cent; a dash where a class does not occur."""
    domains = list(result.iou)
    classes = list(result.iou[domains[0]])
    rows = [[name, *(_percent(result.iou[domain][name]) for domain in domains)] for name in classes]
    return _aligned(["class", *domains], [*rows, ["mean", *(_percent(result.miou[domain]) for domain in domains)]])


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def write_json(path: Path, settings: dict[str, Any], domains: Domains, results: Sequence[Result]) -> None:
    """Write `results.json`: settings, versions, and every figure; what was not counted is null."""
    write_results(path, {**settings, "source": domains.source, "targets": domains.targets}, results, [domains.source])


def write_results(path: Path, settings: dict[str, Any], results: Sequence[Result], sources: Collection[str] = ()) -> None:
    """Write settings, versions and results as JSON; what was not counted is null."""
    versions = {module.__name__: module.__version__ for module in (rein, torch, timm, lightning)}
    content = {
        **settings,
        "versions": versions,
        "results": [asdict(r) | {"mean_miou_of_unseen": mean_over_targets(r, sources)} for r in results],
    }
    replace_file(path, (json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n").encode())


def _without_nan(value: Any) -> Any:
    """NaN, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and isnan(value) else value


def write_panel(
    path: Path,
    domains: Domains,
    miou: Mapping[str, Mapping[str, float]],
    predictions: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Write the panel: one example of every domain, and what each method made of it.

    Args:
        path: the picture.
        domains: their examples are shown.
        miou: method -> domain -> mean IoU of the whole domain, 0 to 1.
        predictions: method -> domain -> predicted classes (H, W) of the example.
    """
    rows = []
    for name in domains.tests:
        image, label = domains.example(name)
        rows.append(
            panel.Row(
                name=f"{name} (source)" if name == domains.source else name,
                image=image.permute(1, 2, 0).numpy(),
                label=label.numpy(),
                predictions={method: classes[name] for method, classes in predictions.items()},
                miou={method: found[name] for method, found in miou.items()},
            )
        )
    title = f"Fitted on {domains.source}; no other domain was shown in fitting (mIoU, %)"
    picture = io.BytesIO()
    panel.draw(rows, domains.space, title).save(picture, "PNG")
    replace_file(path, picture.getvalue())
