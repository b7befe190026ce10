"""Class maps: values or names in label files -> indices of the 19 Cityscapes classes, or 255 (ignored)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rein.dgss.labels import CITYSCAPES_CLASSES, IGNORE_LABEL

_CLASS = {name: k for k, name in enumerate(CITYSCAPES_CLASSES)}


def _class_map(count: int, classes: Mapping[str, int | Sequence[int]]) -> dict[int, int]:
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

# Classes to which both maps of Mapillary Vistas give the same labels: the values of 1.2, those of 2.0, and the names.
_MAPILLARY_COMMON: dict[str, tuple[int, int | tuple[int, ...], str]] = {
    "building": (17, 27, "construction--structure--building"),
    "wall": (6, 12, "construction--barrier--wall"),
    "fence": (3, 5, "construction--barrier--fence"),
    "traffic light": (48, (90, 91, 92, 93, 94, 95), "object--traffic-light"),
    "vegetation": (30, 64, "nature--vegetation"),
    "terrain": (29, 63, "nature--terrain"),
    "sky": (27, 61, "nature--sky"),
    "person": (19, (30, 31), "human--person"),
    "car": (55, 108, "object--vehicle--car"),
    "truck": (61, 114, "object--vehicle--truck"),
    "bus": (54, 107, "object--vehicle--bus"),
    "train": (58, 111, "object--vehicle--on-rails"),
    "motorcycle": (57, 110, "object--vehicle--motorcycle"),
    "bicycle": (52, 105, "object--vehicle--bicycle"),
}


@dataclass(frozen=True)
class MapillaryMap:
    """A map of Mapillary Vistas' labels to the 19 classes.

    Attributes:
        v1: values of version 1.2 -> class index or 255.
        v2: values of version 2.0 -> class index or 255, by the same names.
        names: label name -> class index or 255, for names that differ from their nearest ancestor.
    """

    v1: dict[int, int]
    v2: dict[int, int]
    names: dict[str, int]

    def class_of(self, name: str) -> int:
        """The class index of a label name, or 255.

        A name without a class has the class of its nearest ancestor: `human--person--individual` has that of `human--person`.
        """
        while name not in self.names:
            name, dashes, _ = name.rpartition("--")
            if not dashes:
                return IGNORE_LABEL
        return self.names[name]


def _mapillary(
    v1: dict[str, int | Sequence[int]],
    v2: dict[str, int | Sequence[int]],
    names: dict[str, Sequence[str]],
    ignored: Sequence[str],
) -> MapillaryMap:
    """The map with `_MAPILLARY_COMMON` and the values and names of further classes."""
    common = _MAPILLARY_COMMON.items()
    by_name = {text: _CLASS[name] for name, (_, _, text) in common}
    by_name |= {text: _CLASS[name] for name, texts in names.items() for text in texts}
    return MapillaryMap(
        _class_map(66, {name: first for name, (first, _, _) in common} | v1),
        _class_map(124, {name: second for name, (_, second, _) in common} | v2),
        by_name | dict.fromkeys(ignored, IGNORE_LABEL),
    )


# The maps by name. They are used by the names of the data set's config file or, if it is missing, by the values.
MAPILLARY: dict[str, MapillaryMap] = {
    # The values of 1.2 as in the published settings of Rein; names that only 2.0 has follow their ancestors.
    "rein": _mapillary(
        {
            "road": (7, 8, 10, 13, 14, 23, 24),
            "sidewalk": (2, 9, 11, 15),
            "pole": (44, 45, 47),
            "traffic sign": (46, 49, 50),
            "rider": (20, 21, 22),
        },
        {
            "road": (13, 14, 17, 21, 23, *range(35, 59)),
            "sidewalk": (4, 15, 19, 24),
            "pole": (84, 85, 88),
            "traffic sign": (87, *range(96, 104)),
            "rider": (32, 33, 34),
        },
        {
            "road": (
                *(f"construction--flat--{kind}" for kind in ("bike-lane", "crosswalk-plain", "parking", "road", "service-lane")),
                *("marking", "marking-only"),
            ),
            "sidewalk": (
                "construction--barrier--curb",
                *(f"construction--flat--{kind}" for kind in ("curb-cut", "pedestrian-area", "sidewalk")),
            ),
            "pole": ("object--street-light", "object--support--pole", "object--support--utility-pole"),
            "traffic sign": ("object--support--traffic-sign-frame", "object--traffic-sign"),
            "rider": ("human--rider",),
        },
        ignored=(),
    ),
    # The values of 1.2 as in RobustNet (Choi et al., CVPR 2021); those of 2.0 by the same names.
    "robustnet": _mapillary(
        {"road": (13, 24, 41), "sidewalk": (2, 15), "pole": (45, 47), "traffic sign": 50, "rider": (20, 21, 22)},
        {
            "road": (21, *range(35, 45), *range(46, 56), 57, 58, 74),
            "sidewalk": (4, 24),
            "pole": (85, 88),
            "traffic sign": (99, 100, 101, 103),
            "rider": (32, 33, 34),
        },
        {
            "road": ("construction--flat--road", "marking", "marking-only", "object--manhole"),
            "sidewalk": ("construction--barrier--curb", "construction--flat--sidewalk"),
            "pole": ("object--support--pole", "object--support--utility-pole"),
            "traffic sign": (
                *(
                    f"object--traffic-sign--{kind}"
                    for kind in ("front", "direction-front", "temporary-front", "information-parking")
                ),
            ),
            "rider": ("human--rider",),
        },
        ignored=(
            "marking--crosswalk-zebra",
            "marking--discrete--crosswalk-zebra",
            "marking-only--crosswalk-zebra",
            "marking-only--discrete--crosswalk-zebra",
        ),
    ),
}
