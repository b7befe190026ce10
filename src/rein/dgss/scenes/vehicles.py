"""Cars, vans, trucks, buses and trams: a side profile, of which one end and one side are visible."""

from typing import NamedTuple

from rein.dgss.scenes.painter import CIRCLE, Figure, Painter, Point
from rein.dgss.scenes.palette import BLACK, BUS, CAR, TAIL_LIGHT_GLOW, TRAIN, TRUCK, TYRE, Colour, scaled

GLASS: Colour = (52, 64, 78)
HEADLIGHT_GLOW: Colour = (255, 244, 214)
FACE_COVERS = {"b": 0.1, "g": 0.25, "r": 0.95}  # fraction that snow covers
DETAIL_REACH = 45.0  # metres; details are painted up to this distance


class Vehicle(NamedTuple):
    """The side profile of a vehicle, from the tail over the roof to the nose; metres.

    Each profile point is (along, up, half width). The faces between the points are body, glass or roof.
    """

    label: int
    profile: tuple[Point, ...]
    faces: str  # one letter per face: b body, g glass, r roof or bonnet
    windows: tuple[float, float, float, float, float, float]  # along: tail low, tail high, nose high, nose low; up: low, high
    panes: int
    wheels: tuple[float, ...]
    wheel_radius: float

    @property
    def length(self) -> float:
        """Length including bumpers."""
        return max(along for along, _, _ in self.profile)

    @property
    def underside(self) -> float:
        """Length of the underside."""
        return self.profile[-1][0]


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
PAINTS: tuple[Colour, ...] = (
    (40, 42, 46), (224, 226, 228), (150, 154, 160), (92, 98, 106), (158, 34, 34),
    (36, 66, 130), (190, 186, 176), (54, 92, 74), (206, 120, 40), (120, 172, 196),
)
# fmt: on


def paint_vehicle(painter: Painter, x: float, z: float, vehicle: Vehicle, away: bool, colour: Colour, lit: bool) -> None:
    """Paint a vehicle: the roof, then the visible side, then the end that faces the camera.

    Args:
        painter: the painter of the street.
        x: position of its middle.
        z: position of the end that faces the camera.
        vehicle: its shape.
        away: whether it drives away from the camera, which then sees its tail.
        colour: colour of the body.
        lit: whether its lights are on at night.
    """
    length, profile, faces = vehicle.length, vehicle.profile, vehicle.faces
    if not away:
        profile = tuple((length - along, up, half) for along, up, half in reversed(profile))
        faces = faces[::-1]
    widest, height = max(half for _, _, half in profile), max(up for _, up, _ in profile)
    detailed = z < DETAIL_REACH
    painter.darken(x - widest, x + widest, z, z + length)
    for part in (0.25, 0.6, 1.0) if detailed else (0.8,):
        inset = 0.25 * part
        left, right, near, far = x - widest + inset, x + widest - inset, z + inset, z + length - inset
        painter.shade([(left, near), (right, near), (right, far), (left, far)], part * height * 0.95)

    roof = max(range(len(faces)), key=lambda i: (profile[i][1] + profile[i + 1][1], -i))
    for index in range(len(faces) - 1 if detailed else roof, roof - 1, -1):
        _paint_face(painter, x, z, vehicle, profile[index], profile[index + 1], faces[index], colour)
    middle = x + painter.bend * z * z
    if middle - widest > 0 or middle + widest < 0:
        _paint_flank(painter, x, z, vehicle, profile, away, colour, -1 if middle > 0 else 1)
    axle = min((along if away else length - along for along in vehicle.wheels), default=1.0)
    wheels = Figure(painter, x, z + axle - 0.5 * vehicle.wheel_radius)
    tyre = wheels.surface(vehicle.label, TYRE)
    for foot in (-widest + 0.2, widest - 0.2):
        wheels.box(tyre, foot - 0.12, foot + 0.12, 0, 0.5)
    for index in range(roof - 1, -1, -1):
        _paint_face(painter, x, z, vehicle, profile[index], profile[index + 1], faces[index], colour)
    _paint_end(Figure(painter, x, z), vehicle, profile, away, lit)


def _paint_face(
    painter: Painter, x: float, z: float, vehicle: Vehicle, low: Point, high: Point, kind: str, colour: Colour
) -> None:
    """Paint the face across the vehicle between two points of the profile."""
    (along0, up0, half0), (along1, up1, half1) = low, high
    rise, run = abs(up1 - up0), abs(along1 - along0)
    steep = (rise * rise + run * run) ** 0.5 or 1.0
    normal = (0.0, run / steep, -rise / steep)
    if kind == "g":
        colour = scaled(GLASS, 1.0, 30 * run / steep)  # a slanted pane mirrors the sky
    middle = z + (along0 + along1) / 2
    number = painter.surface(vehicle.label, colour, min(middle, z + 0.5), None, normal, cover=FACE_COVERS[kind])
    near, far = z + along0, z + along1
    painter.polygon(number, (x - half0, up0, near), (x + half0, up0, near), (x + half1, up1, far), (x - half1, up1, far))


def _paint_flank(
    painter: Painter,
    x: float,
    z: float,
    vehicle: Vehicle,
    profile: tuple[Point, ...],
    away: bool,
    colour: Colour,
    sign: int,
) -> None:
    """Paint the visible side, left (-1) or right (1): body, windows and, if it is near, wheels."""
    length, widest = vehicle.length, max(half for _, _, half in profile)
    edge = x + sign * widest
    plane = painter.plane(edge, z, edge, z + length)
    normal = (float(sign), 0.15, 0.0)
    body = painter.surface(vehicle.label, scaled(colour, 0.92), 1, plane, normal, cover=0.05)
    painter.polygon(body, *((x + sign * half, up, z + along) for along, up, half in profile))
    tail_low, tail_high, nose_high, nose_low, low, high = vehicle.windows
    glow = (120.0, 108.0, 76.0) if vehicle.label in (BUS, TRAIN) else BLACK
    glass = painter.surface(vehicle.label, GLASS, 1, plane, normal, glow=glow)
    top_half = min(half for _, up, half in profile if up > low)

    def point(along: float, up: float) -> Point:
        half = widest + (top_half - widest) * max(0.0, (up - low) / max(high - low, 0.1))
        return x + sign * half, up, z + (along if away else length - along)

    for index in range(vehicle.panes):
        start, end = index / vehicle.panes, (index + 1) / vehicle.panes
        gap = 0.035
        lows = [tail_low + (nose_low - tail_low) * share for share in (start, end)]
        highs = [tail_high + (nose_high - tail_high) * share for share in (start, end)]
        corners = ((lows[0] + gap, low), (lows[1] - gap, low), (highs[1] - gap, high), (highs[0] + gap, high))
        painter.polygon(glass, *(point(*corner) for corner in corners))
    if z >= DETAIL_REACH:
        return
    tyre = painter.surface(vehicle.label, TYRE, 1, plane)
    rim = painter.surface(vehicle.label, (150, 152, 156), 1, plane)
    for along in vehicle.wheels:
        middle = along if away else length - along
        for number, radius in ((tyre, vehicle.wheel_radius), (rim, vehicle.wheel_radius * 0.55)):
            rounds = [(edge, vehicle.wheel_radius + radius * v, z + middle + radius * u) for u, v in CIRCLE]
            painter.polygon(number, *rounds)


def _paint_end(figure: Figure, vehicle: Vehicle, profile: tuple[Point, ...], away: bool, lit: bool) -> None:
    """Paint lights, grille, bumper and number plate on the end that faces the camera."""
    half, low = profile[1][2], profile[0][1]
    high = profile[1][1] + 0.15 if vehicle.label == CAR else low + 0.55
    glow = (TAIL_LIGHT_GLOW if away else HEADLIGHT_GLOW) if lit else BLACK
    lamp = figure.surface(vehicle.label, (168, 26, 24) if away else (240, 240, 226), glow=glow)
    bumper = figure.surface(vehicle.label, (56, 58, 62))
    if not away:  # the grille
        figure.box(bumper, -half * 0.55, half * 0.55, high - 0.14, high - 0.02)
    figure.box(bumper, -half * 0.95, half * 0.95, low, low + 0.15)
    tall = 0.2 if away else 0.15
    for sign in (-1, 1):
        figure.box(lamp, sign * half * 0.62, sign * half * 0.95, high - tall, high)
    plate = figure.surface(vehicle.label, (232, 232, 226))
    figure.box(plate, -0.26, 0.26, low + 0.2, low + 0.32)
