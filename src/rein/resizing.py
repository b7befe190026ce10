"""Resizing of 8-bit images as OpenCV does it: bilinear without antialias, in whole numbers.

The published figures were obtained with this rule, in training and in evaluation. A part of a resized image can be computed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width


def resize_image(image: Tensor, size: Size, part: tuple[slice, slice] | None = None) -> Tensor:
    """Resize an image bilinearly, without antialias; pixel centres are at half integers. Equal to OpenCV's
    INTER_LINEAR in its fixed-point arithmetic: weights of 11 bits, and a sum of which some bits are cut off.

    Args:
        image: (C, H, W) uint8.
        size: height and width of the resized image.
        part: rows and columns of the resized image to compute; None computes all.

    Returns:
        (C, h, w) uint8. The input itself if nothing changes.
    """
    if part is None and tuple(image.shape[-2:]) == size:
        return image
    rows, columns = part or (slice(0, size[0]), slice(0, size[1]))
    above, below, *down = _neighbours(image.shape[1], size[0], rows)
    left, right, *across = _neighbours(image.shape[2], size[1], columns)
    needed, places = torch.unique(torch.cat([above, below]), return_inverse=True)
    source = image.index_select(1, needed)
    lines = source.index_select(2, left).int().mul_(across[0])
    lines.add_(source.index_select(2, right).int().mul_(across[1])).bitwise_right_shift_(4)
    upper, lower = (
        lines.index_select(1, place).mul_(weight[:, None]).bitwise_right_shift_(16)
        for place, weight in zip(places.chunk(2), down, strict=True)
    )
    return upper.add_(lower).add_(2).bitwise_right_shift_(2).to(torch.uint8)


def resize_to_edge(image: Tensor, edge: int) -> Tensor:
    """Resize an image (C, H, W) uint8, with its aspect ratio, so that its shorter side has `edge` pixels."""
    height, width = image.shape[-2:]
    ratio = edge / min(height, width)
    return resize_image(image, (max(1, round(height * ratio)), max(1, round(width * ratio))))


def _neighbours(source: int, target: int, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two source indices around each target index of `part`, and their weights as integers, whose sum is 2048."""
    step = 1 / (target / source)
    positions = ((torch.arange(part.start, part.stop, dtype=torch.float64) + 0.5) * step - 0.5).float()
    first = positions.floor()
    weights = positions - first
    one, two = (first.long().add(offset).clamp(0, source - 1) for offset in (0, 1))
    return one, two, ((1 - weights) * 2048).round().int(), (weights * 2048).round().int()
