"""Labels and colours of the objects of a street."""

from numpy.random import Generator

Colour = tuple[float, float, float]
"""Red, green and blue, 0 to 255."""

# Cityscapes train ids. They are not imported from `rein.dgss.labels`, because that imports torch.
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
) = range(19)

BLACK: Colour = (0, 0, 0)
TYRE: Colour = (26, 26, 28)
METAL: Colour = (112, 116, 120)
TAIL_LIGHT_GLOW: Colour = (225, 24, 16)


def scaled(colour: Colour, factor: float, offset: float = 0.0) -> Colour:
    """Return `colour * factor + offset`, clipped to 0..255."""
    red, green, blue = (max(0.0, min(255.0, channel * factor + offset)) for channel in colour)
    return red, green, blue


def pick(random: Generator, colours: tuple[Colour, ...]) -> Colour:
    """Draw one of the colours."""
    return colours[int(random.integers(len(colours)))]
