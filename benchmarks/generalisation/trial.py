"""One run: a contender as a recipe, fitted on the source by `rein fit` and evaluated on every domain by `rein test`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.generalisation.contenders import QUERY_DIM, Contender
from benchmarks.pocket import encoders
from rein.dgss import commands, recipes
from rein.testing.models import POCKET


@dataclass(frozen=True)
class Budget:
    """Length of a run, the same for every contender.

    Attributes:
        steps: AdamW steps; the learning rate decays to zero.
        batch: crops per step.
        crop: side of the crops in pixels.
    """

    steps: int = 400
    batch: int = 4
    crop: int = 96


@dataclass(frozen=True)
class Rates:
    """Learning rates of the head and of the trainable backbone parameters; equal for a frozen backbone."""

    head: float
    method: float


HEADS: dict[str, dict[str, Any]] = {  # on feature maps of the paper's four blocks
    "linear": {"head": "LinearHead"},
    "fpn": {"head": "FPNHead", "head_settings": {"channels": 64, "tower_channels": 32}},
    "mask2former": {
        "head": "Mask2FormerHead",
        "head_settings": {
            "channels": QUERY_DIM,
            "encoder_layers": 1,
            "encoder_feedforward": 128,
            "decoder_layers": 3,
            "decoder_feedforward": 128,
            "num_points": 1000,
        },
    },
}


def schedule(steps: int) -> dict[str, Any]:
    """The weight average and the annealed decay of SoMA's recipe for GTAV, scaled from its 40,000 steps to a run of `steps`.

    The average starts after the same share of the run, 30 %, and forgets a state over the same share of it.
    """
    recipe = recipes.resolve("gtav-dinov2-l-soma")["model"]
    scale = 40_000 / steps
    return {
        "ema": recipe["ema"] ** scale,
        "ema_from": round(recipe["ema_from"] / scale),
        "final_weight_decay": recipe["final_weight_decay"],
    }


def configuration(
    contender: Contender,
    head: str,
    data: dict[str, Any],
    budget: Budget,
    rates: Rates,
    seed: int,
    out: Path,
    weights: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The recipe of one run. The last state is evaluated, as in the paper; no checkpoint is selected.

    Args:
        contender: the method.
        head: a key of `HEADS`.
        data: sources, validation and targets, the `data` section of a recipe.
        budget: length of the run.
        rates: learning rates.
        seed: seed of the run.
        out: folder of the run.
        weights: file of the backbone, which `benchmarks.pocket.pretrain` exported; None means `pocket_vit`.
        device: `cpu`, `cuda` or `cuda:N`.
    """
    factor = rates.method / rates.head
    number = device.partition(":")[2]
    backbone: dict[str, Any] = {"backbone": POCKET}
    if weights is not None:
        name = encoders.about(weights)["encoder"]
        backbone = {"backbone": name, **encoders.settings(name), **({"weights": str(weights)} if contender.pretrained else {})}
    return {
        "out": str(out),
        "seed_everything": seed,
        "checkpoint_every": budget.steps,
        "model": {
            **backbone,
            "pretrained": contender.pretrained,
            "imagenet_normalization": False,
            "method": contender.method,
            "method_settings": dict(contender.settings),
            **HEADS[head],
            "num_maps": 4,
            "lr": rates.head,
            "adapter_factor": factor,
            "backbone_factor": factor,
            **(schedule(budget.steps) if contender.scheduled else {}),
            **({} if contender.token_factor == 1 else {"token_factor": contender.token_factor}),
        },
        "data": {
            **data,
            "batch_size": budget.batch,
            "crop": budget.crop,
            "scales": [1.0, 2.0],
            "max_share": 1.0,
            "workers": 0,
        },
        "trainer": {
            "accelerator": "cpu" if device == "cpu" else "gpu",
            "devices": [int(number)] if number else 1,
            "max_steps": budget.steps,
            "val_check_interval": budget.steps,
            "logger": False,
            "enable_progress_bar": False,
        },
    }


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Fit and test a recipe.

    Returns:
        Figures of the run: numbers of parameters; processor time of training; mIoU in per cent on the source's validation pairs,
        which chooses the rates, and on each target, if the recipe has targets.

    Raises:
        DivergedError: the loss is not finite.
    """
    text = recipes.to_yaml(config, "a run of benchmarks.generalisation")
    started = time.process_time()
    fitted = commands.run(["fit", "--config", text], quiet=True)
    model: Any = fitted.model
    found = {
        "tuned_parameters": model.tuned_parameters,
        "head_parameters": sum(parameter.numel() for parameter in model.segmenter.head.parameters()),
        "fit_cpu_seconds": round(time.process_time() - started, 1),
        "validation_miou": _percent(model.confusions[0].mean_iou()),
    }
    if config["data"]["targets"]:
        tested: Any = commands.run(["test", "--config", text], quiet=True)
        names = [domain["title"] for domain in config["data"]["targets"]]
        confusions = tested.model.confusions
        found["miou"] = {name: _percent(confusions[index].mean_iou()) for index, name in enumerate(names)}
    return found


def _percent(share: float) -> float:
    return round(100 * share, 3)
