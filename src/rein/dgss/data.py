"""Labelled images by domain: generated street scenes, and folders `<domain>/images/*`, `<domain>/labels/*.png`.

A data set gives uint8 tensors: an image (3, H, W) and a label (H, W) with 255 where nothing counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rein.dgss import scenes
from rein.dgss.classes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, IGNORE_LABEL
from rein.errors import InputError

Sample = tuple[Tensor, Tensor]
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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


class Scenes(Dataset[Sample]):
    """Generated street scenes of one domain (see `rein.dgss.scenes`), rendered once and kept.

    Args:
        domain: one of `scenes.DOMAINS`.
        seeds: one scene each.
        size: (height, width) in pixels.
        progress: wraps the seeds while they are rendered, as `tqdm` does.
    """

    def __init__(
        self,
        domain: str,
        seeds: Sequence[int],
        size: tuple[int, int],
        progress: Callable[[Sequence[int]], Any] = lambda seeds: seeds,
    ) -> None:
        rendered = [scenes.render(seed, domain, size) for seed in progress(seeds)]
        self._samples = [(torch.from_numpy(s.image).permute(2, 0, 1), torch.from_numpy(s.label)) for s in rendered]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class Folder(Dataset[Sample]):
    """One domain on disk: `root/images/*` and, for each image, `root/labels/<same name>.png`.

    Images have 8 bits per channel and are taken as stored: a rotation in their EXIF data is not applied. Hidden files are passed
    over. Labels are single-channel PNG files whose pixels are class numbers. Every file is opened once when the data set is made, so
    that a bad one is found before hours of training and not after.

    Args:
        root: the domain's folder.
        space: what the numbers mean.
        indices: use only these pairs, in the order of the sorted file names; None uses all.

    Raises:
        InputError: a folder or a file is missing or unreadable, sizes differ, or a label is out of range. The message names it.
    """

    def __init__(self, root: Path, space: LabelSpace) -> None:
        self.space = space
        self.pairs = _pairs(root)
        for image, label in self.pairs:
            self._check(image, label)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.pairs[index]
        pixels = np.array(_open(image).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(self._read_label(label))

    def _check(self, image: Path, label: Path) -> None:
        opened, labels = _open(image), self._read_label(label)
        size = opened.size
        if opened.mode not in _EIGHT_BIT:
            raise InputError(f"{image} is a picture of mode {opened.mode}; images must have 8 bits per channel.")
        if min(size) < 16 or max(size) > 8 * min(size):
            raise InputError(
                f"{image} is {size[0]} x {size[1]} pixels; wanted at least 16 each way, and sides of at most 8 to 1."
            )
        if size != labels.shape[::-1]:
            raise InputError(
                f"{image} is {size[0]} x {size[1]} pixels, its label {label} is {labels.shape[1]} x {labels.shape[0]}; "
                "they must be equal."
            )

    def _read_label(self, path: Path) -> np.ndarray:
        file = _open(path)
        if file.mode not in ("L", "P", "I", "I;16", "1"):
            raise InputError(f"{path} is a picture of mode {file.mode}; labels must have one channel of class numbers.")
        numbers = np.array(file).astype(np.int64)
        numbers[np.isin(numbers, (*self.space.ignored, IGNORE_LABEL))] = IGNORE_LABEL
        wrong = np.unique(numbers[(numbers != IGNORE_LABEL) & ((numbers < 0) | (numbers >= len(self.space.names)))])
        if len(wrong):
            raise InputError(
                f"{path} has labels {wrong[:8].tolist()}; wanted 0 to {len(self.space.names) - 1} "
                f"({', '.join(self.space.names)}) or {', '.join(map(str, (*self.space.ignored, IGNORE_LABEL)))} for nothing."
            )
        return numbers.astype(np.uint8)


def find_domains(root: Path) -> list[str]:
    """The domains below `root`, sorted: folders with an `images` folder inside.

    Raises:
        InputError: `root` is no folder, or there are no domains in it.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; --data wants one with <domain>/images/* and <domain>/labels/*.png inside.")
    domains = sorted(entry.name for entry in root.iterdir() if (entry / "images").is_dir() and not entry.name.startswith("."))
    if not domains:
        raise InputError(f"{root} has no domains; wanted <domain>/images/* and <domain>/labels/*.png in it.")
    return domains


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
    import colorsys

    extra = (
        colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65, 0.55 + 0.4 * (i % 2)) for i in range(max(0, count - len(CITYSCAPES_PALETTE)))
    )
    return [*CITYSCAPES_PALETTE[:count], *((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in extra)]


def _pairs(root: Path) -> list[tuple[Path, Path]]:
    folder = root / "images"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a domain wants images/* and labels/*.png.")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    if not images:
        raise InputError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)}).")
    twice = [image.stem for image, other in pairwise(images) if image.stem == other.stem]
    if twice:
        raise InputError(f"{folder} has more than one image called {twice[0]!r}; they would share one label.")
    labels = {path.stem: path for path in sorted((root / "labels").glob("*")) if path.suffix.lower() == ".png"}
    for image in images:
        if image.stem not in labels:
            raise InputError(f"{image} has no label; wanted {root / 'labels' / image.stem}.png.")
    return [(image, labels[image.stem]) for image in images]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()  # the pixels stay when the file is closed
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    return image
