"""Perspective and the painter's algorithm: things are painted far to near, in metres, as numbered surfaces.

The image holds at each pixel the number of the surface it shows; `readback` turns the numbers into label, depth
and colour. `Painter` paints in the street's coordinates, `Figure` flat things that stand upright at one place.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rein.dgss.scenes.palette import BLACK, Colour

Point = tuple[float, float, float]

NEAREST = 0.6  # metres; what stands closer is cut off there
TOWARDS_CAMERA: Point = (0.0, 0.0, -1.0)
UPWARDS: Point = (0.0, 1.0, 0.0)
CIRCLE = tuple((float(np.cos(angle)), float(np.sin(angle))) for angle in np.arange(12) * np.pi / 6)


class Camera(NamedTuple):
    """A pinhole camera at street x 0, z 0, looking along the street; all of it in supersampled pixels."""

    rows: int
    columns: int
    focal: float
    horizon: float  # row of the horizon
    centre: float  # column of the viewing direction
    height: float  # metres above the ground


class Surface(NamedTuple):
    """What a surface number stands for; `readback` makes a table of these."""

    label: int
    red: float
    green: float
    blue: float
    sun: float  # 0 to 1, how straight sunlight falls on it
    glow_red: float
    glow_green: float
    glow_blue: float
    cover: float  # 0 to 1, share on which snow stays
    first: float  # of two depth numbers
    second: float
    pattern: int


class Painter:
    """Paints surfaces far to near into one image that holds the number of the surface each pixel shows.

    Every surface is an upright plane (or stands for one), so one over its depth is `first + second * a`
    where `a = (column - centre) / focal`: two numbers a surface give exact depth for every pixel.
    """

    def __init__(self, camera: Camera, bend: float, sun: Point) -> None:
        self.camera, self.bend, self.sun = camera, bend, sun
        shape = (camera.columns, camera.rows)
        self.numbers = Image.new("I", shape, 0)
        self.cast_shadow, self.contact_shadow = Image.new("L", shape, 0), Image.new("L", shape, 0)
        self.draw = ImageDraw.Draw(self.numbers)
        self.draw_cast = ImageDraw.Draw(self.cast_shadow)
        self.draw_contact = ImageDraw.Draw(self.contact_shadow)
        self.surfaces = [Surface(0, *BLACK, 0, *BLACK, 0, 0, 0, 0)]  # number 0 is ground and sky
        self.patterns: list[tuple[float, ...]] = [(0.0,) * 12]  # pattern 0 is plain
        self.lamps: list[Point] = []

    def project(self, points: Iterable[Point]) -> list[tuple[float, float]]:
        """Return the pixels (column, row) of points: metres right of the camera's lane, up, ahead."""
        _, _, focal, horizon, centre, height = self.camera
        bend, pixels = self.bend, []
        for x, y, z in points:
            z = z if z > NEAREST else NEAREST  # called thousands of times: no `max`
            scale = focal / z
            pixels.append((centre + (x + bend * z * z) * scale, horizon + (height - y) * scale))
        return pixels

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
        normal: Point | None = None,
        glow: Colour = BLACK,
        cover: float = 0.0,
        pattern: int = 0,
    ) -> int:
        """Register a surface and return its number.

        Without a `plane` it faces the camera at distance `z`. `normal` decides how much sun it gets (without
        one: a rounded thing), `glow` is its own light after dark, `cover` the share of it on which snow stays.
        """
        sun = 0.5
        if normal is not None:  # by hand: from Python 3.12 on, `sum` rounds in another way
            sun = max(0.0, normal[0] * self.sun[0] + normal[1] * self.sun[1] + normal[2] * self.sun[2])
        first, second = plane or (1.0 / max(z, NEAREST), 0.0)
        self.surfaces.append(Surface(label, *colour, sun, *glow, cover, first, second, pattern))
        return len(self.surfaces) - 1

    def pattern(self, *numbers: float) -> int:
        """Register a wall pattern, see `patterns.paint_patterns`, and return its number."""
        self.patterns.append(numbers)
        return len(self.patterns) - 1

    def polygon(self, number: int, *points: Point) -> None:
        """Paint a polygon given in metres."""
        self.draw.polygon(self.project(points), fill=number)

    def shade(self, points: list[tuple[float, float]], height: float) -> None:
        """Cast the shadow that ground points (x, z) throw when lifted to `height` metres."""
        across, up, ahead = self.sun
        across, ahead = -across / up * height, -ahead / up * height
        self.draw_cast.polygon(self.project((x + across, 0.0, z + ahead) for x, z in points), fill=255)

    def shade_wall(self, start: tuple[float, float], end: tuple[float, float], height: float) -> None:
        """Cast the shadow of an upright wall between two ground points (x, z)."""
        across, up, ahead = self.sun
        across, ahead = -across / up * height, -ahead / up * height
        (x0, z0), (x1, z1) = start, end
        points = ((x0, 0.0, z0), (x1, 0.0, z1), (x1 + across, 0.0, z1 + ahead), (x0 + across, 0.0, z0 + ahead))
        self.draw_cast.polygon(self.project(points), fill=255)

    def darken(self, x0: float, x1: float, z0: float, z1: float) -> None:
        """Darken the ground under a thing: the light that cannot get there in any weather."""
        for margin, strength in ((0.2, 70), (0.05, 130), (-0.15, 190)):
            left, right, near, far = x0 - margin, x1 + margin, z0 - margin, z1 + margin
            corners = ((left, 0.0, near), (right, 0.0, near), (right, 0.0, far), (left, 0.0, far))
            self.draw_contact.polygon(self.project(corners), fill=strength)


class Figure:
    """Paints a flat thing that stands upright at one place: coordinates in metres from its foot.

    Args:
        painter: paints it.
        x: metres right of the camera's lane.
        z: metres ahead.
        squeeze: what is left of its width as it turns away from the camera; negative when mirrored.
        size: multiplies all lengths.
    """

    def __init__(self, painter: Painter, x: float, z: float, squeeze: float = 1.0, size: float = 1.0) -> None:
        self.painter, self.z = painter, z
        (self.foot,) = painter.project([(x, 0.0, z)])
        self.scale = painter.camera.focal / max(z, NEAREST) * size
        self.squeeze = squeeze

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel (column, row) of a point: metres right of the foot, up."""
        return self.foot[0] + x * self.scale * self.squeeze, self.foot[1] - y * self.scale

    def surface(self, label: int, colour: Colour, glow: Colour = BLACK, cover: float = 0.0) -> int:
        """Register a surface that faces the camera and return its number."""
        return self.painter.surface(label, colour, self.z, glow=glow, cover=cover)

    def polygon(self, number: int, *points: tuple[float, float]) -> None:
        """Paint a polygon."""
        self.painter.draw.polygon([self.at(*point) for point in points], fill=number)

    def box(self, number: int, left: float, right: float, low: float, high: float) -> None:
        """Paint a rectangle."""
        self.polygon(number, (left, low), (right, low), (right, high), (left, high))

    def line(self, number: int, thickness: float, *points: tuple[float, float]) -> None:
        """Paint a bent line."""
        width = max(2, round(thickness * self.scale))  # two supersampled pixels, else nearest labels lose it
        self.painter.draw.line([self.at(*point) for point in points], fill=number, width=width, joint="curve")

    def disc(self, number: int, x: float, y: float, radius: float, stretch: float = 1.0) -> None:
        """Paint a disc, `stretch` times as high as wide; it is not squeezed."""
        column, row = self.at(x, y)
        wide, high = max(radius * self.scale, 0.5), max(radius * self.scale * stretch, 0.5)
        self.painter.draw.ellipse((column - wide, row - high, column + wide, row + high), fill=number)

    def ring(self, number: int, x: float, y: float, radius: float, thickness: float) -> None:
        """Paint a circle's outline."""
        column, row = self.at(x, y)
        wide, high = max(radius * self.scale * abs(self.squeeze), 1.0), radius * self.scale
        box = (column - wide, row - high, column + wide, row + high)
        self.painter.draw.ellipse(box, outline=number, width=max(1, round(thickness * self.scale)))
