"""AdaptFormer: a bottleneck in parallel to the MLP of every block.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv 2205.13535. Written from
the paper: x' = x + MLP(LN(x)) + s ReLU(LN(x) W_down) W_up (equations 2 and 3), with LN the block's own. A backbone's LayerScale,
which the paper's backbone does not have, acts on the MLP alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein import backbones
from rein.dgss.methods.frozen import Frozen, adapter_dtype, block_sites, check_count, check_number, rehearse
from rein.errors import UnsupportedBackboneError

_SCALES = ("ls2", "gamma_2")


class Bottleneck(nn.Module):
    """s up(dropout(ReLU(down(x)))), zero at the start.

    Args:
        width: C.
        bottleneck: the hidden width.
        scale: s, a constant.
        dropout: of the hidden units.
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
    """Stands in the place of a block's MLP: LN(x) -> scale MLP(LN(x)) + bottleneck(LN(x)), (..., C) -> (..., C).

    The bottleneck is a child of the backbone, not of this module.

    Args:
        mlp: the block's own.
        scale: the block's LayerScale, which is drawn in here: a module, a parameter (C,), or None.
        bottleneck: what trains.
    """

    def __init__(self, mlp: nn.Module, scale: nn.Module | nn.Parameter | None, bottleneck: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.ls2 = scale if isinstance(scale, nn.Module) else None
        self.gamma_2 = scale if isinstance(scale, nn.Parameter) else None
        self._bottleneck = (bottleneck,)  # in a tuple, which nn.Module does not register

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
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
        """`x`, for models that run all their children in turn."""
        return x


def install(backbone: nn.Module, *, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.0) -> None:
    """Put a bottleneck beside the MLP of every block; together they are `backbone.adaptformer`.

    Raises:
        InputError: a setting that cannot be.
        UnsupportedBackboneError: blocks that are not x + MLP(norm2(x)), as those of most vision transformers in timm are.
    """
    check_count("adaptformer", "bottleneck", bottleneck)
    check_number("adaptformer", "scale", scale)
    check_number("adaptformer", "dropout", dropout, below=1)
    sites = block_sites(backbone, "adaptformer")
    name, paths = backbones.architecture(backbone), [site.path for site in sites]
    for path in paths:
        _check_block(backbone.get_submodule(path), path, name)
    device = next(backbone.get_submodule(paths[0]).parameters()).device
    bottlenecks = Bottlenecks(Bottleneck(site.width, bottleneck, scale, dropout) for site in sites)
    bottlenecks.to(device, adapter_dtype(backbone))

    def try_on(twin: nn.Module) -> None:
        with torch.device("meta"):
            _insert(twin, Bottlenecks(Bottleneck(site.width, bottleneck) for site in sites), paths)
        for path in paths:
            _expect_norm_before_mlp(twin.get_submodule(path), path, name)

    rehearse(backbone, "adaptformer", try_on)
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    _insert(backbone, bottlenecks, paths)
    backbone.adaptformer = bottlenecks
    bottlenecks.train(backbone.training)
    Frozen(backbone, modules).attach()


def _insert(backbone: nn.Module, bottlenecks: Bottlenecks, paths: list[str]) -> None:
    for path, bottleneck in zip(paths, bottlenecks, strict=True):
        block: Any = backbone.get_submodule(path)
        scale: Any = next((value for scale in _SCALES if (value := getattr(block, scale, None)) is not None), None)
        if isinstance(scale, nn.Parameter):
            del block.gamma_2
            # some blocks multiply by it unasked
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
            f"adaptformer goes beside an MLP, x + mlp(norm2(x)); block {path!r} of {name}, a {type(block).__name__}, has no "
            f"{' and no '.join(missing)}."
        )
    scales = [part for part, _ in block.named_parameters(recurse=False)]
    scales += [part for part, child in block.named_children() if "LayerScale" in type(child).__name__]
    strange = [part for part in scales if part not in ("ls1", "gamma_1", *_SCALES)]
    if strange:
        raise UnsupportedBackboneError(
            f"adaptformer must know how the output of an MLP is scaled; block {path!r} of {name} has {', '.join(strange)} beside "
            f"what is known, {' or '.join(_SCALES)}."
        )


class _Order:
    """Hooks on a weightless block: what its MLP is given must be what its norm2 gave."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name, self.normed = path, name, None

    def after_norm(self, norm: nn.Module, args: Any, output: Any) -> None:
        self.normed = output

    def before_mlp(self, mlp: nn.Module, args: Any) -> None:
        if args[0] is not self.normed:
            raise UnsupportedBackboneError(
                f"adaptformer goes beside an MLP, x + mlp(norm2(x)); block {self.path!r} of {self.name} does not give its mlp what "
                "its norm2 gives, as blocks do that norm afterwards."
            )


def _expect_norm_before_mlp(block: Any, path: str, name: str) -> None:
    order = _Order(path, name)
    block.norm2.register_forward_hook(order.after_norm)
    block.mlp.register_forward_pre_hook(order.before_mlp)
