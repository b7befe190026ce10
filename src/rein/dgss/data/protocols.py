"""Protocols: how a data set is evaluated. A mean IoU says something only together with the protocol by which it was obtained.

A protocol states, for each data set, the size of the images, the size of the labels, and the class map. Published figures of the
same methods differ by whole points between protocols.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rein.dgss.data.pairs import Sample
from rein.dgss.data.resampling import fitted_size, halve_image, halve_label
from rein.errors import InputError
from rein.resizing import resize_image, resize_to_edge

RESAMPLING = "bilinear without antialias, 8 bits"


@dataclass(frozen=True)
class Preparation:
    """What is done to a pair before it is evaluated.

    Attributes:
        fit: (long, short): the image is resized to fit inside, with its aspect ratio; None keeps its size.
        edge: shortest edge of the image in pixels instead of `fit`; None means `fit`.
        halved: halve image and label first, as in the published settings for Mapillary.
    """

    fit: tuple[int, int] | None = None
    edge: int | None = None
    halved: bool = False

    def pair(self, image: Tensor, label: Tensor) -> Sample:
        """Image (3, H, W) and label (H, W), uint8, as they are evaluated: logits are resized to the size of this label."""
        if self.halved:
            image, label = halve_image(image), halve_label(label)
        return self.image(image), label

    def image(self, image: Tensor) -> Tensor:
        """An image (3, H, W) without a label, at the size at which it is predicted."""
        if self.edge is not None:
            return resize_to_edge(image, self.edge)
        height, width = image.shape[-2:]
        return image if self.fit is None else resize_image(image, fitted_size((height, width), *self.fit))

    def __str__(self) -> str:
        steps = ["image and label halved"] if self.halved else []
        if self.edge is not None:
            steps.append(f"image resized to a shortest edge of {self.edge}")
        elif self.fit is not None:
            steps.append(f"image fitted into {self.fit[0]} x {self.fit[1]}")
        return ", ".join(steps) or "image at its own size"


@dataclass(frozen=True)
class Protocol:
    """A named way to evaluate.

    Attributes:
        name: the value of `data.protocol`.
        summary: what it is for, in one line.
        sizes: data set -> (long, short), into which its images are fitted; other data sets keep their size.
        halved: data sets whose images and labels are halved first. Labels of others keep their size.
        class_maps: data set -> its class map, where there are several.
    """

    name: str
    summary: str
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    halved: tuple[str, ...] = ()
    class_maps: Mapping[str, str] = field(default_factory=lambda: {"mapillary": "rein"})

    def preparation(self, dataset: str, edge: int | None = None) -> Preparation:
        """What is done to the pairs of a data set; `edge` replaces the size of the images."""
        return Preparation(self.sizes.get(dataset), edge, dataset in self.halved)

    def options(self, dataset: str) -> dict[str, Any]:
        """Options with which a data set is opened."""
        return {"class_map": self.class_maps[dataset]} if dataset in self.class_maps else {}

    def describe(self) -> dict[str, Any]:
        """The protocol as plain values for `results.json`."""
        return {
            "name": self.name,
            "sizes": {dataset: list(size) for dataset, size in self.sizes.items()},
            "halved": list(self.halved),
            "class_maps": dict(self.class_maps),
            "resampling": RESAMPLING,
        }


_CROPS_512 = {
    "cityscapes": (1024, 512),
    "cityscapes-c": (1024, 512),
    "bdd100k": (1280, 720),
    "mapillary": (1024, 512),
    "acdc": (960, 540),
}
_ALL = (
    Protocol("rein", "the published figures with crops of 512", _CROPS_512, halved=("mapillary",)),
    Protocol("rein-1024", "the published figures with crops of 1024", {"acdc": (1920, 1080)}),
    Protocol(
        "robustnet",
        "as rein, but Mapillary mapped to 19 classes as in RobustNet (Choi et al., CVPR 2021)",
        _CROPS_512,
        halved=("mapillary",),
        class_maps={"mapillary": "robustnet"},
    ),
    Protocol("full-resolution", "images and labels at their own size"),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        InputError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise InputError(f"data.protocol is {name!r}; expected one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
