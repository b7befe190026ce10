"""What the methods share: the blocks and projections that they adapt, the dtype of new parameters, and checks of settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def attentions(block: nn.Module, method: str) -> Iterator[tuple[str, Any]]:
    """The modules of a block that contain projections to q, k and v, with their paths in the block.

    Raises:
        UnsupportedBackboneError: a fused projection does not consist of three equal parts, q, k and v.
    """
    for path, module in block.named_modules():
        fused, *separate = (getattr(module, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj"))
        if isinstance(fused, nn.Linear):
            proj = getattr(module, "proj", None)
            width = proj.in_features if isinstance(proj, nn.Linear) else None
            if fused.out_features != 3 * (width or 0) or getattr(module, "head_first", False):
                raise UnsupportedBackboneError(
                    f"the {fused.out_features} outputs of {path}.qkv in a {type(module).__name__} of width {width} are not three "
                    f"equal parts; {method} expects the parts q, k and v, or layers q_proj, k_proj and v_proj. "
                    "Choose another backbone or method."
                )
            yield path, module
        elif all(isinstance(layer, nn.Linear) for layer in separate):
            yield path, module


def block_paths(method: str, backbone: nn.Module, indices: Sequence[int] | None) -> list[str]:
    """The paths of the blocks with these indices, in the order in which the blocks run; of all blocks for None.

    Raises:
        InputError: the indices are not distinct, or there are no such blocks.
    """
    paths = list(dict.fromkeys(info.path for info in backbones.find_blocks(backbone)))
    if indices is None:
        return paths
    count = len(paths)
    valid = isinstance(indices, Sequence) and not isinstance(indices, str) and len(indices) > 0
    valid = valid and all(type(index) is int and 0 <= index < count for index in indices) and len(set(indices)) == len(indices)
    expected = f"distinct block indices from 0 to {count - 1}, since {backbones.architecture(backbone)} has {count} blocks"
    check_setting(method, "blocks", indices, valid, expected)
    return [paths[index] for index in sorted(indices)]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule of `model` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


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
