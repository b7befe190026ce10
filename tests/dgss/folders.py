"""Synthetic folders of domains for tests."""

import json

import numpy as np
from PIL import Image

CLASSES = ["sky", "ground", "thing"]


def make_folder(root, domains=("day", "dusk"), count=4, size=(48, 32), index=True):
    """Write `<domain>/images/*.jpg` and `<domain>/labels/*.png`: bright sky over dark ground, a red thing; label 11 is ignored."""
    generator = np.random.default_rng(0)
    width, height = size
    for number, domain in enumerate(domains):
        for folder in ("images", "labels"):
            (root / domain / folder).mkdir(parents=True)
        for i in range(count):
            label = np.where(np.arange(height)[:, None] < height // 2 + i % 3, 0, 1) + np.zeros((1, width), int)
            left = int(generator.integers(0, width - 12))
            label[height // 3 : height // 3 + 10, left : left + 10] = 2
            colours = np.array([[150, 190, 240], [90, 90, 90], [200, 40, 30]]) * (0.8**number)
            noise = generator.normal(0, 6, (height, width, 3))
            image = np.clip(colours[label] + noise, 0, 255).astype(np.uint8)
            label[:2] = 11
            Image.fromarray(image).save(root / domain / "images" / f"{i:03}.jpg")
            Image.fromarray(label.astype(np.uint8)).save(root / domain / "labels" / f"{i:03}.png")
    if index:
        (root / "index.json").write_text(json.dumps({"classes": CLASSES, "ignore_label_on_disk": 11}))
    return root
