"""Photographs in, coloured masks out: what `Segmenter.segment` reads and returns."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from rein.errors import InputError, one_line
from rein.extras import require
from rein.files import check_regular_file, reason_of, replace_file

Colour = tuple[int, int, int]
_EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}  # of Pillow's modes


def default_palette(count: int) -> list[Colour]:
    """Different colours for `count` classes, at most 256: those of Pascal VOC, without its black."""
    colours = []
    for number in range(1, count + 1):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append((channels[0], channels[1], channels[2]))
    return colours


def to_tensor(image: Any) -> Tensor:
    """An image as a tensor (3, H, W) uint8.

    Args:
        image: a path, a PIL image, a uint8 array (H, W, 3), or a uint8 tensor (3, H, W). A path or a PIL image is turned as its EXIF
            entry says, and converted to RGB.

    Raises:
        InputError: none of these, or a file that is not an image.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise InputError(
                f"image is a tensor {image.dtype} of shape {tuple(image.shape)}; expected uint8 of shape (3, H, W), red first. Use "
                "segmenter.predict for normalised batches."
            )
        return image
    if hasattr(image, "__array_interface__") and not hasattr(image, "getexif"):  # an array, not an image of Pillow
        import numpy as np

        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InputError(
                f"image is an array {image.dtype} of shape {image.shape}; expected uint8 of shape (H, W, 3), red first. Use "
                "segmenter.predict for normalised batches."
            )
        return torch.from_numpy(image.transpose(2, 0, 1).copy())  # a copy, since arrays may be read-only or flipped
    require("PIL", "train")
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, str | os.PathLike):
        try:
            check_regular_file(image)
            with Image.open(image) as opened:
                opened.load()
                image = opened
        except UnidentifiedImageError as error:
            raise InputError(f"{os.fspath(image)} is not an image that Pillow can read. Pass a photograph.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read {os.fspath(image)}: {one_line(reason_of(error, image))}.") from error
    if not isinstance(image, Image.Image):
        raise InputError(
            f"image is a {type(image).__name__}; expected a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W)."
        )
    if image.mode not in _EIGHT_BITS:
        raise InputError(f"image has Pillow's mode {image.mode!r}, with more than 8 bits; expected 8 bits, such as mode 'RGB'.")
    image = (ImageOps.exif_transpose(image) or image).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Segmentation:
    """The classes of an image.

    Attributes:
        classes: class of every pixel, (H, W) uint8, on the CPU; the index of a name in `names`.
        image: the image, (3, H, W) uint8.
        names: names of the classes.
        palette: colours of the classes, (red, green, blue) from 0 to 255.
    """

    classes: Tensor
    image: Tensor
    names: Sequence[str]
    palette: Sequence[Colour]

    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class that occurs, from 0 to 1, the largest first."""
        counts = self.classes.flatten().bincount(minlength=len(self.names))
        found = {self.names[index]: count / self.classes.numel() for index, count in enumerate(counts.tolist()) if count}
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))

    def mask(self) -> Any:
        """The classes as a PIL image with a palette: pixels are class numbers, shown in the colours of the classes."""
        from PIL import Image

        height, width = self.classes.shape
        mask = Image.frombytes("P", (width, height), bytes(self.classes.contiguous().numpy().tobytes()))
        mask.putpalette([value for colour in self.palette for value in colour])
        return mask

    def overlay(self, alpha: float = 0.5) -> Any:
        """The image under the colours of its classes, as a PIL image.

        Args:
            alpha: weight of the colours, from 0 to 1.
        """
        from PIL import Image

        if not 0 <= alpha <= 1:
            raise InputError(f"alpha is {alpha}; expected a number from 0 to 1.")
        pixels = self.image.permute(1, 2, 0).contiguous().cpu().numpy()
        return Image.blend(Image.fromarray(pixels), self.mask().convert("RGB"), alpha)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as a PNG file.

        Raises:
            InputError: the name does not end in `.png`; other formats would change class numbers.
            CheckpointError: the file cannot be written.
        """
        if not os.fspath(path).lower().endswith(".png"):
            raise InputError(
                f"{os.fspath(path)} does not end in .png; other formats would change the class numbers. Choose a name in .png."
            )
        buffer = io.BytesIO()
        self.mask().save(buffer, "PNG")
        replace_file(path, buffer.getvalue())


def check_classes(names: Sequence[str], count: int | None = None) -> list[str]:
    """Return the names of classes as a list.

    Raises:
        InputError: they are not different, non-empty texts of printable characters, or not `count`, if it is given.
    """
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
    valid = is_list and len(set(names)) == len(names) and all(name.strip() and name.isprintable() for name in names)
    if not valid or count not in (None, len(names)):
        raise InputError(
            f"classes is {one_line(repr(names))}; expected different names of printable characters, {_one_each(count)}."
        )
    return list(names)


def check_palette(palette: Sequence[Sequence[int]], count: int | None = None) -> list[Colour]:
    """Return the colours of classes as tuples.

    Raises:
        InputError: they are not lists of three integers from 0 to 255, or not `count`, if it is given.
    """

    def is_colour(values: object) -> bool:
        return isinstance(values, list | tuple) and len(values) == 3 and all(type(v) is int and 0 <= v <= 255 for v in values)

    if not isinstance(palette, list | tuple) or count not in (None, len(palette)) or not all(map(is_colour, palette)):
        raise InputError(
            f"palette is {one_line(repr(palette))}; expected colours, (red, green, blue) from 0 to 255, {_one_each(count)}."
        )
    return [(colour[0], colour[1], colour[2]) for colour in palette]


def check_normalization(normalization: tuple[Sequence[float], Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel as lists.

    Raises:
        InputError: they are not as many finite numbers each, or a deviation is not above 0.
    """
    try:
        mean, std = ([float(value) for value in values] for values in normalization)
        valid = len(mean) == len(std) > 0 and all(map(isfinite, mean)) and all(0 < value < inf for value in std)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise InputError(
            f"normalization is {one_line(repr(normalization))}; expected (mean, std), a number for each channel, for images in "
            "[0, 1]."
        )
    return mean, std


def _one_each(count: int | None) -> str:
    return "one for each class" if count is None else f"one for each of the {count} classes of the head"
