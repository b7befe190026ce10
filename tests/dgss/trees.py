"""Synthetic data sets on disk, in the layout and encoding of every data set that can be opened by name.

`make(name, path)` writes one and returns the class indices that the files encode.
"""

import json
import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from rein.dgss.labels import CITYSCAPES_PALETTE

NAMES = (
    "gtav",
    "synthia",
    "urbansyn",
    "cityscapes",
    "bdd100k",
    "mapillary",
    "acdc",
    "cityscapes-c",
    "idd",
    "camvid",
    "folder",
    "scenes",
)
# train id -> value on disk
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SYNTHIA = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)
MAPILLARY_V1 = (13, 2, 17, 6, 3, 45, 48, 50, 30, 29, 27, 19, 20, 55, 61, 54, 58, 57, 52)
MAPILLARY_V2 = (21, 24, 27, 12, 5, 85, 91, 101, 64, 63, 61, 30, 32, 108, 114, 107, 111, 110, 105)
IDD = (0, 3, 29, 20, 21, 26, 25, 24, 32, 5, 33, 6, 8, 12, 13, 14, 17, 9, 10)
IDD_NAMES = [
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "non-drivable fallback",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
]
IGNORED = 255


@dataclass
class Tree:
    """A data set that `make` wrote.

    Attributes:
        path: folder of the data set.
        options: options for `open_dataset`.
        labels: class indices of each label, (H, W), 255 is ignored; in the order of the opened data set.
        images: path of each image, in the same order.
        label_files: path of each label file, in the same order.
    """

    path: Path
    options: dict = field(default_factory=dict)
    labels: list = field(default_factory=list)
    images: list = field(default_factory=list)
    label_files: list = field(default_factory=list)


def make(name, path, split="train", count=3, size=(64, 128), **choices):
    """Write `count` pairs of `size` (height, width) in pixels below `path`. Several splits can be written to one folder.

    Choices: `labels="trainIds"` for cityscapes, acdc and idd, `labels="polygons"` for idd, `old=True` for bdd100k, `version` and
    `config` for mapillary, `conditions` for acdc.
    """
    tree = Tree(Path(path))
    tree.path.mkdir(parents=True, exist_ok=True)
    if name == "scenes":
        tree.options = {"count": count, "size": size}
        return tree
    if name == "cityscapes-c":
        tree.options = {"kind": "contrast", "severity": 2}
    classes = 11 if name == "camvid" else 3 if name == "folder" else 19
    for number in range(count):
        label = draw(size, classes, seed=number)
        image = paint(label, seed=number)
        WRITERS[name](tree, split, number, image, label, choices)
        tree.labels.append(label)
    if name == "folder":
        (tree.path / "index.json").write_text(json.dumps({"classes": ["sky", "ground", "thing"], "ignore_label_on_disk": 11}))
    if name == "gtav":
        numbers = np.arange(1, count + 1)
        savemat(tree.path / "split.mat", {"trainIds": numbers[:-1], "valIds": numbers[-1:], "testIds": numbers[:0]})
    order = sorted(range(count), key=lambda i: str(tree.images[i]))
    for attribute in ("labels", "images", "label_files"):
        setattr(tree, attribute, [getattr(tree, attribute)[i] for i in order])
    return tree


def draw(size, classes, seed=0):
    """A label with a vertical stripe of each class, shifted by the seed, below ignored rows."""
    columns = (np.arange(size[1]) * classes // size[1] + seed) % classes
    label = np.repeat(columns[None], size[0], axis=0).astype(np.uint8)
    label[: max(1, size[0] // 16)] = IGNORED
    return label


def paint(label, seed=0):
    """An image in the colours of the classes with noise, which a model can learn to segment."""
    colours = np.zeros((256, 3))
    colours[: len(CITYSCAPES_PALETTE)] = CITYSCAPES_PALETTE
    noise = np.random.default_rng(seed).normal(0, 8, (*label.shape, 3))
    return np.clip(colours[label] + noise, 0, 255).astype(np.uint8)


def encode(label, values, ignored):
    """Class indices -> values on disk."""
    table = np.full(256, ignored, np.uint16)
    table[: len(values)] = values
    return table[label]


def write_16_bit_rgb(path, pixels):
    """A PNG with three channels of 16 bits, (H, W, 3), which Pillow neither writes nor reads."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    path.write_bytes(png(width, height, 16, 2, *(row.tobytes() for row in rows)))


def png(width, height, depth, colour_type, *rows):
    """The bytes of a PNG file; colour types are 0 grey, 2 RGB, 3 paletted, 4 grey and 6 RGB with transparency."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    raw = b"".join(b"\0" + row for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def _save(tree, image_path, image, label_path, numbers, mode="L"):
    for path in (image_path, label_path):
        (tree.path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(tree.path / image_path, quality=95)
    if mode == "16 bit":
        pixels = np.zeros((*numbers.shape, 3), np.uint16)
        pixels[..., 0], pixels[..., 1] = numbers, 1000
        write_16_bit_rgb(tree.path / label_path, pixels)
    else:
        picture = Image.fromarray(numbers.astype(np.uint8))
        if mode == "P":
            picture.putpalette([value for k in range(256) for value in (k * 7 % 256, k * 13 % 256, k * 29 % 256)])
        picture.save(tree.path / label_path)
    tree.images.append(tree.path / image_path)
    tree.label_files.append(tree.path / label_path)


def _gtav(tree, split, number, image, label, choices):
    name = f"{number + 1:05}.png"
    _save(tree, f"images/{name}", image, f"labels/{name}", encode(label, LABEL_IDS, (0, 34)[number % 2]), "P")


def _synthia(tree, split, number, image, label, choices):
    name = f"{number:07}.png"
    _save(tree, f"RGB/{name}", image, f"GT/LABELS/{name}", encode(label, SYNTHIA, 22), "16 bit")


def _urbansyn(tree, split, number, image, label, choices):
    _save(tree, f"rgb/rgb_{number + 1:04}.png", image, f"ss/ss_{number + 1:04}.png", encode(label, range(19), 19))


def _cityscapes(tree, split, number, image, label, choices):
    city = ("aachen", "bochum")[number % 2]
    stem = f"{split}/{city}/{city}_{number:06}_000019"
    kind = choices.get("labels", "Ids")
    numbers = encode(label, LABEL_IDS, 4) if kind == "Ids" else label
    _save(
        tree, f"leftImg8bit/{stem}_leftImg8bit.png", image, f"gtFine/{stem}_gtFine_label{kind[0].upper()}{kind[1:]}.png", numbers
    )


def _bdd100k(tree, split, number, image, label, choices):
    stem = f"{split}/{number:08x}-{number + 7:08x}"
    if choices.get("old"):
        _save(tree, f"seg/images/{stem}.jpg", image, f"seg/labels/{stem}_train_id.png", label)
    else:
        _save(tree, f"images/10k/{stem}.jpg", image, f"labels/sem_seg/masks/{stem}.png", label, "LP"[number % 2])


def _mapillary(tree, split, number, image, label, choices):
    folder = {"train": "training", "val": "validation", "test": "testing"}[split]
    version = choices.get("version", "v1.2")
    labels = f"{version}/labels" if version != "v1.1" else "labels"
    numbers, ignored = (MAPILLARY_V2, 123) if version == "v2.0" else (MAPILLARY_V1, 65)
    if choices.get("config"):
        names = ["void--unlabeled", "nature--sky", "human--person--individual", "object--bench"]
        (tree.path / f"config_{version}.json").write_text(json.dumps({"labels": [{"name": name} for name in names]}))
        label[...] = np.where(np.arange(label.shape[1]) % 2, 10, 11)
        label[:2] = IGNORED
        numbers, ignored = [0] * 10 + [1, 2], 3
    name = f"{number:04}_abc-{number}"
    _save(tree, f"{folder}/images/{name}.jpg", image, f"{folder}/{labels}/{name}.png", encode(label, numbers, ignored), "P")


def _acdc(tree, split, number, image, label, choices):
    conditions = choices.get("conditions", ("fog", "night", "rain", "snow"))
    stem = f"{conditions[number % len(conditions)]}/{split}/GOPR0{number}/GOPR0{number}_frame_000{number}"
    kind = choices.get("labels", "trainIds")
    numbers = encode(label, LABEL_IDS, 0) if kind == "Ids" else label
    _save(tree, f"rgb_anon/{stem}_rgb_anon.png", image, f"gt/{stem}_gt_label{kind[0].upper()}{kind[1:]}.png", numbers)


def _idd(tree, split, number, image, label, choices):
    stem, kind = f"{split}/{number:03}/frame{number:04}", choices.get("labels", "ids")
    suffix = ("png", "jpg")[number % 2]
    if kind != "polygons":
        name, numbers = ("labelcsTrainIds", label) if kind == "trainIds" else ("labelids", encode(label, IDD, 35))
        _save(tree, f"leftImg8bit/{stem}_leftImg8bit.{suffix}", image, f"gtFine/{stem}_gtFine_{name}.png", numbers)
        return
    _save(tree, f"leftImg8bit/{stem}_leftImg8bit.{suffix}", image, f"gtFine/{stem}_gtFine_none.png", label)
    tree.label_files.pop().unlink()
    tree.label_files.append(tree.path / f"gtFine/{stem}_gtFine_polygons.json")
    tree.label_files[-1].write_text(json.dumps(polygons_of(label)))


def polygons_of(label):
    """The stripes of `draw` as IDD's polygons."""
    height, width = label.shape
    top = int((label[:, 0] == IGNORED).sum())
    starts = [0, *(np.flatnonzero(np.diff(label[-1].astype(int))) + 1).tolist(), width]
    objects = []
    for left, right in pairwise(starts):
        corners = [[left, top], [right - 1, top], [right - 1, height - 1], [left, height - 1]]
        name = IDD_NAMES[label[-1, left]]
        objects.append({"label": "cargroup" if name == "car" else name, "polygon": corners, "deleted": 0})
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def _camvid(tree, split, number, image, label, choices):
    name = f"0001TP_{number:06}.png"
    _save(tree, f"{split}/{name}", image, f"{split}annot/{name}", encode(label, range(11), 11))


def _folder(tree, split, number, image, label, choices):
    name = f"{number:03}"
    _save(tree, f"{split}/images/{name}.jpg", image, f"{split}/labels/{name}.png", encode(label, range(3), 11))


WRITERS = {
    "gtav": _gtav,
    "synthia": _synthia,
    "urbansyn": _urbansyn,
    "cityscapes": _cityscapes,
    "bdd100k": _bdd100k,
    "mapillary": _mapillary,
    "acdc": _acdc,
    "cityscapes-c": _cityscapes,
    "idd": _idd,
    "camvid": _camvid,
    "folder": _folder,
}
