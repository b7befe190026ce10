"""Pedestrians, bicycles, motorcycles and their riders."""

from typing import NamedTuple

from numpy.random import Generator

from rein.dgss.scenes.painter import Figure, Painter
from rein.dgss.scenes.palette import (
    BICYCLE,
    MOTORCYCLE,
    PERSON,
    RIDER,
    TAIL_LIGHT_GLOW,
    TYRE,
    Colour,
    pick,
    scaled,
)

# fmt: off
CLOTHES: tuple[Colour, ...] = (
    (44, 48, 60), (150, 44, 48), (52, 82, 138), (196, 190, 180), (88, 98, 74),
    (208, 158, 60), (110, 74, 110), (70, 130, 140), (34, 34, 36),
)
# fmt: on
SKINS: tuple[Colour, ...] = ((228, 188, 160), (200, 152, 120), (150, 104, 78), (98, 68, 52))
HAIRS: tuple[Colour, ...] = ((40, 32, 28), (92, 64, 42), (176, 140, 84), (150, 150, 150))


class Person(NamedTuple):
    """The appearance of a person."""

    coat: Colour
    trousers: Colour
    skin: Colour
    hair: Colour
    height: float  # metres
    stride: float  # metres between the feet
    bag: bool


def draw_person(random: Generator) -> Person:
    """Draw the appearance of a person."""
    return Person(
        coat=pick(random, CLOTHES),
        trousers=scaled(pick(random, CLOTHES), 0.7),
        skin=pick(random, SKINS),
        hair=pick(random, HAIRS),
        height=random.uniform(1.58, 1.88) if random.random() > 0.12 else random.uniform(1.05, 1.4),
        stride=random.uniform(0.1, 0.62),
        bag=random.random() < 0.3,
    )


def paint_person(painter: Painter, x: float, z: float, person: Person) -> None:
    """Paint a pedestrian."""
    figure = Figure(painter, x, z, size=person.height / 1.75)
    trousers, coat = figure.surface(PERSON, person.trousers), figure.surface(PERSON, person.coat)
    dark = figure.surface(PERSON, scaled(person.coat, 0.78))
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


def paint_bicycle(painter: Painter, x: float, z: float, squeeze: float, tint: float) -> None:
    """Paint a bicycle; `squeeze` is the visible fraction of its length, negative if it points left."""
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


def _paint_rider(painter: Painter, x: float, z: float, person: Person, lean: float, seat: float, helmet: Colour) -> None:
    """Paint a rider on a seat at `seat` metres; `lean` is the `squeeze` of the bicycle or motorcycle."""
    figure = Figure(painter, x, z)
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


def paint_motorcycle(painter: Painter, x: float, z: float, squeeze: float) -> None:
    """Paint a motorcycle; `squeeze` is the visible fraction of its length, negative if it points left."""
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


def paint_cyclist(painter: Painter, x: float, z: float, person: Person, squeeze: float, tint: float) -> None:
    """Paint a bicycle with its rider."""
    paint_bicycle(painter, x, z, squeeze, tint)
    _paint_rider(painter, x, z, person, squeeze, 0.95, (214, 214, 210))


def paint_motorcyclist(painter: Painter, x: float, z: float, person: Person, squeeze: float, tint: float) -> None:
    """Paint a motorcycle with its rider."""
    paint_motorcycle(painter, x, z, squeeze)
    _paint_rider(painter, x, z, person, squeeze, 0.86, (60 + 150 * tint, 60, 70))
