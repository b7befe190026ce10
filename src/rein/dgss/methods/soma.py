"""SoMA: training of the minor singular components of the linear layers.

Yun et al., "SoMA: Singular Value Decomposed Minor Components Adaptation for Domain Generalizable Representation Learning", CVPR
2025, arXiv 2412.04077. Written from the paper: for W = U diag(s) V^T, the r smallest components start as B0 = U_r diag(sqrt(s_r)) and
A0 = diag(sqrt(s_r)) V_r^T. The frozen part is W - B0 A0, and A and B train: x (W - B0 A0)^T + b + (x A^T) B^T.

Here W stays as it is, and B0 A0 is subtracted from B A instead, which is the same function. A checkpoint holds A0 and B0, and so fits
the pretrained W on a machine whose SVD rounds differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein import backbones
from rein.dgss.methods.common import adapter_dtype, attentions, block_paths, check_count, replace_module, token_blocks
from rein.dgss.methods.dry_run import dry_run
from rein.dgss.methods.frozen import FrozenModules
from rein.errors import InputError, UnsupportedBackboneError

_FUSED = "qkv"
_LAYERS = (
    _FUSED,
    "q_proj",
    "k_proj",
    "v_proj",
    "proj",
    "fc1",
    "fc1_g",
    "fc1_x",
    "fc2",
)  # of attention and MLP, as timm names them


class MinorComponents(nn.Module):
    """The update B A - B0 A0 of one linear layer, (..., C_in) -> (..., C_out).

    Args:
        weight: W of the layer, (C_out, C_in).
        rank: r, the number of components of each matrix.
        parts: number of matrices of equal height that `weight` consists of: 3 for a fused projection to q, k and v.
        dtype: dtype of the parameters.

    Attributes:
        a: A, (parts, r, C_in).
        b: B, (parts, C_out / parts, r).
        a_start: A0, the initial A; not trained.
        b_start: B0, the initial B; not trained.
    """

    a_start: Tensor
    b_start: Tensor

    def __init__(self, weight: Tensor, rank: int, parts: int, dtype: torch.dtype) -> None:
        super().__init__()
        matrices = weight.detach().double().unflatten(0, (parts, -1))
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)  # singular values in descending order
        root = s[:, -rank:].sqrt()
        a, b = root[..., None] * v[:, -rank:], u[..., -rank:] * root[:, None]
        a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()  # FSDP2 refuses others
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("a_start", a.clone())
        self.register_buffer("b_start", b.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out), in the dtype of `x`."""
        parts, rank, _ = self.a.shape
        hidden = F.linear(x.to(self.a.dtype), torch.cat((self.a, self.a_start), 1).flatten(0, 1))
        hidden = hidden.unflatten(-1, (parts, 2 * rank)).movedim(-2, 0)  # (parts, ..., 2 r)
        update = torch.cat((self.b, -self.b_start), 2).mT
        delta = hidden.flatten(1, -2) @ update
        return delta.view(*hidden.shape[:-1], -1).movedim(0, -2).flatten(-2).to(x.dtype)

    def weight(self) -> Tensor:
        """B A - B0 A0 as one matrix, (C_out, C_in)."""
        return (self.b @ self.a - self.b_start @ self.a_start).flatten(0, 1)


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its update, (..., C_in) -> (..., C_out).

    Args:
        base: the frozen layer.
        soma: its update.
    """

    def __init__(self, base: nn.Linear, soma: MinorComponents) -> None:
        super().__init__()
        self.base, self.soma = base, soma

    @property
    def weight(self) -> Tensor:
        """W + B A - B0 A0, for models that read the weight instead of calling the layer."""
        return (self.base.weight + self.soma.weight()).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen layer."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        y: Tensor = self.base(x)
        return y + self.soma(x).to(y.dtype)


def inject(backbone: nn.Module, *, rank: int = 16, blocks: Sequence[int] | None = None) -> None:
    """Freeze the backbone, and train the minor components of the layers q, k, v, proj and those of the MLP in some blocks.

    A fused projection to q, k and v counts as three matrices.

    Args:
        backbone: a bare timm model.
        rank: r, the number of components of each matrix.
        blocks: indices of the blocks, from 0; None means the last two thirds, as in the paper: 8 to 23 of 24.

    Raises:
        InputError: a setting is invalid, or a matrix has fewer than `rank` components.
        UnsupportedBackboneError: a block has none of these layers.
    """
    check_count("soma", "rank", rank)
    token_blocks(backbone, "soma")
    paths = block_paths("soma", backbone, blocks)
    if blocks is None:
        paths = paths[len(paths) // 3 :]
    name = backbones.architecture(backbone)
    layers = [layer for path in paths for layer in _layers(backbone, path, name)]
    _check_rank(backbone, layers, rank)
    dtype = adapter_dtype(backbone)

    def change(model: nn.Module) -> None:
        for path in layers:
            linear: nn.Linear = model.get_submodule(path)  # type: ignore[assignment]
            update = MinorComponents(linear.weight, rank, _parts(path), dtype).train(linear.training)
            adapted = AdaptedLinear(linear, update)
            adapted.training = linear.training
            replace_module(model, path, adapted)

    dry_run(backbone, "soma", change)
    modules = list(backbone.modules())
    backbone.requires_grad_(False)
    change(backbone)
    FrozenModules(backbone, modules).attach()


def _parts(path: str) -> int:
    return 3 if path.rpartition(".")[2] == _FUSED else 1


def _layers(backbone: nn.Module, path: str, name: str) -> list[str]:
    """The paths of the layers of one block."""
    block = backbone.get_submodule(path)
    list(attentions(block, "soma"))  # raises if a fused projection is not in three equal parts
    found = [
        f"{path}.{inner}"
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear) and inner.rpartition(".")[2] in _LAYERS
    ]
    if not found:
        raise UnsupportedBackboneError(
            f"block {path!r} of {name} has no linear layer that soma knows; expected some of {', '.join(_LAYERS)}. Choose another "
            "backbone or method."
        )
    return found


def _check_rank(backbone: nn.Module, layers: list[str], rank: int) -> None:
    for path in layers:
        linear: nn.Linear = backbone.get_submodule(path)  # type: ignore[assignment]
        components = min(linear.out_features // _parts(path), linear.in_features)
        if rank > components:
            raise InputError(
                f"soma: rank is {rank}, but {path} has {components} singular components; expected at most as many. Lower the rank."
            )


@torch.no_grad()
def merge(backbone: nn.Module) -> bool:
    """Add the updates to the frozen weights and undo `inject`; returns whether there were any."""
    adapted = {path: layer for path, layer in backbone.named_modules() if isinstance(layer, AdaptedLinear)}
    for path, layer in adapted.items():
        layer.base.weight.copy_(layer.weight)
        replace_module(backbone, path, layer.base)
    return bool(adapted)
