"""The random layout of the objects on a street, and the order in which they are painted."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from rein.dgss.scenes.buildings import draw_border, draw_house, paint_border, paint_house, paint_skyline
from rein.dgss.scenes.furniture import SIGNALS, SIGNS, paint_bollard, paint_lamp, paint_panel, paint_sign, paint_traffic_light
from rein.dgss.scenes.greenery import draw_tree, paint_tree
from rein.dgss.scenes.painter import Camera, Painter, Point
from rein.dgss.scenes.palette import Colour, pick
from rein.dgss.scenes.people import draw_person, paint_bicycle, paint_cyclist, paint_motorcycle, paint_motorcyclist, paint_person
from rein.dgss.scenes.street import Street, plan_street
from rein.dgss.scenes.vehicles import PAINTS, VEHICLES, paint_vehicle

FARTHEST = 150.0  # metres; the street ends here, in front of the skyline
BUS_PAINTS: tuple[Colour, ...] = ((204, 52, 44), (232, 186, 60), (70, 120, 170))


class SceneObject(NamedTuple):
    """An object at its position, with the function that paints it; metres."""

    x: float
    z: float
    paint: Callable[..., None]
    arguments: tuple[Any, ...]
    length: float = 0.0  # of a long object, which extends from z to z + length


def paint_street(random: Generator, rows: int, columns: int) -> tuple[Street, Painter]:
    """Lay out a street and paint it in an image of rows x columns pixels."""
    camera = _draw_camera(random, rows, columns)
    street = plan_street(random)
    painter = Painter(camera, street.bend, _draw_sun(random))
    paint_skyline(painter, random)
    groups = (_buildings, _furniture, _greenery, _traffic, _people)
    for each in _far_to_near(list(chain.from_iterable(group(street, random) for group in groups))):
        each.paint(painter, *each.arguments)
    return street, painter


def _draw_camera(random: Generator, rows: int, columns: int) -> Camera:
    return Camera(
        rows,
        columns,
        focal=(rows * columns) ** 0.5
        * random.uniform(0.98, 1.2),  # between a fixed vertical and a fixed horizontal field of view
        horizon=rows * random.uniform(0.41, 0.52),
        centre=columns * random.uniform(0.44, 0.56),
        height=random.uniform(1.35, 2.1),
    )


def _draw_sun(random: Generator) -> Point:
    """Return the direction to the sun (right, up, ahead); it is mostly beside or behind the camera."""
    azimuth = random.choice((-1.0, 1.0)) * np.radians(random.uniform(35, 165))
    elevation = np.radians(random.uniform(32, 60))
    return float(np.sin(azimuth) * np.cos(elevation)), float(np.sin(elevation)), float(np.cos(azimuth) * np.cos(elevation))


def _far_to_near(objects: list[SceneObject]) -> list[SceneObject]:
    """Sort objects for painting. An object between a long one and the camera's lane comes after the long one."""
    long = [each for each in objects if each.length]

    def nearness(each: SceneObject) -> float:
        z = each.z
        for other in long:
            between = 0 < each.x < other.x or other.x < each.x < 0
            if between and other.z - 0.02 <= each.z < other.z + other.length:
                z = min(z, other.z - 0.01)
        return -z

    return sorted(objects, key=nearness)


def _object_at(paint: Callable[..., None], x: float, z: float, *arguments: Any) -> SceneObject:
    """Return an object whose paint function takes its position first."""
    return SceneObject(x, z, paint, (x, z, *arguments))


def _buildings(street: Street, random: Generator) -> Iterator[SceneObject]:
    """Fill both sides with buildings and some gaps, and put walls, fences or hedges in front of gardens."""
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
                yield SceneObject(side.x(side.pavement), end, paint_border, (draw_border(random), side, z, end))
            else:
                house, depth = draw_house(random, street.suburb), random.uniform(8, 13)
                yield SceneObject(side.x(side.facade), end, paint_house, (house, side, z, end, depth))
                if side.facade - side.pavement > 1.5 and random.random() < 0.8:
                    yield SceneObject(side.x(side.pavement), end - 0.01, paint_border, (draw_border(random), side, z, end))
            z = end + (random.uniform(1.5, 6) if street.suburb else 3.0 * (random.random() < 0.25))


def _furniture(street: Street, random: Generator) -> Iterator[SceneObject]:
    """Place street lamps, traffic lights, signs and bollards along the kerbs."""
    spacing, first = random.uniform(20, 30), random.uniform(9, 16)
    for index, side in enumerate(street.sides):
        for z in np.arange(first + index * spacing / 2, 120, spacing).tolist():
            if street.is_clear(z):
                yield _object_at(paint_lamp, side.x(side.road + 0.45), z, side.sign)
        for z in random.uniform(8, 55, int(random.integers(2, 5))).tolist():
            kind, size = int(random.integers(len(SIGNS))), random.uniform(0.85, 1.15)
            x = side.x(side.road + random.uniform(0.5, 0.9))
            if street.is_clear(z):
                yield _object_at(paint_sign, x, z, kind, size, random.uniform(2.1, 2.5))
        if random.random() < 0.3:
            start = random.uniform(6, 18)
            for z in np.arange(start, start + 15, 2.0).tolist():
                if street.is_clear(z):
                    yield _object_at(paint_bollard, side.x(side.road + 0.4), z)
    if street.crossing is not None and random.random() < 0.8:
        state = int(random.integers(len(SIGNALS)))
        for z in (street.crossing - 4.6, street.crossing + street.crossing_width + 3):
            for side in street.sides:
                yield _object_at(paint_traffic_light, side.x(side.road + 0.5), z, state)
    if random.random() < 0.25:
        z = random.uniform(28, 60)
        yield _object_at(paint_panel, street.sides[1].road + 0.6, z, random.uniform(2.4, 3.2))


def _greenery(street: Street, random: Generator) -> Iterator[SceneObject]:
    """Plant trees along the verges or pavements, and bushes and trees in the gardens."""
    hue = random.uniform(-1, 1)
    for side in street.sides:
        has_verge = side.verge - side.road > 1
        if random.random() < 0.35 + 0.6 * street.greenery or has_verge:
            distance = (side.road + side.verge) / 2 + 0.1 if has_verge else side.road + 0.7
            spacing = random.uniform(8, 17) - 3 * street.greenery
            for z in np.arange(random.uniform(7, 16), 110, spacing).tolist():
                if street.is_clear(z) and random.random() < 0.85:
                    shift = random.uniform(-1, 1)
                    yield _object_at(paint_tree, side.x(distance), z + shift, draw_tree(random, random.uniform(4.5, 8.5), hue))
        behind = (4 if street.suburb else 1) + int(4 * street.greenery)
        for z in random.uniform(8, 130, behind).tolist():
            distance = side.facade + random.uniform(11, 25)
            yield _object_at(paint_tree, side.x(distance), z, draw_tree(random, random.uniform(6, 11), hue))
        if side.facade - side.pavement > 2:
            for z in random.uniform(5, 70, 7).tolist():
                bush = draw_tree(random, random.uniform(1.2, 2.6), hue)._replace(trunk=0.0, conifer=False)
                distance = random.uniform(side.pavement + 0.9, side.facade - 0.6)
                if street.is_clear(z):
                    yield _object_at(paint_tree, side.x(distance), z, bush)


def _traffic(street: Street, random: Generator) -> Iterator[SceneObject]:
    """Place driving and parked vehicles; at least one car ahead is in view."""
    for lane in range(-street.lanes_left, street.lanes_right):
        away, x = lane >= 0, lane * street.lane
        z = random.uniform(11, 26) if lane == 0 else random.uniform(6, 30)
        if street.tram and lane == -1:
            z = street.beyond_crossing(random.uniform(14, 40), 22)
            yield _vehicle(random, "tram", x, z, False, True)
            z += 32
        while z < 100:
            chance, wobble = random.random(), random.uniform(-0.25, 0.25)
            kind = _draw_car(random) if chance < 0.84 else ("truck" if chance < 0.92 else "bus")
            if kind in ("truck", "bus") and z < 13:
                kind = "van"
            length = VEHICLES[kind].underside
            z = street.beyond_crossing(z, length)
            yield _vehicle(random, kind, x + wobble, z, away, True)
            z += length + random.uniform(5, 42) / street.bustle**0.5
    for side in street.sides:
        if not side.parking:
            continue
        z, gap = random.uniform(3, 9), random.uniform(7, 18)  # without a gap, parked cars may hide the pavement
        while z < 90:
            kind = _draw_car(random)
            length = VEHICLES[kind].underside
            free = street.is_clear(z) and street.is_clear(z + length) and not gap - length < z < gap + 7
            if free and random.random() < 0.35 + 0.5 * street.bustle:
                away = (side.sign > 0) ^ (random.random() < 0.06)
                yield _vehicle(random, kind, side.x(side.road - 1.1), z, away, False)
            z += length + random.uniform(0.7, 1.8)


def _draw_car(random: Generator) -> str:
    return ("hatchback", "saloon", "estate", "van")[int(random.choice(4, p=(0.35, 0.28, 0.25, 0.12)))]


def _vehicle(random: Generator, kind: str, x: float, z: float, away: bool, lit: bool) -> SceneObject:
    colour = pick(random, PAINTS)
    if kind == "tram":
        colour = (206, 60, 48) if random.random() < 0.5 else (228, 200, 90)
    elif kind == "bus":
        colour = pick(random, BUS_PAINTS)
    elif kind == "truck" and random.random() < 0.6:
        colour = (224, 226, 228)
    vehicle = VEHICLES[kind]
    return SceneObject(x, z, paint_vehicle, (x, z, vehicle, away, colour, lit), vehicle.underside)


def _people(street: Street, random: Generator) -> Iterator[SceneObject]:
    """Place people on the pavements and the zebra crossing, and two-wheelers on the road."""
    left, right = street.sides
    for side in street.sides:
        for z in random.uniform(7, 50, 2 + int(7 * street.bustle)).tolist():
            x = side.x(random.uniform(side.verge + 0.6, side.pavement - 0.4))
            count = 2 if random.random() < 0.25 else 1
            for index in range(count):
                yield _object_at(paint_person, x + 0.6 * index, z, draw_person(random))._replace(z=z - 0.01 * index)
        for z in random.uniform(6, 40, int(random.integers(0, 4))).tolist():
            squeeze = random.uniform(0.18, 0.5) * _draw_sign(random)
            z = z if street.is_clear(z) else 6.0 + 0.1 * z
            yield _object_at(paint_bicycle, side.x(side.pavement - 0.35), z, squeeze, random.uniform(0, 1))
    if street.crossing is not None:
        for x in random.uniform(-left.road, right.road, int(random.integers(1, 5))).tolist():
            yield _object_at(paint_person, x, street.crossing - random.uniform(1.6, 3.6), draw_person(random))
    for _ in range(int(random.integers(0, 3)) + (random.random() < street.bustle)):
        side = street.sides[int(random.random() < 0.65)]
        x, z = side.x(side.road - (2.7 if side.parking else 0.6)), random.uniform(7, 32)
        squeeze = random.uniform(0.15, 0.4) * _draw_sign(random)
        if street.crossing is not None and random.random() < 0.3:
            z, x = street.crossing + random.uniform(1, 4), random.uniform(-left.road - 3, right.road + 3)
            squeeze = random.uniform(0.8, 1.0) * _draw_sign(random)
        paint = paint_motorcyclist if random.random() < 0.25 else paint_cyclist
        yield _object_at(paint, x, z, draw_person(random)._replace(bag=False), squeeze, random.random())
    if random.random() < 0.25:
        side = street.sides[int(random.random() < 0.5)]
        z = random.uniform(7, 25)
        yield _object_at(paint_motorcycle, side.x(side.verge + 0.5), z, random.uniform(0.25, 0.5))


def _draw_sign(random: Generator) -> int:
    return int(random.choice((-1, 1)))
