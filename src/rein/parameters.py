"""Which parameters train, how many they are, and how the optimizer should treat them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rein import backbones
from rein.injection import ADAPTER, Injection, injection_of

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Summary:
    """What `summary` counted; printing it gives a few readable lines.

    Attributes:
        backbone: timm's name of the architecture, or the class's name.
        num_layers: adapted blocks, L.
        widths: the distinct widths C, in order.
        num_prefix_tokens: the distinct counts of rows that pass through, in order.
        adapter_parameters: parameters of the adapter.
        trainable_parameters: parameters with `requires_grad`, the adapter's and any others.
        total_parameters: all parameters, the adapter's included.
    """

    backbone: str
    num_layers: int
    widths: tuple[int, ...]
    num_prefix_tokens: tuple[int, ...]
    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int

    @property
    def trainable_fraction(self) -> float:
        """Trainable over total parameters, 0 to 1."""
        return self.trainable_parameters / self.total_parameters

    def __str__(self) -> str:
        widths = ", ".join(map(str, self.widths))
        prefix = ", ".join(map(str, self.num_prefix_tokens))
        return (
            f"{self.backbone}: {self.num_layers} adapted blocks of width {widths}, {prefix} prefix tokens\n"
            f"adapter   {self.adapter_parameters:>13,} parameters\n"
            f"trainable {self.trainable_parameters:>13,} parameters, {self.trainable_fraction:.2%} of {self.total_parameters:,}"
        )


def summary(model: nn.Module) -> Summary:
    """Count what a wrapped model trains.

    Raises:
        WrapError: the model is not wrapped.
    """
    injection = injection_of(model)
    injection.freeze_modes()
    sites = injection.sites
    parameters = list(model.parameters())
    return Summary(
        backbone=backbones.architecture(model),
        num_layers=len(sites),
        widths=tuple(dict.fromkeys(site.width for site in sites)),
        num_prefix_tokens=tuple(dict.fromkeys(site.num_prefix_tokens for site in sites)),
        adapter_parameters=sum(p.numel() for p in getattr(model, ADAPTER).parameters()),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def param_groups(module: nn.Module, lr: float = 1e-4, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Parameter groups for AdamW by the authors' recipe.

    Decayed: the adapter's MLPs, weights and biases, and whatever else trains. Not decayed: the tokens and s, every norm layer and
    every `nn.Embedding` (a head's query and level embeddings), and what any other module names in `no_decay_parameters()`. Frozen
    parameters are left out.

    Args:
        module: a wrapped model, an adapter, a `Segmenter`, or any module that holds one.
        lr: learning rate of both groups.
        weight_decay: of the decayed group.

    Returns:
        One or two dictionaries with `params`, `lr` and `weight_decay`; an empty group is left out.
    """
    kept: set[int] = set()
    for part in module.modules():
        if isinstance(part, Injection):
            part.freeze_modes()
        if callable(spared := getattr(part, "no_decay_parameters", None)):
            kept.update(id(parameter) for parameter in spared())
        elif isinstance(part, (*_NORMS, nn.Embedding)):
            kept.update(id(parameter) for parameter in part.parameters())
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in kept], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in kept], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
