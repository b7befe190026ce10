"""Resizing of labels as OpenCV does it (nearest), and halving of pairs. `rein.resizing` has the resizing of images.

The published figures were obtained with these rules, in training and in evaluation. A part of a resized image can be computed alone.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # height, width


def resize_label(label: Tensor, size: Size, part: tuple[slice, slice] | None = None) -> Tensor:
    """Resize a label (H, W): the nearest pixel at or before each position, as OpenCV's INTER_NEAREST. `part` as in `resize_image`."""
    if part is None and tuple(label.shape) == size:
        return label
    rows, columns = part or (slice(0, size[0]), slice(0, size[1]))
    return label[_nearest(label.shape[0], size[0], rows)][:, _nearest(label.shape[1], size[1], columns)]


def fitted_size(size: Size, long: int, short: int) -> Size:
    """The largest size (height, width) of the same aspect ratio that fits into `long` x `short` pixels, in either orientation."""
    factor = min(long / max(size), short / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def halve_image(image: Tensor) -> Tensor:
    """Halve an image (3, H, W) uint8 with Pillow's bicubic filter, and store it as JPEG with Pillow's default quality."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    halved = picture.resize(_half(picture), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    halved.save(buffer, "JPEG")
    with Image.open(buffer) as stored:
        return torch.from_numpy(np.array(stored)).permute(2, 0, 1)


def halve_label(label: Tensor) -> Tensor:
    """Halve a label (H, W) uint8 with Pillow's nearest filter."""
    picture = Image.fromarray(label.numpy())
    return torch.from_numpy(np.array(picture.resize(_half(picture), Image.Resampling.NEAREST)))


def _half(picture: Image.Image) -> tuple[int, int]:
    """Half the width and height, rounded down, but at least one pixel."""
    return max(1, picture.width // 2), max(1, picture.height // 2)


def _nearest(source: int, target: int, part: slice) -> Tensor:
    step = 1 / (target / source)  # OpenCV's order of operations: another one may round to another pixel
    return (torch.arange(part.start, part.stop, dtype=torch.float64) * step).floor().long().clamp(max=source - 1)
