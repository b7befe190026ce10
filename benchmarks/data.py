"""Images that one core loads per second through the authors' pipeline: read two files, scale, crop, flip, distort colours.

The images are generated streets in the true sizes and formats of the data sets. Real photographs compress worse and take somewhat
longer to read.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import summary
from benchmarks.options import Options
from rein.dgss import scenes
from rein.dgss.data.datasets import open_dataset
from rein.dgss.data.sampling import SampleIndex, TransformedDataset
from rein.dgss.data.transforms import TrainingTransform

LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33] + [0] * 237, np.uint8)


def write_gtav(root: Path, count: int) -> None:
    """Write images of 1914 x 1052 and labels with a palette, as PNG."""
    for number in range(count):
        scene = scenes.render(number, "day", (1052, 1914))
        for folder, picture in (
            ("images", Image.fromarray(scene.image)),
            ("labels", Image.fromarray(LABEL_IDS[scene.label], "P")),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            if folder == "labels":
                picture.putpalette(list(range(256)) * 3)
            picture.save(root / folder / f"{number:05}.png")


def write_bdd100k(root: Path, count: int) -> None:
    """Write images of 1280 x 720 as JPEG, and grey labels as PNG."""
    images, labels = root / "images/10k/train", root / "labels/sem_seg/masks/train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(count):
        scene = scenes.render(number, "day", (720, 1280))
        Image.fromarray(scene.image).save(images / f"{number:05}.jpg", quality=90)
        Image.fromarray(scene.label).save(labels / f"{number:05}.png")


class Read:
    """Reads the files only."""

    def __init__(self, pairs) -> None:
        self.pairs = pairs

    def __call__(self, index: int, position: int) -> None:
        self.pairs[index]


class Pipeline:
    """Reads the files and applies the transforms."""

    def __init__(self, pairs, crop: int) -> None:
        self.dataset = TransformedDataset(pairs, TrainingTransform(crop), seed=0)

    def __call__(self, index: int, position: int) -> None:
        self.dataset[SampleIndex(index, position)]


def rate(read, count: int, repeats: int) -> dict:
    """Images per second: median and range over repeats, after one warm-up repeat."""
    rates = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        for index in range(count):
            read(index, repeat * count + index)
        rates.append(count / (time.perf_counter() - start))
    return dict(zip(("median", "least", "most"), summary.median_and_range(rates[1:], 2), strict=True))


def rows(options: Options) -> Iterator[dict]:
    count, repeats = options.choose((2, 1), (6, 3), (12, 5))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, write in (("gtav", write_gtav), ("bdd100k", write_bdd100k)):
                write(Path(folder) / name, count)
                pairs = open_dataset(name, Path(folder) / name)
                loaders = {"read": Read(pairs), **{f"pipeline, crop {crop}": Pipeline(pairs, crop) for crop in (512, 1024)}}
                for title, read in loaders.items():
                    size = list(pairs[0][0].shape[1:])
                    row = {"data": name, "size": size, "what": title, "images": count, "repeats": repeats}
                    yield {**row, "images_per_second_and_core": rate(read, count, repeats)}
    finally:
        torch.set_num_threads(threads)
