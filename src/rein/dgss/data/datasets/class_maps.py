"""Class maps: values or names in label files -> indices of the 19 Cityscapes classes, or 255 (ignored)."""

from __future__ import annotations

from collections.abc import Sequence

from rein.dgss.labels import CITYSCAPES_CLASSES, IGNORE_LABEL

_CLASS = {name: k for k, name in enumerate(CITYSCAPES_CLASSES)}


def _class_map(count: int, classes: dict[str, int | Sequence[int]]) -> dict[int, int]:
    """Map of the values 0 to count - 1, from the values of each class name. Values without a class are ignored."""
    class_map = dict.fromkeys(range(count), IGNORE_LABEL)
    for name, values in classes.items():
        for value in (values,) if isinstance(values, int) else values:
            class_map[value] = _CLASS[name]
    return class_map


TRAIN_IDS: dict[int, int] = {k: k for k in range(len(CITYSCAPES_CLASSES))}

# Source: helpers/labels.py of cityscapesScripts. The id -1, licence plate, does not occur in label files.
CITYSCAPES_IDS = _class_map(
    34,
    {
        "road": 7,
        "sidewalk": 8,
        "building": 11,
        "wall": 12,
        "fence": 13,
        "pole": 17,
        "traffic light": 19,
        "traffic sign": 20,
        "vegetation": 21,
        "terrain": 22,
        "sky": 23,
        "person": 24,
        "rider": 25,
        "car": 26,
        "truck": 27,
        "bus": 28,
        "train": 31,
        "motorcycle": 32,
        "bicycle": 33,
    },
)

# The ids of Cityscapes; 34 is the licence plate.
GTAV = CITYSCAPES_IDS | {34: IGNORE_LABEL}

# The ids of SYNTHIA-RAND-CITYSCAPES. Terrain, truck and train have an id but no pixels: papers compare the other 16 classes.
SYNTHIA = _class_map(
    23,
    {
        "road": 3,
        "sidewalk": 4,
        "building": 2,
        "wall": 21,
        "fence": 5,
        "pole": 7,
        "traffic light": 15,
        "traffic sign": 9,
        "vegetation": 6,
        "terrain": 16,
        "sky": 1,
        "person": 10,
        "rider": 17,
        "car": 8,
        "truck": 18,
        "bus": 19,
        "train": 20,
        "motorcycle": 12,
        "bicycle": 11,
    },
)

# Cityscapes train ids; 19 is ignored.
URBANSYN = TRAIN_IDS | {19: IGNORE_LABEL}

# Source: column csTrainId of helpers/anue_labels.py, the publisher's map to the 19 classes, by id and by name in a polygon file.
IDD_NAMES: dict[str, int] = {
    "road": _CLASS["road"],
    "parking": IGNORE_LABEL,
    "drivable fallback": IGNORE_LABEL,
    "sidewalk": _CLASS["sidewalk"],
    "rail track": IGNORE_LABEL,
    "non-drivable fallback": _CLASS["terrain"],
    "person": _CLASS["person"],
    "animal": IGNORE_LABEL,
    "rider": _CLASS["rider"],
    "motorcycle": _CLASS["motorcycle"],
    "bicycle": _CLASS["bicycle"],
    "autorickshaw": IGNORE_LABEL,
    "car": _CLASS["car"],
    "truck": _CLASS["truck"],
    "bus": _CLASS["bus"],
    "caravan": IGNORE_LABEL,
    "trailer": IGNORE_LABEL,
    "train": _CLASS["train"],
    "vehicle fallback": IGNORE_LABEL,
    "curb": IGNORE_LABEL,
    "wall": _CLASS["wall"],
    "fence": _CLASS["fence"],
    "guard rail": IGNORE_LABEL,
    "billboard": IGNORE_LABEL,
    "traffic sign": _CLASS["traffic sign"],
    "traffic light": _CLASS["traffic light"],
    "pole": _CLASS["pole"],
    "polegroup": IGNORE_LABEL,
    "obs-str-bar-fallback": IGNORE_LABEL,
    "building": _CLASS["building"],
    "bridge": IGNORE_LABEL,
    "tunnel": IGNORE_LABEL,
    "vegetation": _CLASS["vegetation"],
    "sky": _CLASS["sky"],
    "fallback background": IGNORE_LABEL,
    "unlabeled": IGNORE_LABEL,
    "ego vehicle": IGNORE_LABEL,
    "rectification border": IGNORE_LABEL,
    "out of roi": IGNORE_LABEL,
    "license plate": IGNORE_LABEL,
}
IDD_IDS: dict[int, int] = dict(enumerate(IDD_NAMES.values()))

# The values of Mapillary Vistas 1.2 as mapped by RobustNet (Choi et al., CVPR 2021), and those of 2.0 by the same names. They are
# used only if the data set's config file, which takes precedence, is missing.
MAPILLARY_V1 = _class_map(
    66,
    {
        "road": (13, 24, 41),
        "sidewalk": (2, 15),
        "building": 17,
        "wall": 6,
        "fence": 3,
        "pole": (45, 47),
        "traffic light": 48,
        "traffic sign": 50,
        "vegetation": 30,
        "terrain": 29,
        "sky": 27,
        "person": 19,
        "rider": (20, 21, 22),
        "car": 55,
        "truck": 61,
        "bus": 54,
        "train": 58,
        "motorcycle": 57,
        "bicycle": 52,
    },
)
MAPILLARY_V2 = _class_map(
    124,
    {
        "road": (21, *range(35, 45), *range(46, 56), 57, 58, 74),
        "sidewalk": (4, 24),
        "building": 27,
        "wall": 12,
        "fence": 5,
        "pole": (85, 88),
        "traffic light": tuple(range(90, 96)),
        "traffic sign": (99, 100, 101, 103),
        "vegetation": 64,
        "terrain": 63,
        "sky": 61,
        "person": (30, 31),
        "rider": (32, 33, 34),
        "car": 108,
        "truck": 114,
        "bus": 107,
        "train": 111,
        "motorcycle": 110,
        "bicycle": 105,
    },
)
_MAPILLARY_NAMES: dict[str, int] = {
    "construction--flat--road": _CLASS["road"],
    "marking": _CLASS["road"],  # and all names below it in the hierarchy, except zebra crossings
    "marking-only": _CLASS["road"],
    "object--manhole": _CLASS["road"],
    "construction--barrier--curb": _CLASS["sidewalk"],
    "construction--flat--sidewalk": _CLASS["sidewalk"],
    "construction--structure--building": _CLASS["building"],
    "construction--barrier--wall": _CLASS["wall"],
    "construction--barrier--fence": _CLASS["fence"],
    "object--support--pole": _CLASS["pole"],
    "object--support--utility-pole": _CLASS["pole"],
    "object--traffic-light": _CLASS["traffic light"],
    "object--traffic-sign--front": _CLASS["traffic sign"],
    "object--traffic-sign--direction-front": _CLASS["traffic sign"],
    "object--traffic-sign--temporary-front": _CLASS["traffic sign"],
    "object--traffic-sign--information-parking": _CLASS["traffic sign"],
    "nature--vegetation": _CLASS["vegetation"],
    "nature--terrain": _CLASS["terrain"],
    "nature--sky": _CLASS["sky"],
    "human--person": _CLASS["person"],
    "human--rider": _CLASS["rider"],
    "object--vehicle--car": _CLASS["car"],
    "object--vehicle--truck": _CLASS["truck"],
    "object--vehicle--bus": _CLASS["bus"],
    "object--vehicle--on-rails": _CLASS["train"],
    "object--vehicle--motorcycle": _CLASS["motorcycle"],
    "object--vehicle--bicycle": _CLASS["bicycle"],
}


def mapillary_class(name: str) -> int:
    """The class index of a Mapillary label name, or 255.

    A name without a class has the class of its nearest ancestor: `human--person--individual` has that of `human--person`.
    """
    if name.endswith("--crosswalk-zebra"):
        return IGNORE_LABEL
    while name not in _MAPILLARY_NAMES:
        name, dashes, _ = name.rpartition("--")
        if not dashes:
            return IGNORE_LABEL
    return _MAPILLARY_NAMES[name]
