"""How many images of the authors' pipeline one core loads in a second: reading two files, scale, crop, flip, photometric distortion.

python -m benchmarks.data --out benchmarks/results/<machine>/data.json

The images are generated streets in the files' true sizes and formats; real photographs compress worse and are read somewhat slower.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rein.dgss import scenes
from rein.dgss.datasets import open_dataset
from rein.dgss.sampling import Draw, Drawn
from rein.dgss.transforms import TrainingTransform

LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33] + [0] * 237, np.uint8)


def write_gtav(root: Path, count: int) -> None:
    """PNG of 1914 x 1052, labels paletted."""
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
    """JPEG of 1280 x 720, labels grey."""
    images, labels = root / "images/10k/train", root / "labels/sem_seg/masks/train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(count):
        scene = scenes.render(number, "day", (720, 1280))
        Image.fromarray(scene.image).save(images / f"{number:05}.jpg", quality=90)
        Image.fromarray(scene.label).save(labels / f"{number:05}.png")


class Read:
    """The files alone."""

    def __init__(self, pairs) -> None:
        self.pairs = pairs

    def __call__(self, number: int, place: int) -> None:
        self.pairs[number]


class Pipeline:
    """The files and the transforms."""

    def __init__(self, pairs, crop: int) -> None:
        self.drawn = Drawn(pairs, TrainingTransform(crop), seed=0)

    def __call__(self, number: int, place: int) -> None:
        self.drawn[Draw(number, place)]


def rate(read, count: int, repeats: int) -> dict:
    """Images per second: median and range over repeats, after one to warm up."""
    rates = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        for number in range(count):
            read(number, repeat * count + number)
        rates.append(count / (time.perf_counter() - start))
    rates = sorted(rates[1:])
    return {"median": round(statistics.median(rates), 2), "least": round(rates[0], 2), "most": round(rates[-1], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("gtav", write_gtav), ("bdd100k", write_bdd100k)):
            write(Path(folder) / name, options.count)
            pairs = open_dataset(name, Path(folder) / name)
            row = {
                "data": name,
                "size": list(pairs[0][0].shape[1:]),
                "read": rate(Read(pairs), options.count, options.repeats),
            }
            for crop in (512, 1024):
                row[f"pipeline {crop}"] = rate(Pipeline(pairs, crop), options.count, options.repeats)
            results.append(row)
            print(row)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "unit": "images per second on one core",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "images": options.count,
            "repeats": options.repeats,
            "results": results,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
