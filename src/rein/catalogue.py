"""What rein makes of timm's models, name by name, on meta tensors: nothing is downloaded and no weights are allocated."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from rein import backbones
from rein.adapter import build_adapter
from rein.config import ReinConfig
from rein.errors import InputError, UnsupportedBackboneError


@dataclass(frozen=True)
class Entry:
    """One name.

    Attributes:
        name: timm's.
        family: class of the model.
        widths: C of every adapted block, in order; empty where it is refused.
        num_prefix_tokens: rows that pass through, for each of them.
        adapter_parameters: of the default adapter, or of the given configuration's.
        parameters: of the bare model without classifier.
        refusal: why not, where rein does not adapt it.
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
        """Adapter over all parameters, 0 to 1."""
        return self.adapter_parameters / (self.adapter_parameters + self.parameters)

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.name:44} not adapted: {self.refusal}"
        widths = "+".join(f"{len(list(layers))}x{width}" for width, layers in groupby(self.widths))
        prefix = ",".join(str(count) for count, _ in groupby(self.num_prefix_tokens))
        return (
            f"{self.name:44} {len(self.widths):3} blocks {widths:32} prefix {prefix:4} "
            f"adapter {self.adapter_parameters:>11,} of {self.adapter_parameters + self.parameters:>13,} {self.fraction:7.2%}"
        )


def names(pattern: str = "*") -> list[str]:
    """Timm's names that match a pattern; a tag such as `.lvd142m` at its end is left out.

    Raises:
        InputError: none does.
    """
    import timm

    found = [] if not pattern else timm.list_models(pattern) or timm.list_models(pattern.partition(".")[0] or "-")
    if not found:
        raise InputError(f"timm has no model {pattern!r}; patterns are shell-style: '*dinov2*'.")
    return found


def build_on_meta(name: str) -> nn.Module:
    """A model of timm without classifier and without weights.

    Raises:
        InputError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}; `rein backbones '*{name[:8]}*'` lists those near it.")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own, about weights that are not wanted here
        return timm.create_model(name, num_classes=0)


def describe(name: str, config: ReinConfig | None = None) -> Entry:
    """What rein makes of one model of timm."""
    return entry_of(build_on_meta(name), name, config)


def entry_of(model: nn.Module, name: str, config: ReinConfig | None = None) -> Entry:
    """As `describe`, of a model that is built already."""
    family = type(model).__name__
    try:
        sites = backbones.find_sites(model)
    except UnsupportedBackboneError as error:
        return Entry(name, family, refusal=str(error))
    widths = tuple(site.width for site in sites)
    with torch.device("meta"):
        adapter = build_adapter(widths, config or ReinConfig(), patch_size=16)
    return Entry(
        name,
        family,
        widths,
        tuple(site.num_prefix_tokens for site in sites),
        sum(parameter.numel() for parameter in adapter.parameters()),
        sum(parameter.numel() for parameter in model.parameters()),
    )
