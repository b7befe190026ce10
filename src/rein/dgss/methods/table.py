"""The table of methods, `METHODS`, with `apply` and `merge`. To add a method, add an entry to the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from rein.config import ReinConfig
from rein.dgss.methods import adaptformer, lora, soma, vpt
from rein.dgss.methods.common import block_paths
from rein.dgss.methods.frozen import FROZEN, FrozenModules
from rein.errors import InputError, WrapError
from rein.injection import is_wrapped, wrap

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Method:
    """A method of tuning a backbone.

    Attributes:
        name: name in code, configuration files and on the command line.
        title: what trains, in one line.
        source: the paper and its arXiv number.
        apply: changes a bare backbone in place; takes the settings as keyword arguments.
        settings: default values of the settings, by name.
        backbone_factor: factor of the learning rate of the backbone's own weights, if they train.
        merge: adds what the method trained to the backbone's weights and removes its modules, in place; returns whether there was
            anything. None if the method cannot be merged.
    """

    name: str
    title: str
    source: str
    apply: Callable[..., None]
    settings: Mapping[str, Any]
    backbone_factor: float = 1.0
    merge: Callable[[nn.Module], bool] | None = None


def find(method: str) -> Method:
    """The entry of `METHODS` with this name.

    Raises:
        InputError: the name does not exist.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}. Correct the name.")
    return METHODS[method]


def apply(method: str, backbone: Model, **settings: Any) -> Model:
    """Prepare `backbone` in place for tuning by `method`.

    Afterwards exactly the method's parameters require gradients, and the frozen modules stay in eval mode after `backbone.train()`.

    Args:
        method: one of `METHODS`.
        backbone: a bare timm model.
        settings: settings of the method, see `METHODS[method].settings`. Those of Rein are the fields of `ReinConfig`, which override
            the preset, and `blocks`, the indices of the blocks that are adapted, from 0 (None: all).

    Returns:
        `backbone` itself.

    Raises:
        InputError: the method or a setting is unknown, or a value is invalid.
        UnsupportedBackboneError: the method does not support the backbone's blocks. The backbone is unchanged.
        WrapError: the backbone already has a method, or is compiled.
        MissingExtraError: `lora` without peft.
    """
    found = find(method)
    unknown = sorted(set(settings) - set(found.settings))
    if unknown:
        known = ", ".join(f"{name}={value!r}" for name, value in found.settings.items())
        expected = f"some of: {known}" if known else "none"
        raise InputError(f"{method} has no settings {unknown}; expected {expected}. Remove or rename them.")
    if not isinstance(backbone, nn.Module):
        raise InputError(f"backbone is a {type(backbone).__name__}; expected a torch.nn.Module. Pass a timm model.")
    kind = type(backbone).__name__
    if is_wrapped(backbone) or hasattr(backbone, FROZEN):
        raise WrapError(f"this {kind} already has a method; expected a bare backbone. Apply {method} to a new one.")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in backbone.modules()):
        raise WrapError(f"this {kind} is already compiled; expected a bare backbone. Apply {method} before torch.compile.")
    if torch.is_inference_mode_enabled():
        raise WrapError(
            f"{method} was applied inside torch.inference_mode(), where new parameters cannot train; expected normal mode. "
            "Apply it outside."
        )
    found.apply(backbone, **settings)
    return backbone


def merge(backbone: Model) -> Model:
    """Merge what a method has trained into the backbone's weights, in place, for inference at the bare backbone's cost.

    The outputs stay equal up to rounding. Afterwards the backbone has exactly the modules and parameters of the bare one, all frozen.

    Args:
        backbone: a backbone to which a method was applied that can be merged (`METHODS[method].merge`).

    Returns:
        `backbone` itself.

    Raises:
        InputError: it has no method, or one that cannot be merged.
    """
    mergeable = {name: method.merge for name, method in METHODS.items() if method.merge is not None}
    merged = [name for name, function in mergeable.items() if function(backbone)]
    if not merged:
        raise InputError(
            f"this {type(backbone).__name__} has nothing to merge; expected a backbone tuned by {' or '.join(mergeable)}. Use it as "
            "it is."
        )
    delattr(backbone, FROZEN)
    return backbone.requires_grad_(False)


def _full(backbone: nn.Module) -> None:
    backbone.requires_grad_(True)


def _freeze(backbone: nn.Module) -> None:
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    FrozenModules(backbone, modules).attach()


def _rein(preset: str, backbone: nn.Module, *, blocks: Sequence[int] | None = None, **fields: Any) -> None:
    config = replace(ReinConfig.preset(preset), **fields)
    wrap(backbone, config, blocks=None if blocks is None else block_paths("rein", backbone, blocks))


def _rein_settings(preset: str) -> dict[str, Any]:
    return {**ReinConfig.preset(preset).to_dict(), "blocks": None}


def _keyword_only(function: Callable[..., None]) -> dict[str, Any]:
    """The defaults of the keyword-only arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


_REIN = "Wei et al., CVPR 2024, arXiv 2312.04265"
_PRESETS = {  # name: (preset, title)
    "rein": ("lowrank", "Rein: low-rank tokens, shared MLPs, linked queries"),
    "rein-core": ("core", "Rein without its extensions: full tokens, separate MLPs in every layer, no queries"),
    "rein-link": ("link", "rein-core with queries linked to the tokens"),
    "rein-share": ("share", "rein-link with MLPs shared by all layers"),
    "rein-lowrank": ("lowrank", "rein-share with low-rank tokens: the same as rein"),
}
_TABLE = [
    Method("full", "every weight, at a tenth of the learning rate", _REIN, _full, {}, backbone_factor=0.1),
    Method("freeze", "nothing in the backbone: only the decode head", _REIN, _freeze, {}),
    *(Method(name, title, _REIN, partial(_rein, preset), _rein_settings(preset)) for name, (preset, title) in _PRESETS.items()),
    Method(
        "lora",
        "low-rank updates of the query and value projections",
        "Hu et al., ICLR 2022, arXiv 2106.09685",
        lora.inject,
        _keyword_only(lora.inject),
        merge=lora.merge,
    ),
    Method(
        "soma",
        "the minor singular components of the linear layers in the last two thirds of the blocks",
        "Yun et al., CVPR 2025, arXiv 2412.04077",
        soma.inject,
        _keyword_only(soma.inject),
        merge=soma.merge,
    ),
    Method(
        "vpt",
        "prompt tokens in the input of every block (VPT-deep)",
        "Jia et al., ECCV 2022, arXiv 2203.12119",
        vpt.inject,
        _keyword_only(vpt.inject),
    ),
    Method(
        "adaptformer",
        "a bottleneck in parallel to every MLP",
        "Chen et al., NeurIPS 2022, arXiv 2205.13535",
        adaptformer.inject,
        _keyword_only(adaptformer.inject),
    ),
]
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
