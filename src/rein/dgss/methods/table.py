"""The table of methods: names, sources, settings, and `apply`. A new method is a new row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from rein.config import ReinConfig
from rein.dgss.methods import adaptformer, lora, vpt
from rein.dgss.methods.frozen import FROZEN, Frozen
from rein.errors import InputError, WrapError
from rein.injection import is_wrapped, wrap

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as the paper's tables, in lower case.
        title: one line that says what trains.
        source: the paper and its arXiv number.
        install: changes a bare backbone in place; takes the settings as keywords.
        settings: the names of the settings with their defaults.
        backbone_factor: what the learning rate is multiplied by for those of the backbone's own weights that train.
    """

    name: str
    title: str
    source: str
    install: Callable[..., None]
    settings: Mapping[str, Any]
    backbone_factor: float = 1.0


def find(method: str) -> Method:
    """The row of that name.

    Raises:
        InputError: there is none.
    """
    if method not in METHODS:
        raise InputError(f"no method is named {method!r}; there are {', '.join(METHODS)}.")
    return METHODS[method]


def apply(method: str, backbone: Model, **settings: Any) -> Model:
    """Make `backbone` one that `method` tunes, in place.

    Afterwards exactly the method's parameters require gradients, and the frozen rest stays in eval mode whatever `train()` says.

    Args:
        method: one of `METHODS`.
        backbone: a bare timm model.
        settings: of the method, `METHODS[method].settings`; for Rein the fields of `ReinConfig`, which override its preset.

    Returns:
        `backbone` itself.

    Raises:
        InputError: an unknown method or setting, or a value that cannot be.
        UnsupportedBackboneError: the method does not fit the backbone's blocks; the message says why. The backbone is left as it was.
        WrapError: the backbone has a method already, or is compiled.
        MissingExtraError: `lora` without peft.
    """
    row = find(method)
    unknown = sorted(set(settings) - set(row.settings))
    if unknown:
        known = ", ".join(f"{name}={value!r}" for name, value in row.settings.items()) or "none"
        raise InputError(f"{method} has no settings {unknown}; there are: {known}.")
    if not isinstance(backbone, nn.Module):
        raise InputError(f"a method is applied to a torch.nn.Module; got {type(backbone).__name__}.")
    if is_wrapped(backbone) or hasattr(backbone, FROZEN):
        raise WrapError(f"this {type(backbone).__name__} has a method already; apply {method} to a bare backbone.")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in backbone.modules()):
        raise WrapError(f"this {type(backbone).__name__} is compiled already; apply {method} before torch.compile.")
    if torch.is_inference_mode_enabled():
        raise WrapError("what is made inside torch.inference_mode() could not be trained; apply the method outside.")
    row.install(backbone, **settings)
    return backbone


def _full(backbone: nn.Module) -> None:
    backbone.requires_grad_(True)


def _freeze(backbone: nn.Module) -> None:
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    Frozen(backbone, modules).attach()


def _rein(preset: str, backbone: nn.Module, **fields: Any) -> None:
    wrap(backbone, replace(ReinConfig.preset(preset), **fields))


def _keywords(install: Callable[..., None]) -> dict[str, Any]:
    """The settings of a method: the keyword-only arguments of its `install`."""
    parameters = inspect.signature(install).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


_REIN = "Wei et al., CVPR 2024, arXiv 2312.04265"
_PRESETS = {  # name: (preset, title)
    "rein": ("lowrank", "Rein: low-rank tokens, shared MLPs, linked queries"),
    "rein-core": ("core", "Rein's core alone: full tokens, and MLPs of their own in every layer"),
    "rein-link": ("link", "the core, and queries linked to its tokens"),
    "rein-share": ("share", "linked, and the MLPs shared by all layers"),
    "rein-lowrank": ("lowrank", "shared, and low-rank tokens: the same as rein"),
}
_ROWS = [
    Method("full", "every weight, at a tenth of the learning rate", _REIN, _full, {}, backbone_factor=0.1),
    Method("freeze", "nothing of the backbone: the head alone", _REIN, _freeze, {}),
    *(
        Method(name, title, _REIN, partial(_rein, preset), ReinConfig.preset(preset).to_dict())
        for name, (preset, title) in _PRESETS.items()
    ),
    Method(
        "lora",
        "low-rank updates of the query and value projections",
        "Hu et al., ICLR 2022, arXiv 2106.09685",
        lora.install,
        _keywords(lora.install),
    ),
    Method(
        "vpt",
        "prompt tokens at the input of every block (VPT-deep)",
        "Jia et al., ECCV 2022, arXiv 2203.12119",
        vpt.install,
        _keywords(vpt.install),
    ),
    Method(
        "adaptformer",
        "a bottleneck beside every MLP",
        "Chen et al., NeurIPS 2022, arXiv 2205.13535",
        adaptformer.install,
        _keywords(adaptformer.install),
    ),
]
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
