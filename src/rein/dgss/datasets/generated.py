"""Generated street scenes as a data set (see `rein.dgss.scenes`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rein.dgss import scenes
from rein.dgss.data import Pairs, Sample
from rein.dgss.labels import CITYSCAPES
from rein.errors import InputError

_STARTS = {"train": 0, "val": 1_100_000, "test": 2_000_000}  # 1,000,000 to 1,099,999 is where `pocket_vit` was pretrained
_MOST = 900_000


def scene_seeds(split: str, count: int, seed: int = 0) -> range:
    """The seeds of one split's scenes: no other split and no other seed has them.

    Raises:
        InputError: there are too many or none.
    """
    if not 1 <= count <= _MOST:
        raise InputError(f"count is {count}; wanted 1 to {_MOST:,} scenes.")
    if seed < 0:
        raise InputError(f"seed is {seed}; wanted a whole number from 0.")
    first = 3_000_000 * seed + _STARTS[split]
    return range(first, first + count)


class Scenes(Pairs):
    """Generated street scenes of one domain, each rendered once and kept.

    Args:
        domain: one of `scenes.DOMAINS`.
        seeds: one scene each.
        size: (height, width) in pixels.
        progress: render them all now, and wrap the seeds while they are, as `tqdm` does; without it a scene is rendered when it is
            first read.
    """

    def __init__(
        self,
        domain: str,
        seeds: Sequence[int],
        size: tuple[int, int],
        progress: Callable[[Sequence[int]], Any] | None = None,
    ) -> None:
        self.space = CITYSCAPES
        self.pairs = []
        self.left_out = {}
        self._domain, self._seeds, self._size = domain, seeds, size
        self._samples: dict[int, Sample] = {}
        for seed in seeds[:1] if progress is None else progress(seeds):  # the first in any case: a bad size is said now
            self._render(seed)

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: int) -> Sample:
        return self._render(self._seeds[index])

    def read_image(self, index: int) -> Tensor:
        """The image alone, (3, H, W) uint8."""
        return self[index][0]

    def name_of(self, index: int) -> str:
        """Domain and seed."""
        return f"{self._domain}/{self._seeds[index]:07}"

    def _render(self, seed: int) -> Sample:
        if seed not in self._samples:
            scene = scenes.render(seed, self._domain, self._size)
            self._samples[seed] = (torch.from_numpy(scene.image).permute(2, 0, 1), torch.from_numpy(scene.label))
        return self._samples[seed]
