"""Data sets on disk: folder layouts, images with labels (`Files`) and images without labels (`Images`).

Opening a data set lists its folders and matches every image with its label. Files are read on access.
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

from rein.dgss.data.datasets.encodings import Colours, Encoding, read_rgb
from rein.dgss.data.pairs import Pairs, Sample
from rein.dgss.data.resampling import resize_label
from rein.dgss.labels import IGNORE_LABEL, LabelSpace
from rein.errors import InputError
from rein.files import describe_missing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
NO_LABEL = "no label"  # start of the reason in `left_out` for an image whose label is missing


@dataclass(frozen=True)
class Layout:
    """One folder of images and the folder of their labels, below the data set's root.

    Attributes:
        images: the folder of images; `{split}` is replaced by the split.
        image_names: patterns of image names; `{}` matches the stem, as in `{}_leftImg8bit.png`.
        labels: the folder of labels; `{split}` is replaced by the split.
        label_name: pattern of the label's name; `{}` is replaced by the stem.
        encoding: how labels encode classes.
        recursive: search subfolders too. The label is in the subfolder of the same name.
        prefix: start of the image's name in `Pairs.name_of`.
    """

    images: str
    image_names: tuple[str, ...]
    labels: str
    label_name: str
    encoding: Encoding | Colours
    recursive: bool = True
    prefix: str = ""


@dataclass(frozen=True)
class _Found:
    name: str
    image: Path
    label: Path  # the expected path
    missing: bool  # the label does not exist
    encoding: Encoding | Colours


class Images(Dataset[Tensor]):
    """Images without labels, for prediction.

    Args:
        path: an image file, or a folder whose images, including those in subfolders, are used in the order of their names.
        paths: the images below the folder to use; None uses all.

    Attributes:
        paths: path of each image.

    Raises:
        InputError: `path` does not exist or has no images.
    """

    def __init__(self, path: str | Path, paths: Sequence[Path] | None = None) -> None:
        path = Path(path)
        self.root = path if path.is_dir() else path.parent
        if not path.exists():
            raise InputError(f"{describe_missing(path)}; expected a folder of images or an image file. Check the path.")
        if paths is None:
            inside = sorted(walk(path, recursive=True)) if path.is_dir() else [path.name]
            paths = [self.root / name for name in inside if name.lower().endswith(IMAGE_SUFFIXES)]
        self.paths = list(paths)
        if not self.paths:
            raise InputError(f"{path} has no images; expected files that end in {', '.join(IMAGE_SUFFIXES)}.")
        self._names = short_names([path.relative_to(self.root) for path in self.paths])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """The image, (3, H, W) uint8."""
        return self.read_image(index)

    def read_image(self, index: int) -> Tensor:
        """The image, (3, H, W) uint8."""
        return torch.from_numpy(read_rgb(self.paths[index])).permute(2, 0, 1)

    def name_of(self, index: int) -> str:
        """The image's path below the folder, without its suffix unless another image would then have the same name."""
        return self._names[index]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Different names for the paths, without suffixes where possible."""
    names = [path.with_suffix("").as_posix() for path in paths]
    while len(set(names)) < len(names):  # `0.jpg.jpg` without its suffix may be the whole name of another one
        counts = Counter(names)
        names = [path.as_posix() if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)]
    return names


class Files(Pairs):
    """Images and labels in folders.

    Args:
        root: folder of the data set, in its publisher's layout.
        split: replaces `{split}` in the layouts.
        layouts: alternatives; each alternative is one or more layouts whose images are used together. The first alternative with
            labels is used.
        space: the classes of the labels.
        labels: False opens images only; every label is filled with 255.
        skip_unlabelled: list images without a label in `left_out` instead of raising.

    Attributes:
        resize_labels: resize labels of another size than their image to it, to the nearest pixel, instead of raising.
        resized: labels that were read and resized so far in this process.

    Raises:
        InputError: there are no images, or an image has no label. The message names the folder or the file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        layouts: Sequence[Sequence[Layout]],
        space: LabelSpace,
        labels: bool = True,
        skip_unlabelled: bool = False,
    ) -> None:
        self.space = space
        self.resize_labels = False
        self.resized: set[Path] = set()
        found, unused = _find(root, split, layouts)
        self.unused_labels = unused if labels else []
        missing = [entry for entry in found if entry.missing] if labels else []
        if missing and (not skip_unlabelled or len(missing) == len(found)):
            folder = missing[0].label.parent
            note = "" if folder.is_dir() else f" {describe_missing(folder)}."
            raise InputError(
                f"{missing[0].image} has no label; expected {missing[0].label}.{note} To open images without labels, set "
                "labels=false."
            )
        self.left_out = {entry.image: f"{NO_LABEL}; expected {entry.label}" for entry in missing}
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
        label = self.read_label(index)
        if label.shape != image.shape[1:] and self.resize_labels:
            self.resized.add(label_path)
            label = resize_label(label, (image.shape[1], image.shape[2]))
        if label.shape != image.shape[1:]:
            raise InputError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels and its label {label_path} is {label.shape[1]} x "
                f"{label.shape[0]}; expected equal sizes."
            )
        return image, label

    def read_image(self, index: int) -> Tensor:
        """The image without its label, (3, H, W) uint8."""
        return torch.from_numpy(read_rgb(self.pairs[index][0])).permute(2, 0, 1)

    def read_label(self, index: int) -> Tensor:
        """The label without its image, (H, W) uint8."""
        label_path = self.pairs[index][1]
        return self[index][1] if label_path is None else torch.from_numpy(self._encodings[index].decode(label_path))

    def coding_of(self, index: int) -> str:
        """How the label encodes classes, in words, by the header of its file alone."""
        label_path = self.pairs[index][1]
        return "no labels" if label_path is None else self._encodings[index].coding_of(label_path)

    def name_of(self, index: int) -> str:
        """The image's path below the folder of images, without the prefix and suffix that all names share."""
        return self._names[index]

    def leave_out(self, reasons: dict[Path, str]) -> None:
        """Remove images and add their reasons to `left_out`."""
        self.left_out = self.left_out | reasons
        self.keep({image for image, _ in self.pairs} - reasons.keys())

    def keep(self, images: Collection[Path]) -> None:
        """Remove all other images."""
        kept = [i for i, (image, _) in enumerate(self.pairs) if image in images]
        self.pairs = [self.pairs[i] for i in kept]
        self._names = [self._names[i] for i in kept]
        self._encodings = [self._encodings[i] for i in kept]


def _find(root: Path, split: str, layouts: Sequence[Sequence[Layout]]) -> tuple[list[_Found], list[Path]]:
    """The images of the first alternative with labels, else of the first alternative with images; and labels without an image."""
    if not root.is_dir():
        raise InputError(f"{describe_missing(root)}; expected the folder of the data set. Check the path.")
    without_labels: list[_Found] = []
    for alternative in layouts:
        unused: list[Path] = []
        found = [entry for layout in alternative for entry in _find_layout(root, split, layout, unused)]
        if any(not entry.missing for entry in found):
            return found, unused
        without_labels = without_labels or found
    if without_labels:
        return without_labels, []
    every = [layout for alternative in layouts for layout in alternative]
    folders = dict.fromkeys(str(root / layout.images.format(split=split)) for layout in every)
    names = dict.fromkeys(name.replace("{}", "*") for layout in every for name in layout.image_names)
    first = Path(next(iter(folders)))
    note = "" if any(Path(folder).is_dir() for folder in folders) else f" {describe_missing(first)}."
    raise InputError(f"{' or '.join(folders)} has no images; expected {', '.join(names)}.{note}")


def _find_layout(root: Path, split: str, layout: Layout, unused: list[Path]) -> Iterator[_Found]:
    """The images of one layout. Labels without an image are added to `unused` after the last image."""
    images, labels = (root / folder.format(split=split) for folder in (layout.images, layout.labels))
    present = {_lower_suffix(path): path for path in walk(labels, layout.recursive)} if images.is_dir() else {}
    patterns = [name.split("{}") for name in layout.image_names]
    seen: dict[str, str] = {}
    used = set[str]()
    for path in sorted(walk(images, layout.recursive)):
        folder, name = os.path.split(path)
        for before, after in patterns:
            if name.startswith(before) and name.lower().endswith(after.lower()) and len(name) > len(before) + len(after):
                stem = name[len(before) : len(name) - len(after)]
                key = os.path.join(folder, stem).replace(os.sep, "/")
                if key in seen:
                    raise InputError(
                        f"{images} has several images named {key!r}, for one label; expected one. Rename or remove the others."
                    )
                seen[key] = path
                label = os.path.join(folder, layout.label_name.format(stem))
                label_path = labels / present.get(label, label)
                used.add(label)
                yield _Found(layout.prefix + key, images / path, label_path, label not in present, layout.encoding)
                break
    before, after = layout.label_name.split("{}")
    names = ((label, os.path.basename(label)) for label in present.keys() - used)
    unused += sorted(labels / present[label] for label, name in names if name.startswith(before) and name.endswith(after))


def walk(folder: Path, recursive: bool) -> Iterator[str]:
    """Paths of the files in a folder, relative to it, without hidden files and folders. A link to a folder is followed once."""
    seen = {os.path.realpath(folder)}
    for current, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        real = {name: os.path.realpath(os.path.join(current, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen.update(real.values())
        inside = os.path.relpath(current, folder)
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else os.path.join(inside, name)


def _lower_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem + suffix.lower()
