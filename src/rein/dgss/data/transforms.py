"""Transforms of images and labels: the authors' training pipeline, resizing for evaluation, and normalisation.

The pipeline is that of OpenMMLab's Mask2Former configurations for Cityscapes: random scale and crop, horizontal flip, photometric
distortion. It uses torchvision's v2 transforms on uint8 tensors, processes only the pixels of the crop, and draws from torch's random
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.tv_tensors import Image, Mask

from rein.dgss.data.pairs import Sample
from rein.dgss.labels import IGNORE_LABEL
from rein.errors import InputError

_MAX_CROP_ATTEMPTS = 10


class Normalize(nn.Module):
    """Normalise uint8 images: scale to 0..1, subtract `mean`, divide by `std`.

    Args:
        mean: mean of each channel, for values in 0..1.
        std: standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W), uint8 to float32."""
        return (images.float() / 255 - self.mean) / self.std


class ScaleAndCrop(nn.Module):
    """Resize an image to a random scale and cut a random square in which no class exceeds a share of the labelled pixels.

    The square is cut before it is resized, so the cost depends on the crop and not on the image. An image that is smaller than the
    crop after scaling is padded at the right and at the bottom.

    Args:
        crop: side of the square in pixels, c.
        scales: smallest and largest length of the shortest edge, as multiples of c. Each sample uses one of sixteen evenly spaced
            lengths.
        max_share: largest share of the labelled pixels that one class may have, 0 < max_share <= 1. After ten rejected squares, the
            last one is used.
        fill: colour of the padding, (red, green, blue) from 0 to 255.

    Raises:
        InputError: `crop`, `scales` or `max_share` is out of range.
    """

    def __init__(
        self,
        crop: int,
        scales: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        fill: Sequence[int] = (124, 116, 104),
    ) -> None:
        super().__init__()
        if crop < 1 or not 0 < scales[0] <= scales[1] or not 0 < max_share <= 1:
            raise InputError(
                f"crop is {crop}, scales are {tuple(scales)} and max_share is {max_share}; expected crop >= 1, "
                "0 < scales[0] <= scales[1] and 0 < max_share <= 1."
            )
        self.crop, self.max_share, self.fill = crop, max_share, tuple(fill)
        low, high = scales
        self.edges = [crop * (low + (high - low) * step / 15) for step in range(16)]

    def forward(self, image: Tensor, label: Tensor) -> Sample:
        """Image (3, H, W) and label (H, W) -> (3, c, c) and (c, c)."""
        height, width = label.shape
        edge = self.edges[int(torch.randint(len(self.edges), ()))]
        # the authors' pipeline limits the longest edge to four crops
        ratio = min(edge / min(height, width), 4 * self.crop / max(height, width))
        scaled = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        size = [min(self.crop, side) for side in scaled]
        for _ in range(_MAX_CROP_ATTEMPTS):
            top, left = (int(torch.randint(side - length + 1, ())) for side, length in zip(scaled, size, strict=True))
            rows, columns = _source_slice(top, size[0], ratio, height), _source_slice(left, size[1], ratio, width)
            cut = TF.resize(label[None, rows, columns], size, interpolation=v2.InterpolationMode.NEAREST)[0]
            counts = torch.bincount(cut.flatten(), minlength=256)[:IGNORE_LABEL]
            if self.max_share == 1 or ((counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum()):
                break
        image = TF.resize(image[:, rows, columns], size, antialias=True)
        if size != [self.crop, self.crop]:
            padded = torch.tensor(self.fill, dtype=image.dtype)[:, None, None].expand(-1, self.crop, self.crop).clone()
            padded[:, : size[0], : size[1]] = image
            image, cut = padded, F.pad(cut, (0, self.crop - size[1], 0, self.crop - size[0]), value=IGNORE_LABEL)
        return image, cut


class PhotometricDistort(v2.RandomPhotometricDistort):
    """SSD's photometric distortion without its channel permutation, as in OpenMMLab. Each step has probability 0.5."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw torchvision's parameters, but keep the order of the channels."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class TrainingTransform(nn.Module):
    """The authors' training pipeline for one image and its label.

    Args:
        crop: side of the crops in pixels; None keeps whole images.
        scales: as in `ScaleAndCrop`.
        max_share: as in `ScaleAndCrop`.
        flip: probability of a horizontal flip.
        photometric: apply `PhotometricDistort`.
        fill: as in `ScaleAndCrop`.
    """

    def __init__(
        self,
        crop: int | None,
        scales: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        fill: Sequence[int] = (124, 116, 104),
    ) -> None:
        super().__init__()
        self.scale_and_crop = None if crop is None else ScaleAndCrop(crop, scales, max_share, fill)
        augmentations: list[nn.Module] = [v2.RandomHorizontalFlip(flip)]
        if photometric:
            augmentations.append(PhotometricDistort())
        self.augment = v2.Compose(augmentations)

    def forward(self, image: Tensor, label: Tensor) -> Sample:
        """Image (3, H, W) and label (H, W), uint8 -> transformed image and label, uint8; with a crop, c x c pixels."""
        if self.scale_and_crop is not None:
            image, label = self.scale_and_crop(image, label)
        image, label = self.augment(Image(image), Mask(label))
        return image.as_subclass(Tensor), label.as_subclass(Tensor)


def resized(image: Tensor, shortest_edge: int | None) -> Tensor:
    """Resize an image (3, H, W), antialiased, so that its shortest edge has `shortest_edge` pixels; None keeps the size."""
    if shortest_edge is None or shortest_edge == min(image.shape[-2:]):
        return image
    ratio = shortest_edge / min(image.shape[-2:])
    return TF.resize(image, [max(1, round(side * ratio)) for side in image.shape[-2:]], antialias=True)


def _source_slice(start: int, length: int, ratio: float, limit: int) -> slice:
    """The source pixels of `length` scaled pixels from `start`; at least one pixel."""
    first = min(round(start / ratio), limit - 1)
    return slice(first, max(first + 1, min(limit, round((start + length) / ratio))))
