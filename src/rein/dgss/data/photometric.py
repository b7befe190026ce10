"""Photometric distortion of 8-bit images: brightness, contrast, saturation and hue, as in the published settings.

Saturation and hue change in OpenCV's 8-bit HSV. Each step rounds to 8 bits, so that the order of the steps counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SHIFT, _HALF = 12, 1 << 11  # OpenCV's fixed-point division
_RANGE = torch.arange(1, 256, dtype=torch.float64)


def _reciprocals(numerator: float) -> Tensor:
    """`numerator / i` for i from 0 to 255, in fixed point; 0 for i = 0."""
    return torch.cat([torch.zeros(1), (numerator * (1 << _SHIFT) / _RANGE).round()]).int()


def _parts() -> Tensor:
    """(3, 180): how much of the saturation the red, green and blue of each hue lose, 0 to 1."""
    angle = torch.arange(180, dtype=torch.float32) * (6 / 180)
    sector = angle.floor()
    rest = angle - sector
    zero, one = torch.zeros_like(rest), torch.ones_like(rest)
    kinds = torch.stack([rest, one, one, 1 - rest, zero, zero])  # rises, stays, falls, is zero, over the six sectors
    turned = [(sector.long() + offset) % 6 for offset in (5, 3, 1)]
    return torch.stack([kinds.gather(0, index[None])[0] for index in turned])


_SATURATION, _HUE, _PARTS = _reciprocals(255), _reciprocals(180 / 6), _parts()


@dataclass(frozen=True)
class Distortion:
    """One draw of the distortion; None leaves a step out.

    Attributes:
        brightness: added to every channel, -32 to 32.
        contrast: factor of every channel, 0.5 to 1.5.
        contrast_first: change the contrast before saturation and hue, not after them.
        saturation: factor of the saturation, 0.5 to 1.5.
        hue: added to the hue, -18 to 17, in steps of 2 degrees.
    """

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = False
    saturation: float | None = None
    hue: int | None = None

    @classmethod
    def draw(cls) -> Distortion:
        """Draw from torch's random state; each step has probability 0.5."""
        taken = (torch.rand(5) < 0.5).tolist()
        brightness, contrast, saturation = torch.rand(3).tolist()
        hue = int(torch.randint(-18, 18, ()))
        return cls(
            brightness=64 * brightness - 32 if taken[0] else None,
            contrast=0.5 + contrast if taken[1] else None,
            contrast_first=taken[2],
            saturation=0.5 + saturation if taken[3] else None,
            hue=hue if taken[4] else None,
        )

    def apply(self, image: Tensor) -> Tensor:
        """Distort an image (3, H, W) uint8."""
        if self.brightness is not None:
            image = _scaled(image, 1.0, self.brightness)
        if self.contrast is not None and self.contrast_first:
            image = _scaled(image, self.contrast)
        if self.saturation is not None:
            hue, saturation, value = rgb_to_hsv(image)
            image = hsv_to_rgb(hue, _scaled(saturation, self.saturation), value)
        if self.hue is not None:
            hue, saturation, value = rgb_to_hsv(image)
            image = hsv_to_rgb((hue + self.hue).remainder_(180), saturation, value)
        if self.contrast is not None and not self.contrast_first:
            image = _scaled(image, self.contrast)
        return image


class PhotometricDistort(nn.Module):
    """Random photometric distortion, drawn from torch's random state."""

    def forward(self, image: Tensor) -> Tensor:
        """Image (3, H, W), uint8 to uint8."""
        return Distortion.draw().apply(image)


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image (3, H, W) uint8 -> hue 0 to 179, saturation and value 0 to 255, each (H, W) int32; equal to OpenCV's 8-bit RGB2HSV."""
    red, green, blue = image.int()
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (spread * _SATURATION[value] + _HALF) >> _SHIFT
    hue = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = torch.where(value == red, green - blue, hue)
    hue = (hue * _HUE[spread] + _HALF) >> _SHIFT
    return torch.where(hue < 0, hue + 180, hue), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `rgb_to_hsv` but for rounding: (H, W) integers -> (3, H, W) uint8; as OpenCV's 8-bit HSV2RGB, whose
    vector code truncates.

    A channel is `value * (1 - saturation * part)`: part is 0 over a third of the circle of hues, 1 over the opposite third, and
    linear between them.
    """
    strength, brightness = saturation.float() * (1 / 255), value.float() * (1 / 255)
    return (1 - _PARTS[:, hue] * strength).mul_(brightness).mul_(255).to(torch.uint8)


def _scaled(values: Tensor, factor: float, offset: float = 0.0) -> Tensor:
    """`values * factor + offset`, clipped to 0..255 and truncated; the type stays."""
    return values.float().mul_(factor).add_(offset).clamp_(0, 255).to(torch.uint8).to(values.dtype)
