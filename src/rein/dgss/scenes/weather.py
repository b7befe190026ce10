"""Renders a street on a clear day, in fog, at night, in rain and in snow.

Each domain is a function of a `View`, which is independent of light and weather, and of a random generator. It returns the image and
leaves labels and depth unchanged.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from rein.dgss.scenes.noise import shifted_noise
from rein.dgss.scenes.palette import ROAD, SIDEWALK, TERRAIN
from rein.dgss.scenes.view import View

Triple = tuple[float, float, float]


# --- domains -------------------------------------------------------------------------------------------


def day(view: View, random: Generator) -> np.ndarray:
    """Clear day: sun and blue sky with some clouds. Like every domain, it returns `(H, W, 3)` uint8."""
    exposure = random.uniform(0.88, 1.1)
    warmth = random.uniform(-0.04, 0.06)
    ambient = np.array((0.62, 0.66, 0.72), np.float32)
    sunlight = np.array((0.62 + warmth, 0.58, 0.50 - warmth), np.float32)
    image = view.albedo * (ambient + sunlight * view.sun[..., None])
    top, horizon = (0.30, 0.52, 0.82), (0.76, 0.86, 0.94)
    clouds = random.uniform(0.25, 0.75)
    _haze(image, view, horizon, 0.0016)
    _add_sky(image, view, _sky(view, random, top, horizon, (0.97, 0.97, 0.98), clouds))
    return _to_bytes(image * np.float32(exposure))


def fog(view: View, random: Generator) -> np.ndarray:
    """Fog by Koschmieder's law, I = J t + A (1 - t) with t = exp(-beta depth); beta depends on the seed."""
    beta = random.uniform(0.022, 0.06)
    grey, tint = random.uniform(0.70, 0.82), random.uniform(-0.02, 0.02)
    airlight = (grey + tint, grey + 0.005, grey - tint + 0.01)
    image = view.albedo * np.array((0.78, 0.80, 0.82), np.float32)
    image += view.glow * np.float32(0.25)
    _haze(image, view, airlight, beta)
    _add_sky(image, view, np.asarray(airlight, np.float32))
    return _to_bytes(image)


def night(view: View, random: Generator) -> np.ndarray:
    """Night: faint blue light, light under street lamps, headlights, lit windows and sensor noise."""
    strength = random.uniform(0.85, 1.15)
    light = np.array((0.13, 0.155, 0.24), np.float32) * np.float32(strength)
    light = light + _tinted(_lamp_light(view), (1.0, 0.80, 0.52))
    light += _tinted(_headlight(view), (0.95, 0.93, 0.84))
    image = view.albedo * light
    image = image / (1.0 + 0.35 * image)  # soft saturation of the sensor under the lamps
    top, horizon = (0.035, 0.05, 0.11), (0.13, 0.115, 0.14)
    _add_sky(image, view, _sky(view, random, top, horizon, (0.13, 0.12, 0.15), random.uniform(0.2, 0.7)))
    rows = len(view.b)
    image += view.glow * np.float32(0.85)
    image += _blur(view.glow, rows / 90) * np.float32(0.5) + _blur(view.glow, rows / 22) * np.float32(0.4)
    _add_lamp_halos(image, view)
    # Automatic exposure: bright shop fronts darken the rest of the image.
    np.clip(image, 0, 1.3, out=image)
    image *= np.float32(min(1.0, 0.155 / float(image.mean())))
    noise = random.standard_normal((rows, len(view.a), 1), dtype=np.float32)
    image += noise * (np.float32(0.012) + np.float32(0.02) * image)
    return _to_bytes(image)


def rain(view: View, random: Generator) -> np.ndarray:
    """Rain: grey light, wet ground with reflections, haze, rain streaks, and drops on the lens."""
    strength = random.uniform(0.7, 1.0)
    image = view.albedo * np.array((0.60, 0.63, 0.67), np.float32)
    ground = _is_ground(view)
    image *= np.where(ground, 0.72, 0.92).astype(np.float32)[..., None]
    image += np.float32(0.35) * (_grey(image) - image)
    image += view.glow * np.float32(0.5)
    airlight = (0.56, 0.59, 0.62)
    _haze(image, view, airlight, random.uniform(0.007, 0.014))
    _add_sky(image, view, _sky(view, random, (0.47, 0.50, 0.55), airlight, (0.64, 0.66, 0.69), 0.8))
    image += _blur(view.glow, len(view.b) / 40) * np.float32(0.35)
    _mirror_in_wet_ground(image, view, ground, random)
    image += (_streaks(view, random) * np.float32(0.30 * strength))[..., None] * (0.85 - image)
    return _lens_drops(_to_bytes(image), random)


def snow(view: View, random: Generator) -> np.ndarray:
    """Snow: white ground with tyre tracks, white roofs and crowns, overcast light, haze, falling flakes."""
    cover = _snow_cover(view, random)[..., None]
    white = np.array((0.97, 0.985, 1.0), np.float32)
    # Some grain of the ground remains visible; without it, snow looks like paper.
    albedo = view.albedo + cover * (white * (0.94 + 0.12 * (_grey(view.albedo) - 0.4)) - view.albedo)
    light = np.array((0.80, 0.83, 0.88), np.float32) + np.float32(0.10) * view.sun[..., None]
    image = albedo * light + view.glow * np.float32(0.3)
    airlight = (0.83, 0.85, 0.88)
    _haze(image, view, airlight, random.uniform(0.006, 0.014))
    _add_sky(image, view, _sky(view, random, (0.72, 0.75, 0.80), airlight, (0.86, 0.88, 0.90), 0.7))
    flakes = _flakes(view, random)[..., None]
    image += flakes * (np.float32(0.98) - image)
    return _to_bytes(image)


RENDERERS: dict[str, Callable[[View, Generator], np.ndarray]] = {
    "day": day,
    "fog": fog,
    "night": night,
    "rain": rain,
    "snow": snow,
}


# --- light and air --------------------------------------------------------------------------------------


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _tinted(layer: np.ndarray, colour: Triple) -> np.ndarray:
    """Return a layer `(H, W)` times a colour, `(H, W, 3)`; a loop over channels is faster than broadcasting."""
    image = np.empty((*layer.shape, 3), np.float32)
    for channel, tone in enumerate(colour):
        np.multiply(layer, np.float32(tone), out=image[..., channel])
    return image


def _grey(image: np.ndarray) -> np.ndarray:
    """Return the mean of the channels, `(H, W, 1)`; a sum is faster than numpy's mean over three values."""
    return (image[..., :1] + image[..., 1:2] + image[..., 2:]) / np.float32(3)


def _blur(layer: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray(_to_bytes(layer))
    size, shrink = image.size, max(1, min(4, int(radius / 2)))  # a wide blur gives the same result at a lower resolution
    blurred = image.reduce(shrink).filter(ImageFilter.GaussianBlur(radius / shrink)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(blurred, np.float32) * np.float32(1 / 255)


def _is_ground(view: View) -> np.ndarray:
    return (view.label == ROAD) | (view.label == SIDEWALK) | (view.label == TERRAIN)


def _haze(image: np.ndarray, view: View, airlight: Triple, beta: float) -> None:
    """Apply Koschmieder's law in place; `_add_sky` adds the sky's part of a pixel."""
    clear = np.exp(view.depth * np.float32(-beta))
    image *= clear[..., None]
    image += _tinted((1 - clear) * (1 - view.sky), airlight)


def _add_sky(image: np.ndarray, view: View, sky: np.ndarray) -> None:
    image += view.sky[..., None] * sky


def _sky(view: View, random: Generator, top: Triple, horizon: Triple, cloud: Triple, amount: float) -> np.ndarray:
    """Return the sky for the whole image, `(H, W, 3)`: a gradient, and clouds that get smaller towards the horizon."""
    rise = np.clip(-view.b, 0, None).astype(np.float32)
    share = np.clip(rise / 0.5, 0, 1)[:, None] ** 0.7
    gradient = (1 - share) * np.asarray(horizon, np.float32) + share * np.asarray(top, np.float32)
    rows = int((rise > 0).sum())
    sky = np.empty((len(view.b), len(view.a), 3), np.float32)
    sky[:] = gradient[:, None]
    above = 1.0 / (rise[:rows, None] + 0.14)
    density = shifted_noise(view.a * above * 26, above * 34, random)
    density = np.clip((density - (0.86 - 0.52 * amount)) * 3.2, 0, 1) * np.clip(rise[:rows, None] * 9, 0, 1)
    sky[:rows] += (0.92 * density)[..., None] * (np.asarray(cloud, np.float32) - sky[:rows])
    return sky


# --- night ----------------------------------------------------------------------------------------------


def _lamp_light(view: View) -> np.ndarray:
    """Return the light of the street lamps on every surface, `(H, W)`: inverse square law, downwards only."""
    x, up = view.a * view.depth, view.camera_height - view.b[:, None] * view.depth
    light = np.zeros_like(view.depth)
    for lamp_x, lamp_up, lamp_z in view.lamps.tolist():
        below = lamp_up - up
        across, ahead = x - lamp_x, view.depth - lamp_z
        square = across * across + below * below + ahead * ahead + 6
        light += np.clip(below, 0, 6) / (square * np.sqrt(square))
    light[view.sky >= 1] = 0
    return np.minimum(48 * light, 1.1)


def _headlight(view: View) -> np.ndarray:
    """Return the light of the headlights of the camera's car, `(H, W)`."""
    up = view.camera_height - view.b[:, None] * view.depth
    beam = np.clip(1 - (view.a / 0.85) ** 2, 0, 1) * np.clip(1.35 - 0.4 * up, 0.12, 1)
    return (beam * 0.36 / (1 + (view.depth / 17) ** 2)).astype(np.float32)


def _add_lamp_halos(image: np.ndarray, view: View) -> None:
    """Add the glow around each visible street lamp and the faint cone of light below it, in place."""
    rows, columns = view.depth.shape
    step_a, step_b = view.a[1] - view.a[0], view.b[1] - view.b[0]
    warm = np.array((1.0, 0.82, 0.55), np.float32)
    for x, up, z in view.lamps.tolist():
        column = (x / z - view.a[0]) / step_a
        row = ((view.camera_height - up) / z - view.b[0]) / step_b
        if not (0 <= column < columns and 0 <= row < rows) or view.depth[int(row), int(column)] < z - 0.7:
            continue
        metre = 1 / (z * step_b)
        reach = int(np.clip(3.2 * metre, 4, rows * 0.5))
        top, bottom = max(0, int(row) - reach), min(rows, int(row + 5.5 * metre) + 1)
        left, right = max(0, int(column) - reach), min(columns, int(column) + reach + 1)
        v = (np.arange(top, bottom, dtype=np.float32) - row)[:, None]
        u = (np.arange(left, right, dtype=np.float32) - column)[None]
        distance = np.sqrt(u * u + v * v) / reach
        halo = 0.55 * np.clip(1 - distance, 0, 1) ** 3 + 0.8 * np.clip(1 - distance * 4, 0, 1)
        drop = np.clip(v / (6 * metre), 0, 1)
        cone = np.clip(1.2 - np.abs(u) / (0.15 * metre + 0.45 * np.maximum(v, 0) + 1), 0, 1)
        halo = halo + 0.10 * cone * (v > 0) * (1 - drop)
        image[top:bottom, left:right] += halo[..., None] * warm


# --- rain -----------------------------------------------------------------------------------------------


def _mirror_in_wet_ground(image: np.ndarray, view: View, ground: np.ndarray, random: Generator) -> None:
    """Blend into ground pixels, in place, the objects above them, mirrored at their foot and blurred."""
    rows, columns = view.label.shape
    row = np.arange(rows, dtype=np.int32)[:, None]
    foot = np.maximum.accumulate(np.where(ground, np.int32(-1), row), axis=0)
    source = np.clip(2 * foot - row + 1, 0, rows - 1)
    mirrored = Image.fromarray(_to_bytes(image)[source, np.arange(columns)])
    squeezed = mirrored.resize((max(2, columns // 2), max(2, rows // 8)), Image.Resampling.BOX)
    smooth = np.asarray(squeezed.resize((columns, rows), Image.Resampling.BILINEAR), np.float32) / np.float32(255)
    mirrored = np.asarray(mirrored, np.float32) / np.float32(255)

    puddle = shifted_noise(view.a * view.depth * 3.5, view.depth * 2.5, random)
    puddle = np.clip((puddle - 0.52) * 5, 0, 1) * (view.label == ROAD)
    wetness = np.select([view.label == ROAD, view.label == SIDEWALK], [0.52, 0.34], 0.0)
    grazing = 0.45 + 0.55 * np.exp(-4.5 * np.clip(view.b, 0, None))[:, None]  # after Fresnel
    share = ((wetness + 0.22 * puddle) * grazing * (1 - view.sky)).astype(np.float32)[..., None]
    sharp = (0.25 + 0.5 * puddle).astype(np.float32)[..., None]
    image += share * (smooth + sharp * (mirrored - smooth) - image)


def _streaks(view: View, random: Generator) -> np.ndarray:
    """Return the opacity of falling rain, `(H, W)`."""
    rows, columns = view.label.shape
    layer = Image.new("L", (columns, rows), 0)
    draw = ImageDraw.Draw(layer)
    slant = random.uniform(-0.25, 0.25)
    count = int(0.9 * (rows * columns) ** 0.5)
    lengths = rows * random.uniform(0.03, 0.14, count)
    starts = np.stack([random.uniform(-0.05, 1.05, count) * columns, random.uniform(-0.1, 1, count) * rows], 1)
    for (x, y), length, tone in zip(starts.tolist(), lengths.tolist(), random.integers(70, 255, count).tolist(), strict=True):
        draw.line((x, y, x + slant * length, y + length), fill=tone, width=max(1, round(rows / 300)))
    return np.asarray(layer, np.float32) * np.float32(1 / 255)


def _lens_drops(image: np.ndarray, random: Generator) -> np.ndarray:
    """Add a few drops on the lens; each shows its surroundings reduced and upside down."""
    rows, columns = image.shape[:2]
    for _ in range(int(random.integers(3, 9))):
        radius = max(2, int(rows * random.uniform(0.014, 0.035)))
        middle_x, middle_y = random.uniform(0, columns), random.uniform(0, rows)
        left, top = int(middle_x) - radius, int(middle_y) - radius
        if left < 0 or top < 0 or left + 2 * radius >= columns or top + 2 * radius >= rows:
            continue
        offset = (np.arange(2 * radius, dtype=np.float32) + 0.5) / radius - 1
        edge = np.clip((1 - np.hypot(offset[:, None] * 0.9, offset[None])) * radius * 0.5, 0, 1) * 0.75
        reach = 4
        far_rows = np.clip(middle_y - offset * radius * reach, 0, rows - 1).astype(np.intp)
        far_columns = np.clip(middle_x - offset * radius * reach, 0, columns - 1).astype(np.intp)
        drop = image[np.ix_(far_rows, far_columns)] * (0.92 + 0.2 * offset[:, None, None])
        patch = image[top : top + 2 * radius, left : left + 2 * radius]
        patch[:] = np.clip(patch + edge[..., None] * (drop - patch), 0, 255).astype(np.uint8)
    return image


# --- snow -----------------------------------------------------------------------------------------------


def _snow_cover(view: View, random: Generator) -> np.ndarray:
    """Return the fraction of every pixel that snow covers, `(H, W)`; tyre tracks on the road have less."""
    z = view.depth
    x = view.a * z - view.bend * z * z
    patchy = shifted_noise(x * 9, z * 4, random) - 0.5
    lane = x / view.lane + 0.5
    lane -= np.floor(lane)
    offset = np.abs(np.abs(lane - 0.5) * view.lane - 0.75)  # from the middle of a tyre track, in metres
    track = np.clip(1.5 - offset / 0.26, 0, 1)
    depth_of_snow = random.uniform(0.78, 0.95)
    road = depth_of_snow - (0.34 + 0.25 * random.random()) * track + 0.5 * patchy
    beside = 0.93 + 0.25 * patchy
    cover = np.select([view.label == ROAD, view.label == SIDEWALK, view.label == TERRAIN], [road, beside, beside], 0)
    return np.clip(np.maximum(cover, view.cover), 0, 0.97).astype(np.float32)


def _flakes(view: View, random: Generator) -> np.ndarray:
    """Return the opacity of falling snow, `(H, W)`: many small flakes far away, few large ones near the camera."""
    rows, columns = view.label.shape
    unit = rows / 128
    opacity = np.zeros((rows, columns), np.float32)
    density = random.uniform(0.6, 1.2)
    for distance, radius, per_area, strength in ((18, 0.35, 0.014, 0.75), (8, 0.75, 0.004, 0.8), (3, 1.7, 0.0006, 0.55)):
        layer = Image.new("L", (columns, rows), 0)
        draw = ImageDraw.Draw(layer)
        count = int(per_area * density * rows * columns / unit**2) + 1
        xs, ys = random.uniform(0, columns, count), random.uniform(0, rows, count)
        sizes = radius * unit * random.uniform(0.7, 1.4, count)
        for x, y, size in zip(xs.tolist(), ys.tolist(), sizes.tolist(), strict=True):
            if size < 0.75:
                draw.point((x, y), fill=int(90 + 200 * size))
            else:
                draw.ellipse((x - size, y - size * 1.15, x + size, y + size * 1.15), fill=255)
        if radius * unit > 0.6:
            layer = layer.filter(ImageFilter.GaussianBlur(0.4 * radius * unit))
        falling = np.asarray(layer, np.float32) * np.float32(strength / 255)
        opacity = np.maximum(opacity, falling * (view.depth > distance * 0.5))
    return opacity
