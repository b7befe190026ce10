"""A plain ViT's maps, all of one size, as the four strides that pyramid decoders expect."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rein.errors import InputError


class FeaturePyramid(nn.Module):
    """Resize map i by `scales[i]`, bilinearly (align_corners False), as the paper does: no parameters.

    With patch 16 the default gives strides 4, 8, 16, 32. Maps that already differ in size, as those of a hierarchical backbone
    do, pass through untouched.

    Args:
        scales: one factor per map, largest map first.
    """

    def __init__(self, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        self.scales = tuple(scales)

    def extra_repr(self) -> str:
        return f"scales={self.scales}"

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h, w) -> maps (B, C_i, h * scale_i, w * scale_i), at least one pixel each way.

        Raises:
            InputError: not one map per scale.
        """
        if len(maps) != len(self.scales):
            raise InputError(f"a FeaturePyramid with {len(self.scales)} scales wants as many maps; got {len(maps)}.")
        if len({feature_map.shape[-2:] for feature_map in maps}) > 1:
            return list(maps)
        return [_resize(feature_map, scale) for feature_map, scale in zip(maps, self.scales, strict=True)]


def _resize(feature_map: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return feature_map
    height, width = (max(1, int(side * scale)) for side in feature_map.shape[-2:])
    return F.interpolate(feature_map, (height, width), mode="bilinear", align_corners=False)
