"""The unlabelled pairs for the pretraining of `pocket_vit`: generated streets, each by clear day and in one other look, and textures.

Streets have up to `MAX_STREETS` seeds from `FIRST_STREET` on, which the data set `scenes` never uses. Labels and depth are dropped.
Pair `i` depends only on the pool's seed and `i`, so that any number of processes renders the same pool.
"""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from rein.dgss.scenes import DOMAINS, render_domains

FIRST_STREET, MAX_STREETS = 1_000_000, 100_000
HEIGHT, WIDTH = 128, 256
TEXTURES = 0.08  # share of the pairs that show no street
DAY, DUSK = DOMAINS[0], "dusk"
LOOKS = (*DOMAINS[1:], DUSK)  # the other look of a street


def make_pool(path: Path, count: int, seed: int, workers: int) -> np.ndarray:
    """Render `count` pairs into one `.npy` file, unless it exists.

    Returns:
        The pairs, (N, 128, 256, 6) uint8, memory-mapped: day, then the other look.

    Raises:
        ValueError: `count` is larger than `MAX_STREETS`, or than the number of pairs in an existing file.
    """
    if count > MAX_STREETS:
        raise ValueError(
            f"{count} pairs need streets that are reserved for training and evaluation; expected at most {MAX_STREETS}."
        )
    if not path.exists():
        unfinished = path.with_suffix(".part")
        pool = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(count, HEIGHT, WIDTH, 6))
        with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as processes:
            ordered_map = map if processes is None else partial(processes.imap, chunksize=16)
            for number, pair in enumerate(ordered_map(partial(draw_pair, seed=seed), range(count))):
                pool[number] = pair
        pool.flush()
        unfinished.rename(path)
    pool = np.load(path, mmap_mode="r")
    if len(pool) < count:
        raise ValueError(f"{path} holds {len(pool)} pairs; expected at least {count}. Delete it, or choose another folder.")
    return pool[:count]


def draw_pair(number: int, seed: int) -> np.ndarray:
    """Draw pair `number` of the pool, (128, 256, 6) uint8: the street by clear day, and the same street in another look.

    A texture has one look only, which stands twice.
    """
    random = np.random.default_rng((seed, number))
    if random.random() < TEXTURES:
        return np.tile(draw_texture(random), 2)
    return draw_street(random, FIRST_STREET + number)


def draw_street(random: Generator, street: int) -> np.ndarray:
    """A street by day and in a random look: the same window of two images that may be larger, as from a camera that is nearer."""
    height = HEIGHT if random.random() < 0.5 else int(random.integers(HEIGHT, 208))
    size = height, 2 * height
    look = LOOKS[random.integers(len(LOOKS))]
    if look == DUSK:
        day, night = (scene.image for scene in render_domains(street, (DAY, "night"), size))
        other = _dusk(day, night, random)
    else:
        day, other = (scene.image for scene in render_domains(street, (DAY, look), size))
    top, left = random.integers(height - HEIGHT + 1), random.integers(size[1] - WIDTH + 1)
    return np.concatenate([day, other], -1)[top : top + HEIGHT, left : left + WIDTH]


def _dusk(day: np.ndarray, night: np.ndarray, random: Generator) -> np.ndarray:
    """Dusk: dimmed and tinted daylight, added to the street at night."""
    light = random.uniform(0.2, 0.5) * random.uniform(0.75, 1.25, 3)
    return np.clip(day * light + 0.75 * night, 0, 255).astype(np.uint8)


def draw_texture(random: Generator) -> np.ndarray:
    """Two to four layers of colour noise, checkers and polygons, blended by masks of noise."""
    image = _noise(random)
    for _ in range(int(random.integers(1, 4))):
        layer = (_noise, _checkers, _polygons)[random.integers(3)](random)
        mask = np.clip((_noise(random)[..., :1] - random.uniform(60, 180)) / random.uniform(2, 60), 0, 1)
        image = image + mask * (layer - image)
    return image.astype(np.uint8)


def _noise(random: Generator) -> np.ndarray:
    """Fractal colour noise of a random roughness, (128, 256, 3) from 0 to 255."""
    image, roughness = np.zeros((HEIGHT, WIDTH, 3), np.float32), random.uniform(0.3, 1.0)
    for octave in range(1, 7):
        grid = random.integers(0, 256, (2**octave, 2 ** (octave + 1), 3), dtype=np.uint8)
        smooth = Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image += np.float32(roughness**octave) * np.asarray(smooth, np.float32)
    low, high = image.min((0, 1)), image.max((0, 1))
    first, second = random.uniform(0, 255, (2, 3))
    return first + (image - low) / (high - low) * (second - first)


def _checkers(random: Generator) -> np.ndarray:
    """A rotated grid of two colours, or stripes."""
    angle, sides = random.uniform(0, np.pi), random.uniform(3, 40, 2)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    odd = (u // sides[0] + (v // sides[1]) * (random.random() < 0.7)) % 2
    first, second = random.uniform(0, 255, (2, 3))
    return first + odd[..., None] * (second - first)


def _polygons(random: Generator) -> np.ndarray:
    """Filled polygons of three to five corners, and discs, of random colours and sizes."""
    image = Image.new("RGB", (WIDTH, HEIGHT), tuple(random.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(5, 40))):
        middle, radius = random.uniform(0, 1, 2) * (WIDTH, HEIGHT), random.uniform(4, 50)
        colour = tuple(random.integers(0, 256, 3).tolist())
        if random.random() < 0.3:
            draw.ellipse((*(middle - radius), *(middle + radius)), fill=colour)
        else:
            angles = np.sort(random.uniform(0, 2 * np.pi, int(random.integers(3, 6))))
            corners = middle + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            draw.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)
    return np.asarray(image, np.float32)
