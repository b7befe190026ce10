"""Label encodings: how a label file is read, and how its values map to class indices."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rein.dgss.labels import IGNORE_LABEL, LabelSpace, colour_list, is_colours, is_integer
from rein.errors import InputError, one_line
from rein.extras import require
from rein.files import check_regular_file, read_text

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")  # Pillow would start a program for others, whatever the file's name
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_POLYGON_FILE, _MAX_SIDE, _MAX_COORDINATE = 2**24, 2**15, 1_000_000
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
_ONE_CHANNEL = ("L", "P", "I", "I;16", "1")


Colour = tuple[int, int, int]


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
        return self._to_classes(path, self.read(path))

    def _to_classes(self, path: Path, values: np.ndarray) -> np.ndarray:
        table, known = self._tables
        inside = (values >= 0) & (values < len(table))
        if not inside.all() or not known[values].all():
            wrong = [int(value) for value in np.unique(values) if not (0 <= value < len(table) and known[value])]
            raise InputError(f"{path} has label values {wrong[:8]}; {self._expected()}.")
        return table[values]

    def coding_of(self, path: Path) -> str:
        """How a label file encodes classes, in words, by its header alone."""
        return self.name

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
        return f"expected {classes} ({one_line(self.name)}) or {ignored} (ignored)"


def identity(space: LabelSpace, name: str | None = None, values: Sequence[int] | None = None) -> Encoding:
    """Encoding of label files that hold the class indices of `space`.

    Args:
        space: the classes; its `ignored` values are ignored.
        name: name of the encoding; None uses the class names.
        values: value on disk of each class; None means the class indices.

    Raises:
        InputError: `values` does not hold one different value per class, or a value is ignored, too.
    """
    on_disk = list(range(len(space.names))) if values is None else values
    valid = isinstance(on_disk, (list, tuple)) and all(is_integer(value, 65_535) for value in on_disk)
    if not valid or len(set(on_disk)) != len(space.names) or len(on_disk) != len(space.names):
        raise InputError(
            f"values is {one_line(repr(on_disk))}; expected one different number for each class of {', '.join(space.names)}."
        )
    both = sorted(set(on_disk) & set(space.ignored))
    if both:
        name = space.names[list(on_disk).index(both[0])]
        raise InputError(
            f"the label value {both[0]} is ignored and is also the value of the class {name!r}; expected one of both. Remove it from "
            "the ignored values, or set other values of the classes with values."
        )
    classes = dict.fromkeys(space.ignored, IGNORE_LABEL) | {value: index for index, value in enumerate(on_disk)}
    return Encoding(name or ", ".join(space.names), classes, read_values)


@dataclass(frozen=True)
class ClassNumbers(Encoding):
    """Encoding of a user's own label files: class numbers, or one value for each class, in files of several kinds.

    A file has one channel, equal colour channels, or a palette whose INDICES are the values.

    Attributes:
        palette: colour of each index in the files that were decoded so far.
    """

    palette: dict[int, Colour] = field(default_factory=dict, compare=False)

    def decode(self, path: Path) -> np.ndarray:
        """The class indices of a label file, (H, W) uint8.

        Raises:
            InputError: as for `Encoding`; or an index has another colour than in an earlier file, as after a conversion to a palette
                that was chosen for every image anew.
        """
        values = self.read(path)
        classes, colours = self._to_classes(path, values), _palette_of(path)
        if colours:
            for index in np.unique(values).tolist():
                colour = colours.get(index, (0, 0, 0))
                if self.palette.setdefault(index, colour) != colour:
                    raise InputError(
                        f"{path} has the colour {list(colour)} for index {index} of its palette, an earlier file had "
                        f"{list(self.palette[index])}; expected one palette for all files, since the indices are the classes. If the "
                        "colours are right, read them with 'colors'; if the indices are right, save the files with one channel."
                    )
        return classes

    def coding_of(self, path: Path) -> str:
        """The kind of the file, and its values."""
        mode, values = _mode_of(path), _ranges(value for value, index in self.classes.items() if index != IGNORE_LABEL)
        if mode == "P":
            return f"values {values}, the indices of a palette (its colours are not used)"
        return f"values {values} in {'one channel' if mode in _ONE_CHANNEL else 'equal channels'}"


def class_numbers(space: LabelSpace, values: Sequence[int] | None = None) -> ClassNumbers:
    """Encoding of a user's own label files. Arguments and errors are those of `identity`."""
    encoding = identity(space, values=values)
    white = 255 if encoding.classes.get(255, IGNORE_LABEL) != IGNORE_LABEL and 1 not in encoding.classes else 1
    return ClassNumbers(encoding.name, encoding.classes, partial(read_class_numbers, white=white))


@dataclass(frozen=True)
class Colours:
    """Encoding of label files that show each class in a colour: RGB files, paletted files (by their colours) and grey files.

    Attributes:
        names: name of each class.
        colours: (red, green, blue) -> class index, or 255 (ignored). Other colours in a file are errors.
    """

    names: tuple[str, ...]
    colours: Mapping[Colour, int]

    def decode(self, path: Path) -> np.ndarray:
        """The class indices of a label file, (H, W) uint8.

        Raises:
            InputError: the file cannot be read, or has a colour that is not in `colours`.
        """
        codes = _codes(read_rgb(path))
        known, classes = self._table
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        wrong = codes[known[places] != codes]
        if len(wrong):
            found, counts = np.unique(wrong, return_counts=True)
            code = int(found[counts.argmax()])
            raise InputError(
                f"{path} has {len(wrong)} pixels of {len(found)} colours that are not in the colour table, most of them of "
                f"{[code >> 16, code >> 8 & 255, code & 255]}; expected {self._expected()}. Add the colours to 'colors' or "
                "'ignored_colors', or correct the file; smoothed borders have such colours."
            )
        return classes[places]

    def coding_of(self, path: Path) -> str:
        """The kind of the file."""
        return f"colours of {'a palette' if _mode_of(path) == 'P' else 'the pixels'}, mapped by the colour table"

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted codes of the colours, and the class of each."""
        codes = _codes(np.array(list(self.colours), np.uint8))
        order = codes.argsort()
        return codes[order], np.array(list(self.colours.values()), np.uint8)[order]

    def _expected(self) -> str:
        names = [*(f"{list(colour)} ({self.names[k]})" for colour, k in self.colours.items() if k != IGNORE_LABEL)][:8]
        return ", ".join(names) + (f" and {len(self.colours) - len(names)} more" if len(self.colours) > len(names) else "")


def colour_table(names: Sequence[str], colours: Any, ignored: Any = None) -> Colours:
    """Encoding by colours.

    Args:
        names: name of each class.
        colours: [red, green, blue] of each class, or class name -> [red, green, blue].
        ignored: list of the colours that are ignored; None means none.

    Raises:
        InputError: the colours are not valid, or not one different colour for each class.
    """
    listed: Any = colour_list(colours, names)
    others = [] if ignored is None else ignored
    for name, value in (("colors", listed), ("ignored_colors", others)):
        if not is_colours(value):
            raise InputError(
                f"{name!r} is {one_line(repr(value))}; expected a list of [red, green, blue], each from 0 to 255. Correct the list."
            )
    pairs = [(tuple(colour), k) for k, colour in enumerate(listed)] + [(tuple(colour), IGNORE_LABEL) for colour in others]
    table = dict(pairs)
    if len(listed) != len(names) or len(table) != len(pairs):
        raise InputError(
            f"'colors' has {len(listed)} colours and 'ignored_colors' {len(others)}, of which {len(table)} differ; expected "
            f"{len(names)} colours, one for each class of {', '.join(names)}, and no colour twice. Correct the lists."
        )
    return Colours(tuple(names), table)


def _codes(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) int32, one number for each colour."""
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


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
        check_regular_file(path)
        _check_png(path)
        with Image.open(path, formats=_FORMATS) as image:
            image.load()  # keeps the pixels when the file is closed
    except Exception as error:  # each format has errors of its own
        raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from error
    return image


def _check_png(path: Path) -> None:
    """Raise ValueError unless the checksums of a PNG file are right; of other files, nothing. Pillow ignores those of the pixels."""
    with path.open("rb") as file:
        if file.read(8) != _PNG:
            return
        while len(start := file.read(8)) == 8:
            name, content = start[4:], file.read(int.from_bytes(start[:4], "big"))
            if name[:1].isupper() and zlib.crc32(name + content) != int.from_bytes(file.read(4), "big"):
                raise ValueError(f"the checksum of its part {name!r} is wrong")
            if name[:1].islower():
                file.read(4)  # an ancillary part, whose checksum Pillow and other readers ignore, too
            if name == b"IEND":
                return


def load_photograph(path: Path) -> Image.Image:
    """Open an image that Pillow converts to RGB without loss. A rotation in its EXIF data is not applied.

    Raises:
        InputError: the file cannot be read, or has more than 8 bits per channel.
    """
    image = load_image(path)
    _check_mode(path, image.mode)
    return image


def read_rgb(path: Path) -> np.ndarray:
    """Read an image, (H, W, 3) uint8. Otherwise as `load_photograph`."""
    return np.array(load_photograph(path).convert("RGB"))


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


def read_class_numbers(path: Path, white: int = 1) -> np.ndarray:
    """Read a user's own label: one channel, equal colour channels with or without transparency, or the indices of a palette.

    Pillow, like other readers, stretches grey values of 2 and 4 bits to 0..255, and keeps the upper half of colour channels of 16
    bits. Class numbers would be lost, so that such files are refused.

    Args:
        path: the label file.
        white: value of the white pixels of a file of 1 bit per pixel.

    Raises:
        InputError: the file cannot be read, its channels differ, or its number of bits does not hold class numbers.
    """
    image = load_image(path)
    depth, grey = _png_depth(path)
    if (grey and depth in (2, 4)) or (not grey and depth == 16):
        raise InputError(
            f"{path} has {'one grey channel' if grey else 'several channels'} of {depth} bits; expected class numbers in one channel "
            "of 8 or 16 bits. Convert the label."
        )
    if image.mode == "LA":
        return np.array(image)[..., 0]
    if image.mode not in ("RGB", "RGBA"):
        values = read_values(path)
        return values * np.uint8(white) if image.mode == "1" else values
    channels = np.array(image)[..., :3]
    if not (channels == channels[..., :1]).all():
        codes = np.unique(_codes(channels))
        shown = [[int(code) >> 16, int(code) >> 8 & 255, int(code) & 255] for code in codes[:4]]
        raise InputError(
            f"{path} has {len(codes)} colours, such as {', '.join(map(str, shown))}; expected class numbers in one channel or in "
            "equal channels. If the colours are classes, add a colour table to index.json, such as "
            '"colors": {"road": [128, 64, 128], ...}, or set the option colors.'
        )
    return channels[..., 0]


def png_header(path: Path) -> tuple[int, int, int, int] | None:
    """Width, height, bits per channel and colour type of a PNG file; None for other files. Reading such a file then raises."""
    try:
        with path.open("rb") as file:
            header = file.read(26)
    except OSError:
        return None
    if header[:8] != _PNG or len(header) < 26:
        return None
    width, height, depth, colour_type = struct.unpack(">IIBB", header[16:26])
    return width, height, depth, colour_type


def _png_depth(path: Path) -> tuple[int, bool]:
    """Bits per channel of a file, 8 if it is not a PNG, and whether it has one grey channel."""
    _, _, depth, colour_type = png_header(path) or (0, 0, 8, 0)
    return depth, colour_type == 0


def _mode_of(path: Path) -> str:
    """Pillow's mode of an image, by its header alone; empty if it cannot be read."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.mode
    except Exception:  # each format has errors of its own
        return ""


def _palette_of(path: Path) -> dict[int, Colour]:
    """The colour of each index of a file with a palette, by its header alone; empty for other files."""
    with Image.open(path, formats=_FORMATS) as image:
        if image.mode != "P":
            return {}
        colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3).tolist()
    return {index: (red, green, blue) for index, (red, green, blue) in enumerate(colours)}


def read_first_of_three_16_bit(path: Path) -> np.ndarray:
    """Read the first channel of a PNG with three channels of 16 bits.

    OpenCV reads the file: Pillow keeps the upper 8 bits only, and these are zero in SYNTHIA's labels.

    Raises:
        InputError: the file cannot be read, or has other channels.
        MissingExtraError: OpenCV is not installed.
    """
    cv2 = require("cv2", "data")
    load_image(path)  # raises the same error for a damaged file as other data sets
    try:
        pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error) as error:
        raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from error
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
            content = json.loads(read_text(path, _MAX_POLYGON_FILE))
            size = content["imgWidth"], content["imgHeight"]
            if not all(is_integer(side, _MAX_SIDE) and side for side in size):
                raise ValueError(f"imgWidth and imgHeight are {size}; expected integers from 1 to {_MAX_SIDE}")
            image = Image.new("L", size, self.background)
            draw = ImageDraw.Draw(image)
            for entry in content["objects"]:
                corners = [(float(x), float(y)) for x, y in entry["polygon"]]
                if not all(abs(number) < _MAX_COORDINATE for corner in corners for number in corner):
                    raise ValueError(f"a corner is further than {_MAX_COORDINATE:,} pixels away")
                if not entry.get("deleted") and len(corners) > 1:
                    draw.polygon(corners, fill=self._value(entry["label"], path))
        except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} cannot be read as a polygon file: {type(error).__name__} {one_line(error)}. Expected the keys imgWidth, "
                "imgHeight and objects, each with label and polygon. Restore the file."
            ) from error
        return np.array(image)

    def _value(self, label: str, path: Path) -> int:
        for name in (label, label.removesuffix("group")):
            if name in self.values:
                return self.values[name]
        raise InputError(f"{path} has the label {one_line(repr(label))}; expected one of {', '.join(self.values)}.")
