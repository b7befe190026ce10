"""`DomainData`: the data of one experiment, source domains to train on and target domains to evaluate on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from rein.dgss.data.datasets import Images, Pairs, open_dataset, space_of
from rein.dgss.data.pairs import Sample
from rein.dgss.data.sampling import RunLoader, RunSampler, TransformedDataset, evenly_spaced
from rein.dgss.data.transforms import TrainingTransform, resized
from rein.dgss.labels import LabelSpace
from rein.errors import InputError


@dataclass(frozen=True)
class Domain:
    """A data set, or a part of one, that serves as a domain.

    Attributes:
        dataset: a name of `rein data list`.
        path: folder of the data set; None means `<root>/<dataset>`.
        split: which split; None means train for a source and val for a target.
        title: name in tables and pictures; None means the data set's name and its options.
        options: options of the data set, such as `condition: night` for acdc.
    """

    dataset: str
    path: str | None = None
    split: str | None = None
    title: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The title, or a name made of the data set and its options."""
        return self.title or " ".join([self.dataset, *(str(value) for value in self.options.values())])

    def folder(self, root: Path) -> Path:
        """The data set's folder; `root` holds the data sets that have no path of their own."""
        return Path(self.path) if self.path is not None else root / self.dataset

    def open(self, root: Path, default_split: str) -> Pairs:
        """Open the pairs of the domain."""
        return open_dataset(self.dataset, self.folder(root), self.split or default_split, **self.options)


class DomainData(lightning.LightningDataModule):
    """Training batches from the source domains; validation pairs, target pairs and images to predict, one by one.

    A data set is opened when it is first needed: training opens sources and their validation, testing opens targets.

    Args:
        root: folder that holds the data sets, each under its name.
        sources: domains to train on, together.
        targets: domains to evaluate on; never used in training.
        validation: source domains that choose the best state; if empty, pairs of `sources` are held out.
        held_out: number of source pairs that are held out if `validation` is empty: the last ones of each source.
        predict: folder of images, or one image, for `rein predict`.
        batch_size: images per step and device.
        crop: side of the training crops in pixels; null trains on whole images.
        scales: range of the shortest edge before cropping, as multiples of the crop.
        max_share: largest share of a crop's labelled pixels that one class may have.
        photometric: distort colours in training.
        eval_edge: shortest edge in pixels to which images are resized for evaluation; null keeps their size. Labels keep their size:
            logits are resized to it.
        limit: evaluate at most this many pairs of each domain, evenly spaced.
        workers: processes that load images; 0 loads in the main process.
        seed: seed of the order and the transforms.
        judged_edge: deprecated name of `eval_edge`.

    Attributes:
        space: the classes, which all domains share.

    Raises:
        InputError: an unknown data set, domains with different classes, or a setting out of range.
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
        eval_edge: int | None = None,
        limit: int | None = None,
        workers: int = 4,
        seed: int = 0,
        judged_edge: int | None = None,
    ) -> None:
        super().__init__()
        if judged_edge is not None:
            warnings.warn("data.judged_edge is deprecated; use data.eval_edge.", DeprecationWarning, stacklevel=2)
            eval_edge = judged_edge if eval_edge is None else eval_edge
        self.root, self.sources, self.targets, self.validation = Path(root), list(sources), list(targets), list(validation)
        self.held_out, self.predict, self.batch_size, self.workers, self.seed = held_out, predict, batch_size, workers, seed
        self.eval_edge, self.limit = eval_edge, limit
        self.transform = TrainingTransform(crop, scales, max_share, photometric=photometric)
        if min(batch_size, held_out, 1 if eval_edge is None else eval_edge, 1 if limit is None else limit) < 1 or workers < 0:
            raise InputError(
                f"batch_size is {batch_size}, held_out {held_out}, eval_edge {eval_edge}, limit {limit} and workers {workers}; "
                "expected at least 1, and at least 0 workers."
            )
        domains = [*self.sources, *self.targets, *self.validation]
        if not domains:
            raise InputError(
                "no domain was given. Set data.sources to train on and data.targets to evaluate on, or use a recipe."
            )
        titles = [domain.name for domain in self.targets]
        if len(set(titles)) < len(titles):
            raise InputError(f"two targets have the same title, in {', '.join(titles)}. Give each a title of its own.")
        self.space = self._common_space(domains)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.space.names)

    def _common_space(self, domains: Sequence[Domain]) -> LabelSpace:
        spaces = {domain.name: space_of(domain.dataset, domain.folder(self.root), **domain.options) for domain in domains}
        first_name, first = next(iter(spaces.items()))
        for name, space in spaces.items():
            if space.names != first.names:
                raise InputError(
                    f"{name} has the classes {', '.join(space.names)}, {first_name} has {', '.join(first.names)}; expected the same "
                    "classes in all sources and targets."
                )
        return first

    # -- opening

    def _split_sources(self) -> tuple[Dataset[Sample], Dataset[Sample]]:
        """(training pairs, validation pairs)."""
        if not self.sources:
            raise InputError("no source was given to train on. Set data.sources, or use a recipe.")
        opened = [domain.open(self.root, "train") for domain in self.sources]
        if self.validation:
            return ConcatDataset(opened), ConcatDataset([domain.open(self.root, "val") for domain in self.validation])
        train: list[Dataset[Sample]] = []
        held_out: list[Dataset[Sample]] = []
        for index, pairs in enumerate(opened):
            share = self.held_out // len(opened) + (index < self.held_out % len(opened))
            kept = len(pairs) - share
            if not 0 < kept < len(pairs):
                raise InputError(
                    f"{self.sources[index].name} has {len(pairs)} pairs, of which {share} were to be held out for validation; "
                    f"expected 1 to {len(pairs) - 1}. Change data.held_out, or set data.validation."
                )
            train.append(Subset(pairs, range(kept)))
            held_out.append(Subset(pairs, range(kept, len(pairs))))
        return ConcatDataset(train), ConcatDataset(held_out)

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
        return RunLoader(TransformedDataset(pairs, self.transform, self.seed), sampler, self.workers)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Source validation pairs, one by one."""
        return self._evaluation_loader(self._split_sources()[1])

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """One loader per target."""
        if not self.targets:
            raise InputError("no target was given to evaluate on. Set data.targets, or use a recipe.")
        return [self._evaluation_loader(domain.open(self.root, "val")) for domain in self.targets]

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images of `predict`, each with its index."""
        if self.predict is None:
            raise InputError("no images were given. Pass a folder of images with --data.predict FOLDER.")
        images = Images(Path(self.predict))
        images.check()
        return self._evaluation_loader(images)

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        assert self.trainer is not None
        indices = evenly_spaced(len(dataset), self.limit)  # type: ignore[arg-type]
        own = indices[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(
            EvaluationDataset(dataset, self.eval_edge),
            batch_size=1,
            sampler=_FixedSampler(own),
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=self.workers > 0,
        )


class EvaluationDataset(Dataset[Any]):
    """(image at the evaluation size, label at its own size, index) of each pair; for images alone, (image, own size, index).

    Args:
        dataset: pairs, or `Images`.
        edge: as `eval_edge` of `DomainData`.
    """

    def __init__(self, dataset: Dataset[Any], edge: int | None) -> None:
        self.dataset, self.edge = dataset, edge

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.dataset, Images):
            image = self.dataset[index]
            return resized(image, self.edge), tuple(image.shape[-2:]), index
        image, label = self.dataset[index]
        return resized(image, self.edge), label, index


class _FixedSampler(Sampler[int]):
    """Fixed indices in a fixed order."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
