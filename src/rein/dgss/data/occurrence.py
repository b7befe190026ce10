"""Which classes occur in labels. A class without pixels in the source cannot be learned."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from rein.dgss.data.pairs import Pairs
from rein.dgss.data.sampling import coarse_first
from rein.dgss.labels import IGNORE_LABEL, LabelSpace


@dataclass
class Occurrence:
    """What the labels that were read contain.

    Attributes:
        space: the classes.
        pixels: number of pixels of each class.
        ignored: number of ignored pixels.
        labels: number of labels that were read.
        elsewhere: names of classes that occur in other labels, which were not read.
    """

    space: LabelSpace
    pixels: np.ndarray = field(init=False)
    ignored: int = 0
    labels: int = 0
    elsewhere: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.pixels = np.zeros(len(self.space.names), np.int64)

    def add(self, label: np.ndarray) -> None:
        """Count the pixels of a label, (H, W) uint8."""
        counts = np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1)
        self.pixels += counts[: len(self.pixels)]
        self.ignored += int(counts[IGNORE_LABEL])
        self.labels += 1

    @property
    def absent(self) -> list[str]:
        """Names of the classes that do not occur."""
        counted = zip(self.space.names, self.pixels, strict=True)
        return [name for name, count in counted if not count and name not in self.elsewhere]

    def describe_absent(self, where: str) -> str:
        """Why a run cannot start: the classes without pixels, and what to do.

        Args:
            where: which labels were read, such as `the source 'day'`.
        """
        absent, total = self.absent, int(self.pixels.sum()) + self.ignored
        names = ", ".join(map(repr, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        share = f"{100 * self.ignored / total:.1f} % of their pixels are ignored" if total else "they have no pixels"
        example = "masks of 0 and 255 need values: [0, 255]" if len(self.space.names) == 2 else "values: [VALUE, ...]"
        return (
            f"{'the class' if len(absent) == 1 else 'the classes'} {names} never {'occurs' if len(absent) == 1 else 'occur'} in the "
            f"{self.labels:,} labels of {where}, and {share}; expected pixels of every class. If the labels have other values than "
            f"0 to {len(self.space.names) - 1}, state the value of each class with the option values ({example}), or its colour with "
            "the option colors: in index.json, in the domain's options, or with --option for rein data check. If a class is really "
            "absent, set data.allow_absent_classes to true (--allow-absent-classes for rein data check and rein demo)."
        )


def find_classes(
    labels: Iterable[tuple[Pairs, Sequence[int]]], space: LabelSpace, enough: int, elsewhere: frozenset[str] = frozenset()
) -> Occurrence:
    """Read labels until `enough` classes occur. Evenly spaced labels come first, so that few are read in the usual case.

    Args:
        labels: pairs and the indices to read.
        space: the classes.
        enough: number of classes after which reading stops.
        elsewhere: names of classes that occur in other labels, which need not be read.

    Raises:
        InputError: a label cannot be read.
    """
    found = Occurrence(space, elsewhere=elsewhere)
    every = [(pairs, index) for pairs, indices in labels for index in indices]
    order: Iterable[int] = coarse_first(len(every))
    if sys.stderr.isatty():  # elsewhere even a disabled bar would leave a lock behind in a process that is stopped
        order = tqdm(order, desc="look for every class", leave=False, delay=3)
    for position in order:
        pairs, index = every[position]
        found.add(pairs.read_label(index).numpy())
        if len(space.names) - len(found.absent) >= enough:
            break
    return found
