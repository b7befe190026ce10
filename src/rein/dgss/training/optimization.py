"""AdamW with the authors' parameter groups, and the schedules of a run.

The learning rate rises linearly in the warm-up and then decays polynomially. The weight decay may be annealed, and the weights may be
averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from rein.adapter import ReinAdapter
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
        warmup_steps: number of steps over which the learning rates rise linearly, before the decay; 0 starts with the decay.
        warmup_factor: learning rates of the first step of the warm-up, as a multiple of the full ones.
        final_weight_decay: weight decay at the end of the run, to which it is annealed by a cosine; None keeps it constant.
        ema_from: number of steps after which the average starts, from the weights of that step. Before, the weights are evaluated.
        token_factor: learning rate of Rein's tokens, as a multiple of the rate of the rest of the adapter.

    Raises:
        InputError: a value out of range.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    power: float = 0.9
    backbone_factor: float = 0.1
    ema: float | None = None
    adapter_factor: float = 1.0
    warmup_steps: int = 0
    warmup_factor: float = 1e-6
    final_weight_decay: float | None = None
    ema_from: int = 0
    token_factor: float = 1.0

    def __post_init__(self) -> None:
        rates = (self.lr, self.backbone_factor, self.adapter_factor, self.token_factor)
        if not (min(rates) > 0 and self.weight_decay >= 0 and self.power >= 0):
            raise InputError(f"got {asdict(self)}; rates must be above 0, weight_decay and power at least 0.")
        if self.warmup_steps < 0 or not 0 < self.warmup_factor <= 1:
            raise InputError(
                f"warmup_steps is {self.warmup_steps} and warmup_factor is {self.warmup_factor}; expected at least 0 steps, and a "
                "factor above 0 and up to 1."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must lie between 0 and 1. 0.999 averages over about 1,000 steps.")
        if self.ema_from < 0 or (self.ema_from > 0 and self.ema is None):
            raise InputError(
                f"ema_from is {self.ema_from} and ema is {self.ema}; expected at least 0 steps, and a decay if they are more. Set "
                "ema (0.9998 is OpenMMLab's), or leave ema_from out."
            )
        if self.final_weight_decay is not None and not 0 <= self.final_weight_decay <= self.weight_decay:
            raise InputError(
                f"final_weight_decay is {self.final_weight_decay}; expected 0 to weight_decay, {self.weight_decay}. Lower it, or "
                "leave it out for a constant decay."
            )

    def weight_decay_at(self, step: int, steps: int) -> float:
        """The weight decay of a step, counted from 0, of a run of `steps`: (w - w_end) (1 + cos(pi step / steps)) / 2 + w_end."""
        if self.final_weight_decay is None:
            return self.weight_decay
        annealed = (1 + cos(pi * min(step / steps, 1))) / 2
        return self.final_weight_decay + (self.weight_decay - self.final_weight_decay) * annealed


class WarmupPolynomialLR(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, then polynomial decay to zero.

    In the warm-up the factor of the rates rises linearly from `warmup_factor` to 1; then it is (remaining / all steps after the
    warm-up) ** power, which is 0 after the last step.

    Args:
        optimizer: the optimizer, with the full rates.
        total_iters: number of steps of the run.
        power: exponent of the decay.
        warmup_steps: number of steps of the warm-up.
        warmup_factor: factor of the first step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_iters: int, power: float, warmup_steps: int = 0, warmup_factor: float = 1.0
    ) -> None:
        self.total_iters, self.power = total_iters, power
        self.warmup_steps, self.warmup_factor = warmup_steps, warmup_factor
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Learning rates of a step, counted from 0, as a multiple of the full ones."""
        if step < self.warmup_steps:
            return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        decaying = self.total_iters - self.warmup_steps
        return (max(0, self.total_iters - step) / decaying) ** self.power if decaying > 0 else 1.0

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rates of the next step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]


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
    for module in segmenter.backbone.modules():
        if isinstance(module, ReinAdapter):
            rates |= {id(parameter): rates[id(parameter)] * settings.token_factor for parameter in module.token_parameters()}
    groups = split_by_rate(param_groups(segmenter, settings.lr, settings.weight_decay), rates)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = WarmupPolynomialLR(optimizer, steps, settings.power, settings.warmup_steps, settings.warmup_factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def anneal_weight_decay(optimizer: torch.optim.Optimizer, settings: Optimization, step: int, steps: int) -> None:
    """Set the weight decay of a step, counted from 0 and below `steps`, in the groups that have one; groups without stay without."""
    for group in optimizer.param_groups:
        if group["weight_decay"] > 0 and settings.final_weight_decay is not None:
            group["weight_decay"] = settings.weight_decay_at(step, steps)


@torch.no_grad()
def update_average(average: dict[str, Tensor], weights: Mapping[str, Tensor], settings: Optimization, step: int) -> None:
    """Update the moving average after a step, in place, as OpenMMLab does.

    The average starts as the weights after step `ema_from`. Each later step makes it average + (1 - ema) (weights - average).

    Args:
        average: the average by name; empty before it starts.
        weights: the weights by name.
        settings: `ema`, and `ema_from`.
        step: number of steps that are done, the weights' own included; 0 before the first.
    """
    if settings.ema is None or step < settings.ema_from:
        return
    for name, weight in weights.items():
        if name in average:
            average[name].lerp_(weight, 1 - settings.ema)
        else:
            average[name] = weight.detach().clone()
