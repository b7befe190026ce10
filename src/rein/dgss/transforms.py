"""What happens to an image and its label before training: the authors' pipeline, drawn from torch's random state.

Scale and crop, flip, photometric distortion, as OpenMMLab's pipelines for Mask2Former on Cityscapes have them; torchvision's v2 does
the work. All of it runs on uint8 tensors, and only on the pixels that the crop keeps.
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

from rein.dgss.classes import IGNORE_LABEL
from rein.errors import InputError

Pair = tuple[Tensor, Tensor]
_TRIES = 10


class Normalize(nn.Module):
    """uint8 (..., 3, H, W) -> float32, scaled to 0..1, minus mean, over deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise a batch of images."""
        return (images.float() / 255 - self.mean) / self.std


class ScaleAndCrop(nn.Module):
    """Scale the shortest edge to a random multiple of the crop, then cut a random square in which no class fills more than a share.

    The square is cut before it is scaled, so that the cost goes by the crop and not by the image. Where the scaled image is smaller
    than the crop, it is padded at the right and at the bottom.

    Args:
        crop: side of the square in pixels, c.
        scales: least and greatest length of the shortest edge, as multiples of c; sixteen lengths, evenly spaced, are drawn from.
        max_share: of the labelled pixels that one class may fill, 0 to 1; where ten draws fail, the last one is taken.
        fill: colour of the padding, (red, green, blue) from 0 to 255.

    Raises:
        InputError: a crop below 1, scales that are not 0 < least <= greatest, or a share that is not above 0 and up to 1.
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
                f"crop {crop} must be at least 1, scales {tuple(scales)} rising from above 0, max_share {max_share} above 0 and up "
                "to 1."
            )
        self.crop, self.max_share, self.fill = crop, max_share, tuple(fill)
        low, high = scales
        self.edges = [crop * (low + (high - low) * step / 15) for step in range(16)]

    def forward(self, image: Tensor, label: Tensor) -> Pair:
        """Image (3, H, W) and label (H, W) -> (3, c, c) and (c, c)."""
        height, width = label.shape
        edge = self.edges[int(torch.randint(len(self.edges), ()))]
        # as the authors': the longest edge is held to four crops
        ratio = min(edge / min(height, width), 4 * self.crop / max(height, width))
        scaled = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        kept = [min(self.crop, side) for side in scaled]
        for _ in range(_TRIES):
            top, left = (int(torch.randint(side - keep + 1, ())) for side, keep in zip(scaled, kept, strict=True))
            rows, columns = _source(top, kept[0], ratio, height), _source(left, kept[1], ratio, width)
            cut = TF.resize(label[None, rows, columns], kept, interpolation=v2.InterpolationMode.NEAREST)[0]
            counts = torch.bincount(cut.flatten(), minlength=256)[:IGNORE_LABEL]
            if self.max_share == 1 or ((counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum()):
                break
        picture = TF.resize(image[:, rows, columns], kept, antialias=True)
        if kept != [self.crop, self.crop]:
            missing = (0, self.crop - kept[1], 0, self.crop - kept[0])
            colour = torch.tensor(self.fill, dtype=picture.dtype)[:, None, None].expand(-1, self.crop, self.crop).clone()
            colour[:, : kept[0], : kept[1]] = picture
            picture, cut = colour, F.pad(cut, missing, value=IGNORE_LABEL)
        return picture, cut


class PhotometricDistort(v2.RandomPhotometricDistort):
    """SSD's photometric distortion without its swap of colour channels, as OpenMMLab has it; each step with probability 0.5."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw as torchvision does, and leave the channels in their order."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class TrainingTransform(nn.Module):
    """The authors' pipeline on one pair.

    Args:
        crop: side of the crops in pixels; None leaves the size alone.
        scales: as in `ScaleAndCrop`.
        max_share: as in `ScaleAndCrop`.
        flip: probability of a horizontal flip.
        photometric: whether colours are distorted.
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
        self.cut = None if crop is None else ScaleAndCrop(crop, scales, max_share, fill)
        rest: list[nn.Module] = [v2.RandomHorizontalFlip(flip)]
        if photometric:
            rest.append(PhotometricDistort())
        self.rest = v2.Compose(rest)

    def forward(self, image: Tensor, label: Tensor) -> Pair:
        """Image (3, H, W) and label (H, W), uint8, to a pair of the same kind."""
        if self.cut is not None:
            image, label = self.cut(image, label)
        image, label = self.rest(Image(image), Mask(label))
        return image.as_subclass(Tensor), label.as_subclass(Tensor)


def resized(image: Tensor, shortest_edge: int | None) -> Tensor:
    """The image (3, H, W) with its shortest edge so many pixels long, antialiased; as it is where that is None."""
    if shortest_edge is None or shortest_edge == min(image.shape[-2:]):
        return image
    ratio = shortest_edge / min(image.shape[-2:])
    return TF.resize(image, [max(1, round(side * ratio)) for side in image.shape[-2:]], antialias=True)


def _source(start: int, length: int, ratio: float, limit: int) -> slice:
    """Where the pixels lie in the image of which `length` from `start` are wanted after scaling; at least one of them."""
    first = min(round(start / ratio), limit - 1)
    return slice(first, max(first + 1, min(limit, round((start + length) / ratio))))
