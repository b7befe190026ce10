"""Street furniture: lamps, bollards, signs, direction panels, traffic lights."""

from rein.dgss.scenes.painter import Figure, Painter
from rein.dgss.scenes.palette import BLACK, METAL, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, TYRE, Colour, scaled

LAMP_GLOW: Colour = (255, 214, 150)
SIGN_BLUE: Colour = (28, 84, 170)
SIGN_RED: Colour = (200, 32, 38)
SIGN_WHITE: Colour = (240, 240, 238)
SIGN_YELLOW: Colour = (244, 200, 40)
SIGNALS: tuple[Colour, ...] = ((250, 60, 48), (250, 186, 50), (70, 235, 140))  # from top to bottom

NO_ENTRY, LIMIT, WARNING, PARKING, PRIORITY, STOP = SIGNS = range(6)


def paint_lamp(painter: Painter, x: float, z: float, sign: int) -> None:
    """Paint a street lamp with its arm over the road, on the left (sign -1) or right (1); it is lit at night."""
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


def paint_bollard(painter: Painter, x: float, z: float) -> None:
    """Paint a bollard."""
    figure = Figure(painter, x, z)
    figure.box(figure.surface(POLE, (72, 72, 76)), -0.08, 0.08, 0, 0.95)
    figure.box(figure.surface(POLE, (225, 225, 220)), -0.08, 0.08, 0.7, 0.82)
    painter.darken(x - 0.1, x + 0.1, z, z + 0.1)


def paint_sign(painter: Painter, x: float, z: float, kind: int, size: float, low: float) -> None:
    """Paint one of `SIGNS` on a pole; its lower edge is `low` metres above the ground."""
    figure, half = Figure(painter, x, z), 0.42 * size
    middle = low + half
    figure.line(figure.surface(POLE, METAL), 0.09, (0, 0), (0, middle))
    red, white = figure.surface(TRAFFIC_SIGN, SIGN_RED), figure.surface(TRAFFIC_SIGN, SIGN_WHITE)
    if kind == NO_ENTRY:
        figure.disc(red, 0, middle, half)
        figure.box(white, -half * 0.62, half * 0.62, middle - 0.09, middle + 0.09)
    elif kind == LIMIT:
        figure.disc(red, 0, middle, half)
        figure.disc(white, 0, middle, half * 0.72)
        figure.line(figure.surface(TRAFFIC_SIGN, TYRE), 0.08, (0, middle - 0.15), (0, middle + 0.15))
    elif kind == WARNING:
        figure.polygon(red, (-half, middle - half * 0.8), (half, middle - half * 0.8), (0, middle + half))
        inner = half * 0.58
        figure.polygon(white, (-inner, middle - half * 0.6), (inner, middle - half * 0.6), (0, middle + inner))
    elif kind == PARKING:
        blue = figure.surface(TRAFFIC_SIGN, SIGN_BLUE)
        figure.box(blue, -half, half, low, middle + half)
        figure.line(white, 0.09, (-half * 0.3, middle - half * 0.5), (-half * 0.3, middle + half * 0.5))
        figure.disc(white, half * 0.1, middle + half * 0.25, half * 0.33)
    elif kind == PRIORITY:
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


def paint_panel(painter: Painter, x: float, z: float, width: float) -> None:
    """Paint a blue direction panel on two poles with its left edge at x."""
    figure = Figure(painter, x + width / 2, z)
    pole = figure.surface(POLE, METAL)
    for foot in (-0.35 * width, 0.35 * width):
        figure.line(pole, 0.13, (foot, 0), (foot, 3.6))
    white, blue = figure.surface(TRAFFIC_SIGN, SIGN_WHITE), figure.surface(TRAFFIC_SIGN, SIGN_BLUE)
    for number, inset in ((white, 0.0), (blue, 0.07)):
        half = width / 2 - inset
        figure.box(number, -half, half, 2.4 + inset, 3.9 - inset)
    for row, end in ((3.45, 0.25), (2.9, 0.05)):
        figure.line(white, 0.16, (-width * 0.38, row), (width * end, row))


def paint_traffic_light(painter: Painter, x: float, z: float, state: int) -> None:
    """Paint a traffic light; `state` is the index of the lit signal in `SIGNALS`."""
    figure = Figure(painter, x, z)
    figure.line(figure.surface(POLE, METAL), 0.13, (0, 0), (0, 2.4))
    figure.box(figure.surface(TRAFFIC_LIGHT, (44, 48, 46)), -0.24, 0.24, 2.25, 3.4)
    for index, colour in enumerate(SIGNALS):
        lit = index == state
        lens = figure.surface(TRAFFIC_LIGHT, colour if lit else scaled(colour, 0.28), glow=colour if lit else BLACK)
        figure.disc(lens, 0, 3.2 - 0.37 * index, 0.15)
    painter.shade_wall((x - 0.06, z), (x + 0.06, z), 3.3)
    painter.darken(x - 0.12, x + 0.12, z, z + 0.15)
