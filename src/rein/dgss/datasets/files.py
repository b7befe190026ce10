"""Data sets that lie in folders: where images and labels lie, how one finds the other, and the pairs that come of it.

Opening lists the folders and asks for a label of every image; the files are read when they are needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rein.dgss.classes import IGNORE_LABEL
from rein.dgss.data import Pairs, Sample
from rein.dgss.datasets.encodings import Encoding, check_rgb, read_rgb
from rein.dgss.labels import LabelSpace
from rein.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
NO_LABEL = "no label"  # how a reason in `left_out` starts where the label is what is missing


@dataclass(frozen=True)
class Layout:
    """One folder of images and the folder of their labels, below the data set's root.

    Attributes:
        images: the folder of images; `{split}` stands for the split.
        image_names: what their names look like, with `{}` for what differs, as `{}_leftImg8bit.png`.
        labels: the folder of labels.
        label_name: what a label is called.
        encoding: how it encodes classes.
        deep: images may lie in folders of that folder; the labels then lie in folders of the same name.
        prefix: stands before the image's name in `Pairs.name_of`.
    """

    images: str
    image_names: tuple[str, ...]
    labels: str
    label_name: str
    encoding: Encoding
    deep: bool = True
    prefix: str = ""


@dataclass(frozen=True)
class _Found:
    name: str
    image: Path
    label: Path  # wanted; it may be missing
    missing: bool
    encoding: Encoding


class Images(Dataset[Tensor]):
    """Images without labels, to predict: those of a folder and of the folders in it, sorted by name, or one file.

    Args:
        path: the folder or the file.

    Attributes:
        paths: where they lie.

    Raises:
        InputError: there are no images.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.root = path if path.is_dir() else path.parent
        if not path.exists():
            raise InputError(f"{path} does not exist; wanted a folder of images, or one.")
        inside = sorted(_files(path, deep=True)) if path.is_dir() else [path.name]
        self.paths = [self.root / name for name in inside if name.lower().endswith(IMAGE_SUFFIXES)]
        if not self.paths:
            raise InputError(f"{path} has no images; wanted files that end in {', '.join(IMAGE_SUFFIXES)}.")
        self._stems = Counter(path.relative_to(self.root).with_suffix("") for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """The image (3, H, W) uint8."""
        return self.read_image(index)

    def read_image(self, index: int) -> Tensor:
        """The image (3, H, W) uint8."""
        return torch.from_numpy(read_rgb(self.paths[index])).permute(2, 0, 1)

    def check(self) -> None:
        """Look at the head of every file, before hours of predicting.

        Raises:
            InputError: some are no images that can be used; the message names the first.
        """
        wrong = []
        for path in self.paths:
            try:
                check_rgb(path)
            except InputError as error:
                wrong.append(str(error))
        if wrong:
            more = f" ({len(wrong)} such files of {len(self.paths)})" if len(wrong) > 1 else ""
            raise InputError(f"{wrong[0]}{more}")

    def name_of(self, index: int) -> str:
        """Its path below the folder, without the suffix where no other image differs by that alone."""
        path = self.paths[index].relative_to(self.root)
        stem = path.with_suffix("")
        return (stem if self._stems[stem] == 1 else path).as_posix()


class Files(Pairs):
    """Images and labels in folders.

    Args:
        root: the data set's folder, as its publisher packs it.
        split: stands for `{split}` in the layouts.
        ways: each way is one or more layouts whose images are used together. The first way whose labels are there is taken.
        space: what the class numbers mean.
        labels: False opens the images alone; every label is then 255.
        tolerant: leave images without a label out, and say so in `left_out`, rather than to refuse them.

    Raises:
        InputError: there are no images, or an image has no label. The message names the folder or the file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        ways: Sequence[Sequence[Layout]],
        space: LabelSpace,
        labels: bool = True,
        tolerant: bool = False,
    ) -> None:
        self.space = space
        self.left_out = {}
        found = _find(root, split, ways)
        missing = [entry for entry in found if entry.missing] if labels else []
        if missing and (not tolerant or len(missing) == len(found)):
            raise InputError(
                f"{missing[0].image} has no label; wanted {missing[0].label}. To open images without labels, say labels=false."
            )
        self.left_out = {entry.image: f"{NO_LABEL}; wanted {entry.label}" for entry in missing}
        used = [entry for entry in found if not (labels and entry.missing)]
        self.pairs = [(entry.image, entry.label if labels else None) for entry in used]
        self._names = [entry.name for entry in used]
        self._encodings = [entry.encoding for entry in used]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image = self.read_image(index)
        path, label_path = self.pairs[index]
        if label_path is None:
            return image, torch.full(image.shape[1:], IGNORE_LABEL, dtype=torch.uint8)
        label = torch.from_numpy(self._encodings[index].decode(label_path))
        if label.shape != image.shape[1:]:
            raise InputError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, its label {label_path} is {label.shape[1]} x "
                f"{label.shape[0]}; they must be equal."
            )
        return image, label

    def read_image(self, index: int) -> Tensor:
        """The image alone, (3, H, W) uint8."""
        return torch.from_numpy(read_rgb(self.pairs[index][0])).permute(2, 0, 1)

    def name_of(self, index: int) -> str:
        """Its path below the folder of images, without what the publisher adds to every name."""
        return self._names[index]

    def leave_out(self, reasons: dict[Path, str]) -> None:
        """Use these images no more, and say why in `left_out`."""
        self.left_out = self.left_out | reasons
        self.keep({image for image, _ in self.pairs} - reasons.keys())

    def keep(self, images: Collection[Path]) -> None:
        """Use these images only."""
        kept = [i for i, (image, _) in enumerate(self.pairs) if image in images]
        self.pairs = [self.pairs[i] for i in kept]
        self._names = [self._names[i] for i in kept]
        self._encodings = [self._encodings[i] for i in kept]


def _find(root: Path, split: str, ways: Sequence[Sequence[Layout]]) -> list[_Found]:
    """Every image, by the first way that has labels, else by the first that has images."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder.")
    without_labels: list[_Found] = []
    for way in ways:
        found = [entry for layout in way for entry in _find_layout(root, split, layout)]
        if any(not entry.missing for entry in found):
            return found
        without_labels = without_labels or found
    if without_labels:
        return without_labels
    places = dict.fromkeys(str(root / layout.images.format(split=split)) for way in ways for layout in way)
    names = dict.fromkeys(name.replace("{}", "*") for way in ways for layout in way for name in layout.image_names)
    raise InputError(f"{' or '.join(places)} has no images; wanted {', '.join(names)}.")


def _find_layout(root: Path, split: str, layout: Layout) -> Iterator[_Found]:
    images, labels = (root / folder.format(split=split) for folder in (layout.images, layout.labels))
    present = {_with_small_suffix(path): path for path in _files(labels, layout.deep)} if images.is_dir() else {}
    kinds = [name.split("{}") for name in layout.image_names]
    seen: dict[str, str] = {}
    for path in sorted(_files(images, layout.deep)):
        folder, name = os.path.split(path)
        for before, after in kinds:
            if name.startswith(before) and name.lower().endswith(after.lower()) and len(name) > len(before) + len(after):
                stem = name[len(before) : len(name) - len(after)]
                key = os.path.join(folder, stem).replace(os.sep, "/")
                if key in seen:
                    raise InputError(f"{images} has more than one image called {key!r}; they would share one label.")
                seen[key] = path
                label = os.path.join(folder, layout.label_name.format(stem))
                there = labels / present.get(label, label)
                yield _Found(layout.prefix + key, images / path, there, label not in present, layout.encoding)
                break


def _files(folder: Path, deep: bool) -> Iterator[str]:
    """The files below a folder, relative to it; hidden ones are passed over."""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        inside = os.path.relpath(where, folder)
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


def _with_small_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem + suffix.lower()
