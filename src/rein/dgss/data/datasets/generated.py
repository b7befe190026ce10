"""Generated street scenes as a data set (see `rein.dgss.scenes`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rein.dgss import scenes
from rein.dgss.data.pairs import Pairs, Sample
from rein.dgss.labels import CITYSCAPES
from rein.errors import InputError

# `pocket_vit` was pretrained on the seeds 1,000,000 to 1,099,999
_FIRST_SEEDS = {"train": 0, "val": 1_100_000, "test": 2_000_000}
_MAX_COUNT = 900_000


def scene_seeds(split: str, count: int, seed: int = 0) -> range:
    """The scene seeds of one split. Different splits and different `seed`s share no scene.

    Raises:
        InputError: `count` or `seed` is out of range.
    """
    if not 1 <= count <= _MAX_COUNT:
        raise InputError(f"count is {count}; expected 1 to {_MAX_COUNT:,} scenes.")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected an integer of at least 0.")
    first = 3_000_000 * seed + _FIRST_SEEDS[split]
    return range(first, first + count)


class Scenes(Pairs):
    """Generated street scenes of one domain. A scene is rendered on access; the process caches rendered scenes.

    Args:
        domain: one of `scenes.DOMAINS`.
        seeds: the seed of each scene.
        size: (height, width) in pixels.

    Raises:
        InputError: `domain` or `size` is not valid.
    """

    def __init__(self, domain: str, seeds: Sequence[int], size: tuple[int, int]) -> None:
        self.space = CITYSCAPES
        self.pairs = []
        self.left_out = {}
        self._domain, self._seeds, self._size = domain, seeds, size
        for seed in seeds[:1]:
            _rendered(seed, domain, size)  # raises for a bad domain or size now, not on first access

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: int) -> Sample:
        return _rendered(self._seeds[index], self._domain, self._size)

    def read_image(self, index: int) -> Tensor:
        """The image without its label, (3, H, W) uint8."""
        return self[index][0]

    def name_of(self, index: int) -> str:
        """Domain and seed."""
        return f"{self._domain}/{self._seeds[index]:07}"


# Several runs in one process use the same scenes. 1,024 scenes of 128 x 256 pixels take 134 MB.
@lru_cache(maxsize=1024)
def _rendered(seed: int, domain: str, size: tuple[int, int]) -> Sample:
    """Image and label of a scene. Callers share the tensors and must not modify them."""
    scene = scenes.render(seed, domain, size)
    return torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.label)
