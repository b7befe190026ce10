"""Perspective projection and the painter's algorithm: objects are painted far to near, in metres, as numbered surfaces.

Each pixel of the image contains the number of the visible surface; `readback` converts the numbers to label, depth and colour.
`Painter` paints in street coordinates. `Figure` paints a flat upright object (a billboard) in coordinates relative to its foot.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rein.dgss.scenes.palette import BLACK, Colour

Point = tuple[float, float, float]

NEAREST = 0.6  # metres; closer points are moved to this distance
TOWARDS_CAMERA: Point = (0.0, 0.0, -1.0)
UPWARDS: Point = (0.0, 1.0, 0.0)
CIRCLE = tuple((float(np.cos(angle)), float(np.sin(angle))) for angle in np.arange(12) * np.pi / 6)


class Camera(NamedTuple):
    """A pinhole camera at x = 0, z = 0 that looks along the street; in supersampled pixels unless stated otherwise."""

    rows: int
    columns: int
    focal: float
    horizon: float  # row of the horizon
    centre: float  # column of the viewing direction
    height: float  # metres above the ground


class Surface(NamedTuple):
    """The properties of a surface; its number is its index in `Painter.surfaces`."""

    label: int
    red: float
    green: float
    blue: float
    sun: float  # 0 to 1, how directly sunlight falls on it
    glow_red: float
    glow_green: float
    glow_blue: float
    cover: float  # 0 to 1, fraction that snow covers
    first: float  # depth coefficients: 1 / depth = first + second * a
    second: float
    pattern: int


class Painter:
    """Paints surfaces far to near into one image of surface numbers.

    Every surface is an upright plane or is approximated by one. Its inverse depth is `first + second * a` with
    `a = (column - centre) / focal`, so that two coefficients per surface give the depth of every pixel.
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
        """Return the pixels (column, row) of points (x, y, z): metres to the right of the camera's lane, up, ahead."""
        _, _, focal, horizon, centre, height = self.camera
        bend, pixels = self.bend, []
        for x, y, z in points:
            z = z if z > NEAREST else NEAREST  # faster than `max`; this runs thousands of times
            scale = focal / z
            pixels.append((centre + (x + bend * z * z) * scale, horizon + (height - y) * scale))
        return pixels

    def plane(self, x0: float, z0: float, x1: float, z1: float) -> tuple[float, float]:
        """Return the depth coefficients of the upright plane through two ground points."""
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

        Args:
            label: train id.
            colour: colour of the surface.
            z: distance in metres of a surface that faces the camera; ignored with `plane`.
            plane: depth coefficients, see `plane`.
            normal: direction that the surface faces, which determines its sunlight; None means a rounded surface.
            glow: light that the surface emits at night.
            cover: fraction that snow covers.
            pattern: number of a pattern, see `pattern`.
        """
        sun = 0.5
        if normal is not None:  # not `sum`: it rounds differently since Python 3.12
            sun = max(0.0, normal[0] * self.sun[0] + normal[1] * self.sun[1] + normal[2] * self.sun[2])
        first, second = plane or (1.0 / max(z, NEAREST), 0.0)
        self.surfaces.append(Surface(label, *colour, sun, *glow, cover, first, second, pattern))
        return len(self.surfaces) - 1

    def pattern(self, *numbers: float) -> int:
        """Register a pattern, see `patterns.paint_patterns`, and return its number."""
        self.patterns.append(numbers)
        return len(self.patterns) - 1

    def polygon(self, number: int, *points: Point) -> None:
        """Paint a polygon given in metres."""
        self.draw.polygon(self.project(points), fill=number)

    def shade(self, points: list[tuple[float, float]], height: float) -> None:
        """Cast the shadow of a polygon with corners (x, z) at `height` metres above the ground."""
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
        """Darken the ground under an object, where ambient light is blocked in every weather."""
        for margin, strength in ((0.2, 70), (0.05, 130), (-0.15, 190)):
            left, right, near, far = x0 - margin, x1 + margin, z0 - margin, z1 + margin
            corners = ((left, 0.0, near), (right, 0.0, near), (right, 0.0, far), (left, 0.0, far))
            self.draw_contact.polygon(self.project(corners), fill=strength)


class Figure:
    """Paints a flat upright object, in metres relative to its foot.

    Args:
        painter: the painter of the street.
        x: metres to the right of the camera's lane.
        z: metres ahead.
        squeeze: factor of all x coordinates, for an object that is turned away from the camera; negative values mirror it.
        size: factor of all lengths.
    """

    def __init__(self, painter: Painter, x: float, z: float, squeeze: float = 1.0, size: float = 1.0) -> None:
        self.painter, self.z = painter, z
        (self.foot,) = painter.project([(x, 0.0, z)])
        self.scale = painter.camera.focal / max(z, NEAREST) * size
        self.squeeze = squeeze

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel (column, row) of a point (x, y): metres to the right of the foot, up."""
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
        """Paint a polyline."""
        width = max(2, round(thickness * self.scale))  # one pixel of the final label, which has no supersampling
        self.painter.draw.line([self.at(*point) for point in points], fill=number, width=width, joint="curve")

    def disc(self, number: int, x: float, y: float, radius: float, stretch: float = 1.0) -> None:
        """Paint a disc whose height is `stretch` times its width; `squeeze` does not change its width."""
        column, row = self.at(x, y)
        wide, high = max(radius * self.scale, 0.5), max(radius * self.scale * stretch, 0.5)
        self.painter.draw.ellipse((column - wide, row - high, column + wide, row + high), fill=number)

    def ring(self, number: int, x: float, y: float, radius: float, thickness: float) -> None:
        """Paint the outline of a circle."""
        column, row = self.at(x, y)
        wide, high = max(radius * self.scale * abs(self.squeeze), 1.0), radius * self.scale
        box = (column - wide, row - high, column + wide, row + high)
        self.painter.draw.ellipse(box, outline=number, width=max(1, round(thickness * self.scale)))
