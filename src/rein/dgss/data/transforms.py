"""Transforms of images and labels: the authors' training pipeline, and normalisation.

The pipeline is that of OpenMMLab's Mask2Former configurations for Cityscapes: random scale and crop, horizontal flip, photometric
distortion, padding. It resizes only the pixels of the crop, and draws from torch's random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein.dgss.data.pairs import Sample
from rein.dgss.data.photometric import PhotometricDistort
from rein.dgss.data.resampling import resize_label
from rein.dgss.labels import IGNORE_LABEL
from rein.errors import InputError
from rein.resizing import resize_image

_MAX_CROP_ATTEMPTS = 10
_MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean, which normalisation takes to 0, within 0.01


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

    The result equals a cut from the resized image, but only the pixels of the cut are computed. The longest edge of the resized image
    has at most four crops, so that its shortest edge may be shorter than drawn.

    Args:
        crop: side of the square in pixels, c.
        scales: smallest and largest length of the shortest edge, as multiples of c. Each sample uses one of sixteen evenly spaced
            lengths, rounded down.
        max_share: each class has less than this share of the labelled pixels, 0 < max_share <= 1, and there are two classes or more.
            After ten rejected squares, the last one is used; 1 accepts the first.

    Raises:
        InputError: `crop`, `scales` or `max_share` is out of range.
    """

    def __init__(self, crop: int, scales: tuple[float, float] = (0.5, 2.0), max_share: float = 0.75) -> None:
        super().__init__()
        if crop < 1 or not 0 < scales[0] <= scales[1] or not 0 < max_share <= 1:
            raise InputError(
                f"crop is {crop}, scales are {tuple(scales)} and max_share is {max_share}; expected crop >= 1, "
                "0 < scales[0] <= scales[1] and 0 < max_share <= 1."
            )
        self.crop, self.max_share = crop, max_share
        low, high = scales
        lengths = (crop * (low + (high - low) * step / 15) for step in range(16))
        self.edges = [max(1, int(round(length, 6))) for length in lengths]  # 512.0, not 511.99999

    def scaled_size(self, size: tuple[int, int], edge: int) -> tuple[int, int]:
        """Height and width of an image of this size when its shortest edge is to have `edge` pixels."""
        ratio = min(edge / min(size), 4 * self.crop / max(size))
        height, width = (max(1, int(side * ratio + 0.5)) for side in size)
        return height, width

    def forward(self, image: Tensor, label: Tensor) -> Sample:
        """Image (3, H, W) and label (H, W) -> image and label of at most c x c pixels; a scaled edge below c is not padded."""
        edge = self.edges[int(torch.randint(len(self.edges), ()))]
        scaled = self.scaled_size((label.shape[0], label.shape[1]), edge)
        size = [min(self.crop, side) for side in scaled]
        for _ in range(_MAX_CROP_ATTEMPTS):
            top, left = (int(torch.randint(side - length + 1, ())) for side, length in zip(scaled, size, strict=True))
            part = slice(top, top + size[0]), slice(left, left + size[1])
            cut = resize_label(label, scaled, part)
            counts = torch.bincount(cut.flatten(), minlength=256)[:IGNORE_LABEL]
            if self.max_share == 1 or ((counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum()):
                break
        return resize_image(image, scaled, part), cut


class TrainingTransform(nn.Module):
    """The authors' training pipeline for one image and its label.

    Args:
        crop: side of the crops in pixels; None keeps whole images.
        scales: as in `ScaleAndCrop`.
        max_share: as in `ScaleAndCrop`.
        flip: probability of a horizontal flip.
        photometric: apply `PhotometricDistort`.
        fill: colour of the padding at the right and at the bottom, (red, green, blue) from 0 to 255. It is not distorted, and
            its label is 255.
    """

    def __init__(
        self,
        crop: int | None,
        scales: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        fill: Sequence[int] = _MEAN_COLOUR,
    ) -> None:
        super().__init__()
        self.scale_and_crop = None if crop is None else ScaleAndCrop(crop, scales, max_share)
        self.flip, self.fill = flip, tuple(fill)
        self.distort = PhotometricDistort() if photometric else None

    def forward(self, image: Tensor, label: Tensor) -> Sample:
        """Image (3, H, W) and label (H, W), uint8 -> transformed image and label, uint8; with a crop, c x c pixels."""
        if self.scale_and_crop is not None:
            image, label = self.scale_and_crop(image, label)
        if float(torch.rand(())) < self.flip:
            image, label = image.flip(-1), label.flip(-1)
        if self.distort is not None:
            image = self.distort(image)
        return (image, label) if self.scale_and_crop is None else self._pad(image, label, self.scale_and_crop.crop)

    def _pad(self, image: Tensor, label: Tensor, side: int) -> Sample:
        height, width = label.shape
        if (height, width) == (side, side):
            return image, label
        padded = torch.tensor(self.fill, dtype=image.dtype)[:, None, None].expand(-1, side, side).clone()
        padded[:, :height, :width] = image
        return padded, F.pad(label, (0, side - width, 0, side - height), value=IGNORE_LABEL)
