"""Generated street scenes with exact labels, to try domain generalisation without a download.

A street is laid out in metres from the seed alone, painted far to near into one image of surface numbers,
and read back as label, depth and colour. The same street then gets its look from `weather`: clear day, the
source domain, or fog, night, rain or snow, the target domains. numpy and Pillow only.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rein.dgss.classes import CITYSCAPES_CLASSES
from rein.dgss.weather import LOOKS, View, noise_tile
from rein.errors import InputError

DOMAINS = ("day", "fog", "night", "rain", "snow")

SKY_DEPTH = 1000.0
SMALLEST_SIDE = 32
SUPERSAMPLING = 2

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

Colour = tuple[float, float, float]
Point = tuple[float, float, float]
Generator = np.random.Generator

BLACK: Colour = (0, 0, 0)
TYRE: Colour = (26, 26, 28)
METAL: Colour = (112, 116, 120)
GLASS: Colour = (52, 64, 78)
HEADLIGHT_GLOW: Colour = (255, 244, 214)
TAIL_LIGHT_GLOW: Colour = (225, 24, 16)
LAMP_GLOW: Colour = (255, 214, 150)

TOWARDS_CAMERA = (0.0, 0.0, -1.0)
UPWARDS = (0.0, 1.0, 0.0)

NEAREST = 0.6  # metres; what stands closer is cut off there
FARTHEST = 150.0  # metres; the street ends here, the skyline stands behind


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
    view = _view(_generator(seed, 0), height, width)
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


def _scaled(colour: Colour, factor: float, more: float = 0.0) -> Colour:
    red, green, blue = (max(0.0, min(255.0, part * factor + more)) for part in colour)
    return red, green, blue


def _generator(*entropy: int) -> Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


# --- painting -------------------------------------------------------------------------------------------


class Camera(NamedTuple):
    """A pinhole camera at street x 0, z 0, looking along the street; all of it in supersampled pixels."""

    rows: int
    columns: int
    focal: float
    horizon: float  # row of the horizon
    centre: float  # column of the viewing direction
    height: float  # metres above the ground


# What makes a surface's columns bytes: label, colour, sun, glow, snow cover, two of depth, pattern, sky.
SURFACE_SCALES = (1, 1, 1, 1, 255, 1, 1, 1, 255, 0, 0, 0, 0)


class Painter:
    """Paints surfaces far to near into one image that holds the number of the surface each pixel shows.

    Every surface is an upright plane (or stands for one), so one over its depth is `first + second * a`
    where `a = (column - centre) / focal`: two numbers a surface give exact depth for every pixel.
    """

    def __init__(self, camera: Camera, bend: float, sun: tuple[float, float, float]) -> None:
        self.camera, self.bend, self.sun = camera, bend, sun
        shape = (camera.columns, camera.rows)
        self.numbers = Image.new("I", shape, 0)
        self.cast_shadow, self.contact_shadow = Image.new("L", shape, 0), Image.new("L", shape, 0)
        self.draw = ImageDraw.Draw(self.numbers)
        self.draw_cast = ImageDraw.Draw(self.cast_shadow)
        self.draw_contact = ImageDraw.Draw(self.contact_shadow)
        self.surfaces: list[tuple] = [(0.0,) * 13]  # number 0 is ground and sky, painted by `_ground`
        self.patterns: list[tuple] = [(0.0,) * 12]  # pattern 0 is plain
        self.lamps: list[tuple[float, float, float]] = []

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Return the pixel (column, row) of a point: metres right of the camera's lane, up, ahead."""
        camera, z = self.camera, max(z, NEAREST)
        scale = camera.focal / z
        return camera.centre + (x + self.bend * z * z) * scale, camera.horizon + (camera.height - y) * scale

    def plane(self, x0: float, z0: float, x1: float, z1: float) -> tuple[float, float]:
        """Return the two depth numbers of the upright plane through two ground points."""
        x0, x1 = x0 + self.bend * z0 * z0, x1 + self.bend * z1 * z1
        if abs(z1 - z0) < 1e-6:
            return 1.0 / z0, 0.0
        slope = (x1 - x0) / (z1 - z0)
        offset = x0 - slope * z0
        return (-slope / offset, 1.0 / offset) if abs(offset) > 1e-3 else (1.0 / max(z0, NEAREST), 0.0)

    def surface(
        self,
        label: int,
        colour: Colour,
        z: float = 1.0,
        plane: tuple[float, float] | None = None,
        normal: tuple[float, float, float] | None = None,
        glow: Colour = BLACK,
        cover: float = 0.0,
        pattern: int = 0,
    ) -> int:
        """Register a surface and return its number.

        `normal` decides how much sun it gets (without one: a rounded thing), `glow` is its own light after
        dark, `cover` the share of it on which snow stays.
        """
        sun = 0.5 if normal is None else max(0.0, sum(n * s for n, s in zip(normal, self.sun, strict=True)))
        first, second = plane or (1.0 / max(z, NEAREST), 0.0)
        self.surfaces.append((label, *colour, sun, *glow, cover, first, second, pattern, 0.0))
        return len(self.surfaces) - 1

    def pattern(self, *numbers: float) -> int:
        """Register a wall pattern, see `_paint_patterns`, and return its number."""
        self.patterns.append(numbers)
        return len(self.patterns) - 1

    def polygon(self, number: int, *points: tuple[float, float, float]) -> None:
        """Paint a polygon given in metres."""
        self.draw.polygon([self.at(*point) for point in points], fill=number)

    def shade(self, points: list[tuple[float, float]], height: float) -> None:
        """Cast the shadow that ground points (x, z) throw when lifted to `height` metres."""
        across, up, ahead = self.sun
        across, ahead = -across / up * height, -ahead / up * height
        self.draw_cast.polygon([self.at(x + across, 0.0, z + ahead) for x, z in points], fill=255)

    def shade_wall(self, start: tuple[float, float], end: tuple[float, float], height: float) -> None:
        """Cast the shadow of an upright wall between two ground points (x, z)."""
        across, up, ahead = self.sun
        across, ahead = -across / up * height, -ahead / up * height
        points = (start, end, (end[0] + across, end[1] + ahead), (start[0] + across, start[1] + ahead))
        self.draw_cast.polygon([self.at(x, 0.0, z) for x, z in points], fill=255)

    def darken(self, x0: float, x1: float, z0: float, z1: float) -> None:
        """Darken the ground under a thing: the light that cannot get there in any weather."""
        for margin, strength in ((0.2, 70), (0.05, 130), (-0.15, 190)):
            left, right, near, far = x0 - margin, x1 + margin, z0 - margin, z1 + margin
            corners = ((left, near), (right, near), (right, far), (left, far))
            self.draw_contact.polygon([self.at(x, 0.0, z) for x, z in corners], fill=strength)


class Figure:
    """Paints a flat thing that stands upright at one place: coordinates in metres from its foot."""

    def __init__(self, painter: Painter, x: float, z: float, squeeze: float = 1.0, size: float = 1.0) -> None:
        self.painter, self.z = painter, z
        self.foot = painter.at(x, 0.0, z)
        self.scale = painter.camera.focal / max(z, NEAREST) * size
        self.squeeze = squeeze

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.foot[0] + x * self.scale * self.squeeze, self.foot[1] - y * self.scale

    def surface(self, label: int, colour: Colour, glow: Colour = BLACK, cover: float = 0.0) -> int:
        return self.painter.surface(label, colour, self.z, glow=glow, cover=cover)

    def polygon(self, number: int, *points: tuple[float, float]) -> None:
        self.painter.draw.polygon([self.at(*point) for point in points], fill=number)

    def line(self, number: int, thickness: float, *points: tuple[float, float]) -> None:
        width = max(2, round(thickness * self.scale))  # two supersampled pixels, else nearest labels lose it
        self.painter.draw.line([self.at(*point) for point in points], fill=number, width=width, joint="curve")

    def disc(self, number: int, x: float, y: float, radius: float, stretch: float = 1.0) -> None:
        column, row = self.at(x, y)
        wide, high = max(radius * self.scale, 0.5), max(radius * self.scale * stretch, 0.5)
        self.painter.draw.ellipse((column - wide, row - high, column + wide, row + high), fill=number)

    def ring(self, number: int, x: float, y: float, radius: float, thickness: float) -> None:
        column, row = self.at(x, y)
        wide, high = max(radius * self.scale * abs(self.squeeze), 1.0), radius * self.scale
        box = (column - wide, row - high, column + wide, row + high)
        self.painter.draw.ellipse(box, outline=number, width=max(1, round(thickness * self.scale)))


# --- the plan of a street -------------------------------------------------------------------------------


class Side(NamedTuple):
    """One side of the street; all distances in metres from the camera's lane, towards the side."""

    sign: int  # -1 left, 1 right
    road: float  # where the road ends
    verge: float  # where the strip of grass ends; equal to road plus kerb without one
    pavement: float  # where the pavement ends
    facade: float  # where the buildings stand; a garden lies between

    def x(self, distance: float) -> float:
        return self.sign * distance


class Street(NamedTuple):
    """The plan of a street; metres."""

    lane: float
    lanes_left: int  # lanes of oncoming traffic
    lanes_right: int  # lanes in the camera's direction, its own the leftmost
    parking: tuple[bool, bool]  # a lane of parked cars left, right
    sides: tuple[Side, Side]
    crossing: float | None  # where a cross street begins
    crossing_width: float
    bend: float
    suburb: bool
    greenery: float  # 0 to 1
    bustle: float  # 0 to 1
    tram: bool


def _plan(random: Generator) -> Street:
    suburb = random.random() < 0.4
    lane = random.uniform(3.0, 3.6)
    lanes_left, lanes_right = (1 + int(random.random() < share) for share in (0.3, 0.4))
    parking = (random.random() < 0.6, random.random() < 0.6)
    tram = random.random() < 0.12
    sides = []
    for sign, lanes, parked in ((-1, lanes_left + 0.5, parking[0]), (1, lanes_right - 0.5, parking[1])):
        road = lanes * lane + (2.2 if parked else 0.5)
        verge = road + 0.2 + (random.uniform(1.3, 2.4) if random.random() < 0.45 else 0.0)
        pavement = verge + random.uniform(2.2, 4.2)
        garden = random.uniform(2.5, 6.0) if suburb else (random.uniform(1, 3) * (random.random() < 0.2))
        sides.append(Side(sign, road, verge, pavement, pavement + garden + 0.1))
    return Street(
        lane,
        lanes_left,
        lanes_right,
        parking,
        (sides[0], sides[1]),
        random.uniform(17.0, 42.0) if random.random() < 0.55 else None,
        random.uniform(7.0, 11.0),
        random.uniform(-1, 1) ** 3 * 0.0022,
        suburb,
        random.uniform(0.25, 1.0),
        random.uniform(0.25, 1.0),
        tram,
    )


def _camera(random: Generator, height: int, width: int) -> Camera:
    rows, columns = SUPERSAMPLING * height, SUPERSAMPLING * width
    return Camera(
        rows,
        columns,
        focal=(rows * columns) ** 0.5 * random.uniform(0.98, 1.2),  # between a fixed height and width angle
        horizon=rows * random.uniform(0.41, 0.52),
        centre=columns * random.uniform(0.44, 0.56),
        height=random.uniform(1.35, 2.1),
    )


def _sun(random: Generator) -> tuple[float, float, float]:
    """Return the direction to the sun: right, up, ahead; mostly from the side or from behind."""
    azimuth = random.choice((-1.0, 1.0)) * np.radians(random.uniform(35, 165))
    elevation = np.radians(random.uniform(32, 60))
    return (float(np.sin(azimuth) * np.cos(elevation)), float(np.sin(elevation)), float(np.cos(azimuth) * np.cos(elevation)))


def _view(random: Generator, height: int, width: int) -> View:
    """Lay out the street of a generator and look at it."""
    camera, street, sun = _camera(random, height, width), _plan(random), _sun(random)
    painter = Painter(camera, street.bend, sun)
    _paint_skyline(painter, random)
    things = _buildings(street, random) + _furniture(street, random) + _greenery(street, random)
    things += _traffic(street, random) + _people(street, random)
    for thing in _far_to_near(things):
        thing.paint(painter, *thing.arguments)
    return _read_back(painter, street)


class Thing(NamedTuple):
    """Something to paint; metres."""

    z: float
    paint: Callable
    arguments: tuple
    x: float = 0.0
    length: float = 0.0  # of what reaches from z ahead


def _far_to_near(things: list[Thing]) -> list[Thing]:
    """Order things for painting: what stands beside a long one, on the camera's side, comes after it."""
    long = [thing for thing in things if thing.length]

    def nearness(thing: Thing) -> float:
        z = thing.z
        for other in long:
            between = 0 < thing.x < other.x or other.x < thing.x < 0
            if between and other.z - 0.02 <= thing.z < other.z + other.length:
                z = min(z, other.z - 0.01)
        return -z

    return sorted(things, key=nearness)


# --- reading the painting back --------------------------------------------------------------------------

# Ground materials: label, colour, strength of the grain.
ASPHALT, MARKING, KERB, PAVING, GRASS, RAIL, WORN = range(7)
MATERIALS = (
    (ROAD, (102, 102, 106), 0.20),
    (ROAD, (226, 226, 220), 0.08),
    (SIDEWALK, (178, 174, 168), 0.08),
    (SIDEWALK, (158, 149, 140), 0.14),
    (TERRAIN, (104, 130, 66), 0.55),
    (ROAD, (72, 74, 80), 0.10),
    (ROAD, (92, 92, 97), 0.20),
)
TABLE_REACH, TABLE_STEPS = 60.0, 40  # the across-street table: metres to each side, entries a metre


def _across_tables(street: Street) -> np.ndarray:
    """Return the ground material by kind of row and place across the street, (5, places).

    Kinds of row: plain, between two dashes, cross street, zebra crossing, stop line.
    """
    left, right = street.sides
    x = np.arange(-TABLE_REACH, TABLE_REACH, 1 / TABLE_STEPS) + 0.5 / TABLE_STEPS
    plain = np.full(len(x), ASPHALT, np.uint8)
    on_road = (x > -left.road) & (x < right.road)
    lane_place = (x / street.lane + 0.5) % 1.0
    plain[on_road & (np.abs(np.abs(lane_place - 0.5) * street.lane - 0.75) < 0.28)] = WORN
    gaps = plain.copy()
    for index in range(-street.lanes_left, street.lanes_right + 1):
        line = np.abs(x - (index - 0.5) * street.lane) < 0.075
        outermost = index in (-street.lanes_left, street.lanes_right)
        plain[line] = MARKING
        if outermost:
            gaps[line] = MARKING
    if street.tram:
        for table in (plain, gaps):
            table[np.abs(np.abs(x + street.lane) - 0.72) < 0.06] = RAIL
    for side in street.sides:
        distance = x * side.sign
        for table in (plain, gaps):
            table[distance > side.road] = KERB
            table[distance > side.road + 0.2] = GRASS
            table[(distance > side.verge) & (distance < side.pavement)] = PAVING
            if not street.suburb:
                table[(distance > side.pavement) & (distance < side.facade + 0.5)] = PAVING
    cross_street = np.where(np.abs(x) < 45, ASPHALT, GRASS).astype(np.uint8)
    zebra = np.where(on_road, np.where((x % 1.1) < 0.55, MARKING, ASPHALT), gaps).astype(np.uint8)
    stop = np.where((x > -0.5 * street.lane) & (x < right.road - 0.3), MARKING, gaps).astype(np.uint8)
    return np.stack([plain, gaps, cross_street, zebra, stop])


def _row_kinds(street: Street, z: np.ndarray) -> np.ndarray:
    """Return the kind of each ground row, (rows,), from its distance in metres."""
    kinds = ((z % 8.0) > 3.4).astype(np.intp)
    if street.crossing is not None:
        near, far = street.crossing, street.crossing + street.crossing_width
        kinds[(z > near - 6.5) & (z < far + 4)] = 1
        kinds[(z > near) & (z < far)] = 2
        kinds[(z > near - 4.2) & (z < near - 1.0)] = 3
        kinds[(z > near - 5.6) & (z < near - 5.1)] = 4
    return kinds


def _read_back(painter: Painter, street: Street) -> View:
    """Turn surface numbers into label, depth and colour, and average the supersampled pixels."""
    camera = painter.camera
    a = ((np.arange(camera.columns) + 0.5 - camera.centre) / camera.focal).astype(np.float32)
    b = ((np.arange(camera.rows) + 0.5 - camera.horizon) / camera.focal).astype(np.float32)
    numbers = np.asarray(painter.numbers)
    table = np.array(painter.surfaces, np.float32)
    bytes_table = np.clip(table * np.array(SURFACE_SCALES, np.float32), 0, 255).astype(np.uint8)

    first, second = table[:, 9].take(numbers), table[:, 10].take(numbers)
    depth = np.float32(1) / np.clip(first + second * a, 1.0 / 500.0, 1.0 / NEAREST)
    label = bytes_table[:, 0].take(numbers)
    colour = bytes_table[:, 1:4].take(numbers, axis=0)
    glow = bytes_table[:, 5:8].take(numbers, axis=0)
    shares = bytes_table[:, (4, 8, 12)].take(numbers, axis=0)  # sun, snow cover, sky

    _paint_patterns(painter, numbers, table[:, 11].astype(np.int16), a, b, depth, colour, glow)
    horizon = int(np.searchsorted(b, 1e-4))
    is_sky = numbers[:horizon] == 0
    label[:horizon][is_sky] = SKY
    depth[:horizon][is_sky] = SKY_DEPTH
    shares[:horizon, :, 2] = is_sky * np.uint8(255)
    _paint_ground(painter, street, np.flatnonzero(numbers == 0), a, b, label, depth, colour, shares)

    step, shares = SUPERSAMPLING, _average(shares)
    return View(
        albedo=_average(colour),
        sky=shares[..., 2],
        sun=shares[..., 0],
        glow=_average(glow),
        cover=shares[..., 1],
        label=np.ascontiguousarray(label[::step, ::step]),
        depth=np.ascontiguousarray(depth[::step, ::step]),
        a=a[::step],
        b=b[::step],
        camera_height=camera.height,
        bend=street.bend,
        lane=street.lane,
        lamps=np.array(painter.lamps, np.float32).reshape(-1, 3),
        sun_direction=painter.sun,
    )


def _average(layer: np.ndarray) -> np.ndarray:
    """Average supersampled bytes to float32 in 0..1."""
    small = np.asarray(Image.fromarray(layer).reduce(SUPERSAMPLING))
    return small.astype(np.float32) * np.float32(1 / 255)


def _paint_ground(
    painter: Painter,
    street: Street,
    where: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    label: np.ndarray,
    depth: np.ndarray,
    colour: np.ndarray,
    shares: np.ndarray,
) -> None:
    """Fill in place those pixels without a surface (flat indices `where`) that lie below the horizon."""
    camera, noise = painter.camera, noise_tile()
    horizon = int(np.searchsorted(b, 1e-4))
    where = where[np.searchsorted(where, horizon * camera.columns) :].astype(np.int32)
    row, column = np.divmod(where, np.int32(camera.columns))
    row -= horizon
    row_z = np.minimum(camera.height / b[horizon:], 500.0).astype(np.float32)

    z = row_z.take(row)
    x = a.take(column) * z - (street.bend * row_z * row_z).take(row)
    places = int(2 * TABLE_REACH * TABLE_STEPS)
    place = np.clip((x + TABLE_REACH) * TABLE_STEPS, 0, places - 1).astype(np.int32)
    place += (_row_kinds(street, row_z) * places).astype(np.int32).take(row)
    material = _across_tables(street).ravel().take(place)
    labels, colours, grains = zip(*MATERIALS, strict=True)

    scale = np.float32(24.0 * max(1.0, min(2.0, camera.rows / 512)))
    size = len(noise)
    cell = ((row_z * scale).astype(np.int32) % size * size).take(row) + ((x * scale).astype(np.int32) & (size - 1))
    fade = (1 / (1 + row_z / 14)).astype(np.float32).take(row)
    bright = 1 + 2 * np.array(grains, np.float32).take(material) * fade * (noise.ravel().take(cell) - np.float32(0.5))
    joint = (x - np.floor(x) < 0.07) | (row_z % 1.0 < 0.07).take(row)
    bright -= np.float32(0.22) * fade * (joint & (material == PAVING))
    bright *= 1 - np.asarray(painter.contact_shadow).ravel().take(where) * np.float32(0.85 / 255)
    paint = np.array(colours, np.float32).take(material, axis=0) * bright[:, None]

    label.ravel()[where] = np.array(labels, np.uint8).take(material)
    depth.ravel()[where] = z
    colour.reshape(-1, 3)[where] = np.minimum(paint, 255).astype(np.uint8)
    sunny = (255 - np.asarray(painter.cast_shadow).ravel().take(where)) * np.float32(painter.sun[1])
    shares.reshape(-1, 3)[where, 0] = sunny.astype(np.uint8)


# Kinds of pattern.
WINDOWS, BRICKS, BARS, LEAVES, TILES = range(1, 6)


def _paint_patterns(
    painter: Painter,
    numbers: np.ndarray,
    pattern_of: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    depth: np.ndarray,
    colour: np.ndarray,
    glow: np.ndarray,
) -> None:
    """Paint windows, bricks, fence bars and leaves in place, by metres along and up each wall.

    A pattern is (kind, along x, along z, along offset, column width, window width, storey height,
    window height, wall height, shop, seed, lit share); lengths in metres, window sizes as shares.
    """
    pattern = pattern_of.take(numbers)
    where = np.flatnonzero(pattern)
    if not len(where):
        return
    pattern = pattern.ravel().take(where)
    rows, columns = np.divmod(where.astype(np.int32), np.int32(numbers.shape[1]))
    z = depth.ravel().take(where)
    across = a.take(columns) * z
    up = painter.camera.height - b.take(rows) * z
    table = np.array(painter.patterns, np.float32)

    def of(column: int) -> np.ndarray:
        return table[:, column].take(pattern)

    along = of(1) * across + of(2) * z + of(3)
    kind, top = of(0), of(8)
    noise = noise_tile()
    size = len(noise)
    speck = noise.ravel().take(((up * 20).astype(np.int32) & (size - 1)) * size + ((along * 20).astype(np.int32) & (size - 1)))
    wide, high = of(4), of(6)
    column, storey = along / wide, up / high
    column_index, storey_index = np.floor(column), np.floor(storey)
    column -= column_index
    storey -= storey_index
    shop = (of(9) > 0) & (storey_index == 0)
    dx = np.abs(column - np.float32(0.5)) - np.where(shop, np.float32(0.44), of(5) * np.float32(0.5))
    dy = np.abs(storey - np.float32(0.5)) - np.where(shop, np.float32(0.36), of(7) * np.float32(0.5))
    inside = np.maximum(dx * wide, dy * high)  # metres to the window's edge, negative inside
    inside[(kind != WINDOWS) | (up > top - np.float32(0.25)) | (up < 0)] = 1.0
    window = np.flatnonzero(inside < 0)

    bright = np.float32(0.92) + np.float32(0.16) * speck
    bright[inside < 0.14] = 1.14  # the frame; panes are painted below
    other = np.flatnonzero(kind != WINDOWS)
    bright[other] = _wall_grain(kind[other], along[other], up[other], top[other], speck[other])
    bright *= np.minimum(np.float32(1), np.float32(0.78) + np.float32(0.22) * up)  # darker near the ground

    flat = colour.reshape(-1, 3)
    paint = flat.take(where, axis=0) * bright[:, None]
    chance = np.sin(column_index[window] * 12.9898 + storey_index[window] * 78.233 + of(10)[window]) * 43758.547
    chance -= np.floor(chance)  # a number in 0..1 for each window
    pane = 0.3 + 0.55 * chance + 0.5 * storey[window]
    paint[window] = pane[:, None] * np.array((84, 100, 120), np.float32)
    flat[where] = np.minimum(paint, 255).astype(np.uint8)

    is_lit = chance < of(11)[window]
    warmth = chance[is_lit] * 97.0
    warmth -= np.floor(warmth)
    light = np.stack([230 + 25 * warmth, 172 + 50 * warmth, 88 + 80 * warmth], 1)
    light *= ((0.5 + 0.4 * warmth) * np.where(shop[window[is_lit]], 0.6, 1.0))[:, None]  # shops are large
    glow.reshape(-1, 3)[where[window[is_lit]]] = light.astype(np.uint8)


def _wall_grain(kind: np.ndarray, along: np.ndarray, up: np.ndarray, top: np.ndarray, speck: np.ndarray) -> np.ndarray:
    """Return the brightness of bricks, fence bars, leaves and tiles by metres along and up, (N,)."""
    course = np.floor(up / 0.4)
    brick = (along + 0.4 * (course % 2)) / 0.8
    mortar = (up / 0.4 - course < 0.17) | (brick - np.floor(brick) < 0.09)
    bar = along / 0.32 - np.floor(along / 0.32) < 0.4
    bar |= (np.abs(up - top + 0.15) < 0.09) | (np.abs(up - 0.25) < 0.07)
    seam = along / 1.1 - np.floor(along / 1.1) < 0.22
    kinds = [kind == BRICKS, kind == BARS, kind == LEAVES]
    return np.select(
        kinds,
        [(0.8 + 0.4 * speck) * (1 - 0.25 * mortar), np.where(bar, 1.0, 0.5), 0.5 + speck],
        (0.84 + 0.32 * speck) * (1 - 0.14 * seam),
    )


# --- buildings, walls, fences ---------------------------------------------------------------------------

# fmt: off
WALL_COLOURS: tuple[Colour, ...] = (
    (214, 198, 166), (168, 96, 74), (196, 152, 102), (186, 186, 182), (226, 222, 210),
    (204, 150, 126), (158, 170, 182), (140, 112, 92), (218, 186, 122), (172, 178, 150),
)
# fmt: on
ROOF_COLOURS: tuple[Colour, ...] = ((150, 78, 58), (122, 66, 54), (84, 84, 92), (104, 96, 90))
SHOP_COLOURS: tuple[Colour, ...] = ((148, 40, 40), (40, 84, 62), (36, 60, 110), (196, 160, 60), (70, 66, 64))


class House(NamedTuple):
    """What a building looks like; metres."""

    wall: Colour
    height: float
    roof: Colour | None  # None: a flat one
    roof_height: float
    column: float
    window_width: float
    storey: float
    window_height: float
    shop: Colour | None
    lit: float
    seed: float


def _pick(random: Generator, colours: tuple[Colour, ...]) -> Colour:
    return colours[int(random.integers(len(colours)))]


def _house(street: Street, random: Generator) -> House:
    pick = partial(_pick, random)
    storeys = int(random.integers(1, 4) if street.suburb else random.integers(3, 8))
    storey = random.uniform(2.9, 3.5)
    shade = random.uniform(0.86, 1.08)
    pitched = random.random() < (0.9 if street.suburb else 0.45)
    return House(
        wall=_scaled(pick(WALL_COLOURS), shade),
        height=storeys * storey + 0.5,
        roof=pick(ROOF_COLOURS) if pitched else None,
        roof_height=random.uniform(2.5, 4.5),
        column=random.uniform(1.9, 3.3),
        window_width=random.uniform(0.36, 0.62),
        storey=storey,
        window_height=random.uniform(0.42, 0.62),
        shop=pick(SHOP_COLOURS) if not street.suburb and random.random() < 0.5 else None,
        lit=random.uniform(0.2, 0.5),
        seed=random.uniform(0, 100),
    )


def _buildings(street: Street, random: Generator) -> list[Thing]:
    """Fill both sides with buildings, some gaps between them, and a wall, fence or hedge before gardens."""
    things: list[Thing] = []
    for side in street.sides:
        z = random.uniform(-8, 0)
        while z < FARTHEST:
            end = z + (random.uniform(8, 15) if street.suburb else random.uniform(9, 22))
            if street.crossing is not None and z < street.crossing + street.crossing_width + 2 < FARTHEST:
                if z >= street.crossing - 3:
                    z = street.crossing + street.crossing_width + 2
                    continue
                end = min(end, street.crossing - 1.5)
            if random.random() < (0.1 if 4 < z < 45 else 0.2):
                things.append(Thing(end, _paint_border, _border(random, side, z, end, side.pavement + 0.15)))
            else:
                house = _house(street, random)
                depth = random.uniform(8, 13)
                things.append(Thing(end, _paint_house, (house, side, side.facade, z, end, depth)))
                if side.facade - side.pavement > 1.5 and random.random() < 0.8:
                    border = _border(random, side, z, end, side.pavement + 0.15)
                    things.append(Thing(end - 0.01, _paint_border, border))
            z = end + (random.uniform(1.5, 6) if street.suburb else 3.0 * (random.random() < 0.25))
    return things


def _paint_house(painter: Painter, house: House, side: Side, facade: float, start: float, end: float, depth: float) -> None:
    x, back, height = side.x(facade), side.x(facade + depth), house.height
    near = max(start, NEAREST)
    if end <= near + 0.3:
        return
    inward = (float(-side.sign), 0.0, 0.0)
    size = (house.column, house.window_width, house.storey, house.window_height, height)
    looks = (float(house.shop is not None), house.seed, house.lit)
    along_street = painter.pattern(WINDOWS, 0.0, 1.0, -start, *size, *looks)
    along_end = painter.pattern(WINDOWS, 1.0, 0.0, 200.0, *size, 0.0, house.seed + 7, house.lit)
    plane = painter.plane(x, near, x, end)
    if house.roof is not None:
        ridge, top = side.x(facade + depth / 2), height + house.roof_height
        tiles = painter.pattern(TILES, 0.0, 1.0, 0.0, *size, *looks)
        slope = (inward[0] * 0.6, 0.8, 0.0)
        roof = painter.surface(BUILDING, house.roof, 1, plane, slope, cover=0.95, pattern=tiles)
        painter.polygon(roof, (x, height, near), (x, height, end), (ridge, top, end), (ridge, top, near))
    if start > NEAREST:
        wall = painter.surface(BUILDING, house.wall, start, None, TOWARDS_CAMERA, pattern=along_end)
        outline = [(x, 0, start), (back, 0, start), (back, height, start), (x, height, start)]
        if house.roof is not None:
            outline.insert(3, (ridge, top, start))
        painter.polygon(wall, *outline)
    wall = painter.surface(BUILDING, house.wall, 1, plane, inward, pattern=along_street)
    painter.polygon(wall, (x, 0, near), (x, 0, end), (x, height, end), (x, height, near))
    light = _scaled(house.wall, 1.12)
    cornice = painter.surface(BUILDING, light, 1, plane, inward, cover=0.0 if house.roof else 0.7)
    _paint_band(painter, cornice, x, near, end, height - 0.3, height + 0.1)
    if house.shop is not None:
        sign = painter.surface(BUILDING, house.shop, 1, plane, inward, glow=_scaled(house.shop, 0.7))
        _paint_band(painter, sign, x, near, end - 0.4, 2.75, 3.2)
    footprint = [(x, near), (x, end), (back, end), (back, near)]
    for first in range(4):
        corners = footprint[first], footprint[(first + 1) % 4]
        painter.shade_wall(*corners, height)


def _paint_band(painter: Painter, number: int, x: float, near: float, end: float, low: float, high: float) -> None:
    painter.polygon(number, (x, low, near), (x, low, end), (x, high, end), (x, high, near))


BORDERS: dict[int, tuple[int, Colour]] = {
    BRICKS: (WALL, (168, 148, 128)),
    BARS: (FENCE, (150, 140, 126)),
    LEAVES: (VEGETATION, (62, 92, 44)),
}


def _border(random: Generator, side: Side, start: float, end: float, distance: float) -> tuple:
    kind = int(random.choice((BRICKS, BARS, LEAVES), p=(0.3, 0.4, 0.3)))
    return kind, side, distance, start, end, random.uniform(0.9, 1.9), random.uniform(0.85, 1.1)


def _paint_border(
    painter: Painter, kind: int, side: Side, distance: float, start: float, end: float, height: float, shade: float
) -> None:
    """Paint a wall, a fence or a hedge along the pavement."""
    label, colour = BORDERS[kind]
    near, x = max(start, NEAREST), side.x(distance)
    if end <= near + 0.3:
        return
    pattern = painter.pattern(kind, 0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, height, 0.0, 0.0, 0.0)
    colour = _scaled(colour, shade)
    plane = painter.plane(x, near, x, end)
    inward = (-0.7 * side.sign, 0.4, 0.0)
    number = painter.surface(label, colour, 1, plane, inward, pattern=pattern)
    _paint_band(painter, number, x, near, end, 0.0, height)
    if kind != BARS:
        top = painter.surface(label, _scaled(colour, 1.15), 1, plane, UPWARDS, cover=0.95)
        back = side.x(distance + 0.4)
        painter.polygon(top, (x, height, near), (x, height, end), (back, height, end), (back, height, near))
    painter.shade_wall((x, near), (x, end), height)


def _paint_skyline(painter: Painter, random: Generator) -> None:
    """Close the far end of the street: blocks and trees in the distance."""
    for x in range(-190, 190, 15):
        height, width = random.uniform(4, 16), random.uniform(8, 15)
        colour = (158 + random.uniform(-12, 12), 160.0, 166.0)
        house = painter.pattern(WINDOWS, 1.0, 0.0, 300.0, 3.4, 0.5, 3.3, 0.5, height, 0.0, x, 0.3)
        number = painter.surface(BUILDING, colour, 215, None, TOWARDS_CAMERA, pattern=house)
        painter.polygon(*_upright(number, x, x + width, 0, height, 215))
    leaves = painter.pattern(LEAVES, 1.0, 0.0, 300.0, 9.0, 0.0, 9.0, 0.0, 9.0, 0.0, 0.0, 0.0)
    for z, tone in ((200.0, 1.0), (172.0, 0.88)):
        trees = painter.surface(VEGETATION, (96 * tone, 118 * tone, 88 * tone), z, cover=0.5, pattern=leaves)
        top = [(x, 2.5 + 5.5 * random.random() ** 2, z) for x in range(-200, 201, 4)]
        painter.polygon(trees, (-200, 0, z), *top, (200, 0, z))


def _upright(number: int, x0: float, x1: float, low: float, high: float, z: float) -> tuple:
    """Return the arguments of `Painter.polygon` for a rectangle that faces the camera."""
    return number, (x0, low, z), (x1, low, z), (x1, high, z), (x0, high, z)


# --- trees ----------------------------------------------------------------------------------------------

CIRCLE = tuple((float(np.cos(angle)), float(np.sin(angle))) for angle in np.arange(12) * np.pi / 6)
TONES = 6  # levels of light in a crown


class Tree(NamedTuple):
    """What a tree looks like; metres."""

    colour: Colour
    trunk: float
    width: float
    height: float
    conifer: bool
    shape: int  # which of the crowns


def _greenery(street: Street, random: Generator) -> list[Thing]:
    """Plant trees along the verges or pavements, and bushes and trees in the gardens."""
    things: list[Thing] = []
    hue = random.uniform(-1, 1)

    def tree(size: float) -> Tree:
        dark = random.uniform(0.85, 1.12)
        colour = ((80 + 18 * hue) * dark, (116 + 4 * hue) * dark, (52 - 6 * hue) * dark)
        conifer = random.random() < 0.12
        width = size * (0.55 if conifer else random.uniform(0.75, 1.05))
        trunk = size * (0.08 if conifer else random.uniform(0.28, 0.42))
        return Tree(colour, trunk, width, size, conifer, int(random.integers(CROWNS)))

    for side in street.sides:
        has_verge = side.verge - side.road > 1
        if random.random() < 0.35 + 0.6 * street.greenery or has_verge:
            distance = (side.road + side.verge) / 2 + 0.1 if has_verge else side.road + 0.7
            spacing = random.uniform(8, 17) - 3 * street.greenery
            for z in np.arange(random.uniform(7, 16), 110, spacing):
                if _clear(street, z) and random.random() < 0.85:
                    z = float(z + random.uniform(-1, 1))
                    things.append(Thing(z, _paint_tree, (tree(random.uniform(4.5, 8.5)), side.x(distance), z)))
        behind = (4 if street.suburb else 1) + int(4 * street.greenery)
        for z in random.uniform(8, 130, behind):
            distance = side.facade + random.uniform(11, 25)
            things.append(Thing(float(z), _paint_tree, (tree(random.uniform(6, 11)), side.x(distance), float(z))))
        if side.facade - side.pavement > 2:
            for z in random.uniform(5, 70, 7):
                bush = tree(random.uniform(1.2, 2.6))._replace(trunk=0.0, conifer=False)
                distance = random.uniform(side.pavement + 0.9, side.facade - 0.6)
                if _clear(street, z):
                    things.append(Thing(float(z), _paint_tree, (bush, side.x(distance), float(z))))
    return things


def _clear(street: Street, z: float) -> bool:
    """Return whether a place along the street is outside the cross street and its zebra crossing."""
    return street.crossing is None or not street.crossing - 6 < z < street.crossing + street.crossing_width + 2


CROWNS, CROWN_CELLS = 8, 320


@lru_cache(maxsize=4 * CROWNS)
def _crown(shape: int, conifer: bool, sun_side: int) -> tuple[Image.Image, Image.Image]:
    """Return a crown's tones and where it is, both "L": a noisy blob or triangle, lit from above and one side."""
    noise, cells = noise_tile(), CROWN_CELLS
    y, x = np.meshgrid(*2 * [np.linspace(-1, 1, cells, dtype=np.float32)], indexing="ij")
    first, second = 61 * shape + 7, 37 * shape + 120
    index = np.arange(cells) * 96 // cells
    coarse = noise[np.ix_((index + first) % 512, (index + second) % 512)] - 0.5
    index = np.arange(cells) * 300 // cells
    fine = noise[np.ix_((index + second) % 512, (index + first) % 512)] - 0.5
    triangle, ball = np.abs(x) - 0.48 * (y + 1), x * x + y * y - 0.72
    where = triangle < 0.35 * fine if conifer else ball < -1.1 * coarse - 0.38 * fine
    tone = 0.45 + 0.7 * coarse + 0.5 * fine + 0.22 * sun_side * x - 0.3 * y
    tone = np.clip(tone * TONES, 0, TONES - 1).astype(np.uint8)
    return Image.fromarray(tone), Image.fromarray(where.astype(np.uint8) * np.uint8(255))


def _paint_tree(painter: Painter, tree: Tree, x: float, z: float) -> None:
    figure = Figure(painter, x, z)
    if tree.trunk > 0:
        bark = figure.surface(VEGETATION, (92, 76, 60))
        half, top = 0.03 + 0.022 * tree.height, tree.trunk + 0.25 * tree.height
        figure.polygon(bark, (-half, 0), (half, 0), (half * 0.7, top), (-half * 0.7, top))
    high = (tree.height - tree.trunk) * figure.scale
    wide = tree.width * figure.scale
    column, row = figure.at(0, tree.trunk)
    box = (round(column - wide / 2), round(row - high), round(column + wide / 2) + 1, round(row) + 1)
    camera = painter.camera
    if box[2] <= 0 or box[0] >= camera.columns or box[3] <= 0:
        return
    first = len(painter.surfaces)
    for tone in range(TONES):
        bright = 0.52 + 0.85 * tone / (TONES - 1)
        colour = _scaled(tree.colour, bright)
        cover = max(0.0, tone - 1.5) / (TONES - 2)
        figure.surface(VEGETATION, colour, cover=min(0.9, cover))
    size = (box[2] - box[0], box[3] - box[1])
    tones, where = _crown(tree.shape, tree.conifer, 1 if painter.sun[0] > 0 else -1)
    tones, where = (layer.resize(size, Image.Resampling.NEAREST) for layer in (tones, where))
    painter.numbers.paste(Image.fromarray(np.asarray(tones, np.int32) + np.int32(first)), box, where)
    for part, share in ((0.35, 0.38), (0.75, 0.36)) if z < 70 else ():
        circle = [(x + tree.width * share * u, z + tree.width * share * v) for u, v in CIRCLE]
        painter.shade(circle, tree.trunk + part * (tree.height - tree.trunk))
    painter.darken(x - 0.2, x + 0.2, z - 0.1, z + 0.2)


# --- poles, lights, signs -------------------------------------------------------------------------------

SIGN_BLUE: Colour = (28, 84, 170)
SIGN_RED: Colour = (200, 32, 38)
SIGN_WHITE: Colour = (240, 240, 238)
SIGN_YELLOW: Colour = (244, 200, 40)


def _furniture(street: Street, random: Generator) -> list[Thing]:
    """Place street lamps, traffic lights, signs and bollards along the kerbs."""
    things: list[Thing] = []
    spacing, first = random.uniform(20, 30), random.uniform(9, 16)
    for index, side in enumerate(street.sides):
        for z in np.arange(first + index * spacing / 2, 120, spacing):
            if _clear(street, z):
                things.append(Thing(float(z), _paint_lamp, (side.x(side.road + 0.45), float(z), side.sign)))
        for z in random.uniform(8, 55, int(random.integers(2, 5))):
            kind, size = int(random.integers(6)), random.uniform(0.85, 1.15)
            x = side.x(side.road + random.uniform(0.5, 0.9))
            if not _clear(street, z):
                continue
            things.append(Thing(float(z), _paint_sign, (x, float(z), kind, size, random.uniform(2.1, 2.5))))
        if random.random() < 0.3:
            start = random.uniform(6, 18)
            for z in np.arange(start, start + 15, 2.0):
                if _clear(street, z):
                    things.append(Thing(float(z), _paint_bollard, (side.x(side.road + 0.4), float(z))))
    if street.crossing is not None and random.random() < 0.8:
        state = int(random.integers(3))
        for z in (street.crossing - 4.6, street.crossing + street.crossing_width + 3):
            for side in street.sides:
                things.append(Thing(z, _paint_traffic_light, (side.x(side.road + 0.5), z, state)))
    if random.random() < 0.25:
        z = random.uniform(28, 60)
        right = street.sides[1]
        things.append(Thing(z, _paint_panel, (right.x(right.road + 0.6), z, random.uniform(2.4, 3.2))))
    return things


def _paint_lamp(painter: Painter, x: float, z: float, sign: int) -> None:
    figure, arm, top = Figure(painter, x, z), -1.9 * sign, 6.6
    pole = figure.surface(POLE, METAL)
    figure.polygon(pole, (-0.1, 0), (0.1, 0), (0.07, top), (-0.07, top))
    figure.line(pole, 0.09, (0, top - 0.5), (arm * 0.5, top), (arm, top + 0.05))
    head = figure.surface(POLE, (206, 206, 200), glow=LAMP_GLOW, cover=0.2)
    figure.line(head, 0.2, (arm * 0.72, top), (arm * 1.12, top + 0.03))
    painter.lamps.append((x + arm + painter.bend * z * z, top, z))
    painter.shade([(x - 0.1, z), (x + 0.1, z), (x + 0.1, z + 0.1)], 0.0)
    painter.shade_wall((x - 0.08, z), (x + 0.08, z), top)
    painter.darken(x - 0.12, x + 0.12, z, z + 0.15)


def _paint_bollard(painter: Painter, x: float, z: float) -> None:
    figure = Figure(painter, x, z)
    figure.polygon(figure.surface(POLE, (72, 72, 76)), (-0.08, 0), (0.08, 0), (0.08, 0.95), (-0.08, 0.95))
    figure.polygon(figure.surface(POLE, (225, 225, 220)), (-0.08, 0.7), (0.08, 0.7), (0.08, 0.82), (-0.08, 0.82))
    painter.darken(x - 0.1, x + 0.1, z, z + 0.1)


def _paint_sign(painter: Painter, x: float, z: float, kind: int, size: float, low: float) -> None:
    """Paint a sign on its pole: no entry, limit, warning, parking, priority or stop."""
    figure, half = Figure(painter, x, z), 0.42 * size
    middle = low + half
    figure.line(figure.surface(POLE, METAL), 0.09, (0, 0), (0, middle))
    red, white = figure.surface(TRAFFIC_SIGN, SIGN_RED), figure.surface(TRAFFIC_SIGN, SIGN_WHITE)
    if kind in (0, 1):
        figure.disc(red, 0, middle, half)
        if kind == 0:
            bar = half * 0.62
            figure.polygon(white, (-bar, middle - 0.09), (bar, middle - 0.09), (bar, middle + 0.09), (-bar, middle + 0.09))
        else:
            figure.disc(white, 0, middle, half * 0.72)
            figure.line(figure.surface(TRAFFIC_SIGN, TYRE), 0.08, (0, middle - 0.15), (0, middle + 0.15))
    elif kind == 2:
        figure.polygon(red, (-half, middle - half * 0.8), (half, middle - half * 0.8), (0, middle + half))
        inner = half * 0.58
        figure.polygon(white, (-inner, middle - half * 0.6), (inner, middle - half * 0.6), (0, middle + inner))
    elif kind == 3:
        blue = figure.surface(TRAFFIC_SIGN, SIGN_BLUE)
        figure.polygon(blue, (-half, low), (half, low), (half, middle + half), (-half, middle + half))
        figure.line(white, 0.09, (-half * 0.3, middle - half * 0.5), (-half * 0.3, middle + half * 0.5))
        figure.disc(white, half * 0.1, middle + half * 0.25, half * 0.33)
    elif kind == 4:
        yellow = figure.surface(TRAFFIC_SIGN, SIGN_YELLOW)
        for number, radius in ((white, half * 1.2), (yellow, half * 0.9)):
            figure.polygon(number, (-radius, middle), (0, middle - radius), (radius, middle), (0, middle + radius))
    else:
        edge, cut = half, half * 0.41
        corners = [(-edge, -cut), (-cut, -edge), (cut, -edge), (edge, -cut), (edge, cut), (cut, edge)]
        corners += [(-cut, edge), (-edge, cut)]
        figure.polygon(red, *((u, middle + v) for u, v in corners))
        figure.line(white, 0.14, (-half * 0.6, middle), (half * 0.6, middle))
    painter.shade_wall((x - 0.05, z), (x + 0.05, z), middle)


def _paint_panel(painter: Painter, x: float, z: float, width: float) -> None:
    """Paint a blue direction panel on two poles."""
    figure = Figure(painter, x + width / 2, z)
    pole = figure.surface(POLE, METAL)
    for foot in (-0.35 * width, 0.35 * width):
        figure.line(pole, 0.13, (foot, 0), (foot, 3.6))
    white, blue = figure.surface(TRAFFIC_SIGN, SIGN_WHITE), figure.surface(TRAFFIC_SIGN, SIGN_BLUE)
    for number, inset in ((white, 0.0), (blue, 0.07)):
        half, low, high = width / 2 - inset, 2.4 + inset, 3.9 - inset
        figure.polygon(number, (-half, low), (half, low), (half, high), (-half, high))
    for row, end in ((3.45, 0.25), (2.9, 0.05)):
        figure.line(white, 0.16, (-width * 0.38, row), (width * end, row))


def _paint_traffic_light(painter: Painter, x: float, z: float, state: int) -> None:
    figure = Figure(painter, x, z)
    figure.line(figure.surface(POLE, METAL), 0.13, (0, 0), (0, 2.4))
    box = figure.surface(TRAFFIC_LIGHT, (44, 48, 46))
    figure.polygon(box, (-0.24, 2.25), (0.24, 2.25), (0.24, 3.4), (-0.24, 3.4))
    for index, colour in enumerate(((250, 60, 48), (250, 186, 50), (70, 235, 140))):
        lit = index == state
        dim = _scaled(colour, 0.28)
        lens = figure.surface(TRAFFIC_LIGHT, colour if lit else dim, glow=colour if lit else BLACK)
        figure.disc(lens, 0, 3.2 - 0.37 * index, 0.15)
    painter.shade_wall((x - 0.06, z), (x + 0.06, z), 3.3)
    painter.darken(x - 0.12, x + 0.12, z, z + 0.15)


# --- vehicles -------------------------------------------------------------------------------------------


class Vehicle(NamedTuple):
    """A vehicle's lengthwise profile, from the tail over the roof to the nose; metres.

    Each profile point is (along, up, half width); the faces between them are body, glass or roof.
    """

    label: int
    profile: tuple[Point, ...]
    faces: str  # one letter a face: b body, g glass, r roof or bonnet
    windows: tuple[float, float, float, float, float, float]  # along: low and high ends, up: low, high
    panes: int
    wheels: tuple[float, ...]
    wheel_radius: float


# fmt: off
VEHICLES: dict[str, Vehicle] = {
    "hatchback": Vehicle(
        CAR,
        ((0.05, 0.24, 0.82), (0, 0.6, 0.88), (0.08, 0.95, 0.86), (0.55, 1.47, 0.64), (2.2, 1.5, 0.66),
         (3.1, 0.99, 0.84), (3.95, 0.8, 0.8), (4.1, 0.55, 0.84), (4.05, 0.24, 0.82)),
        "bbgrgrbb", (0.4, 0.75, 2.1, 2.85, 0.98, 1.4), 2, (0.75, 3.25), 0.33,
    ),
    "saloon": Vehicle(
        CAR,
        ((0.05, 0.24, 0.84), (0, 0.6, 0.9), (0.1, 0.98, 0.84), (0.75, 1.02, 0.86), (1.4, 1.42, 0.64),
         (2.7, 1.45, 0.65), (3.5, 0.98, 0.86), (4.45, 0.8, 0.8), (4.6, 0.55, 0.86), (4.55, 0.24, 0.84)),
        "bbrgrgrbb", (1.0, 1.45, 2.6, 3.25, 0.98, 1.36), 2, (0.85, 3.65), 0.33,
    ),
    "estate": Vehicle(
        CAR,
        ((0.05, 0.28, 0.88), (0, 0.7, 0.93), (0.05, 1.1, 0.92), (0.4, 1.66, 0.74), (2.7, 1.7, 0.76),
         (3.45, 1.12, 0.9), (4.4, 0.98, 0.86), (4.55, 0.6, 0.9), (4.5, 0.28, 0.88)),
        "bbgrgrbb", (0.35, 0.6, 2.6, 3.2, 1.12, 1.58), 3, (0.85, 3.6), 0.37,
    ),
    "van": Vehicle(
        CAR,
        ((0, 0.28, 0.92), (0, 1.2, 0.96), (0.1, 1.8, 0.9), (0.3, 1.95, 0.86), (3.5, 1.95, 0.86),
         (4.2, 1.2, 0.94), (4.8, 0.95, 0.9), (4.95, 0.6, 0.92), (4.95, 0.28, 0.9)),
        "bgbrgrbb", (2.6, 2.6, 3.35, 3.95, 1.2, 1.75), 1, (0.95, 3.95), 0.35,
    ),
    "truck": Vehicle(
        TRUCK,
        ((0, 0.65, 1.2), (0, 3.4, 1.2), (5.6, 3.4, 1.2), (5.9, 2.7, 1.1), (7.2, 2.65, 1.08), (7.6, 1.5, 1.15),
         (7.65, 0.45, 1.15)),
        "brbrgb", (6.1, 6.15, 7.1, 7.4, 1.55, 2.4), 1, (0.9, 2.0, 6.5), 0.48,
    ),
    "bus": Vehicle(
        BUS,
        ((0, 0.35, 1.25), (0, 1.5, 1.25), (0.05, 2.6, 1.22), (0.1, 3.05, 1.18), (10.9, 3.05, 1.18),
         (10.95, 2.75, 1.2), (11.1, 1.1, 1.25), (11.1, 0.35, 1.25)),
        "bgbrbgb", (0.4, 0.4, 10.7, 10.7, 1.4, 2.5), 7, (2.6, 8.6), 0.5,
    ),
    "tram": Vehicle(
        TRAIN,
        ((0, 0.25, 1.2), (0, 1.4, 1.25), (0.3, 2.8, 1.15), (0.5, 3.3, 1.1), (21.5, 3.3, 1.1), (21.7, 2.8, 1.15),
         (22, 1.4, 1.25), (22, 0.25, 1.2)),
        "bgbrbgb", (1.0, 1.0, 21, 21, 1.4, 2.6), 10, (), 0.4,
    ),
}
# fmt: on

# fmt: off
PAINTS: tuple[Colour, ...] = (
    (40, 42, 46), (224, 226, 228), (150, 154, 160), (92, 98, 106), (158, 34, 34),
    (36, 66, 130), (190, 186, 176), (54, 92, 74), (206, 120, 40), (120, 172, 196),
)
# fmt: on


def _beyond_crossing(street: Street, z: float, length: float) -> float:
    """Return z, or where the cross street ends if something that long would stand in it."""
    if street.crossing is None or z > street.crossing + street.crossing_width or z + length < street.crossing - 5:
        return z
    return street.crossing + street.crossing_width + 1.0


def _traffic(street: Street, random: Generator) -> list[Thing]:
    """Place driving and parked vehicles; there is always one car in view ahead."""
    things: list[Thing] = []

    def place(kind: str, x: float, z: float, away: bool, lit: bool) -> None:
        colour = _pick(random, PAINTS)
        if kind == "tram":
            colour = (206, 60, 48) if random.random() < 0.5 else (228, 200, 90)
        elif kind == "bus":
            colour = ((204, 52, 44), (232, 186, 60), (70, 120, 170))[int(random.integers(3))]
        elif kind == "truck" and random.random() < 0.6:
            colour = (224, 226, 228)
        length = VEHICLES[kind].profile[-1][0]
        things.append(Thing(z, _paint_vehicle, (VEHICLES[kind], x, z, away, colour, lit), x, length))

    def a_car() -> str:
        return ("hatchback", "saloon", "estate", "van")[int(random.choice(4, p=(0.35, 0.28, 0.25, 0.12)))]

    for lane in range(-street.lanes_left, street.lanes_right):
        away, x = lane >= 0, lane * street.lane
        z = random.uniform(11, 26) if lane == 0 else random.uniform(6, 30)
        if street.tram and lane == -1:
            z = _beyond_crossing(street, random.uniform(14, 40), 22)
            place("tram", x, z, False, True)
            z += 32
        while z < 100:
            chance, wobble = random.random(), random.uniform(-0.25, 0.25)
            kind = a_car() if chance < 0.84 else ("truck" if chance < 0.92 else "bus")
            if kind in ("truck", "bus") and z < 13:
                kind = "van"
            z = _beyond_crossing(street, z, VEHICLES[kind].profile[-1][0])
            place(kind, x + wobble, z, away, True)
            z += VEHICLES[kind].profile[-1][0] + random.uniform(5, 42) / street.bustle**0.5
    for side, parked in zip(street.sides, street.parking, strict=True):
        if not parked:
            continue
        z, gap = random.uniform(3, 9), random.uniform(7, 18)  # without a gap the pavement might not be seen
        while z < 90:
            kind = a_car()
            length = VEHICLES[kind].profile[-1][0]
            free = _clear(street, z) and _clear(street, z + length) and not gap - length < z < gap + 7
            if free and random.random() < 0.35 + 0.5 * street.bustle:
                place(kind, side.x(side.road - 1.1), z, (side.sign > 0) ^ (random.random() < 0.06), False)
            z += length + random.uniform(0.7, 1.8)
    return things


def _paint_vehicle(painter: Painter, vehicle: Vehicle, x: float, z: float, away: bool, colour: Colour, lit: bool) -> None:
    """Paint a vehicle whose nearest end stands at z: roof first, then the visible side, then the end."""
    length = max(point[0] for point in vehicle.profile)
    profile, faces = vehicle.profile, vehicle.faces
    if not away:
        profile = tuple((length - along, up, half) for along, up, half in reversed(profile))
        faces = faces[::-1]
    widest = max(point[2] for point in profile)
    painter.darken(x - widest, x + widest, z, z + length)
    height = max(point[1] for point in profile)
    detailed = z < 45
    for part in (0.25, 0.6, 1.0) if detailed else (0.8,):
        inset = 0.25 * part
        corners = [(x - widest + inset, z + inset), (x + widest - inset, z + inset)]
        corners += [(x + widest - inset, z + length - inset), (x - widest + inset, z + length - inset)]
        painter.shade(corners, part * height * 0.95)

    roof = max(range(len(faces)), key=lambda i: (profile[i][1] + profile[i + 1][1], -i))
    for index in range(len(faces) - 1 if detailed else roof, roof - 1, -1):
        _paint_face(painter, vehicle, profile[index], profile[index + 1], faces[index], x, z, colour)
    middle = x + painter.bend * z * z
    if middle - widest > 0 or middle + widest < 0:
        _paint_flank(painter, vehicle, profile, x, z, away, colour, -1 if middle > 0 else 1, detailed)
    axle = min((along if away else length - along for along in vehicle.wheels), default=1.0)
    wheels = Figure(painter, x, z + axle - 0.5 * vehicle.wheel_radius)
    tyre = wheels.surface(vehicle.label, TYRE)
    for foot in (-widest + 0.2, widest - 0.2):
        wheels.polygon(tyre, (foot - 0.12, 0), (foot + 0.12, 0), (foot + 0.12, 0.5), (foot - 0.12, 0.5))
    for index in range(roof - 1, -1, -1):
        _paint_face(painter, vehicle, profile[index], profile[index + 1], faces[index], x, z, colour)
    _paint_end(Figure(painter, x, z), vehicle, profile, away, lit)


def _paint_face(
    painter: Painter, vehicle: Vehicle, low: Point, high: Point, kind: str, x: float, z: float, colour: Colour
) -> None:
    (along0, up0, half0), (along1, up1, half1) = low, high
    rise, run = up1 - up0, along1 - along0
    steep = (rise * rise + run * run) ** 0.5 or 1.0
    normal = (0.0, abs(run) / steep, -abs(rise) / steep)
    cover = {"r": 0.95, "g": 0.25, "b": 0.1}[kind]
    if kind == "g":
        colour = _scaled(GLASS, 1.0, 30 * abs(run) / steep)  # a slanted pane mirrors the sky
    middle = z + (along0 + along1) / 2
    number = painter.surface(vehicle.label, colour, min(middle, z + 0.5), None, normal, cover=cover)
    near, far = (x, up0, z + along0, half0), (x, up1, z + along1, half1)
    painter.polygon(
        number,
        (near[0] - half0, up0, near[2]),
        (near[0] + half0, up0, near[2]),
        (far[0] + half1, up1, far[2]),
        (far[0] - half1, up1, far[2]),
    )


def _paint_flank(
    painter: Painter,
    vehicle: Vehicle,
    profile: tuple[Point, ...],
    x: float,
    z: float,
    away: bool,
    colour: Colour,
    sign: int,
    detailed: bool,
) -> None:
    """Paint the visible side: body, windows and, where they can be seen, wheels."""
    length = max(point[0] for point in profile)
    widest = max(point[2] for point in profile)
    edge = x + sign * widest
    plane = painter.plane(edge, z, edge, z + length)
    normal = (float(sign), 0.15, 0.0)
    body = painter.surface(vehicle.label, _scaled(colour, 0.92), 1, plane, normal, cover=0.05)
    painter.polygon(body, *((x + sign * half, up, z + along) for along, up, half in profile))
    tail_low, tail_high, nose_high, nose_low, low, high = vehicle.windows
    glass = painter.surface(vehicle.label, GLASS, 1, plane, normal)
    if vehicle.label in (BUS, TRAIN):
        glass = painter.surface(vehicle.label, GLASS, 1, plane, normal, glow=(120, 108, 76))
    top_half = min(half for _, up, half in profile if up > low)

    def point(along: float, up: float) -> tuple[float, float, float]:
        half = widest + (top_half - widest) * max(0.0, (up - low) / max(high - low, 0.1))
        return x + sign * half, up, z + (along if away else length - along)

    for index in range(vehicle.panes):
        start, end = index / vehicle.panes, (index + 1) / vehicle.panes
        gap = 0.035
        lows = [tail_low + (nose_low - tail_low) * share for share in (start, end)]
        highs = [tail_high + (nose_high - tail_high) * share for share in (start, end)]
        corners = ((lows[0] + gap, low), (lows[1] - gap, low), (highs[1] - gap, high), (highs[0] + gap, high))
        painter.polygon(glass, *(point(*corner) for corner in corners))
    if not detailed:
        return
    tyre = painter.surface(vehicle.label, TYRE, 1, plane)
    rim = painter.surface(vehicle.label, (150, 152, 156), 1, plane)
    for along in vehicle.wheels:
        for number, radius in ((tyre, vehicle.wheel_radius), (rim, vehicle.wheel_radius * 0.55)):
            middle = along if away else length - along
            rounds = [(edge, vehicle.wheel_radius + radius * v, z + middle + radius * u) for u, v in CIRCLE]
            painter.polygon(number, *rounds)


def _box(left: float, right: float, low: float, high: float) -> tuple[tuple[float, float], ...]:
    return (left, low), (right, low), (right, high), (left, high)


def _paint_end(figure: Figure, vehicle: Vehicle, profile: tuple[Point, ...], away: bool, lit: bool) -> None:
    """Paint lights, bumper and number plate on the end that faces the camera."""
    half, low = profile[1][2], profile[0][1]
    high = profile[1][1] + (0.15 if vehicle.label == CAR else -0.35)
    if vehicle.label in (BUS, TRAIN, TRUCK):
        high = low + 0.55
    glow = (TAIL_LIGHT_GLOW if away else HEADLIGHT_GLOW) if lit else BLACK
    lamp = figure.surface(vehicle.label, (168, 26, 24) if away else (240, 240, 226), glow=glow)
    bumper = figure.surface(vehicle.label, (56, 58, 62))
    if not away:  # the grille
        figure.polygon(bumper, *_box(-half * 0.55, half * 0.55, high - 0.14, high - 0.02))
    figure.polygon(bumper, *_box(-half * 0.95, half * 0.95, low, low + 0.15))
    tall = 0.2 if away else 0.15
    for sign in (-1, 1):
        figure.polygon(lamp, *_box(sign * half * 0.62, sign * half * 0.95, high - tall, high))
    plate = figure.surface(vehicle.label, (232, 232, 226))
    figure.polygon(plate, *_box(-0.26, 0.26, low + 0.2, low + 0.32))


# --- people and two-wheelers ----------------------------------------------------------------------------

SKINS: tuple[Colour, ...] = ((228, 188, 160), (200, 152, 120), (150, 104, 78), (98, 68, 52))
# fmt: off
CLOTHES: tuple[Colour, ...] = (
    (44, 48, 60), (150, 44, 48), (52, 82, 138), (196, 190, 180), (88, 98, 74),
    (208, 158, 60), (110, 74, 110), (70, 130, 140), (34, 34, 36),
)
# fmt: on


class Person(NamedTuple):
    """What a person looks like."""

    coat: Colour
    trousers: Colour
    skin: Colour
    hair: Colour
    height: float  # metres
    stride: float  # metres between the feet
    bag: bool


def _person(random: Generator) -> Person:
    pick = partial(_pick, random)
    return Person(
        pick(CLOTHES),
        _scaled(pick(CLOTHES), 0.7),
        pick(SKINS),
        pick(((40, 32, 28), (92, 64, 42), (176, 140, 84), (150, 150, 150))),
        random.uniform(1.58, 1.88) if random.random() > 0.12 else random.uniform(1.05, 1.4),
        random.uniform(0.1, 0.62),
        random.random() < 0.3,
    )


def _people(street: Street, random: Generator) -> list[Thing]:
    """Place people on the pavements and the zebra crossing, and two-wheelers on the road."""
    things: list[Thing] = []
    left, right = street.sides
    for side in street.sides:
        for z in random.uniform(7, 50, 2 + int(7 * street.bustle)):
            x = side.x(random.uniform(side.verge + 0.6, side.pavement - 0.4))
            count = 2 if random.random() < 0.25 else 1
            for index in range(count):
                arguments = (_person(random), x + 0.6 * index, float(z))
                things.append(Thing(float(z) - 0.01 * index, _paint_person, arguments))
        for z in random.uniform(6, 40, int(random.integers(0, 4))):
            x = side.x(side.pavement - 0.35)
            squeeze = random.uniform(0.18, 0.5) * random.choice((-1, 1))
            z = float(z) if _clear(street, z) else 6.0 + 0.1 * float(z)
            things.append(Thing(float(z), _paint_bicycle, (x, float(z), float(squeeze), random.uniform(0, 1))))
    if street.crossing is not None:
        for x in random.uniform(-left.road, right.road, int(random.integers(1, 5))):
            z = street.crossing - random.uniform(1.6, 3.6)
            things.append(Thing(z, _paint_person, (_person(random), float(x), z), float(x)))
    for _ in range(int(random.integers(0, 3)) + (random.random() < street.bustle)):
        side = street.sides[int(random.random() < 0.65)]
        z = random.uniform(7, 32)
        parked = street.parking[0 if side.sign < 0 else 1]
        x = side.x(side.road - (2.7 if parked else 0.6))
        squeeze = random.uniform(0.15, 0.4) * random.choice((-1, 1))
        if street.crossing is not None and random.random() < 0.3:
            z, x = street.crossing + random.uniform(1, 4), random.uniform(-left.road - 3, right.road + 3)
            squeeze = random.uniform(0.8, 1.0) * random.choice((-1, 1))
        paint = _paint_motorcyclist if random.random() < 0.25 else _paint_cyclist
        things.append(Thing(z, paint, (_person(random)._replace(bag=False), x, z, float(squeeze), random.random()), x))
    if random.random() < 0.25:
        side = street.sides[int(random.random() < 0.5)]
        z = random.uniform(7, 25)
        things.append(Thing(z, _paint_motorcycle, (side.x(side.verge + 0.5), z, random.uniform(0.25, 0.5))))
    return things


def _paint_person(painter: Painter, person: Person, x: float, z: float) -> None:
    figure = Figure(painter, x, z, size=person.height / 1.75)
    trousers, coat = figure.surface(PERSON, person.trousers), figure.surface(PERSON, person.coat)
    dark = figure.surface(PERSON, _scaled(person.coat, 0.78))
    skin, hair = figure.surface(PERSON, person.skin), figure.surface(PERSON, person.hair, cover=0.5)
    half = person.stride / 2
    for foot in (-half, half):
        figure.polygon(trousers, (-0.13, 0.88), (0.13, 0.88), (foot + 0.08, 0.04), (foot - 0.08, 0.04))
        figure.disc(figure.surface(PERSON, TYRE), foot, 0.05, 0.1, 0.5)
    for sign in (-1, 1):
        swing = sign * (0.26 + 0.25 * half)
        figure.line(dark, 0.12, (sign * 0.2, 1.4), (swing, 1.1), (swing + 0.1 * half, 0.84))
        figure.disc(skin, swing + 0.1 * half, 0.8, 0.055)
    outline = ((-0.12, 1.5), (0.12, 1.5), (0.24, 1.4), (0.2, 1.05), (0.21, 0.78), (-0.21, 0.78), (-0.2, 1.05))
    figure.polygon(coat, *outline, (-0.24, 1.4))
    if person.bag:
        figure.polygon(dark, (-0.15, 1.38), (0.15, 1.38), (0.16, 1.0), (-0.16, 1.0))
    figure.disc(skin, 0, 1.62, 0.115, 1.2)
    figure.disc(hair, 0, 1.69, 0.118, 0.75)
    painter.shade_wall((x - 0.2, z), (x + 0.2, z), 1.7)
    painter.darken(x - 0.22, x + 0.22, z - 0.05, z + 0.2)


def _paint_bicycle(painter: Painter, x: float, z: float, squeeze: float, tint: float) -> None:
    """Paint a bicycle; `squeeze` is how much of its length is seen, negative when it points left."""
    figure = Figure(painter, x, z, squeeze)
    colour = (190 * tint + 20, 60 + 40 * tint, 170 - 150 * tint)
    tyre, frame = figure.surface(BICYCLE, TYRE), figure.surface(BICYCLE, colour)
    for middle in (-0.52, 0.52):
        figure.ring(tyre, middle, 0.34, 0.34, 0.06)
    for line in (
        ((-0.52, 0.34), (-0.2, 0.72), (0.36, 0.78), (-0.05, 0.3), (-0.2, 0.72)),
        ((-0.52, 0.34), (-0.05, 0.3)),
        ((0.52, 0.34), (0.36, 0.95), (0.22, 1.02)),
        ((-0.2, 0.72), (-0.23, 0.92)),
    ):
        figure.line(frame, 0.05, *line)
    upright = Figure(painter, x, z)
    upright.line(tyre, 0.05, (0.36 * squeeze - 0.26, 1.0), (0.36 * squeeze + 0.26, 1.0))
    upright.line(tyre, 0.08, (-0.23 * squeeze - 0.12, 0.94), (-0.23 * squeeze + 0.12, 0.94))
    painter.darken(x - 0.15, x + 0.15, z - 0.1, z + 0.3)


def _paint_cyclist(painter: Painter, person: Person, x: float, z: float, squeeze: float, tint: float) -> None:
    _paint_bicycle(painter, x, z, squeeze, tint)
    _paint_rider(painter, person, x, z, squeeze, 0.95, (214, 214, 210))


def _paint_rider(painter: Painter, person: Person, x: float, z: float, squeeze: float, seat: float, helmet: Colour) -> None:
    """Paint a rider above a seat that is `seat` metres high, leaning to where the machine points."""
    figure, lean = Figure(painter, x, z), squeeze
    trousers, coat = figure.surface(RIDER, person.trousers), figure.surface(RIDER, person.coat, cover=0.1)
    skin, head = figure.surface(RIDER, person.skin), figure.surface(RIDER, helmet, cover=0.4)
    hip = -0.2 * lean
    for sign, knee, foot in ((-1, seat - 0.38, 0.24), (1, seat - 0.24, 0.42)):
        spread = 0.13 * sign
        points = ((hip + spread * 0.6, seat), (spread + 0.18 * lean, knee), (spread + 0.02 * lean, foot))
        figure.line(trousers, 0.15, *points)
        figure.line(figure.surface(RIDER, TYRE), 0.1, (spread, foot - 0.03), (spread + 0.2 * lean, foot - 0.05))
    neck = 0.16 * lean
    figure.polygon(
        coat,
        (hip - 0.17, seat - 0.04),
        (hip + 0.17, seat - 0.04),
        (neck + 0.23, seat + 0.46),
        (neck + 0.1, seat + 0.58),
        (neck - 0.1, seat + 0.58),
        (neck - 0.23, seat + 0.46),
    )
    for sign in (-1, 1):
        hand = (0.36 * lean + 0.24 * sign, seat + 0.08)
        figure.line(coat, 0.1, (neck + 0.2 * sign, seat + 0.46), (neck + 0.3 * sign, seat + 0.25), hand)
    figure.disc(skin, neck + 0.06 * lean, seat + 0.7, 0.115, 1.2)
    figure.disc(head, neck + 0.04 * lean, seat + 0.77, 0.135, 0.8)
    painter.shade_wall((x - 0.2, z), (x + 0.2, z), seat + 0.8)


def _paint_motorcycle(painter: Painter, x: float, z: float, squeeze: float) -> None:
    figure, upright = Figure(painter, x, z, squeeze), Figure(painter, x, z)
    tyre, body = figure.surface(MOTORCYCLE, TYRE), figure.surface(MOTORCYCLE, (158, 38, 36), cover=0.3)
    steel = figure.surface(MOTORCYCLE, (140, 142, 146))
    for middle in (-0.68, 0.68):
        figure.ring(tyre, middle, 0.32, 0.32, 0.13)
        upright.line(tyre, 0.14, (middle * squeeze, 0.06), (middle * squeeze, 0.6))
    figure.polygon(steel, (-0.45, 0.3), (0.4, 0.3), (0.35, 0.6), (-0.4, 0.6))
    figure.polygon(body, (-0.8, 0.75), (-0.2, 0.72), (0.1, 0.95), (0.5, 0.92), (0.45, 0.55), (-0.5, 0.55))
    figure.line(steel, 0.07, (0.68, 0.32), (0.45, 1.0))
    upright.polygon(body, (-0.16, 0.5), (0.16, 0.5), (0.14, 0.82), (-0.14, 0.82))
    upright.line(tyre, 0.06, (0.45 * squeeze - 0.34, 1.03), (0.45 * squeeze + 0.34, 1.03))
    upright.disc(figure.surface(MOTORCYCLE, (190, 30, 26), glow=TAIL_LIGHT_GLOW), 0, 0.72, 0.07)
    painter.darken(x - 0.25, x + 0.25, z - 0.1, z + 0.5)


def _paint_motorcyclist(painter: Painter, person: Person, x: float, z: float, squeeze: float, tint: float) -> None:
    _paint_motorcycle(painter, x, z, squeeze)
    _paint_rider(painter, person, x, z, squeeze, 0.86, (60 + 150 * tint, 60, 70))
