"""What the camera sees of a street before light and weather, as the painting is read back and once it is."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Layers(NamedTuple):
    """Supersampled layers of H x W pixels, filled in place; lengths in metres.

    Four bytes a pixel and not three: numpy gathers and scatters them as one uint32, several times faster.
    """

    a: np.ndarray  # (W,), metres to the right per metre ahead
    b: np.ndarray  # (H,), metres down per metre ahead
    label: np.ndarray  # (H, W) uint8
    depth: np.ndarray  # (H, W) float32
    colour: np.ndarray  # (H, W, 4) uint8: red, green, blue, sun
    glow: np.ndarray  # (H, W, 4) uint8: red, green, blue, snow cover


@dataclass(frozen=True)
class View:
    """Layers of H x W pixels, colours and shares in 0..1, lengths in metres; float32 unless said otherwise.

    Attributes:
        albedo: `(H, W, 3)`, the colour of surfaces in even light; black where sky is.
        sky: `(H, W)`, share of the pixel that is sky.
        sun: `(H, W)`, how straight sunlight falls on the surface, 0 in shadow.
        glow: `(H, W, 3)`, light that surfaces give off after dark.
        cover: `(H, W)`, share of the pixel on which snow stays, other than ground.
        label: `(H, W)` uint8, train ids.
        depth: `(H, W)`, distance along the viewing direction.
        a: `(W,)`, metres to the right per metre ahead, for each column.
        b: `(H,)`, metres down per metre ahead, for each row; negative above the horizon.
        camera_height: metres above the ground.
        bend: the street's centre lies `bend * z * z` to the right at distance z.
        lane: width of a lane.
        lamps: `(N, 3)`, street lamps: right of the camera, above the ground, ahead.
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
