"""Resampling of a ViT's weights for another patch and image size, as the authors of Rein do it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rein.errors import InputError


def resample(state: Mapping[str, Tensor], patch_size: int = 16, grid: int = 32) -> dict[str, Tensor]:
    """Resample the patch embedding and the position embedding of DINOv2 as the authors do: bicubic, without antialiasing.

    Timm resamples differently (`create_model(..., patch_size=16)`); an official adapter does not fit the weights that it gives.

    Args:
        state: DINOv2's state dict with `patch_embed.proj.weight` (C, 3, P, P) and `pos_embed` (1, 1 + N, C), class token first.
        patch_size: new patch size P in pixels.
        grid: new side of the position embedding, N = grid^2; 32 fits images of 512 x 512 pixels at P = 16.

    Returns:
        A new dictionary. All other tensors are shared with `state`.

    Raises:
        InputError: `state` lacks a key, or the position embedding is not a class token and a square grid.
    """
    if not {"patch_embed.proj.weight", "pos_embed"} <= state.keys():
        raise InputError("the state dict lacks patch_embed.proj.weight or pos_embed; pass a state dict of DINOv2.")
    kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    side = round((positions.shape[1] - 1) ** 0.5)
    if side * side != positions.shape[1] - 1:
        raise InputError(f"pos_embed has shape {tuple(positions.shape)}; expected a class token and a square grid.")
    patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), (grid, grid), mode="bicubic", align_corners=False)
    return {
        **state,
        "patch_embed.proj.weight": F.interpolate(
            kernel.float(), (patch_size, patch_size), mode="bicubic", align_corners=False
        ).to(kernel.dtype),
        "pos_embed": torch.cat((positions[:, :1], patches.flatten(2).mT.to(positions.dtype)), 1),
    }
