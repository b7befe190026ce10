"""From a label file to class numbers: how the file is read, and which number on disk is which class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rein.dgss.classes import IGNORE_LABEL
from rein.dgss.labels import LabelSpace
from rein.errors import InputError
from rein.extras import require

_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
_ONE_CHANNEL = ("L", "P", "I", "I;16", "1")


@dataclass(frozen=True)
class Encoding:
    """How labels encode classes.

    Attributes:
        name: as the publisher calls it, for messages.
        classes: number on disk -> class number, or 255 for nothing. Any other number in a file is an error. 255 on disk is always
            nothing.
        read: path -> numbers (H, W).
    """

    name: str
    classes: Mapping[int, int]
    read: Callable[[Path], np.ndarray]

    def decode(self, path: Path) -> np.ndarray:
        """The label's class numbers, (H, W) uint8.

        Raises:
            InputError: the file cannot be read, or has a number that is not in `classes`.
        """
        numbers = self.read(path)
        table, known = self._tables
        inside = (numbers >= 0) & (numbers < len(table))
        if not inside.all() or not known[numbers].all():
            wrong = [int(number) for number in np.unique(numbers) if not (0 <= number < len(table) and known[number])]
            raise InputError(f"{path} has labels {wrong[:8]}; {self._wanted()}.")
        return table[numbers]

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        table = np.full(max(IGNORE_LABEL, *self.classes) + 1, IGNORE_LABEL, np.uint8)
        known = np.zeros(len(table), bool)
        for number, value in self.classes.items():
            table[number], known[number] = value, True
        known[IGNORE_LABEL] = True
        return table, known

    def _wanted(self) -> str:
        classes = _ranges(number for number, value in self.classes.items() if value != IGNORE_LABEL)
        nothing = _ranges({*(number for number, value in self.classes.items() if value == IGNORE_LABEL), IGNORE_LABEL})
        return f"wanted {classes} ({self.name}) or {nothing} for nothing"


def identity(space: LabelSpace, name: str | None = None, values: Sequence[int] | None = None) -> Encoding:
    """The label files hold the class numbers of `space`, or `values` in the order of its classes.

    Raises:
        InputError: there are not as many different values as classes.
    """
    numbers = range(len(space.names)) if values is None else values
    if len(set(numbers)) != len(space.names) or len(numbers) != len(space.names):
        raise InputError(f"values {list(numbers)} must be as many and as different as the classes {', '.join(space.names)}.")
    classes = dict.fromkeys(space.ignored, IGNORE_LABEL) | {number: k for k, number in enumerate(numbers)}
    return Encoding(name or ", ".join(space.names), classes, read_numbers)


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def open_picture(path: Path) -> Image.Image:
    """The picture, read to its end.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()  # the pixels stay when the file is closed
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    return image


def read_rgb(path: Path) -> np.ndarray:
    """An image, (H, W, 3) uint8, as stored: a rotation in its EXIF data is not applied.

    Raises:
        InputError: it cannot be read, or has more than 8 bits per channel.
    """
    picture = open_picture(path)
    _check_mode(path, picture.mode)
    return np.array(picture.convert("RGB"))


def check_rgb(path: Path) -> None:
    """As `read_rgb`, by the file's head alone.

    Raises:
        InputError: as `read_rgb`, as far as the head tells.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    _check_mode(path, mode)


def _check_mode(path: Path, mode: str) -> None:
    if mode not in _EIGHT_BIT:
        raise InputError(f"{path} is a picture of mode {mode}; images must have 8 bits per channel.")


def read_numbers(path: Path) -> np.ndarray:
    """The numbers of a picture with one channel; of a paletted one the indices, not the colours.

    Raises:
        InputError: it cannot be read, or has several channels.
    """
    picture = open_picture(path)
    if picture.mode not in _ONE_CHANNEL:
        raise InputError(f"{path} is a picture of mode {picture.mode}; labels must have one channel of class numbers.")
    numbers = np.array(picture)
    return numbers.astype(np.uint8) if picture.mode == "1" else numbers


def read_grey_numbers(path: Path) -> np.ndarray:
    """The numbers of a picture with one channel, or with equal ones: some copies of UrbanSyn's labels have three or four.

    Raises:
        InputError: it cannot be read, or its channels differ.
    """
    picture = open_picture(path)
    if picture.mode in ("RGB", "RGBA"):
        channels = np.array(picture)[..., :3]
        if not (channels == channels[..., :1]).all():
            raise InputError(f"{path} is a coloured picture; wanted labels whose channels are equal class numbers.")
        return channels[..., 0]
    return read_numbers(path)


def read_first_of_three_16_bit(path: Path) -> np.ndarray:
    """The first channel of a PNG with three channels of 16 bits, of which Pillow keeps the upper 8: zeros.

    Raises:
        InputError: it cannot be read, or is another kind of picture.
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = require("cv2", "data")
    open_picture(path)  # finds what is damaged, in the words of every other data set
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise InputError(f"{path} cannot be read as an image.")
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels != 3 or pixels.dtype != np.uint16:
        raise InputError(
            f"{path} has {channels} channels of {8 * pixels.dtype.itemsize} bits; wanted three channels of 16 bits, the class in the "
            "first."
        )
    numbers: np.ndarray = pixels[..., 2]  # OpenCV's order is blue, green, red
    return numbers


@dataclass(frozen=True)
class Polygons:
    """Reads polygon files as those of Cityscapes and IDD: later polygons lie over earlier ones.

    Attributes:
        numbers: label name -> number. A group of things, as `cargroup`, is a `car`.
        background: where there is no polygon.
    """

    numbers: Mapping[str, int]
    background: int

    def __call__(self, path: Path) -> np.ndarray:
        """The numbers, (H, W).

        Raises:
            InputError: the file is no polygon file, or has a label that is not in `numbers`.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            picture = Image.new("L", (content["imgWidth"], content["imgHeight"]), self.background)
            pen = ImageDraw.Draw(picture)
            for thing in content["objects"]:
                corners = [(float(x), float(y)) for x, y in thing["polygon"]]
                if not thing.get("deleted") and len(corners) > 1:
                    pen.polygon(corners, fill=self._number(thing["label"], path))
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read as a polygon file: {type(error).__name__} {error}") from error
        return np.array(picture)

    def _number(self, label: str, path: Path) -> int:
        for name in (label, label.removesuffix("group")):
            if name in self.numbers:
                return self.numbers[name]
        raise InputError(f"{path} has the label {label!r}; wanted one of {', '.join(self.numbers)}.")
