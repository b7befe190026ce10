"""Patterns of surfaces: windows, bricks, fence bars, leaves and roof tiles, in metres along and up each wall."""

import numpy as np

from rein.dgss.scenes.noise import noise_tile
from rein.dgss.scenes.painter import Painter
from rein.dgss.scenes.view import Layers

# Kinds of pattern.
WINDOWS, BRICKS, BARS, LEAVES, TILES = range(1, 6)


def paint_patterns(painter: Painter, pattern: np.ndarray, layers: Layers) -> None:
    """Paint the patterns into `layers` in place.

    A pattern is (kind, x factor, z factor, offset, column width, window width, storey height, window height, wall height, shop,
    seed, lit fraction). The position along the wall is x factor * x + z factor * z + offset. Lengths are in metres; window width and
    height are fractions of the column and the storey.

    Args:
        painter: the painter, for the registered patterns and the camera.
        pattern: (H, W), number of the pattern of each pixel; 0 for none.
        layers: the layers with colours, depth and glow.
    """
    where = np.flatnonzero(pattern > 0)
    if not len(where):
        return
    rows, columns = np.divmod(where.astype(np.int32), np.int32(pattern.shape[1]))
    pattern = pattern.ravel().take(where).astype(np.intp)
    z = layers.depth.ravel().take(where)
    across = layers.a.take(columns) * z
    up = painter.camera.height - layers.b.take(rows) * z
    table = np.array(painter.patterns, np.float32)

    def value(column: int) -> np.ndarray:
        return table[:, column].take(pattern)

    along = value(1) * across + value(2) * z + value(3)
    kind, top = value(0), value(8)
    noise = noise_tile()
    size = len(noise)
    speck = noise.ravel().take(((up * 20).astype(np.int32) & (size - 1)) * size + ((along * 20).astype(np.int32) & (size - 1)))
    wide, high = value(4), value(6)
    column, storey = along / wide, up / high
    column_index, storey_index = np.floor(column), np.floor(storey)
    column -= column_index
    storey -= storey_index
    shop = (value(9) > 0) & (storey_index == 0)
    dx = np.abs(column - np.float32(0.5)) - np.where(shop, np.float32(0.44), value(5) * np.float32(0.5))
    dy = np.abs(storey - np.float32(0.5)) - np.where(shop, np.float32(0.36), value(7) * np.float32(0.5))
    inside = np.maximum(dx * wide, dy * high)  # distance to the edge of the window in metres, negative inside
    inside[(kind != WINDOWS) | (up > top - np.float32(0.25)) | (up < 0)] = 1.0
    window = np.flatnonzero(inside < 0)

    bright = np.float32(0.92) + np.float32(0.16) * speck
    bright[inside < 0.14] = 1.14  # the window frame; panes are painted below
    other = np.flatnonzero(kind != WINDOWS)
    bright[other] = _wall_grain(kind[other], along[other], up[other], top[other], speck[other])
    bright *= np.minimum(np.float32(1), np.float32(0.78) + np.float32(0.22) * up)  # darker near the ground

    chance = np.sin(column_index[window] * 12.9898 + storey_index[window] * 78.233 + value(10)[window]) * 43758.547
    chance -= np.floor(chance)  # a pseudo-random number in 0..1 for each window
    pane = 0.3 + 0.55 * chance + 0.5 * storey[window]
    colour = layers.colour.view(np.uint32).ravel()
    paint = colour.take(where)[:, None].view(np.uint8)
    for channel, tone in enumerate((84, 100, 120)):
        paint[:, channel] = np.minimum(paint[:, channel] * bright, 255)
        paint[window, channel] = np.minimum(pane * np.float32(tone), 255)
    colour[where] = paint.view(np.uint32).ravel()

    is_lit = chance < value(11)[window]
    warmth = chance[is_lit] * 97.0
    warmth -= np.floor(warmth)
    light = np.stack([230 + 25 * warmth, 172 + 50 * warmth, 88 + 80 * warmth], 1)
    light *= ((0.5 + 0.4 * warmth) * np.where(shop[window[is_lit]], 0.6, 1.0))[:, None]  # shop windows are larger
    layers.glow.reshape(-1, 4)[where[window[is_lit]], :3] = light.astype(np.uint8)


def _wall_grain(kind: np.ndarray, along: np.ndarray, up: np.ndarray, top: np.ndarray, speck: np.ndarray) -> np.ndarray:
    """Return the brightness of bricks, fence bars, leaves and tiles, (N,), from metres along and up the wall."""
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
