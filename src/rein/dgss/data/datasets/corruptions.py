"""Common corruptions of images, applied on access: noise, blur, weather and digital damage in five severities.

The corruptions are those of Hendrycks and Dietterich, ICLR 2019 (arXiv 1903.12261), as extended to images of any size by Michaelis
et al. (arXiv 1907.07484). The package `imagecorruptions-imaug`, a maintained fork of the latter's code, computes them.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import torch
from torch import Tensor

from rein.dgss.data.pairs import Pairs, Sample
from rein.errors import InputError
from rein.extras import require

KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
_TAKES_SEED = ("impulse_noise", "glass_blur")  # take a seed argument; the others draw from numpy's global random state
_RANDOM_STATE_LOCK = threading.Lock()


def corrupt(image: np.ndarray, kind: str, severity: int, name: str) -> np.ndarray:
    """Corrupt an image. The result depends only on the arguments; numpy's random state is restored.

    Args:
        image: (H, W, 3) uint8.
        kind: one of `KINDS`.
        severity: 1 to 5.
        name: name of the image, part of the random seed.

    Raises:
        InputError: a side of the image is shorter than 32 pixels.
        MissingExtraError: `imagecorruptions` is not installed.
    """
    if min(image.shape[:2]) < 32:
        raise InputError(
            f"{name} is {image.shape[1]} x {image.shape[0]} pixels; expected at least 32 pixels on each side for a corruption."
        )
    library = require("imagecorruptions", "data")
    seed = int.from_bytes(hashlib.sha256(f"{name}\n{kind}\n{severity}".encode()).digest()[:4], "big")
    arguments = {"seed": seed} if kind in _TAKES_SEED else {}
    with _RANDOM_STATE_LOCK:
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            corrupted: np.ndarray = library.corrupt(image, severity=severity, corruption_name=kind, **arguments)
        finally:
            np.random.set_state(before)
    return corrupted


class Corrupted(Pairs):
    """A data set with corrupted images and unchanged labels.

    Args:
        data: the clean data set.
        kind: one of `KINDS`.
        severity: 1 to 5.
    """

    def __init__(self, data: Pairs, kind: str, severity: int) -> None:
        require("imagecorruptions", "data")  # raises now, not on first access
        self.space, self.pairs, self.left_out, self.unused_labels = data.space, data.pairs, data.left_out, data.unused_labels
        self._data, self._kind, self._severity = data, kind, severity

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        image, label = self._data[index]
        return self._corrupt(image, index), label

    def read_image(self, index: int) -> Tensor:
        """The corrupted image, (3, H, W) uint8."""
        return self._corrupt(self._data.read_image(index), index)

    def read_label(self, index: int) -> Tensor:
        """The label without its image, (H, W) uint8."""
        return self._data.read_label(index)

    def coding_of(self, index: int) -> str:
        """How the label encodes classes, in words."""
        return self._data.coding_of(index)

    def name_of(self, index: int) -> str:
        """Kind, severity, and the name of the clean image."""
        return f"{self._kind}/{self._severity}/{self._data.name_of(index)}"

    def _corrupt(self, image: Tensor, index: int) -> Tensor:
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        corrupted = corrupt(pixels, self._kind, self._severity, self._data.name_of(index))
        return torch.from_numpy(corrupted).permute(2, 0, 1)
