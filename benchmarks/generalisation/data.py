"""What is fitted on, chosen by and judged on: generated streets, and CamVid's real ones.

One clear-day source in each; every other domain is only ever judged. What a seed's data are follows from the seed alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

from benchmarks.generalisation import camera
from rein.dgss import scenes
from rein.dgss.data import Sample
from rein.dgss.datasets import generated, open_dataset
from rein.dgss.domains import Domains
from rein.dgss.labels import CITYSCAPES
from rein.errors import InputError

STREETS, CAMVID = "streets", "camvid"
CAMERA = "camera"
SIZE = (128, 256)
CAMVID_SIZE = (180, 240)  # half of what the files have


@dataclass(frozen=True)
class Counts:
    """How many streets."""

    train: int = 200
    validation: int = 32
    test: int = 32


def version(kind: str, camvid: Path | None) -> str:
    """What the data of all seeds follow from besides their seed, as a digest: the code that makes them, and CamVid's files."""
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


def streets(seed: int, counts: Counts, cache: Path, judged: bool = True) -> Domains:
    """Generated streets of one seed: other seeds share none of them. The same streets are judged in every domain.

    Args:
        seed: of the streets.
        counts: how many.
        cache: folder in which they are kept once rendered.
        judged: whether the target domains are rendered at all; choosing a rate does without.
    """
    day, *others = scenes.DOMAINS

    def pairs(domain: str, split: str, count: int) -> TensorDataset:
        return _kept(cache / f"streets-{seed}-{split}-{domain}-{count}.npz", lambda: _drawn(domain, split, count, seed))

    cache = cache / version(STREETS, None)
    tests: dict[str, Dataset[Sample]] = {}
    if judged:
        tests |= {domain: pairs(domain, "test", counts.test) for domain in (day, *others, CAMERA)}
    return Domains(day, CITYSCAPES, pairs(day, "train", counts.train), pairs(day, "val", counts.validation), tests)


def camvid(root: Path, cache: Path, limit: int | None = None) -> Domains:
    """Real frames: fitted on the drive 0016E5 by day, chosen by the drive 0006R0 by day, judged on the drive 0001TP at dusk.

    Judged by day is a clip of the fitted drive, a second of driving away from what was fitted on, so that figure is a high one.

    Args:
        root: a folder with `day_train`, `day_val` and `dusk_test`, each with `images` and `labels`; frames are named by their drive.
        cache: folder in which the halved frames are kept.
        limit: at most so many frames of each kind, evenly spaced.
    """
    cache = cache / version(CAMVID, root)
    folders = {split: open_dataset("folder", root, split=split) for split in ("day_train", "day_val", "dusk_test")}

    def pairs(split: str, drive: str) -> TensorDataset:
        data = folders[split]
        numbers = [number for number in range(len(data)) if data.name_of(number).rpartition("/")[2].startswith(drive)]
        if not numbers:
            raise InputError(f"{root / split} has no frames of the drive {drive}; their names begin with it.")
        numbers = numbers if limit is None else numbers[:: -(-len(numbers) // limit)]
        return _kept(cache / f"camvid-{split}-{drive}-{len(numbers)}.npz", lambda: [_halved(data[number]) for number in numbers])

    tests: dict[str, Dataset[Sample]] = {"day": pairs("day_val", "0016E5"), "dusk": pairs("dusk_test", "0001TP")}
    space = folders["day_train"].space
    return Domains("day", space, pairs("day_train", "0016E5"), pairs("day_train", "0006R0"), tests)


def _drawn(domain: str, split: str, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for street in generated.scene_seeds(split, count, seed):
        if domain == CAMERA:
            double = scenes.render(street, scenes.DOMAINS[0], (2 * SIZE[0], 2 * SIZE[1]))
            found.append(camera.another_camera(_image(double.image), torch.from_numpy(double.label), street, SIZE))
        else:
            scene = scenes.render(street, domain, SIZE)
            found.append((_image(scene.image), torch.from_numpy(scene.label)))
    return found


def _image(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _halved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    image, label = pair
    small = TF.resize(label[None], list(CAMVID_SIZE), interpolation=TF.InterpolationMode.NEAREST_EXACT)[0]
    return TF.resize(image, list(CAMVID_SIZE), antialias=True), small


def _kept(path: Path, make) -> TensorDataset:
    """Pairs from a file, which is written first where it is not there."""
    if not path.exists():
        pairs: Sequence[tuple[Tensor, Tensor]] = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part-{os.getpid()}")
        with part.open("wb") as file:
            np.savez_compressed(
                file, images=torch.stack([image for image, _ in pairs]), labels=torch.stack([label for _, label in pairs])
            )
        part.replace(path)
    with np.load(path) as found:
        return TensorDataset(torch.from_numpy(found["images"]), torch.from_numpy(found["labels"]))
