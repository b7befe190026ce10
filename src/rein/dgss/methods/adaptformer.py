"""AdaptFormer: a bottleneck in parallel to the MLP of every block.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv 2205.13535.
Written from the paper: x' = x + MLP(LN(x)) + s ReLU(LN(x) W_down) W_up (equations 2 and 3), where LN is the LayerNorm of the block.
The paper's backbone has no LayerScale. In other backbones it scales the MLP but not the bottleneck.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein import backbones
from rein.dgss.methods.common import adapter_dtype, check_count, check_number, token_blocks
from rein.dgss.methods.dry_run import dry_run
from rein.dgss.methods.frozen import FrozenModules
from rein.errors import UnsupportedBackboneError

_SCALES = ("ls2", "gamma_2")


class Bottleneck(nn.Module):
    """s up(dropout(ReLU(down(x)))), initially zero.

    Args:
        width: C.
        bottleneck: width of the hidden layer.
        scale: s, a constant.
        dropout: dropout rate of the hidden layer.
    """

    def __init__(self, width: int, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in the dtype of `x`."""
        hidden = self.dropout(F.relu(self.down(x.to(self.down.weight.dtype))))
        result: Tensor = self.scale * self.up(hidden)
        return result.to(x.dtype)


class AdaptedMlp(nn.Module):
    """Replaces the MLP of a block: LN(x) -> layer_scale MLP(LN(x)) + bottleneck(LN(x)), (..., C) -> (..., C).

    The bottleneck is a child of the backbone and not of this module.

    Args:
        mlp: the MLP of the block.
        scale: the LayerScale of the block's MLP, which moves into this module: a module, a parameter (C,), or None.
        bottleneck: the part that trains.
    """

    def __init__(self, mlp: nn.Module, scale: nn.Module | nn.Parameter | None, bottleneck: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.ls2 = scale if isinstance(scale, nn.Module) else None
        self.gamma_2 = scale if isinstance(scale, nn.Parameter) else None
        self._bottleneck = (bottleneck,)  # in a tuple, which nn.Module does not register

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y: Tensor = self.mlp(x)
        if self.ls2 is not None:
            y = self.ls2(y)
        if self.gamma_2 is not None:
            y = self.gamma_2 * y
        branch: Tensor = self._bottleneck[0](x)
        return y + branch.to(y.dtype)


class Bottlenecks(nn.ModuleList):
    """All bottlenecks of a backbone, `backbone.adaptformer`."""

    def forward(self, x: Any) -> Any:
        """Return `x`, for models that run all their children in sequence."""
        return x


def inject(backbone: nn.Module, *, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.0) -> None:
    """Freeze the backbone and add a bottleneck in parallel to the MLP of every block, as `backbone.adaptformer`.

    Raises:
        InputError: a setting is invalid.
        UnsupportedBackboneError: the blocks do not compute x + MLP(norm2(x)), as most vision transformers of timm do.
    """
    check_count("adaptformer", "bottleneck", bottleneck)
    check_number("adaptformer", "scale", scale)
    check_number("adaptformer", "dropout", dropout, below=1)
    infos = token_blocks(backbone, "adaptformer")
    name, paths = backbones.architecture(backbone), [info.path for info in infos]
    for path in paths:
        _check_block(backbone.get_submodule(path), path, name)
    device = next(backbone.get_submodule(paths[0]).parameters()).device
    bottlenecks = Bottlenecks(Bottleneck(info.width, bottleneck, scale, dropout) for info in infos)
    bottlenecks.to(device, adapter_dtype(backbone))

    def change(model: nn.Module) -> None:
        with torch.device("meta"):
            _replace_mlps(model, Bottlenecks(Bottleneck(info.width, bottleneck) for info in infos), paths)
        for path in paths:
            _expect_norm_before_mlp(model.get_submodule(path), path, name)

    dry_run(backbone, "adaptformer", change)
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    _replace_mlps(backbone, bottlenecks, paths)
    backbone.adaptformer = bottlenecks
    bottlenecks.train(backbone.training)
    FrozenModules(backbone, modules).attach()


def _replace_mlps(backbone: nn.Module, bottlenecks: Bottlenecks, paths: list[str]) -> None:
    for path, bottleneck in zip(paths, bottlenecks, strict=True):
        block: Any = backbone.get_submodule(path)
        scale: Any = next((value for scale in _SCALES if (value := getattr(block, scale, None)) is not None), None)
        if isinstance(scale, nn.Parameter):
            del block.gamma_2
            # some blocks multiply by gamma_2 without a check for None
            block.register_buffer("gamma_2", torch.ones((), dtype=scale.dtype, device=scale.device), persistent=False)
        elif scale is not None:
            block.ls2 = nn.Identity().train(block.training)
        adapted = AdaptedMlp(block.mlp, scale, bottleneck)
        adapted.training = block.training
        block.mlp = adapted


def _check_block(block: nn.Module, path: str, name: str) -> None:
    missing = [part for part in ("norm2", "mlp") if not isinstance(getattr(block, part, None), nn.Module)]
    if missing:
        raise UnsupportedBackboneError(
            f"block {path!r} of {name}, a {type(block).__name__}, has no {' and no '.join(missing)}; adaptformer expects blocks that "
            "compute x + mlp(norm2(x)). Choose another backbone or method."
        )
    scales = [part for part, _ in block.named_parameters(recurse=False)]
    scales += [part for part, child in block.named_children() if "LayerScale" in type(child).__name__]
    unknown = [part for part in scales if part not in ("ls1", "gamma_1", *_SCALES)]
    if unknown:
        raise UnsupportedBackboneError(
            f"block {path!r} of {name} has {', '.join(unknown)}, which may scale the output of its MLP; adaptformer expects "
            f"{' or '.join(_SCALES)} as the only scale of the MLP. Choose another backbone or method."
        )


class _NormOrderCheck:
    """Hooks on a block of a meta model: they check that the input of the MLP is the output of norm2."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name, self.normed = path, name, None

    def after_norm(self, norm: nn.Module, args: Any, output: Any) -> None:
        self.normed = output

    def before_mlp(self, mlp: nn.Module, args: Any) -> None:
        if args[0] is not self.normed:
            raise UnsupportedBackboneError(
                f"in block {self.path!r} of {self.name}, the input of mlp is not the output of norm2, as in post-norm blocks; "
                "adaptformer expects blocks that compute x + mlp(norm2(x)). Choose another backbone or method."
            )


def _expect_norm_before_mlp(block: Any, path: str, name: str) -> None:
    check = _NormOrderCheck(path, name)
    block.norm2.register_forward_hook(check.after_norm)
    block.mlp.register_forward_pre_hook(check.before_mlp)
