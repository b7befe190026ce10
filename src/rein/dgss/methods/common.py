"""What LoRA, VPT and AdaptFormer share: the blocks that they adapt, the dtype of new parameters, and checks of settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rein import backbones
from rein.backbones import BlockInfo
from rein.errors import InputError, UnsupportedBackboneError


def token_blocks(backbone: nn.Module, method: str) -> list[BlockInfo]:
    """The blocks of a backbone, if each returns one tensor of tokens.

    Raises:
        UnsupportedBackboneError: the blocks are not known, or return several tensors or maps (B, C, H, W).
    """
    infos = backbones.find_blocks(backbone)
    for info in infos:
        if info.item is not None or info.layout == "NCHW":
            returned = "several tensors" if info.item is not None else "a map (B, C, H, W)"
            raise UnsupportedBackboneError(
                f"block {info.path!r} of {backbones.architecture(backbone)} returns {returned}; {method} expects blocks that return "
                "one tensor of tokens. Choose another backbone or method."
            )
    return infos


def adapter_dtype(backbone: nn.Module) -> torch.dtype:
    """The dtype of new parameters: float64 in a float64 backbone, float32 in any other."""
    return torch.float64 if any(p.dtype == torch.float64 for p in backbone.parameters()) else torch.float32


def check_setting(method: str, name: str, value: Any, valid: bool, expected: str) -> None:
    """Raise InputError unless `valid`; `expected` says in words which values are."""
    if not valid:
        raise InputError(f"{method}: {name} is {value!r}; expected {expected}. Change it, or omit it to use the default.")


def check_count(method: str, name: str, value: Any) -> None:
    """Raise InputError unless `value` is a whole number of at least 1."""
    check_setting(method, name, value, type(value) is int and value >= 1, "a whole number of at least 1")


def check_number(method: str, name: str, value: Any, below: float = float("inf")) -> None:
    """Raise InputError unless `value` is a number with 0 <= value < below."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < below
    check_setting(method, name, value, valid, f"a number of at least 0 and below {below:g}")
