"""The classes of labels: names, colours and ignored values (`LabelSpace`); by default those of Cityscapes."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rein.errors import InputError, one_line
from rein.files import read_text
from rein.heads.base import IGNORE_LABEL as IGNORE_LABEL

# The Cityscapes label definitions by train id (Cordts et al., CVPR 2016, arXiv 1604.01685).
CITYSCAPES_CLASSES: tuple[str, ...] = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)

CITYSCAPES_PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set's labels.

    Attributes:
        names: name of each class, by class index.
        palette: colour of each class, (red, green, blue) from 0 to 255.
        ignored: values in label files that are ignored, in addition to 255.

    Raises:
        InputError: there are no names or too many, names are equal, empty or not printable, or colours are missing.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= IGNORE_LABEL:
            raise InputError(f"{len(self.names)} class names given; expected 1 to {IGNORE_LABEL}.")
        if len(set(self.names)) < len(self.names) or not all(name.strip() and name.isprintable() for name in self.names):
            raise InputError(
                f"The class names are {one_line(', '.join(map(repr, self.names)))}; expected different, non-empty names of printable "
                "characters."
            )
        if len(self.palette) < len(self.names):
            raise InputError(
                f"The palette has {len(self.palette)} colours for {len(self.names)} classes; expected one per class."
            )


CITYSCAPES = LabelSpace(CITYSCAPES_CLASSES, CITYSCAPES_PALETTE)


def label_space(root: Path, names: Sequence[str] | None = None, ignored: Sequence[int] = ()) -> LabelSpace:
    """The classes of the labels below `root`. Arguments take precedence over `root/index.json`, which `read_index` describes.

    Args:
        root: folder of `index.json`.
        names: name of each class; None reads them from `index.json`.
        ignored: values in label files to ignore, in addition to 255; empty reads them from `index.json`.

    Raises:
        InputError: the class names are unknown, or `index.json` is not valid.
    """
    path = root / "index.json"
    index = read_index(root)
    if names is None:
        names = index.get("classes")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"The class names are unknown; expected a list of names 'classes' in {path}. Add the list, or set the option "
                "classes: `--option classes=NAME,NAME` for rein data check, `options: {classes: [NAME, NAME]}` in a configuration."
            )
    if not ignored:
        from_index = index.get("ignore_label_on_disk")
        ignored = from_index if isinstance(from_index, list) else [] if from_index is None else [from_index]
    if not all(is_integer(value, 65_535) for value in ignored):
        raise InputError(
            f"'ignore_label_on_disk' in {path} is {one_line(ignored)}; expected integers from 0 to 65535. Correct the file."
        )
    colours = index.get("palette") or colour_list(index.get("colors"), names) or []
    if not is_colours(colours):
        raise InputError(
            f"'palette' in {path} is not valid; expected a list of [red, green, blue], each from 0 to 255. Correct the file."
        )
    if len(colours) < len(names):
        colours = distinct_colours(len(names))
    return LabelSpace(tuple(names), tuple((red, green, blue) for red, green, blue in colours), tuple(ignored))


_INDEX_KEYS = ("classes", "palette", "ignore_label_on_disk", "values", "colors", "ignored_colors")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError if a key stands in it twice, of which the reader would ignore the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands in it twice")
        found[key] = value
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `index.json` in a folder; empty if there is no such file. The values are not checked here.

    `index.json` is an object with some of the keys `classes` (names), `palette` (colours in pictures), `ignore_label_on_disk`
    (values that are ignored in addition to 255), `values` (value on disk of each class), `colors` (colour on disk of each class)
    and `ignored_colors` (colours on disk that are ignored).

    Raises:
        InputError: the file cannot be read, is not a JSON object, or has another key.
    """
    path = folder / "index.json"
    try:
        index = json.loads(read_text(path, 1_000_000), object_pairs_hook=_without_duplicates)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {one_line(error)}. Expected a JSON object with a list 'classes'. Correct the file."
        ) from error
    if not isinstance(index, dict):
        raise InputError(
            f"{path} is a JSON {type(index).__name__}; expected a JSON object with a list 'classes'. Correct the file."
        )
    for key in index:
        if key not in _INDEX_KEYS:
            similar = get_close_matches(key.lower().replace("colour", "color"), _INDEX_KEYS, n=1)
            remedy = f"Did you mean {similar[0]!r}?" if similar else "Remove the key."
            raise InputError(
                f"unknown key {one_line(repr(key))} in {path}; expected {', '.join(map(repr, _INDEX_KEYS))}. {remedy}"
            )
    return index


def colour_list(colours: Any, names: Sequence[str]) -> list[Any] | None:
    """The colours of a mapping from class names, in the order of the classes; a list unchanged; None for None.

    Raises:
        InputError: the mapping's keys are not the class names.
    """
    if not isinstance(colours, Mapping):
        return colours
    wrong = [name for name in [*colours, *names] if name not in colours or name not in names]
    if wrong:
        raise InputError(
            f"'colors' has {one_line(', '.join(map(repr, colours)))}, the classes are {', '.join(map(repr, names))}; expected one "
            f"colour for each class. Correct {one_line(repr(wrong[0]))}."
        )
    return [colours[name] for name in names]


def is_colours(value: Any) -> bool:
    """Whether a value is a list of [red, green, blue], each an integer from 0 to 255."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(c, (list, tuple)) and len(c) == 3 and all(is_integer(channel, 255) for channel in c) for c in value
    )


def is_integer(value: Any, maximum: int) -> bool:
    """Whether a value is an integer from 0 to `maximum`."""
    return type(value) is int and 0 <= value <= maximum  # JSON's true is a bool, which is an int


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """`count` different colours: those of Cityscapes first, then hues a golden angle apart, so that neighbours differ clearly."""
    extra = (
        colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65, 0.55 + 0.4 * (i % 2)) for i in range(max(0, count - len(CITYSCAPES_PALETTE)))
    )
    return [*CITYSCAPES_PALETTE[:count], *((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in extra)]
