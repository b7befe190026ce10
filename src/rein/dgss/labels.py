"""What the numbers in a label mean: names, colours, and the numbers that count for nothing."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rein.dgss.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, IGNORE_LABEL
from rein.errors import InputError


@dataclass(frozen=True)
class LabelSpace:
    """What the numbers in the labels mean.

    Attributes:
        names: class k is called `names[k]`.
        palette: its colour, (red, green, blue) from 0 to 255.
        ignored: numbers on disk that count for nothing, besides 255.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= IGNORE_LABEL:
            raise InputError(f"{len(self.names)} class names were given; there must be 1 to {IGNORE_LABEL}.")
        if len(set(self.names)) < len(self.names) or not all(self.names):
            raise InputError(f"class names must differ and must not be empty; got {', '.join(map(repr, self.names))}.")
        if len(self.palette) < len(self.names):
            raise InputError(f"the palette has {len(self.palette)} colours for {len(self.names)} classes.")


CITYSCAPES = LabelSpace(CITYSCAPES_CLASSES, CITYSCAPES_PALETTE)


def label_space(root: Path, names: Sequence[str] | None = None, ignored: Sequence[int] = ()) -> LabelSpace:
    """What the labels below `root` mean: from the arguments, else from `root/index.json`.

    `index.json` may have `classes` (a list of names, needed), `palette` (a list of [red, green, blue]) and
    `ignore_label_on_disk` (a number or a list).

    Raises:
        InputError: neither says what the classes are, or `index.json` cannot be read.
    """
    path = root / "index.json"
    index: dict[str, Any] = {}
    if path.exists():
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(index, dict):
            raise InputError(f"{path} cannot be read: it must be an object with a list 'classes'.")
    if names is None:
        names = index.get("classes")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"the class names are not known: give --classes road,car,... or a list of names 'classes' in {path}."
            )
    if not ignored:
        from_index = index.get("ignore_label_on_disk")
        ignored = from_index if isinstance(from_index, list) else [] if from_index is None else [from_index]
    if not all(_is_number(number, 65_535) for number in ignored):
        raise InputError(f"'ignore_label_on_disk' in {path} is {ignored}; wanted whole numbers from 0 to 65535.")
    palette = index.get("palette") or []
    colours = palette if isinstance(palette, list) else [palette]
    if not all(isinstance(c, list) and len(c) == 3 and all(_is_number(part, 255) for part in c) for c in colours):
        raise InputError(f"'palette' in {path} is not a list of [red, green, blue] from 0 to 255.")
    if len(colours) < len(names):
        colours = distinct_colours(len(names))
    return LabelSpace(tuple(names), tuple((red, green, blue) for red, green, blue in colours), tuple(ignored))


def _is_number(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ well from neighbour to neighbour: Cityscapes' own, then golden-angle hues."""
    extra = (
        colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65, 0.55 + 0.4 * (i % 2)) for i in range(max(0, count - len(CITYSCAPES_PALETTE)))
    )
    return [*CITYSCAPES_PALETTE[:count], *((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in extra)]
