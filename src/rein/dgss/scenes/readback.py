"""Converts the painted image of surface numbers to label, depth and colour at the requested size."""

from itertools import chain

import numpy as np
from PIL import Image

from rein.dgss.scenes.ground import paint_ground
from rein.dgss.scenes.painter import NEAREST, Painter
from rein.dgss.scenes.palette import SKY
from rein.dgss.scenes.patterns import paint_patterns
from rein.dgss.scenes.street import Street
from rein.dgss.scenes.view import Layers, View

SUPERSAMPLING = 2
SKY_DEPTH = 1000.0

# Factors that convert the first columns of `Surface` to bytes: label, colour, sun, glow, snow cover.
BYTE_SCALES = np.array((1, 1, 1, 1, 255, 1, 1, 1, 255), np.float32)


def read_back(painter: Painter, street: Street) -> View:
    """Return the view of a painted street. Colours and fractions are averaged over supersampled pixels; label and depth are not."""
    camera = painter.camera
    a = ((np.arange(camera.columns) + 0.5 - camera.centre) / camera.focal).astype(np.float32)
    b = ((np.arange(camera.rows) + 0.5 - camera.horizon) / camera.focal).astype(np.float32)
    numbers = np.asarray(painter.numbers).astype(np.intp)
    table = np.fromiter(chain.from_iterable(painter.surfaces), np.float32).reshape(len(painter.surfaces), -1)
    table_bytes = np.clip(table[:, :9] * BYTE_SCALES, 0, 255).astype(np.uint8)
    first, second = table[:, 9].take(numbers), table[:, 10].take(numbers)
    layers = Layers(
        a=a,
        b=b,
        label=table_bytes[:, 0].take(numbers),
        depth=np.float32(1) / np.clip(first + second * a, 1.0 / 500.0, 1.0 / NEAREST),
        colour=_take_four(table_bytes[:, 1:5], numbers),
        glow=_take_four(table_bytes[:, 5:9], numbers),
    )
    paint_patterns(painter, table[:, 11].take(numbers).astype(np.int16), layers)
    bare = numbers == 0
    horizon = int(np.searchsorted(b, 1e-4))
    paint_ground(painter, street, np.flatnonzero(bare[horizon:]) + horizon * camera.columns, layers)
    bare[horizon:] = False
    layers.label[bare] = SKY
    layers.depth[bare] = SKY_DEPTH

    step, colour, glow = SUPERSAMPLING, _average(layers.colour), _average(layers.glow)
    return View(
        albedo=_fractions(colour[..., :3]),
        sky=_fractions(_average(bare * np.uint8(255))),
        sun=_fractions(colour[..., 3]),
        glow=_fractions(glow[..., :3]),
        cover=_fractions(glow[..., 3]),
        label=np.ascontiguousarray(layers.label[::step, ::step]),
        depth=np.ascontiguousarray(layers.depth[::step, ::step]),
        a=a[::step],
        b=b[::step],
        camera_height=camera.height,
        bend=street.bend,
        lane=street.lane,
        lamps=np.array(painter.lamps, np.float32).reshape(-1, 3),
    )


def _take_four(table: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Gather rows of a byte table (surfaces, 4) by surface number (H, W) -> (H, W, 4)."""
    return np.ascontiguousarray(table).view(np.uint32).ravel().take(numbers)[..., None].view(np.uint8)


def _average(layer: np.ndarray) -> np.ndarray:
    """Return the mean over supersampled pixels of a uint8 layer, (H, W) or (H, W, 4)."""
    rows, columns = layer.shape[:2]
    mode = "L" if layer.ndim == 2 else "RGBX"  # not "RGBA", where Pillow weights the colours by alpha
    image = Image.frombuffer(mode, (columns, rows), np.ascontiguousarray(layer), "raw", mode, 0, 1)
    return np.asarray(image.reduce(SUPERSAMPLING))


def _fractions(layer: np.ndarray) -> np.ndarray:
    """Convert uint8 to contiguous float32 in 0..1."""
    return np.ascontiguousarray(layer).astype(np.float32) * np.float32(1 / 255)
