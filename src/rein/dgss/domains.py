"""One source domain to fit on and others to judge on: generated street scenes, or a folder of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset, Subset

from rein.dgss import scenes
from rein.dgss.data import Pairs, Sample
from rein.dgss.datasets import open_dataset
from rein.dgss.datasets.generated import Scenes, scene_seeds
from rein.dgss.labels import CITYSCAPES, LabelSpace
from rein.dgss.progress import bar
from rein.dgss.sampling import spread
from rein.errors import InputError


@dataclass(frozen=True)
class Domains:
    """Data for one comparison.

    Attributes:
        source: name of the source domain.
        space: what the labels mean.
        train: source pairs to fit on.
        validation: source pairs to choose the best state by.
        tests: domain -> pairs to judge on; never used before the end.
    """

    source: str
    space: LabelSpace
    train: Dataset[Sample]
    validation: Dataset[Sample]
    tests: dict[str, Dataset[Sample]]

    @property
    def targets(self) -> list[str]:
        """The domains that are never shown in fitting."""
        return [name for name in self.tests if name != self.source]

    def example(self, name: str) -> Sample:
        """One pair to show of a domain: the middle one."""
        dataset = self.tests[name]
        return dataset[len(dataset) // 2]  # type: ignore[arg-type]


def generated_domains(size: tuple[int, int], seed: int = 0, count: int = 160) -> Domains:
    """Street scenes: clear day to fit on, every other domain to be judged on.

    Args:
        size: (height, width) in pixels.
        seed: of the streets; other seeds share none of them.
        count: scenes to fit on. An eighth as many choose the best state, and three twentieths, the same streets in every domain, are
            judged on.
    """

    def make(domain: str, split: str, count: int) -> Scenes:
        return Scenes(domain, scene_seeds(split, count, seed), size, partial(bar, desc=f"render {domain}"))

    source = scenes.DOMAINS[0]
    return Domains(
        source=source,
        space=CITYSCAPES,
        train=make(source, "train", count),
        validation=make(source, "val", max(1, count // 8)),
        tests={domain: make(domain, "test", max(1, count * 3 // 20)) for domain in scenes.DOMAINS},
    )


def folder_domains(root: Path, source: str, space: LabelSpace, limit: int | None = None) -> Domains:
    """A folder of domains: the last tenth of `source` is held out to choose the best state, all others are judged on.

    Args:
        root: holds `<domain>/images/*` and `<domain>/labels/*.png`.
        source: the domain to fit on.
        space: what the labels mean.
        limit: judge on at most so many images of a domain, evenly spaced.

    Raises:
        InputError: there is no such source, nothing to judge on, or too little to fit on; or as `open_domain`.
    """
    names = find_domains(root)
    if source not in names:
        raise InputError(f"{root} has no domain {source!r}; it has {', '.join(names)}.")
    if len(names) < 2:
        raise InputError(f"{root} has only {source!r}; at least one other domain is needed to judge on.")
    folders = {name: open_domain(root / name, space) for name in bar(names, desc="check images and labels")}
    count = len(folders[source])
    if count < 2:
        raise InputError(
            f"{root / source} has {count} image; at least 2 are needed, one to fit on and one to choose the best state."
        )
    held_out = max(1, count // 10)  # the last ones, not random ones: neighbouring frames of a drive are nearly equal
    return Domains(
        source=source,
        space=space,
        train=Subset(folders[source], range(count - held_out)),
        validation=Subset(folders[source], range(count - held_out, count)),
        tests={name: Subset(folder, spread(len(folder), limit)) for name, folder in folders.items() if name != source},
    )


def find_domains(root: Path) -> list[str]:
    """The domains below `root`, sorted: folders with an `images` folder inside.

    Raises:
        InputError: `root` is no folder, or there are no domains in it.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; --data wants one with <domain>/images/* and <domain>/labels/*.png inside.")
    domains = sorted(entry.name for entry in root.iterdir() if (entry / "images").is_dir() and not entry.name.startswith("."))
    if not domains:
        raise InputError(f"{root} has no domains; wanted <domain>/images/* and <domain>/labels/*.png in it.")
    return domains


def open_domain(root: Path, space: LabelSpace) -> Pairs:
    """The data set `folder` at `root`, with every file read once, so that a bad one is found before hours of training and not after.

    Raises:
        InputError: a folder or a file is missing or unreadable, sizes differ or are too small or too thin to be cut into crops, or a
            label is out of range. The message names it.
    """
    data = open_dataset("folder", root, space=space)
    for index, (path, _) in enumerate(data.pairs):
        image, _ = data[index]
        height, width = image.shape[1:]
        if min(height, width) < 16 or max(height, width) > 8 * min(height, width):
            raise InputError(f"{path} is {width} x {height} pixels; wanted at least 16 each way, and sides of at most 8 to 1.")
    return data
