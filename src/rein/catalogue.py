"""Describe how rein adapts the models of timm. Models are built on meta tensors: no downloads and no memory for weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from rein import backbones
from rein.config import ReinConfig
from rein.errors import InputError, UnsupportedBackboneError
from rein.stagewise import build_adapter


@dataclass(frozen=True)
class Entry:
    """How rein adapts one model.

    Attributes:
        name: timm's name of the model.
        family: class name of the model.
        widths: widths C of the adapted blocks, in order; empty if rein does not support the model.
        num_prefix_tokens: number of prefix tokens of each adapted block.
        adapter_parameters: number of parameters of the adapter.
        parameters: number of parameters of the bare model without classifier.
        refusal: why rein does not support the model, or None if it does.
    """

    name: str
    family: str
    widths: tuple[int, ...] = ()
    num_prefix_tokens: tuple[int, ...] = ()
    adapter_parameters: int = 0
    parameters: int = 0
    refusal: str | None = None

    @property
    def fraction(self) -> float:
        """Adapter parameters over all parameters, 0 to 1."""
        return self.adapter_parameters / (self.adapter_parameters + self.parameters)

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.name:44} not supported: {self.refusal}"
        widths = "+".join(f"{len(list(layers))}x{width}" for width, layers in groupby(self.widths))
        prefix = ",".join(str(count) for count, _ in groupby(self.num_prefix_tokens))
        return (
            f"{self.name:44} {len(self.widths):3} blocks {widths:32} prefix {prefix:4} "
            f"adapter {self.adapter_parameters:>11,} of {self.adapter_parameters + self.parameters:>13,} {self.fraction:7.2%}"
        )


def names(pattern: str = "*") -> list[str]:
    """Timm's model names that match a shell-style pattern. A tag at the end of the pattern, such as `.lvd142m`, is ignored.

    Raises:
        InputError: no name matches.
    """
    import timm

    found = [] if not pattern else timm.list_models(pattern) or timm.list_models(pattern.partition(".")[0] or "-")
    if not found:
        raise InputError(f"timm has no model {pattern!r}; expected a name or a shell-style pattern, such as '*dinov2*'.")
    return found


def build_on_meta(name: str) -> nn.Module:
    """Build a timm model without classifier on meta tensors.

    Raises:
        InputError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}; list similar names with: rein backbones '*{name[:8]}*'")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns about weights, which are not needed here
        return timm.create_model(name, num_classes=0)


def describe(name: str, config: ReinConfig | None = None) -> Entry:
    """Describe how rein adapts the timm model `name`, by default with `ReinConfig()`."""
    return describe_model(build_on_meta(name), name, config)


def describe_model(model: nn.Module, name: str, config: ReinConfig | None = None) -> Entry:
    """Describe how rein adapts `model`, which is listed under `name`."""
    family = type(model).__name__
    try:
        blocks = backbones.find_blocks(model)
    except UnsupportedBackboneError as error:
        return Entry(name, family, refusal=str(error))
    widths = tuple(block.width for block in blocks)
    with torch.device("meta"):
        adapter = build_adapter(widths, config or ReinConfig(), patch_size=16)
    return Entry(
        name,
        family,
        widths,
        tuple(block.num_prefix_tokens for block in blocks),
        sum(parameter.numel() for parameter in adapter.parameters()),
        sum(parameter.numel() for parameter in model.parameters()),
    )
