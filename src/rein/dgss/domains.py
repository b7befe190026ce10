"""One source domain to fit on and others to judge on: generated street scenes, or a folder of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset, Subset

from rein.dgss import scenes
from rein.dgss.data import CITYSCAPES, Folder, LabelSpace, Sample, Scenes, find_domains
from rein.dgss.progress import bar
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
        """The domains that are never shown in training."""
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
    first = 3_000_000 * seed

    def make(domain: str, start: int, count: int) -> Scenes:
        seeds = range(first + start, first + start + count)
        return Scenes(domain, seeds, size, partial(bar, desc=f"render {domain}"))

    source = scenes.DOMAINS[0]
    return Domains(
        source=source,
        space=CITYSCAPES,
        train=make(source, 0, count),
        validation=make(source, 1_000_000, max(1, count // 8)),
        tests={domain: make(domain, 2_000_000, max(1, count * 3 // 20)) for domain in scenes.DOMAINS},
    )


def folder_domains(root: Path, source: str, space: LabelSpace, limit: int | None = None) -> Domains:
    """A folder of domains: the last tenth of `source` is held out to choose the best state, all others are judged on.

    Args:
        root: holds `<domain>/images/*` and `<domain>/labels/*.png`.
        source: the domain to fit on.
        space: what the labels mean.
        limit: judge on at most so many images of a domain, evenly spaced.

    Raises:
        InputError: there is no such source, nothing to judge on, or too little to fit on; or as `Folder`.
    """
    names = find_domains(root)
    if source not in names:
        raise InputError(f"{root} has no domain {source!r}; it has {', '.join(names)}.")
    if len(names) < 2:
        raise InputError(f"{root} has only {source!r}; at least one other domain is needed to judge on.")
    folders = {name: Folder(root / name, space) for name in bar(names, desc="check images and labels")}
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
        tests={name: _spaced(folder, limit) for name, folder in folders.items() if name != source},
    )


def _spaced(dataset: Dataset[Sample], limit: int | None) -> Dataset[Sample]:
    count = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= count:
        return dataset
    return Subset(dataset, [round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)])
