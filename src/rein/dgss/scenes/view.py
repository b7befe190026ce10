"""The camera's view of a street before light and weather: supersampled `Layers` and the final `View`."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Layers(NamedTuple):
    """Supersampled layers of H x W pixels, filled in place; lengths in metres.

    Colours have four bytes per pixel, because numpy gathers and scatters one uint32 several times faster than three bytes.
    """

    a: np.ndarray  # (W,) float32, metres to the right per metre ahead
    b: np.ndarray  # (H,) float32, metres down per metre ahead
    label: np.ndarray  # (H, W) uint8
    depth: np.ndarray  # (H, W) float32
    colour: np.ndarray  # (H, W, 4) uint8: red, green, blue, sun
    glow: np.ndarray  # (H, W, 4) uint8: red, green, blue, snow cover


@dataclass(frozen=True)
class View:
    """Layers of H x W pixels; colours and fractions in 0..1, lengths in metres; float32 unless stated otherwise.

    Attributes:
        albedo: `(H, W, 3)`, colour of surfaces in uniform light; black in the sky.
        sky: `(H, W)`, fraction of the pixel that is sky.
        sun: `(H, W)`, how directly sunlight falls on the surface; 0 in shadow.
        glow: `(H, W, 3)`, light that surfaces emit at night.
        cover: `(H, W)`, fraction of the pixel that snow covers, except on the ground.
        label: `(H, W)` uint8, train ids.
        depth: `(H, W)`, distance along the viewing direction.
        a: `(W,)`, metres to the right per metre ahead, for each column.
        b: `(H,)`, metres down per metre ahead, for each row; negative above the horizon.
        camera_height: metres above the ground.
        bend: at distance z, the street is shifted by `bend * z * z` to the right.
        lane: width of a lane.
        lamps: `(N, 3)`, positions of street lamps: to the right of the camera, above the ground, ahead.
    """

    albedo: np.ndarray
    sky: np.ndarray
    sun: np.ndarray
    glow: np.ndarray
    cover: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    a: np.ndarray
    b: np.ndarray
    camera_height: float
    bend: float
    lane: float
    lamps: np.ndarray
