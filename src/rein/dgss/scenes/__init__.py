"""Generated street scenes with exact labels, to try domain generalisation without a download.

A street is laid out in metres from the seed alone (`street`, `layout`), painted far to near into one image of
surface numbers (`painter`; `buildings`, `vehicles`, ... say how each kind of thing is drawn) and read back as label,
depth and colour (`readback`). The same street then gets its look from `weather`: clear day, the source domain, or
fog, night, rain or snow, the target domains. numpy and Pillow only.
"""

import operator
from dataclasses import dataclass

import numpy as np

from rein.dgss.scenes.layout import paint_street
from rein.dgss.scenes.readback import SUPERSAMPLING, read_back
from rein.dgss.scenes.weather import LOOKS
from rein.errors import InputError

__all__ = ["DOMAINS", "Scene", "render"]

DOMAINS = tuple(LOOKS)

SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Scene:
    """One street scene.

    Attributes:
        image: `(H, W, 3)` uint8, sRGB.
        label: `(H, W)` uint8, Cityscapes train ids.
        depth: `(H, W)` float32, distance along the viewing direction in metres; the sky is at 1000.
    """

    image: np.ndarray
    label: np.ndarray
    depth: np.ndarray


def render(seed: int, domain: str = "day", size: tuple[int, int] = (128, 256)) -> Scene:
    """Render the street of one seed in one domain.

    The seed fixes the street, its labels and its depth; the domain changes only the image. Equal arguments
    give equal bytes; numpy's and Python's global random states are neither read nor written.

    Args:
        seed: which street, a non-negative integer.
        domain: one of `DOMAINS`.
        size: height and width in pixels, each at least 32.

    Returns:
        The scene, with arrays of height and width `size`.

    Raises:
        InputError: for an unknown domain, a seed that is no non-negative integer, or a size too small.
    """
    seed, (height, width) = _checked_seed(seed), _checked_size(size)
    if domain not in DOMAINS:
        raise InputError(f"domain is {domain!r}; wanted one of {', '.join(DOMAINS)}")
    street, painter = paint_street(_generator(seed, 0), SUPERSAMPLING * height, SUPERSAMPLING * width)
    view = read_back(painter, street)
    image = LOOKS[domain](view, _generator(seed, 1 + DOMAINS.index(domain)))
    return Scene(image=image, label=view.label, depth=view.depth)


def _checked_seed(seed: int) -> int:
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if number < 0:
        raise InputError(f"seed is {seed!r}; wanted a non-negative integer")
    return number


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise InputError(f"size is {size!r}; wanted two integers, (height, width)") from None
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"size is {height} x {width}; wanted at least {SMALLEST_SIDE} pixels on each side")
    return height, width


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(entropy))
