"""AdamW with the authors' parameter groups, and the polynomial decay of the learning rate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rein.errors import InputError
from rein.parameters import param_groups, split_by_rate
from rein.segmenter import Segmenter


@dataclass(frozen=True)
class Optimization:
    """Learning rates and decays; the defaults are the authors' recipe.

    Attributes:
        lr: learning rate of head and adapter; of the head alone if `adapter_factor` is not 1.
        weight_decay: weight decay of AdamW; tokens, scale, norm layers and embeddings are not decayed.
        power: exponent of the polynomial decay of the learning rate to zero over the run.
        backbone_factor: learning rate of the backbone's own weights, where they train, as a multiple of `lr`.
        ema: decay of an exponential moving average of the weights, which is then evaluated and kept; None keeps none.
        adapter_factor: learning rate of what a method adds to the backbone, as a multiple of `lr`.

    Raises:
        InputError: a value out of range.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    power: float = 0.9
    backbone_factor: float = 0.1
    ema: float | None = None
    adapter_factor: float = 1.0

    def __post_init__(self) -> None:
        rates = (self.lr, self.backbone_factor, self.adapter_factor)
        if not (min(rates) > 0 and self.weight_decay >= 0 and self.power >= 0):
            raise InputError(f"got {asdict(self)}; rates must be above 0, weight_decay and power at least 0.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must lie between 0 and 1. 0.999 averages over about 1,000 steps.")


def make_optimizer(
    segmenter: Segmenter, settings: Optimization, backbone_parameters: Collection[str], steps: int
) -> dict[str, Any]:
    """The optimizer and its schedule, as Lightning's `configure_optimizers` returns them.

    Args:
        segmenter: the model; frozen parameters are left out.
        settings: rates and decays.
        backbone_parameters: names of the backbone's own parameters; its other parameters were added by a method.
        steps: length of the run.
    """
    rates = {
        id(parameter): settings.lr * (settings.backbone_factor if name in backbone_parameters else settings.adapter_factor)
        for name, parameter in segmenter.backbone.named_parameters()
    }
    groups = split_by_rate(param_groups(segmenter, settings.lr, settings.weight_decay), rates)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=settings.power)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
