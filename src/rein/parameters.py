"""Count the trainable parameters of a model, and group them for the optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rein import backbones
from rein.adapter import ReinAdapter
from rein.errors import InputError
from rein.injection import ADAPTER, INJECTION, get_injection, warn_if_frozen_by_peft
from rein.named_adapters import NamedAdapters

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Summary:
    """Result of `summary`; `print` shows it in five lines, and one more if the adapters have names.

    Attributes:
        backbone: timm's name of the architecture, or the class name of other models.
        num_layers: number of adapted blocks, L.
        widths: distinct widths C of the blocks, in order.
        num_prefix_tokens: distinct numbers of prefix tokens of the blocks, in order.
        adapter_parameters: number of parameters of the adapter, or of all named ones together.
        trainable_parameters: number of parameters with `requires_grad`, including the adapter's.
        total_parameters: number of all parameters, including the adapter's.
        trains: names of the modules and parameters that train, as in `model.named_modules()`, with N for each number.
        frozen: names of those that are frozen.
        adapters: number of parameters of each named adapter, by name; empty if the adapter has no name.
        active: name of the active adapter; None if it has no name.
    """

    backbone: str
    num_layers: int
    widths: tuple[int, ...]
    num_prefix_tokens: tuple[int, ...]
    adapter_parameters: int
    trainable_parameters: int
    total_parameters: int
    trains: tuple[str, ...]
    frozen: tuple[str, ...]
    adapters: Mapping[str, int] = field(default_factory=dict, hash=False)
    active: str | None = None

    @property
    def trainable_fraction(self) -> float:
        """Trainable over total parameters, 0 to 1."""
        return self.trainable_parameters / self.total_parameters

    def __str__(self) -> str:
        widths = ", ".join(map(str, self.widths))
        prefix = ", ".join(map(str, self.num_prefix_tokens))
        named = [f"{name}{' (active)' if name == self.active else ''} {count:,}" for name, count in self.adapters.items()]
        return (
            f"{self.backbone}: {self.num_layers} adapted blocks of width {widths}, {prefix} prefix tokens\n"
            f"adapter   {self.adapter_parameters:>13,} parameters\n"
            f"trainable {self.trainable_parameters:>13,} parameters, {self.trainable_fraction:.2%} of {self.total_parameters:,}\n"
            f"trains    {', '.join(self.trains) or 'nothing'}\n"
            f"frozen    {', '.join(self.frozen) or 'nothing'}" + (f"\nadapters  {', '.join(named)}" if named else "")
        )


def summary(model: nn.Module) -> Summary:
    """Count the parameters of a wrapped model, and name those that train and those that are frozen.

    Raises:
        WrapError: the model is not wrapped, or `model.rein` was replaced.
    """
    injection = get_injection(model)
    injection.freeze_modes()
    blocks = injection.blocks
    parameters = list(model.parameters())
    adapter = injection.adapter
    named = adapter if isinstance(adapter, NamedAdapters) else None
    return Summary(
        backbone=backbones.architecture(model),
        num_layers=len(blocks),
        widths=tuple(dict.fromkeys(block.width for block in blocks)),
        num_prefix_tokens=tuple(dict.fromkeys(block.num_prefix_tokens for block in blocks)),
        adapter_parameters=_count(adapter),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
        trains=_without_numbers(_names(model, True)),
        frozen=_without_numbers(_names(model, False)),
        adapters={} if named is None else {name: _count(named[name]) for name in named},
        active=None if named is None else named.active_name,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _without_numbers(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names, with N for each number."""
    return tuple(dict.fromkeys(re.sub(r"\b\d+\b", "N", name) for name in names))


def _names(module: nn.Module, requires_grad: bool, prefix: str = "") -> Iterator[str]:
    """The largest parts of `module` whose parameters all have this `requires_grad`, by name."""
    parameters = list(module.parameters())
    if prefix and all(parameter.requires_grad == requires_grad for parameter in parameters):
        yield from [prefix] if parameters else []
        return
    dot = f"{prefix}." if prefix else ""
    yield from (f"{dot}{name}" for name, p in module._parameters.items() if p is not None and p.requires_grad == requires_grad)
    for name, child in module.named_children():
        yield from _names(child, requires_grad, dot + name)


def param_groups(
    module: nn.Module, lr: float = 1e-4, weight_decay: float = 0.05, *, adapter_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW as in the authors' recipe.

    Without weight decay: the adapter's tokens and scale s, norm layers, `nn.Embedding`s (a head's query and level embeddings), and
    the parameters that any other module lists in `no_decay_parameters()`. With weight decay: all other trainable parameters,
    including biases. Frozen parameters are in no group; a warning says so if peft has frozen the adapter.

    Args:
        module: a wrapped model, an adapter, a `Segmenter`, or any module that contains one.
        lr: learning rate of all parameters, or of those outside the adapter.
        weight_decay: weight decay of the parameters that have one.
        adapter_lr: learning rate of the adapter; None means `lr`.

    Returns:
        Dictionaries with `params`, `lr` and `weight_decay`: one or two, or up to four with `adapter_lr`. Empty groups are left out.

    Raises:
        InputError: a rate or the weight decay is not a finite number of at least 0; or `adapter_lr` is given, but the module has no
            adapter.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("adapter_lr", 0 if adapter_lr is None else adapter_lr)):
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor) or not 0 <= value < math.inf:
            raise InputError(f"{name} is {value!r}; expected a finite number of at least 0.")
    no_decay: set[int] = set()
    rates: dict[int, float] = {}
    for part in module.modules():
        if adapter_lr is not None and isinstance(part, ReinAdapter):
            rates.update((id(parameter), adapter_lr) for parameter in part.parameters())
        if INJECTION in part._modules:
            get_injection(part).freeze_modes()
            warn_if_frozen_by_peft(getattr(part, ADAPTER), module)
        if callable(listed := getattr(part, "no_decay_parameters", None)):
            no_decay.update(id(parameter) for parameter in listed())
        elif isinstance(part, (*_NORMS, nn.Embedding)):
            no_decay.update(id(parameter) for parameter in part.parameters())
    if adapter_lr is not None and not rates:
        raise InputError(
            f"adapter_lr is {adapter_lr}, but this {type(module).__name__} has no adapter; expected a wrapped model. Call rein.wrap "
            "first, or leave adapter_lr out."
        )
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in no_decay], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in no_decay], "lr": lr, "weight_decay": 0.0},
    ]
    return split_by_rate(groups, rates)


def split_by_rate(groups: Iterable[dict[str, Any]], rates: Mapping[int, float]) -> list[dict[str, Any]]:
    """Split parameter groups so that parameters have learning rates of their own; the group of the highest rate comes first.

    Args:
        groups: dictionaries with `params` and `lr`. Empty ones are left out.
        rates: learning rates by id of the parameter; other parameters keep the one of their group.
    """
    split = []
    for group in groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates.get(id(parameter), group["lr"]), []).append(parameter)
        split += [{**group, "params": by_rate[rate], "lr": rate} for rate in sorted(by_rate, reverse=True)]
    return split
