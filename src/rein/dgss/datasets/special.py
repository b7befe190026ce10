"""Data sets that need a word more than where their files lie."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rein.dgss.data import Pairs
from rein.dgss.datasets import maps
from rein.dgss.datasets.corruptions import Corrupted
from rein.dgss.datasets.encodings import Encoding, identity, read_numbers
from rein.dgss.datasets.files import IMAGE_SUFFIXES, Files, Layout
from rein.dgss.datasets.generated import Scenes, scene_seeds
from rein.dgss.datasets.row import Asked, Row
from rein.dgss.labels import LabelSpace, label_space
from rein.errors import InputError
from rein.extras import require

CONDITIONS = ("fog", "night", "rain", "snow")


def open_gtav(row: Row, asked: Asked) -> Files:
    """All images, or those that the publisher's split.mat names for the split; without pairs of unequal sizes."""
    split_file = asked.options["split_file"]
    if split_file is None and asked.split != "train":
        raise InputError(
            f"gtav has the split {asked.split!r} only by its publisher's split.mat; give split_file=split.mat, or take train, "
            "which is every image."
        )
    data = row.files(asked)
    if split_file is not None:
        numbers = _split_numbers(asked.root / split_file, asked.split)
        data.keep({image for image, _ in data.pairs if _number(image) in numbers})
    if asked.options["skip_misfits"] and asked.labels:
        with ThreadPoolExecutor(16) as pool:  # 50,000 heads of files: seconds, where the pictures themselves take an hour
            sizes = list(pool.map(_sizes, data.pairs))
        data.leave_out(
            {
                image: f"{size[0]} x {size[1]} pixels, its label {other[0]} x {other[1]}"
                for (image, _), (size, other) in zip(data.pairs, sizes, strict=True)
                if size and other and size != other
            }
        )
    return data


def _split_numbers(path: Path, split: str) -> set[int]:
    loadmat = require("scipy.io", "data").loadmat
    try:
        return {int(number) for number in loadmat(path)[f"{split}Ids"].ravel()}
    except Exception as error:  # scipy raises kinds of its own
        raise InputError(f"{path} cannot be read as the publisher's split.mat: {type(error).__name__} {error}") from error


def _number(image: Path) -> int:
    return int(image.stem) if image.stem.isdecimal() else -1


def _sizes(pair: tuple[Path, Path | None]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    image, label = pair
    return _png_size(image), _png_size(label) if label else None


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height by the file's head; None where it has none, which is said when it is read."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return None
    return struct.unpack(">II", head[16:24]) if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 24 else None


_MAPILLARY_FOLDERS = {"train": ("training", "train"), "val": ("validation", "val"), "test": ("testing", "test")}
# version -> where labels lie below a split, what describes them, and the numbers where that is not there
_MAPILLARY_VERSIONS = {
    "v1.2": ("v1.2/labels", "config_v1.2.json", maps.MAPILLARY_V1),
    "v2.0": ("v2.0/labels", "config_v2.0.json", maps.MAPILLARY_V2),
    "v1.1": ("labels", "config.json", maps.MAPILLARY_V1),
}


def open_mapillary(row: Row, asked: Asked) -> Files:
    """The labels of one version, mapped by the names in its config file."""
    asked_version = asked.options["version"]
    versions = [asked_version] if asked_version else list(_MAPILLARY_VERSIONS)
    ways = []
    for version in versions:
        labels, config, numbers = _MAPILLARY_VERSIONS[version]
        classes = _mapillary_classes(asked.root / config) or numbers
        encoding = Encoding(f"Mapillary Vistas {version}", classes, read_numbers)
        for folder in _MAPILLARY_FOLDERS[asked.split]:
            ways.append((Layout(f"{folder}/images", ("{}.jpg",), f"{folder}/{labels}", "{}.png", encoding, deep=False),))
    return row.files(asked, ways)


def _mapillary_classes(config: Path) -> dict[int, int] | None:
    if not config.exists():
        return None
    try:
        names = [label["name"] for label in json.loads(config.read_text(encoding="utf-8"))["labels"]]
        return {number: maps.mapillary_class(name) for number, name in enumerate(names)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{config} cannot be read as a config file of Mapillary Vistas: {type(error).__name__} {error}"
        ) from error


def open_acdc(row: Row, asked: Asked) -> Files:
    """All conditions, or one."""
    condition = asked.options["condition"]
    return row.files(asked, [[way for way in ways if condition in (None, way.prefix.rstrip("/"))] for ways in row.ways])


def open_corrupted(row: Row, asked: Asked) -> Corrupted:
    """Cityscapes under one corruption."""
    kind, severity = asked.options["kind"], asked.options["severity"]
    for name, value in (("kind", kind), ("severity", severity)):
        if value is None:
            choices = ", ".join(map(str, row.options[name].choices or ()))
            raise InputError(f"{row.name} wants {name}=, one of {choices}.")
    return Corrupted(row.files(asked), kind, severity)


def open_folder(row: Row, asked: Asked) -> Files:
    """`images` and `labels` in the folder, or in the folder below that the split names."""
    domain = _domain(asked)
    if domain == asked.root and asked.split != "train":
        raise InputError(f"{domain} has no folder {asked.split!r} with images in it; it is one set, which is called train.")
    if not (domain / "images").is_dir():
        splits = sorted(path.parent.name for path in asked.root.glob("*/images"))
        there = f"; {asked.root} has the splits {', '.join(splits)}" if splits else ""
        raise InputError(f"{domain / 'images'} is not a folder; a domain wants images/* and labels/*.png{there}.")
    space = space_of_folder(asked)
    names = tuple(f"{{}}{suffix}" for suffix in IMAGE_SUFFIXES)
    layout = Layout("images", names, "labels", "{}.png", identity(space, values=asked.options["values"]), deep=False)
    return Files(domain, asked.split, [[layout]], space, asked.labels, asked.tolerant)


def space_of_folder(asked: Asked) -> LabelSpace:
    """What the labels mean: as it was asked, else by the index.json of the folder, else of the one above."""
    options = asked.options
    if options["space"] is not None:
        space: LabelSpace = options["space"]
        return space
    domain = _domain(asked)
    place = domain if (domain / "index.json").exists() else domain.parent
    if not asked.labels and options["classes"] is None and not (place / "index.json").exists():
        return LabelSpace(("anything",), ((128, 128, 128),))  # there are no labels to ask about
    return label_space(place, options["classes"], tuple(options["ignored"]))


def _domain(asked: Asked) -> Path:
    below = asked.root / asked.split
    return below if (below / "images").is_dir() or not (asked.root / "images").is_dir() else asked.root


def open_scenes(row: Row, asked: Asked) -> Pairs:
    """Generated scenes; they are rendered when they are first read."""
    options = asked.options
    return Scenes(options["domain"], scene_seeds(asked.split, options["count"], options["seed"]), tuple(options["size"]))
