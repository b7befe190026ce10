"""`FeaturePyramid`: resize the equal-sized maps of a plain ViT to the strides that pyramid decoders expect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein.errors import InputError
from rein.heads.base import have_one_size


class FeaturePyramid(nn.Module):
    """Resize map i by the factor `scales[i]`, bilinearly (align_corners=False) and without parameters, as the paper does.

    With patch size 16, the default scales give strides 4, 8, 16 and 32. Maps of different sizes, as from a hierarchical backbone,
    pass through unchanged.

    Args:
        scales: one factor per map, largest map first.
    """

    def __init__(self, scales: Sequence[float] = (4, 2, 1, 0.5)) -> None:
        super().__init__()
        self.scales = tuple(scales)

    def extra_repr(self) -> str:
        return f"scales={self.scales}"

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h, w) -> maps (B, C_i, h * scale_i, w * scale_i), each side at least one pixel.

        Raises:
            InputError: the number of maps differs from the number of scales.
        """
        if len(maps) != len(self.scales):
            raise InputError(f"FeaturePyramid expects {len(self.scales)} maps, one per scale, got {len(maps)}.")
        if not have_one_size(maps):
            return list(maps)
        return [_resize(feature_map, scale) for feature_map, scale in zip(maps, self.scales, strict=True)]


def _resize(feature_map: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return feature_map
    height, width = (_scaled(side, scale) for side in feature_map.shape[-2:])
    return F.interpolate(feature_map, (height, width), mode="bilinear", align_corners=False)


def _scaled(side: int, scale: float) -> int:
    """`side` times `scale`, rounded down, at least 1."""
    numerator, denominator = float(scale).as_integer_ratio()
    if denominator > 64:  # not a power of two
        return max(1, int(side * scale))
    scaled = side * numerator // denominator  # integers stay symbols in torch.export, products with a float do not
    return torch.sym_max(1, scaled) if isinstance(scaled, torch.SymInt) else max(1, scaled)
