"""Trees and bushes: a trunk and a noisy crown, lit from above and from the side of the sun."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from rein.dgss.scenes.noise import noise_tile
from rein.dgss.scenes.painter import CIRCLE, Figure, Painter
from rein.dgss.scenes.palette import VEGETATION, Colour, scaled

TONES = 6  # brightness levels of a crown
CROWNS, CROWN_CELLS = 8, 320


class Tree(NamedTuple):
    """The appearance of a tree; lengths in metres."""

    colour: Colour
    trunk: float
    width: float
    height: float
    conifer: bool
    shape: int  # index of the crown


def draw_tree(random: Generator, height: float, hue: float) -> Tree:
    """Draw the appearance of a tree; `hue` is between -1, bluish, and 1, yellowish."""
    dark = random.uniform(0.85, 1.12)
    conifer = random.random() < 0.12
    return Tree(
        colour=((80 + 18 * hue) * dark, (116 + 4 * hue) * dark, (52 - 6 * hue) * dark),
        width=height * (0.55 if conifer else random.uniform(0.75, 1.05)),
        trunk=height * (0.08 if conifer else random.uniform(0.28, 0.42)),
        height=height,
        conifer=conifer,
        shape=int(random.integers(CROWNS)),
    )


def paint_tree(painter: Painter, x: float, z: float, tree: Tree) -> None:
    """Paint a tree, or a bush if it has no trunk."""
    figure = Figure(painter, x, z)
    if tree.trunk > 0:
        bark = figure.surface(VEGETATION, (92, 76, 60))
        half, top = 0.03 + 0.022 * tree.height, tree.trunk + 0.25 * tree.height
        figure.polygon(bark, (-half, 0), (half, 0), (half * 0.7, top), (-half * 0.7, top))
    high = (tree.height - tree.trunk) * figure.scale
    wide = tree.width * figure.scale
    column, row = figure.at(0, tree.trunk)
    left, right = round(column - wide / 2), round(column + wide / 2) + 1
    top_row, bottom_row = round(row - high), round(row) + 1
    if right <= 0 or left >= painter.camera.columns or bottom_row <= 0:
        return
    first = len(painter.surfaces)
    for tone in range(TONES):
        bright = 0.52 + 0.85 * tone / (TONES - 1)
        cover = max(0.0, tone - 1.5) / (TONES - 2)
        figure.surface(VEGETATION, scaled(tree.colour, bright), cover=min(0.9, cover))
    size = (right - left, bottom_row - top_row)
    crown = _crown(tree.shape, tree.conifer, 1 if painter.sun[0] > 0 else -1)
    tones, mask = (layer.resize(size, Image.Resampling.NEAREST) for layer in crown)
    numbers = Image.fromarray(np.asarray(tones, np.int32) + np.int32(first))
    painter.numbers.paste(numbers, (left, top_row, right, bottom_row), mask)
    for part, share in ((0.35, 0.38), (0.75, 0.36)) if z < 70 else ():
        circle = [(x + tree.width * share * u, z + tree.width * share * v) for u, v in CIRCLE]
        painter.shade(circle, tree.trunk + part * (tree.height - tree.trunk))
    painter.darken(x - 0.2, x + 0.2, z - 0.1, z + 0.2)


@lru_cache(maxsize=4 * CROWNS)
def _crown(shape: int, conifer: bool, sun_side: int) -> tuple[Image.Image, Image.Image]:
    """Return the brightness levels and the mask of a crown, both of mode "L".

    A crown is a noisy disc or triangle, lit from above and from one side.
    """
    noise, cells = noise_tile(), CROWN_CELLS
    y, x = np.meshgrid(*2 * [np.linspace(-1, 1, cells, dtype=np.float32)], indexing="ij")
    first, second = 61 * shape + 7, 37 * shape + 120
    index = np.arange(cells) * 96 // cells
    coarse = noise[np.ix_((index + first) % 512, (index + second) % 512)] - 0.5
    index = np.arange(cells) * 300 // cells
    fine = noise[np.ix_((index + second) % 512, (index + first) % 512)] - 0.5
    triangle, ball = np.abs(x) - 0.48 * (y + 1), x * x + y * y - 0.72
    mask = triangle < 0.35 * fine if conifer else ball < -1.1 * coarse - 0.38 * fine
    tone = 0.45 + 0.7 * coarse + 0.5 * fine + 0.22 * sun_side * x - 0.3 * y
    tone = np.clip(tone * TONES, 0, TONES - 1).astype(np.uint8)
    return Image.fromarray(tone), Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
