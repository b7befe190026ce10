"""Small timm `VisionTransformer`s for tests. They need no download."""

from __future__ import annotations

from typing import Any

from torch import nn

from rein.backbones.pocket import POCKET, POCKET_MEAN, POCKET_STD, POCKET_VIT, POCKET_WEIGHTS, pocket_vit

__all__ = ["POCKET", "POCKET_MEAN", "POCKET_STD", "POCKET_VIT", "POCKET_WEIGHTS", "pocket_vit", "tiny_vit"]


def tiny_vit(**settings: Any) -> nn.Module:
    """Build a timm `VisionTransformer` with random weights and no classifier: 4 blocks, width 32, 32 x 32 images, 8 x 8 patches.

    Args:
        settings: arguments of `timm.models.VisionTransformer`; they override the values above.
    """
    from timm.models.vision_transformer import VisionTransformer

    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**{**defaults, **settings})
