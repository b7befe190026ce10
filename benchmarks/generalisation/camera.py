"""Another camera for generated streets: a longer lens with barrel distortion, tilted, and another sensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rein.dgss.labels import IGNORE_LABEL


def another_camera(image: Tensor, label: Tensor, seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Transform an image and its labels to those of another camera.

    Args:
        image: (3, H, W) uint8, of a higher resolution than `size`.
        label: (H, W) uint8.
        seed: seed of the camera's properties.
        size: height and width of the output in pixels.

    Returns:
        An image (3, height, width) and labels (height, width), uint8; labels outside the scene are 255.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    grid = _lens(size, zoom=some(0.55, 0.85), bend=some(0.05, 0.25), roll=some(-0.12, 0.12), shift=some(-0.1, 0.1, 2))
    seen = F.grid_sample(image[None] / 255, grid, padding_mode="reflection", align_corners=False)[0]
    classes = F.grid_sample(label[None, None].float() - IGNORE_LABEL, grid, mode="nearest", align_corners=False)[0, 0]
    return _sensor(seen, some, generator), (classes + IGNORE_LABEL).round().to(torch.uint8)


def _lens(size: tuple[int, int], zoom: Tensor, bend: Tensor, roll: Tensor, shift: Tensor) -> Tensor:
    """Sampling grid (1, height, width, 2) from -1 to 1: barrel distortion, then zoom, roll and shift."""
    height, width = size
    y, x = torch.meshgrid(
        torch.linspace(-1 + 1 / height, 1 - 1 / height, height),
        torch.linspace(-1 + 1 / width, 1 - 1 / width, width),
        indexing="ij",
    )
    aspect = width / height
    further = 1 + bend * ((aspect * x) ** 2 + y**2) / (1 + aspect**2)
    x, y = zoom * x * further, zoom * y * further
    x, y = x * roll.cos() - y * roll.sin() / aspect, x * aspect * roll.sin() + y * roll.cos()
    return torch.stack([x + shift[0], y + shift[1]], -1)[None]


def _sensor(seen: Tensor, some, generator: torch.Generator) -> Tensor:
    """Apply response curve, white balance, saturation, vignette, blur and noise; returns uint8."""
    _, height, width = seen.shape
    seen = seen.clamp(1e-4, 1) ** torch.exp(some(-0.4, 0.4)) * torch.exp(some(-0.25, 0.25) + some(-0.15, 0.15, 3, 1, 1))
    grey = seen.mean(0, keepdim=True)
    seen = grey + (seen - grey) * some(0.4, 1.5)
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    seen = seen * (1 - some(0.1, 0.5) * (x**2 + y**2) / 2)
    soft = F.avg_pool2d(F.pad(seen[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    seen = seen + (soft - seen) * some(0, 0.8) + some(0.01, 0.04) * torch.randn(seen.shape, generator=generator)
    return (255 * seen.clamp(0, 1)).round().to(torch.uint8)
