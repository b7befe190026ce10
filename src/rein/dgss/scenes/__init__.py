"""Generated street scenes with exact labels, for domain generalisation without a download.

The seed determines the plan of a street in metres (`street`, `layout`). `painter` paints it far to near into one image of surface
numbers; `buildings`, `vehicles`, ... paint one kind of object each. `readback` converts the numbers to label, depth and colour.
`weather` renders the image of a domain: clear day, the source domain, or fog, night, rain or snow, the target domains.

Belongs here: the renderer, and no data set or file format. It imports numpy, Pillow and `rein.errors` only, no torch; imported by
`data` and the benchmarks, which use `render`, `Scene` and `DOMAINS`.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rein.dgss.scenes.layout import paint_street
from rein.dgss.scenes.readback import SUPERSAMPLING, read_back
from rein.dgss.scenes.weather import RENDERERS
from rein.errors import InputError

__all__ = ["DOMAINS", "Scene", "render", "render_domains"]

DOMAINS = tuple(RENDERERS)

SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Scene:
    """One street scene.

    Attributes:
        image: `(H, W, 3)` uint8, sRGB.
        label: `(H, W)` uint8, Cityscapes train ids.
        depth: `(H, W)` float32, distance along the viewing direction in metres; 1000 for the sky.
    """

    image: np.ndarray
    label: np.ndarray
    depth: np.ndarray


def render(seed: int, domain: str = "day", size: tuple[int, int] = (128, 256)) -> Scene:
    """Render the street of one seed in one domain.

    The seed determines the street, its labels and its depth. The domain changes only the image. Equal arguments give equal bytes.
    The global random states of numpy and Python are neither read nor changed.

    Args:
        seed: a non-negative integer that identifies the street.
        domain: one of `DOMAINS`.
        size: height and width in pixels, each at least 32.

    Returns:
        The scene, with arrays of height and width `size`.

    Raises:
        InputError: the domain is unknown, the seed is not a non-negative integer, or the size is too small.
    """
    return render_domains(seed, (domain,), size)[0]


def render_domains(seed: int, domains: Sequence[str], size: tuple[int, int] = (128, 256)) -> list[Scene]:
    """Render the street of one seed in several domains; it is painted only once. Arguments and errors as for `render`."""
    seed, (height, width) = _check_seed(seed), _check_size(size)
    for domain in domains:
        if domain not in DOMAINS:
            raise InputError(f"domain is {domain!r}; expected one of {', '.join(DOMAINS)}. Correct the name.")
    street, painter = paint_street(_generator(seed, 0), SUPERSAMPLING * height, SUPERSAMPLING * width)
    scenes = []
    for domain in domains:
        view = read_back(painter, street)  # anew for each domain: a renderer may change it
        image = RENDERERS[domain](view, _generator(seed, 1 + DOMAINS.index(domain)))
        scenes.append(Scene(image=image, label=view.label, depth=view.depth))
    return scenes


def _check_seed(seed: int) -> int:
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if number < 0:
        raise InputError(f"seed is {seed!r}; expected a non-negative integer. Pass one such as 0.")
    return number


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise InputError(f"size is {size!r}; expected two integers, (height, width). Pass a pair such as (128, 256).") from None
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"size is {height} x {width}; expected at least {SMALLEST_SIDE} pixels on each side. Use a larger size.")
    return height, width


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(entropy))
