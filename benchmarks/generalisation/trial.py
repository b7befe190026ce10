"""One run: a contender fitted on the source, and judged on the source's held-out pairs or on every domain."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.generalisation.contenders import QUERY_DIM, Contender
from rein import Segmenter, backbones, heads
from rein.dgss.domains import Domains
from rein.dgss.training import BestState, Schedule, fit, judge
from rein.dgss.transforms import Normalize
from rein.segmenter import default_indices


@dataclass(frozen=True)
class Budget:
    """The same for every contender.

    Attributes:
        steps: of AdamW, at a rate that falls to zero.
        batch: crops per step.
        crop: side of the crops in pixels.
    """

    steps: int = 400
    batch: int = 4
    crop: int = 96


HEADS: dict[str, Callable[[list[int], int], heads.Head]] = {
    "linear": heads.LinearHead,
    "mask2former": partial(
        heads.Mask2FormerHead,
        channels=QUERY_DIM,
        encoder_layers=1,
        encoder_feedforward=128,
        decoder_layers=3,
        decoder_feedforward=128,
        num_points=1000,
    ),
}


def head_for(name: str, backbone: torch.nn.Module, classes: int) -> heads.Head:
    """The head of every contender, over the maps of the paper's four blocks."""
    widths = backbones.map_channels(backbone)
    return HEADS[name]([widths[index] for index in default_indices(len(widths), 4)], classes)


@dataclass(frozen=True)
class Rates:
    """Learning rates of the head, and of what trains in the backbone; with a frozen one they are the same."""

    head: float
    method: float


def fitted(contender: Contender, head: str, data: Domains, budget: Budget, rates: Rates, seed: int) -> tuple[Segmenter, float]:
    """The last state, as in the paper, nothing is chosen on the way; and its mIoU on the source's validation pairs, in per cent."""
    torch.manual_seed(seed)
    backbone = contender.backbone()
    torch.manual_seed(seed + 1)  # every contender starts from the same head
    segmenter = Segmenter(backbone, head_for(head, backbone, len(data.space.names)))
    schedule = Schedule(
        lr=rates.head,
        backbone_factor=rates.method / rates.head,
        adapter_factor=rates.method / rates.head,
        steps=budget.steps,
        batch_size=budget.batch,
        crop=budget.crop,
        validations=1,
        seed=seed,
    )
    last = BestState(Path(), lambda segmenter, path: None)
    with contextlib.redirect_stdout(io.StringIO()):
        fit(segmenter, data.train, data.validation, normalize=_normalize(segmenter), schedule=schedule, best=last)
    assert last.step == budget.steps
    assert last.miou is not None
    return segmenter, _percent(last.miou)


def run(
    contender: Contender, head: str, data: Domains, budget: Budget, rates: Rates, seed: int
) -> tuple[dict[str, Any], Segmenter]:
    """Fit and judge: what goes into the results, and the fitted segmenter.

    Returned are mIoUs in per cent: of the source's validation pairs, by which rates are chosen, and of each domain of `data.tests`.
    """
    started = time.process_time()
    segmenter, validation = fitted(contender, head, data, budget, rates, seed)
    taken = time.process_time() - started
    head_size = sum(parameter.numel() for parameter in segmenter.head.parameters())
    tuned = sum(parameter.numel() for parameter in segmenter.backbone.parameters() if parameter.requires_grad)
    found = {
        "contender": contender.name,
        "head_rate": rates.head,
        "rate": rates.method,
        "seed": seed,
        "tuned_parameters": tuned,
        "head_parameters": head_size,
        "fit_cpu_seconds": round(taken, 1),
        "validation_miou": validation,
    }
    if data.tests:
        found["miou"] = {domain: miou(segmenter, pairs) for domain, pairs in data.tests.items()}
    return found, segmenter


def miou(segmenter: Segmenter, pairs) -> float:
    """Mean IoU of a domain, in per cent."""
    return _percent(judge(segmenter, pairs, _normalize(segmenter), lambda loader: loader).mean_iou())


def example(segmenter: Segmenter, data: Domains, domain: str) -> torch.Tensor:
    """The predicted classes (H, W), uint8, of the pair that is shown of a domain."""
    image = data.example(domain)[0][None]
    return segmenter.predict(_normalize(segmenter)(image)).argmax(1)[0].to(torch.uint8)


def _percent(share: float) -> float:
    return round(100 * share, 3)


def _normalize(segmenter: Segmenter) -> Normalize:
    return Normalize(*backbones.normalization(segmenter.backbone))
