"""Count the trainable parameters of a model, and group them for the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rein import backbones
from rein.injection import ADAPTER, Injection, get_injection

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Summary:
    """Result of `summary`; `print` shows it in three lines.

    Attributes:
        backbone: timm's name of the architecture, or the class name of other models.
        num_layers: number of adapted blocks, L.
        widths: distinct widths C of the blocks, in order.
        num_prefix_tokens: distinct numbers of prefix tokens of the blocks, in order.
        adapter_parameters: number of parameters of the adapter.
        trainable_parameters: number of parameters with `requires_grad`, including the adapter's.
        total_parameters: number of all parameters, including the adapter's.
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
    """Count the parameters of a wrapped model.

    Raises:
        WrapError: the model is not wrapped.
    """
    injection = get_injection(model)
    injection.freeze_modes()
    blocks = injection.blocks
    parameters = list(model.parameters())
    return Summary(
        backbone=backbones.architecture(model),
        num_layers=len(blocks),
        widths=tuple(dict.fromkeys(block.width for block in blocks)),
        num_prefix_tokens=tuple(dict.fromkeys(block.num_prefix_tokens for block in blocks)),
        adapter_parameters=sum(p.numel() for p in getattr(model, ADAPTER).parameters()),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def param_groups(module: nn.Module, lr: float = 1e-4, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Parameter groups for AdamW as in the authors' recipe.

    Without weight decay: the adapter's tokens and scale s, norm layers, `nn.Embedding`s (a head's query and level embeddings), and
    the parameters that any other module lists in `no_decay_parameters()`. With weight decay: all other trainable parameters,
    including biases. Frozen parameters are in no group.

    Args:
        module: a wrapped model, an adapter, a `Segmenter`, or any module that contains one.
        lr: learning rate of both groups.
        weight_decay: weight decay of the first group.

    Returns:
        One or two dictionaries with `params`, `lr` and `weight_decay`. Empty groups are left out.
    """
    no_decay: set[int] = set()
    for part in module.modules():
        if isinstance(part, Injection):
            part.freeze_modes()
        if callable(listed := getattr(part, "no_decay_parameters", None)):
            no_decay.update(id(parameter) for parameter in listed())
        elif isinstance(part, (*_NORMS, nn.Embedding)):
            no_decay.update(id(parameter) for parameter in part.parameters())
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in no_decay], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in no_decay], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
