"""The data of one experiment for `rein fit / validate / test / predict`: source domains to train on, targets to judge on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from rein.dgss.data import Sample
from rein.dgss.datasets import Images, Pairs, open_dataset, space_of
from rein.dgss.labels import LabelSpace
from rein.dgss.sampling import Drawn, RunLoader, RunSampler, spread
from rein.dgss.transforms import TrainingTransform, resized
from rein.errors import InputError


@dataclass(frozen=True)
class Domain:
    """One data set, or a part of it, as a domain.

    Attributes:
        dataset: a row of `rein data list`.
        path: its folder; None means `<root>/<dataset>`.
        split: which part; None means train for a source and val for a target.
        title: its name in tables and pictures; None means the data set's, with the condition where one is chosen.
        options: what else the row takes, as `condition: night` for acdc.
    """

    dataset: str
    path: str | None = None
    split: str | None = None
    title: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The title, or one made of the data set and what was chosen of it."""
        return self.title or " ".join([self.dataset, *(str(value) for value in self.options.values())])

    def folder(self, root: Path) -> Path:
        """Where it lies, where `root` holds the data sets."""
        return Path(self.path) if self.path is not None else root / self.dataset

    def open(self, root: Path, split: str) -> Pairs:
        """Find the pairs below `root`."""
        return open_dataset(self.dataset, self.folder(root), self.split or split, **self.options)


class DomainData(lightning.LightningDataModule):
    """Source pairs in the authors' pipeline; source validation, targets and images to predict as they are.

    Nothing is opened before it is needed: fitting asks for sources and their validation, testing for targets.

    Args:
        root: the folder that holds the data sets, each under its name.
        sources: domains to fit on, together.
        targets: domains to judge on, never used in training.
        validation: source domains to choose the best state by; empty holds out pairs of `sources`.
        held_out: without `validation`, how many pairs of the sources are held out: neighbours at the end of each source.
        predict: a folder of images for `rein predict`.
        batch_size: images of one step on one device.
        crop: side of the training crops in pixels; None trains on whole images.
        scales: lengths of the shortest edge before cropping, as multiples of the crop.
        max_share: of a crop's labelled pixels that one class may fill.
        photometric: whether colours are distorted.
        judged_edge: length of the shortest edge to which images are resized when judging, in pixels; None leaves them. Labels are
            never resized: logits are brought to their size.
        limit: judge on at most so many pairs of each domain, evenly spaced.
        workers: processes that load images, for training and for judging; 0 loads beside the computation.
        seed: of the order and of the transforms.

    Attributes:
        space: the classes, which all domains must share.

    Raises:
        InputError: a data set is not known, classes differ, or settings cannot be.
    """

    def __init__(
        self,
        root: str = "data",
        sources: Sequence[Domain] = (),
        targets: Sequence[Domain] = (),
        validation: Sequence[Domain] = (),
        held_out: int = 100,
        predict: str | None = None,
        batch_size: int = 4,
        crop: int | None = 512,
        scales: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        photometric: bool = True,
        judged_edge: int | None = None,
        limit: int | None = None,
        workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.sources, self.targets, self.chosen_by = Path(root), list(sources), list(targets), list(validation)
        self.held_out, self.images, self.batch_size, self.workers, self.seed = held_out, predict, batch_size, workers, seed
        self.judged_edge, self.limit = judged_edge, limit
        self.transform = TrainingTransform(crop, scales, max_share, photometric=photometric)
        if min(batch_size, held_out, 1 if judged_edge is None else judged_edge, 1 if limit is None else limit) < 1 or workers < 0:
            raise InputError(
                f"batch_size {batch_size}, held_out {held_out}, judged_edge {judged_edge} and limit {limit} must be at least 1, "
                f"workers {workers} at least 0."
            )
        domains = [*self.sources, *self.targets, *self.chosen_by]
        if not domains:
            raise InputError("no domain was given: name data.sources to fit on and data.targets to judge on, or use a recipe.")
        titles = [domain.name for domain in self.targets]
        if len(set(titles)) < len(titles):
            raise InputError(f"two targets have the same title, of {', '.join(titles)}; give each its own.")
        self.space = self._common_space(domains)

    @property
    def num_classes(self) -> int:
        """K of the domains' common classes."""
        return len(self.space.names)

    def _common_space(self, domains: Sequence[Domain]) -> LabelSpace:
        spaces = {
            domain.name: space_of(
                domain.dataset, Path(domain.path) if domain.path else self.root / domain.dataset, **domain.options
            )
            for domain in domains
        }
        first_name, first = next(iter(spaces.items()))
        for name, space in spaces.items():
            if space.names != first.names:
                raise InputError(
                    f"the classes of {name} ({', '.join(space.names)}) are not those of {first_name} ({', '.join(first.names)}); "
                    "what is fitted and what is judged must have the same."
                )
        return first

    # -- opening

    def _split_sources(self) -> tuple[Dataset[Sample], Dataset[Sample]]:
        """(training pairs, validation pairs)."""
        if not self.sources:
            raise InputError("no source was given to fit on: name data.sources, or use a recipe.")
        opened = [domain.open(self.root, "train") for domain in self.sources]
        if self.chosen_by:
            return ConcatDataset(opened), ConcatDataset([domain.open(self.root, "val") for domain in self.chosen_by])
        train: list[Dataset[Sample]] = []
        held: list[Dataset[Sample]] = []
        for number, pairs in enumerate(opened):
            kept = len(pairs) - self._share(number, len(opened))
            if not 0 < kept < len(pairs):
                raise InputError(
                    f"{self.sources[number].name} has {len(pairs)} pairs, of which {len(pairs) - kept} were to be held out to choose "
                    "the best state by; at least one must be and one must not. Change data.held_out, or name data.validation."
                )
            train.append(Subset(pairs, range(kept)))
            held.append(Subset(pairs, range(kept, len(pairs))))
        return ConcatDataset(train), ConcatDataset(held)

    def _share(self, number: int, count: int) -> int:
        return self.held_out // count + (number < self.held_out % count)

    # -- loaders

    def train_dataloader(self) -> RunLoader:
        """Batches of the whole run."""
        assert self.trainer is not None
        pairs, _ = self._split_sources()
        sampler = RunSampler(
            len(pairs),  # type: ignore[arg-type]
            self.batch_size,
            self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return RunLoader(Drawn(pairs, self.transform, self.seed), sampler, self.workers)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Source validation pairs, one by one."""
        return self._judging(self._split_sources()[1])

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """One loader for each target."""
        if not self.targets:
            raise InputError("no target was given to judge on: name data.targets, or use a recipe.")
        return [self._judging(domain.open(self.root, "val")) for domain in self.targets]

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images of the folder `predict`, each with its number."""
        if self.images is None:
            raise InputError("no images were given: rein predict wants --data.predict FOLDER.")
        images = Images(Path(self.images))
        images.check()
        return self._judging(images)

    def _judging(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        assert self.trainer is not None
        chosen = spread(len(dataset), self.limit)  # type: ignore[arg-type]
        mine = chosen[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(
            Judged(dataset, self.judged_edge),
            batch_size=1,
            sampler=_Fixed(mine),
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=self.workers > 0,
        )


class Judged(Dataset[Any]):
    """(image at the judged size, label at its own, index) for each pair; for images without labels, a label of None.

    Args:
        dataset: pairs, or `Images`.
        edge: as `judged_edge` of `DomainData`.
    """

    def __init__(self, dataset: Dataset[Any], edge: int | None) -> None:
        self.dataset, self.edge = dataset, edge

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.dataset, Images):
            image = self.dataset[index]
            return resized(image, self.edge), tuple(image.shape[-2:]), index
        image, label = self.dataset[index]
        return resized(image, self.edge), label, index


class _Fixed(Sampler[int]):
    """These indices, in this order."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
