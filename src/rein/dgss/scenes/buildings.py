"""Buildings, the walls, fences and hedges in front of them, and the skyline at the far end of the street."""

from typing import NamedTuple

from numpy.random import Generator

from rein.dgss.scenes.painter import NEAREST, TOWARDS_CAMERA, UPWARDS, Painter
from rein.dgss.scenes.palette import BUILDING, FENCE, VEGETATION, WALL, Colour, pick, scaled
from rein.dgss.scenes.patterns import BARS, BRICKS, LEAVES, TILES, WINDOWS
from rein.dgss.scenes.street import Side

# fmt: off
WALL_COLOURS: tuple[Colour, ...] = (
    (214, 198, 166), (168, 96, 74), (196, 152, 102), (186, 186, 182), (226, 222, 210),
    (204, 150, 126), (158, 170, 182), (140, 112, 92), (218, 186, 122), (172, 178, 150),
)
# fmt: on
ROOF_COLOURS: tuple[Colour, ...] = ((150, 78, 58), (122, 66, 54), (84, 84, 92), (104, 96, 90))
SHOP_COLOURS: tuple[Colour, ...] = ((148, 40, 40), (40, 84, 62), (36, 60, 110), (196, 160, 60), (70, 66, 64))
BORDER_STYLES: dict[int, tuple[int, Colour]] = {  # label and colour, by pattern
    BRICKS: (WALL, (168, 148, 128)),
    BARS: (FENCE, (150, 140, 126)),
    LEAVES: (VEGETATION, (62, 92, 44)),
}


class House(NamedTuple):
    """The appearance of a building; lengths in metres."""

    wall: Colour
    height: float
    roof: Colour | None  # None: a flat roof
    roof_height: float
    column: float
    window_width: float
    storey: float
    window_height: float
    shop: Colour | None
    lit: float
    seed: float


def draw_house(random: Generator, suburb: bool) -> House:
    """Draw the appearance of a building."""
    storeys = int(random.integers(1, 4) if suburb else random.integers(3, 8))
    storey = random.uniform(2.9, 3.5)
    shade = random.uniform(0.86, 1.08)
    pitched = random.random() < (0.9 if suburb else 0.45)
    return House(
        wall=scaled(pick(random, WALL_COLOURS), shade),
        height=storeys * storey + 0.5,
        roof=pick(random, ROOF_COLOURS) if pitched else None,
        roof_height=random.uniform(2.5, 4.5),
        column=random.uniform(1.9, 3.3),
        window_width=random.uniform(0.36, 0.62),
        storey=storey,
        window_height=random.uniform(0.42, 0.62),
        shop=pick(random, SHOP_COLOURS) if not suburb and random.random() < 0.5 else None,
        lit=random.uniform(0.2, 0.5),
        seed=random.uniform(0, 100),
    )


def paint_house(painter: Painter, house: House, side: Side, start: float, end: float, depth: float) -> None:
    """Paint a building between two distances: the roof, the wall that faces the camera, and the facade."""
    x, back, height = side.x(side.facade), side.x(side.facade + depth), house.height
    near = max(start, NEAREST)
    if end <= near + 0.3:
        return
    inward = (float(-side.sign), 0.0, 0.0)
    size = (house.column, house.window_width, house.storey, house.window_height, height)
    style = (float(house.shop is not None), house.seed, house.lit)
    along_street = painter.pattern(WINDOWS, 0.0, 1.0, -start, *size, *style)
    along_end = painter.pattern(WINDOWS, 1.0, 0.0, 200.0, *size, 0.0, house.seed + 7, house.lit)
    plane = painter.plane(x, near, x, end)
    ridge, top = side.x(side.facade + depth / 2), height + house.roof_height
    if house.roof is not None:
        tiles = painter.pattern(TILES, 0.0, 1.0, 0.0, *size, *style)
        slope = (inward[0] * 0.6, 0.8, 0.0)
        roof = painter.surface(BUILDING, house.roof, 1, plane, slope, cover=0.95, pattern=tiles)
        painter.polygon(roof, (x, height, near), (x, height, end), (ridge, top, end), (ridge, top, near))
    if start > NEAREST:
        wall = painter.surface(BUILDING, house.wall, start, None, TOWARDS_CAMERA, pattern=along_end)
        gable = [] if house.roof is None else [(ridge, top, start)]
        painter.polygon(wall, (x, 0, start), (back, 0, start), (back, height, start), *gable, (x, height, start))
    wall = painter.surface(BUILDING, house.wall, 1, plane, inward, pattern=along_street)
    _paint_band(painter, wall, x, near, end, 0, height)
    light = scaled(house.wall, 1.12)
    cornice = painter.surface(BUILDING, light, 1, plane, inward, cover=0.0 if house.roof else 0.7)
    _paint_band(painter, cornice, x, near, end, height - 0.3, height + 0.1)
    if house.shop is not None:
        sign = painter.surface(BUILDING, house.shop, 1, plane, inward, glow=scaled(house.shop, 0.7))
        _paint_band(painter, sign, x, near, end - 0.4, 2.75, 3.2)
    footprint = [(x, near), (x, end), (back, end), (back, near)]
    for corner, following in zip(footprint, footprint[1:] + footprint[:1], strict=True):
        painter.shade_wall(corner, following, height)


def _paint_band(painter: Painter, number: int, x: float, near: float, end: float, low: float, high: float) -> None:
    painter.polygon(number, (x, low, near), (x, low, end), (x, high, end), (x, high, near))


class Border(NamedTuple):
    """The appearance of a wall, a fence or a hedge."""

    kind: int  # BRICKS, BARS or LEAVES
    height: float  # metres
    shade: float


def draw_border(random: Generator) -> Border:
    """Draw the appearance of a wall, a fence or a hedge."""
    kind = int(random.choice((BRICKS, BARS, LEAVES), p=(0.3, 0.4, 0.3)))
    return Border(kind, random.uniform(0.9, 1.9), random.uniform(0.85, 1.1))


def paint_border(painter: Painter, border: Border, side: Side, start: float, end: float) -> None:
    """Paint a wall, a fence or a hedge along the pavement between two distances."""
    label, colour = BORDER_STYLES[border.kind]
    distance, height, near = side.pavement + 0.15, border.height, max(start, NEAREST)
    x = side.x(distance)
    if end <= near + 0.3:
        return
    pattern = painter.pattern(border.kind, 0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, height, 0.0, 0.0, 0.0)
    colour = scaled(colour, border.shade)
    plane = painter.plane(x, near, x, end)
    inward = (-0.7 * side.sign, 0.4, 0.0)
    number = painter.surface(label, colour, 1, plane, inward, pattern=pattern)
    _paint_band(painter, number, x, near, end, 0.0, height)
    if border.kind != BARS:
        top = painter.surface(label, scaled(colour, 1.15), 1, plane, UPWARDS, cover=0.95)
        back = side.x(distance + 0.4)
        painter.polygon(top, (x, height, near), (x, height, end), (back, height, end), (back, height, near))
    painter.shade_wall((x, near), (x, end), height)


def paint_skyline(painter: Painter, random: Generator) -> None:
    """Paint distant buildings and trees across the far end of the street."""
    z = 215.0
    for x in range(-190, 190, 15):
        height, width = random.uniform(4, 16), random.uniform(8, 15)
        colour = (158 + random.uniform(-12, 12), 160.0, 166.0)
        windows = painter.pattern(WINDOWS, 1.0, 0.0, 300.0, 3.4, 0.5, 3.3, 0.5, height, 0.0, x, 0.3)
        block = painter.surface(BUILDING, colour, z, None, TOWARDS_CAMERA, pattern=windows)
        painter.polygon(block, (x, 0, z), (x + width, 0, z), (x + width, height, z), (x, height, z))
    leaves = painter.pattern(LEAVES, 1.0, 0.0, 300.0, 9.0, 0.0, 9.0, 0.0, 9.0, 0.0, 0.0, 0.0)
    for z, tone in ((200.0, 1.0), (172.0, 0.88)):
        trees = painter.surface(VEGETATION, (96 * tone, 118 * tone, 88 * tone), z, cover=0.5, pattern=leaves)
        top = [(x, 2.5 + 5.5 * random.random() ** 2, z) for x in range(-200, 201, 4)]
        painter.polygon(trees, (-200, 0, z), *top, (200, 0, z))
