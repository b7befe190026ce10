"""Which images a step sees and what is drawn for them: a function of the seed and the step's number alone.

That is what makes a killed run resume exactly: nothing has to be remembered but how far it was. Neither the number of loading
processes nor the number of devices changes what image and transform a place in the run has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from rein.dgss.data import Sample
from rein.errors import InputError


class Draw(NamedTuple):
    """One image of the run: its number in the data set, and its place in the run, both from 0."""

    image: int
    place: int


def derived_seed(*numbers: int) -> int:
    """A seed for torch out of whole numbers from 0; numbers that differ anywhere give streams that have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class RunSampler(Sampler[list[Draw]]):
    """The batches of a whole run: the data set in a new order for each time through, without a gap between them.

    Args:
        size: images in the data set.
        batch_size: images of one batch on one device.
        batches: of the run, on one device.
        seed: of the order.
        rank: which device this is.
        world_size: how many there are; together they see what one would with batches so many times as large.

    Attributes:
        start: the batch to begin with.

    Raises:
        InputError: the data set is empty, or a batch is.
    """

    def __init__(self, size: int, batch_size: int, batches: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if size < 1 or batch_size < 1:
            raise InputError(f"batches of {batch_size} images cannot be drawn from {size} images; there must be one at least.")
        self.size, self.batch_size, self.batches, self.seed = size, batch_size, batches, seed
        self.rank, self.world_size, self.start = rank, world_size, 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in range(self.start, self.batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [self._draw(first + offset) for offset in range(self.batch_size)]

    def _draw(self, place: int) -> Draw:
        epoch, position = divmod(place, self.size)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.size))
        return Draw(int(self._order[1][position]), place)


class Drawn(Dataset[Sample]):
    """A data set whose pairs are transformed, each place of the run with random numbers of its own.

    Args:
        dataset: the pairs.
        transform: called with image and label; draws from torch's random state, which is left as it was.
        seed: of the random numbers.
    """

    def __init__(self, dataset: Dataset[Sample], transform: nn.Module, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, draw: Draw) -> Sample:
        image, label = self.dataset[draw.image]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, draw.place))
            pair: Sample = self.transform(image, label)
        return pair


class RunLoader(DataLoader[Sample]):
    """The batches of a run, from where it was left: `state_dict` and `load_state_dict` say how many were handed out.

    Args:
        dataset: what the sampler's draws mean.
        sampler: of the whole run.
        workers: processes that load; 0 loads in this one.
    """

    def __init__(self, dataset: Drawn, sampler: RunSampler, workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            # a process that was forked beside torch's threads may hang
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # draws the processes' seeds, of which nothing here depends
        )
        self.run_sampler = sampler
        self.handed_out = 0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        self.run_sampler.start = self.handed_out
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out."""
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after so many batches."""
        self.handed_out = int(state["handed_out"])


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` numbers from 0, evenly spaced, with the first and the last."""
    if limit is None or limit >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)]
