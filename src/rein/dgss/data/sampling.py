"""Sampler and loader of a training run: every sample depends only on the seed and on its position in the run.

An interrupted run therefore resumes exactly; its state is the number of batches served. The image and the random numbers of a
position do not depend on the number of loader processes or devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from rein.dgss.data.pairs import Sample
from rein.errors import CheckpointError, InputError


@dataclass(frozen=True)
class SampleIndex:
    """One sample of a run: its index in the data set and its position in the run, both from 0."""

    index: int
    position: int


def derived_seed(*numbers: int) -> int:
    """A seed for torch, derived from non-negative integers. Different integers give independent random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class RunSampler(Sampler[list[SampleIndex]]):
    """Batches of a whole run. Each epoch has a new order; batches may span two epochs, so no sample is dropped.

    Args:
        size: number of images in the data set.
        batch_size: number of images per batch on one device.
        batches: number of batches in the run on one device.
        seed: seed of the order.
        rank: index of this device.
        world_size: number of devices. Together they serve the samples that one device serves with batches `world_size` times as
            large.

    Attributes:
        start: index of the first batch to serve.

    Raises:
        InputError: `size` or `batch_size` is below 1.
    """

    def __init__(self, size: int, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if size < 1 or batch_size < 1:
            raise InputError(f"The data set has {size} images and batch_size is {batch_size}; expected at least 1 of each.")
        self.size, self.batch_size, self.batches, self.seed = size, batch_size, batches, seed
        self.rank, self.world_size, self.start = rank, world_size, 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        for batch in range(self.start, self.batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [self._sample(first + offset) for offset in range(self.batch_size)]

    def _sample(self, position: int) -> SampleIndex:
        epoch, offset = divmod(position, self.size)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size))
        return SampleIndex(int(self._order[1][offset]), position)


class TransformedDataset(Dataset[Sample]):
    """A data set with a random transform. The random numbers depend only on `seed` and on the position in the run.

    Args:
        dataset: image and label pairs.
        transform: called with an image and a label. It may draw from torch's random state, which is restored afterwards.
        seed: seed of the random numbers.
    """

    def __init__(self, dataset: Dataset[Sample], transform: nn.Module, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, sample: SampleIndex) -> Sample:
        image, label = self.dataset[sample.index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, sample.position))
            pair: Sample = self.transform(image, label)
        return pair


class RunLoader(DataLoader[Sample]):
    """Loader of a run that can resume: `state_dict` and `load_state_dict` hold the number of batches served.

    Args:
        dataset: the samples, indexed by the sampler's `SampleIndex`.
        sampler: batches of the whole run.
        workers: number of loader processes; 0 loads in this process.
    """

    def __init__(self, dataset: TransformedDataset, sampler: RunSampler, workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            # a process that is forked while torch's threads run may hang
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            # DataLoader draws worker seeds from this generator; without it, it would advance the global random state
            generator=torch.Generator(),
        )
        self.run_sampler = sampler
        self.batches_served = 0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        self.run_sampler.start = self.batches_served
        for batch in super().__iter__():
            self.batches_served += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches served."""
        return {"batches_served": self.batches_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of `state`. Older checkpoints name their number `handed_out`.

        Raises:
            CheckpointError: the state holds no number of batches.
        """
        served = state.get("batches_served", state.get("handed_out")) if isinstance(state, dict) else None
        if type(served) is not int or served < 0:
            raise CheckpointError("the checkpoint does not say how many batches were served. Pass another one of its folder.")
        self.batches_served = served


def coarse_first(count: int) -> list[int]:
    """All of `count` indices: 0, then the middle, the quarters, the eighths, and so on; every beginning is evenly spaced."""
    step = 1 << max(0, count - 1).bit_length()
    order = [0] if count else []
    while step > 1:
        order += range(step // 2, count, step)
        step //= 2
    return order


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices, evenly spaced, including the first and the last. None returns all indices."""
    if limit is None or limit >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)]
