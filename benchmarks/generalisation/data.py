"""Source and target domains of each seed, written once as folders of images and labels: generated streets, and real frames of CamVid.

The source is clear day; the other domains are only evaluated. The data of a seed depend only on the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from benchmarks.generalisation import camera
from rein.dgss import scenes
from rein.dgss.data.datasets import generated, open_dataset
from rein.dgss.labels import CITYSCAPES, LabelSpace
from rein.errors import InputError

STREETS, CAMVID = "streets", "camvid"
CAMERA = "camera"
SIZE = (128, 256)
CAMVID_SIZE = (180, 240)  # half the size of the files
SOURCE, VALIDATION = "train", "validation"  # folders of the source's pairs

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Counts:
    """Numbers of streets in each domain."""

    train: int = 200
    validation: int = 32
    test: int = 32


def version(kind: str, camvid: Path | None) -> str:
    """Digest of the code that writes the data and, for CamVid, of its files."""
    digest = hashlib.sha256()
    if kind == STREETS:
        drawing = (Path(camera.__file__), Path(generated.__file__), *sorted(Path(scenes.__file__).parent.glob("*.py")))
        files = {path.name: path for path in (Path(__file__), *drawing)}
    else:
        files = {"": Path(__file__)}
        if camvid is not None:
            files |= {str(path.relative_to(camvid)): path for path in sorted(camvid.rglob("*.*"))}
    for name, path in files.items():
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def streets(seed: int, counts: Counts, cache: Path, targets: bool = True) -> dict[str, Any]:
    """Generated streets of one seed, as the `data` section of a recipe.

    Different seeds share no street; all target domains show the same streets.

    Args:
        seed: seed of the streets.
        counts: numbers of streets.
        cache: folder that keeps the rendered images.
        targets: also render the target domains, which are not needed to choose a rate.
    """
    sizes = "-".join(map(str, (counts.train, counts.validation, counts.test)))
    root = cache / version(STREETS, None) / f"streets-{seed}-{sizes}"
    day, *others = scenes.DOMAINS

    def write(folder: str, domain: str, split: str, count: int) -> None:
        _write_domain(root / folder, CITYSCAPES, lambda: _draw(domain, split, count, seed))

    write(SOURCE, day, "train", counts.train)
    write(VALIDATION, day, "val", counts.validation)
    domains = [day, *others, CAMERA] if targets else []
    for domain in domains:
        write(domain, domain, "test", counts.test)
    return _section(root, day, domains)


def camvid(root: Path, cache: Path, limit: int | None = None, targets: bool = True) -> dict[str, Any]:
    """Real frames: trained on the drive 0016E5 by day, validated on 0006R0 by day, evaluated on 0001TP at dusk.

    The day frames of the evaluation are a clip of the training drive, one second of driving after its last training frame, so that
    mIoU by day is optimistic.

    Args:
        root: folder with `day_train`, `day_val` and `dusk_test`, each with `images` and `labels`; frames are named by their drive.
        cache: folder that keeps the halved frames.
        limit: maximum number of frames of each kind, evenly spaced.
        targets: also read the target domains.
    """
    out = cache / version(CAMVID, root) / f"camvid-{limit or 'all'}"
    splits = {name: open_dataset("folder", root, split=name) for name in ("day_train", "day_val", "dusk_test")}

    def write(folder: str, split: str, drive: str) -> None:
        pairs = splits[split]
        indices = [index for index in range(len(pairs)) if pairs.name_of(index).rpartition("/")[2].startswith(drive)]
        if not indices:
            raise InputError(f"{root / split} has no frames of the drive {drive}; expected names that begin with it.")
        indices = indices if limit is None else indices[:: -(-len(indices) // limit)]
        _write_domain(out / folder, pairs.space, lambda: (_halve(pairs[index]) for index in indices))

    write(SOURCE, "day_train", "0016E5")
    write(VALIDATION, "day_train", "0006R0")
    domains = ["day", "dusk"] if targets else []
    if targets:
        write("day", "day_val", "0016E5")
        write("dusk", "dusk_test", "0001TP")
    return _section(out, "day", domains)


def _section(root: Path, source: str, targets: list[str]) -> dict[str, Any]:
    """The `data` section of a recipe over the folders below `root`."""

    def domain(folder: str, title: str) -> dict[str, Any]:
        return {"dataset": "folder", "path": str(root), "split": folder, "title": title}

    return {
        "sources": [domain(SOURCE, source)],
        "validation": [domain(VALIDATION, f"{source} (held out)")],
        "targets": [domain(name, name) for name in targets],
        "allow_absent_classes": True,  # few streets may show no train
    }


def _draw(domain: str, split: str, count: int, seed: int) -> Iterable[Pair]:
    for street in generated.scene_seeds(split, count, seed):
        if domain == CAMERA:
            double = scenes.render(street, scenes.DOMAINS[0], (2 * SIZE[0], 2 * SIZE[1]))
            yield camera.another_camera(_to_tensor(double.image), torch.from_numpy(double.label), street, SIZE)
        else:
            scene = scenes.render(street, domain, SIZE)
            yield _to_tensor(scene.image), torch.from_numpy(scene.label)


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _halve(pair: Pair) -> Pair:
    image, label = pair
    small = TF.resize(label[None], list(CAMVID_SIZE), interpolation=TF.InterpolationMode.NEAREST_EXACT)[0]
    return TF.resize(image, list(CAMVID_SIZE), antialias=True), small


def _write_domain(folder: Path, space: LabelSpace, make: Callable[[], Iterable[Pair]]) -> None:
    """Write pairs as a data set for the loader `folder`, unless the folder exists."""
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}-{os.getpid()}")
    for kind in ("images", "labels"):
        (part / kind).mkdir(parents=True)
    for index, (image, label) in enumerate(make()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(part / "images" / f"{index:04}.png", compress_level=1)
        Image.fromarray(label.numpy()).save(part / "labels" / f"{index:04}.png", compress_level=1)
    palette = [list(colour) for colour in space.palette[: len(space.names)]]
    (part / "index.json").write_text(json.dumps({"classes": list(space.names), "palette": palette}))
    try:
        part.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(part)
        if not folder.exists():
            raise
