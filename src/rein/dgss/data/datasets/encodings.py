"""Label encodings: how a label file is read, and how its values map to class indices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rein.dgss.labels import IGNORE_LABEL, LabelSpace
from rein.errors import InputError
from rein.extras import require

_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
_ONE_CHANNEL = ("L", "P", "I", "I;16", "1")


@dataclass(frozen=True)
class Encoding:
    """How label files encode classes.

    Attributes:
        name: name of the encoding, for error texts.
        classes: value on disk -> class index, or 255 (ignored). Other values in a file are errors, except 255, which is ignored.
        read: reads a label file: path -> values (H, W).
    """

    name: str
    classes: Mapping[int, int]
    read: Callable[[Path], np.ndarray]

    def decode(self, path: Path) -> np.ndarray:
        """The class indices of a label file, (H, W) uint8.

        Raises:
            InputError: the file cannot be read, or has a value that is not in `classes`.
        """
        values = self.read(path)
        table, known = self._tables
        inside = (values >= 0) & (values < len(table))
        if not inside.all() or not known[values].all():
            wrong = [int(value) for value in np.unique(values) if not (0 <= value < len(table) and known[value])]
            raise InputError(f"{path} has label values {wrong[:8]}; {self._expected()}.")
        return table[values]

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        table = np.full(max(IGNORE_LABEL, *self.classes) + 1, IGNORE_LABEL, np.uint8)
        known = np.zeros(len(table), bool)
        for value, index in self.classes.items():
            table[value], known[value] = index, True
        known[IGNORE_LABEL] = True
        return table, known

    def _expected(self) -> str:
        classes = _ranges(value for value, index in self.classes.items() if index != IGNORE_LABEL)
        ignored = _ranges({*(value for value, index in self.classes.items() if index == IGNORE_LABEL), IGNORE_LABEL})
        return f"expected {classes} ({self.name}) or {ignored} (ignored)"


def identity(space: LabelSpace, name: str | None = None, values: Sequence[int] | None = None) -> Encoding:
    """Encoding of label files that hold the class indices of `space`.

    Args:
        space: the classes; its `ignored` values are ignored.
        name: name of the encoding; None uses the class names.
        values: value on disk of each class; None means the class indices.

    Raises:
        InputError: `values` does not hold one different value per class.
    """
    on_disk = range(len(space.names)) if values is None else values
    if len(set(on_disk)) != len(space.names) or len(on_disk) != len(space.names):
        raise InputError(f"values is {list(on_disk)}; expected one different number for each class of {', '.join(space.names)}.")
    classes = dict.fromkeys(space.ignored, IGNORE_LABEL) | {value: index for index, value in enumerate(on_disk)}
    return Encoding(name or ", ".join(space.names), classes, read_values)


def _ranges(numbers: Iterable[int]) -> str:
    """Integers as text: 1, 2, 3, 5 -> `1 to 3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def load_image(path: Path) -> Image.Image:
    """Open an image and read all of its pixels.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()  # keeps the pixels when the file is closed
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    return image


def read_rgb(path: Path) -> np.ndarray:
    """Read an image, (H, W, 3) uint8. A rotation in its EXIF data is not applied.

    Raises:
        InputError: the file cannot be read, or has more than 8 bits per channel.
    """
    image = load_image(path)
    _check_mode(path, image.mode)
    return np.array(image.convert("RGB"))


def check_rgb(path: Path) -> None:
    """Check by the header alone that `read_rgb` can read an image.

    Raises:
        InputError: the header cannot be read, or the image has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    _check_mode(path, mode)


def _check_mode(path: Path, mode: str) -> None:
    if mode not in _EIGHT_BIT:
        raise InputError(f"{path} has mode {mode}; expected an image with 8 bits per channel. Convert the image.")


def read_values(path: Path) -> np.ndarray:
    """Read a label with one channel, (H, W). The values of a paletted file are its indices, not its colours.

    Raises:
        InputError: the file cannot be read, or has several channels.
    """
    image = load_image(path)
    if image.mode not in _ONE_CHANNEL:
        raise InputError(f"{path} has mode {image.mode}; expected a label with one channel of class numbers.")
    values = np.array(image)
    return values.astype(np.uint8) if image.mode == "1" else values


def read_grey_values(path: Path) -> np.ndarray:
    """Read a label with one channel, or with equal colour channels: some copies of UrbanSyn have RGB or RGBA labels.

    Raises:
        InputError: the file cannot be read, or its colour channels differ.
    """
    image = load_image(path)
    if image.mode in ("RGB", "RGBA"):
        channels = np.array(image)[..., :3]
        if not (channels == channels[..., :1]).all():
            raise InputError(f"{path} has colour channels that differ; expected a label with the class number in every channel.")
        return channels[..., 0]
    return read_values(path)


def read_first_of_three_16_bit(path: Path) -> np.ndarray:
    """Read the first channel of a PNG with three channels of 16 bits.

    OpenCV reads the file: Pillow keeps the upper 8 bits only, and these are zero in SYNTHIA's labels.

    Raises:
        InputError: the file cannot be read, or has other channels.
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = require("cv2", "data")
    load_image(path)  # raises the same error for a damaged file as other data sets
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise InputError(f"{path} cannot be read as an image.")
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels != 3 or pixels.dtype != np.uint16:
        raise InputError(
            f"{path} has {channels} channels of {8 * pixels.dtype.itemsize} bits; expected three channels of 16 bits, with the class "
            "in the first."
        )
    values: np.ndarray = pixels[..., 2]  # OpenCV's order is blue, green, red
    return values


@dataclass(frozen=True)
class Polygons:
    """Reads the polygon files of Cityscapes and IDD. Later polygons are drawn over earlier ones.

    Attributes:
        values: label name -> value. The suffix `group` is removed from an unknown name: `cargroup` is `car`.
        background: value of the pixels outside all polygons.
    """

    values: Mapping[str, int]
    background: int

    def __call__(self, path: Path) -> np.ndarray:
        """The values of a polygon file, (H, W).

        Raises:
            InputError: the file is not a polygon file, or has a label that is not in `values`.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            image = Image.new("L", (content["imgWidth"], content["imgHeight"]), self.background)
            draw = ImageDraw.Draw(image)
            for entry in content["objects"]:
                corners = [(float(x), float(y)) for x, y in entry["polygon"]]
                if not entry.get("deleted") and len(corners) > 1:
                    draw.polygon(corners, fill=self._value(entry["label"], path))
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read as a polygon file: {type(error).__name__} {error}") from error
        return np.array(image)

    def _value(self, label: str, path: Path) -> int:
        for name in (label, label.removesuffix("group")):
            if name in self.values:
                return self.values[name]
        raise InputError(f"{path} has the label {label!r}; expected one of {', '.join(self.values)}.")
