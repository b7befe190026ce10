"""Labels and colours that the things of a street are painted in."""

from numpy.random import Generator

from rein.dgss.classes import CITYSCAPES_CLASSES

Colour = tuple[float, float, float]
"""Red, green and blue, 0 to 255."""

(
    ROAD,
    SIDEWALK,
    BUILDING,
    WALL,
    FENCE,
    POLE,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    VEGETATION,
    TERRAIN,
    SKY,
    PERSON,
    RIDER,
    CAR,
    TRUCK,
    BUS,
    TRAIN,
    MOTORCYCLE,
    BICYCLE,
) = range(len(CITYSCAPES_CLASSES))

BLACK: Colour = (0, 0, 0)
TYRE: Colour = (26, 26, 28)
METAL: Colour = (112, 116, 120)
TAIL_LIGHT_GLOW: Colour = (225, 24, 16)


def scaled(colour: Colour, factor: float, more: float = 0.0) -> Colour:
    """Return a colour times a factor plus a number, kept within 0 and 255."""
    red, green, blue = (max(0.0, min(255.0, part * factor + more)) for part in colour)
    return red, green, blue


def pick(random: Generator, colours: tuple[Colour, ...]) -> Colour:
    """Draw one of some colours."""
    return colours[int(random.integers(len(colours)))]
