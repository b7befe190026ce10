"""Augmentation for pretraining: a crop by a random camera, and the same crop in another light and weather."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(low: float, high: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform random numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def crops(images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Crop every image at random: zoomed by up to 2, stretched, mirrored, tilted, and bent by a lens.

    Args:
        images: (B, H, W, C) uint8; all channels are cropped alike.
        size: height and width of the crops in pixels.
        generator: source of all random numbers.

    Returns:
        (B, C, height, width), from 0 to 1.
    """
    batch, height, width, channels = images.shape
    zoom = torch.exp(uniform(math.log(0.5), 0, generator, batch))
    stretch = torch.exp(uniform(-0.25, 0.25, generator, batch))
    high = (zoom * stretch).clamp(max=1)  # share of the image's height
    wide = (zoom / stretch * size[1] / size[0] * height / width).clamp(max=1)
    mirror = uniform(-1, 1, generator, batch).sign()
    tilt = uniform(-0.12, 0.12, generator, batch)
    across = torch.stack([wide * mirror, -high * tilt * height / width, (1 - wide) * uniform(-1, 1, generator, batch)], 1)
    down = torch.stack([wide * mirror * tilt * width / height, high, (1 - high) * uniform(-1, 1, generator, batch)], 1)
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, channels, *size], align_corners=False)
    bend = uniform(-0.08, 0.16, generator, batch, 1, 1, 1)
    bent = grid * (1 + bend * grid.square().sum(-1, keepdim=True)) / (1 + 2 * bend.clamp(min=0))  # corners stay inside
    points = torch.cat([bent, torch.ones_like(bent[..., :1])], -1)
    grid = torch.einsum("bhwk,bck->bhwc", points, torch.stack([across, down], 1))
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def relight(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change light, weather and sensor of images (B, 3, H, W). Colours change, geometry does not."""
    batch, _, height, width = images.shape

    def each(low: float, high: float, *shape: int) -> Tensor:
        return uniform(low, high, generator, batch, *(shape or (1, 1, 1)))

    def chosen(share: float) -> Tensor:
        return each(0, 1) < share

    def field(low: float, high: float) -> Tensor:
        return F.interpolate(each(low, high, 1, 3, 3), size=(height, width), mode="bicubic", align_corners=True)

    images = images.clamp(min=1e-4) ** torch.exp(each(-0.7, 0.7))
    exposure, white_balance, light = each(-0.8, 0.4), each(-0.3, 0.3, 3, 1, 1), field(-0.5, 0.5)
    images = images * torch.exp(exposure + white_balance + light)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * each(0.1, 1.2)
    veil = field(0, 1).clamp(0, 1) * each(0, 0.9) * chosen(0.4)
    images = images + (each(0.4, 0.9) + each(-0.05, 0.05, 3, 1, 1) - images) * veil
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(chosen(0.25), blurred, images)
    noise = torch.randn(images.shape, generator=generator) * each(0, 0.06) * chosen(0.5)
    return (images + noise).clamp(0, 1)
