"""The ground: the material at each point of the street, with its colour, grain and shadows."""

import numpy as np

from rein.dgss.scenes.noise import noise_tile
from rein.dgss.scenes.painter import Painter
from rein.dgss.scenes.palette import ROAD, SIDEWALK, TERRAIN
from rein.dgss.scenes.street import Street
from rein.dgss.scenes.view import Layers

# Ground materials: label, colour, strength of the grain.
ASPHALT, MARKING, KERB, PAVING, GRASS, RAIL, WORN = range(7)
MATERIALS = (
    (ROAD, (102, 102, 106), 0.20),
    (ROAD, (226, 226, 220), 0.08),
    (SIDEWALK, (178, 174, 168), 0.08),
    (SIDEWALK, (158, 149, 140), 0.14),
    (TERRAIN, (104, 130, 66), 0.55),
    (ROAD, (72, 74, 80), 0.10),
    (ROAD, (92, 92, 97), 0.20),
)
PLAIN, GAPS, CROSS_STREET, ZEBRA, STOP_LINE = range(5)  # kinds of image row; GAPS: between two dashes of a lane marking
TABLE_REACH, TABLE_STEPS = 60.0, 40  # of the across-street table: metres to each side, entries per metre


def paint_ground(painter: Painter, street: Street, where: np.ndarray, layers: Layers) -> None:
    """Paint the ground into `layers` in place.

    `where` contains the flat indices of the ground pixels: below the horizon and without a surface.
    """
    if not len(where):
        return
    camera, noise = painter.camera, noise_tile()
    highest = int(where[0]) // camera.columns
    row, column = np.divmod(where.astype(np.int32), np.int32(camera.columns))
    row, column = row.astype(np.intp) - highest, column.astype(np.intp)
    row_z = np.minimum(camera.height / layers.b[highest:], 500.0).astype(np.float32)

    z = row_z.take(row)
    x = layers.a.take(column) * z - (street.bend * row_z * row_z).take(row)
    entries = int(2 * TABLE_REACH * TABLE_STEPS)
    entry = np.clip((x + TABLE_REACH) * TABLE_STEPS, 0, entries - 1).astype(np.int32)
    entry += (_row_kinds(street, row_z) * entries).astype(np.int32).take(row)
    material = _across_tables(street).ravel().take(entry).astype(np.intp)
    labels, colours, grains = zip(*MATERIALS, strict=True)

    scale = np.float32(24.0 * max(1.0, min(2.0, camera.rows / 512)))
    size = len(noise)
    cell = ((row_z * scale).astype(np.int32) % size * size).take(row) + ((x * scale).astype(np.int32) & (size - 1))
    fade = (1 / (1 + row_z / 14)).astype(np.float32).take(row)
    bright = 1 + 2 * np.array(grains, np.float32).take(material) * fade * (noise.ravel().take(cell) - np.float32(0.5))
    joint = (x - np.floor(x) < 0.07) | (row_z % 1.0 < 0.07).take(row)
    bright -= np.float32(0.22) * fade * (joint & (material == PAVING))
    bright *= 1 - np.asarray(painter.contact_shadow).ravel().take(where) * np.float32(0.85 / 255)

    paint = np.empty((len(where), 4), np.uint8)
    for channel, tones in enumerate(np.array(colours, np.float32).T):
        paint[:, channel] = np.minimum(tones.take(material) * bright, 255)
    paint[:, 3] = (255 - np.asarray(painter.cast_shadow).ravel().take(where)) * np.float32(painter.sun[1])
    layers.colour.view(np.uint32).ravel()[where] = paint.view(np.uint32).ravel()
    layers.label.ravel()[where] = np.array(labels, np.uint8).take(material)
    layers.depth.ravel()[where] = z


def _across_tables(street: Street) -> np.ndarray:
    """Return the ground material for each kind of row and position across the street, (5, entries)."""
    left, right = street.sides
    x = np.arange(-TABLE_REACH, TABLE_REACH, 1 / TABLE_STEPS) + 0.5 / TABLE_STEPS
    plain = np.full(len(x), ASPHALT, np.uint8)
    on_road = (x > -left.road) & (x < right.road)
    lane_position = (x / street.lane + 0.5) % 1.0
    plain[on_road & (np.abs(np.abs(lane_position - 0.5) * street.lane - 0.75) < 0.28)] = WORN
    gaps = plain.copy()
    for index in range(-street.lanes_left, street.lanes_right + 1):
        line = np.abs(x - (index - 0.5) * street.lane) < 0.075
        plain[line] = MARKING
        if index in (-street.lanes_left, street.lanes_right):  # the outermost lines are not dashed
            gaps[line] = MARKING
    for table in (plain, gaps):
        if street.tram:
            table[np.abs(np.abs(x + street.lane) - 0.72) < 0.06] = RAIL
        for side in street.sides:
            distance = x * side.sign
            table[distance > side.road] = KERB
            table[distance > side.road + 0.2] = GRASS
            table[(distance > side.verge) & (distance < side.pavement)] = PAVING
            if not street.suburb:
                table[(distance > side.pavement) & (distance < side.facade + 0.5)] = PAVING
    cross_street = np.where(np.abs(x) < 45, ASPHALT, GRASS).astype(np.uint8)
    zebra = np.where(on_road, np.where((x % 1.1) < 0.55, MARKING, ASPHALT), gaps).astype(np.uint8)
    stop = np.where((x > -0.5 * street.lane) & (x < right.road - 0.3), MARKING, gaps).astype(np.uint8)
    return np.stack([plain, gaps, cross_street, zebra, stop])


def _row_kinds(street: Street, z: np.ndarray) -> np.ndarray:
    """Return the kind of each image row, (rows,), from its distance in metres."""
    kinds = np.where((z % 8.0) > 3.4, GAPS, PLAIN)
    if street.crossing is not None:
        near, far = street.crossing, street.crossing + street.crossing_width
        kinds[(z > near - 6.5) & (z < far + 4)] = GAPS
        kinds[(z > near) & (z < far)] = CROSS_STREET
        kinds[(z > near - 4.2) & (z < near - 1.0)] = ZEBRA
        kinds[(z > near - 5.6) & (z < near - 5.1)] = STOP_LINE
    return kinds
