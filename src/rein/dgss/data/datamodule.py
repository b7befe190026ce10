"""`DomainData`: the data of one experiment, source domains to train on and target domains to evaluate on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from rein.dgss.data.datasets import DATASETS, Images, Pairs, Part, open_dataset, part_of, space_of
from rein.dgss.data.occurrence import find_classes
from rein.dgss.data.pairs import Sample
from rein.dgss.data.protocols import Preparation, find_protocol
from rein.dgss.data.sampling import RunLoader, RunSampler, TransformedDataset, evenly_spaced
from rein.dgss.data.transforms import TrainingTransform
from rein.dgss.labels import LabelSpace
from rein.errors import InputError, ReinError

SOURCE, HELD_OUT, UNSEEN, PART = "source", "held-out source", "unseen", "part of another target"  # roles of a target domain


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

    def open(self, root: Path, default_split: str, defaults: Mapping[str, Any] | None = None) -> Pairs:
        """Open the pairs of the domain; `defaults` are options that it may override."""
        options = {**(defaults or {}), **self.options}
        return open_dataset(self.dataset, self.folder(root), self.split or default_split, **options)

    def space(self, root: Path, default_split: str) -> LabelSpace:
        """The classes of the domain."""
        return space_of(self.dataset, self.folder(root), self.split or default_split, **self.options)

    def part(self, root: Path, default_split: str) -> Part:
        """Which part of which domain it is, whatever its title."""
        return part_of(self.dataset, self.folder(root), self.split or default_split, **self.options)


Opened = tuple[Domain, Pairs, range]  # the pairs of a domain, and which of them are used


class DomainData(lightning.LightningDataModule):
    """Training batches from the source domains; validation pairs, target pairs and images to predict, one by one.

    A data set is opened when it is first needed: training opens sources and their validation, testing opens targets.

    Args:
        root: folder that holds the data sets, each under its name.
        sources: domains to train on, together.
        targets: domains to evaluate on; never used in training.
        validation: source domains that choose the best state; if empty, pairs of `sources` are held out.
        held_out: number of source pairs that are held out if `validation` is empty: the last ones of each source. 0 trains on all
            pairs; the run is then not validated, and its last state is the one to evaluate.
        predict: folder of images, or one image, for `rein predict`.
        batch_size: images per step and device.
        crop: side of the training crops in pixels; null trains on whole images.
        scales: range of the shortest edge before cropping, as multiples of the crop.
        max_share: largest share of a crop's labelled pixels that one class may have.
        photometric: distort colours in training.
        protocol: how targets are evaluated: sizes of images and labels, and class maps. rein and rein-1024 are those of the published
            figures with crops of 512 and 1024, robustnet maps Mapillary as in RobustNet, full-resolution changes no size.
        eval_edge: shortest edge in pixels to which images are resized for evaluation, instead of the protocol's size. Logits are
            resized to the label.
        limit: evaluate at most this many pairs of each domain, evenly spaced.
        workers: processes that load images; 0 loads in the main process.
        seed: seed of the order and the transforms.
        judged_edge: deprecated name of `eval_edge`.
        allow_absent_classes: train and evaluate although a class never occurs in the labels of the sources. Without it, such
            classes are an error where users state how labels encode classes (the data set `folder`).

    Attributes:
        space: the classes, which all domains share.
        submission: data set for whose test server predictions are made; `rein predict --format` sets it. If `predict` is null, the
            images of its test split are predicted.

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
        protocol: str = "full-resolution",
        eval_edge: int | None = None,
        limit: int | None = None,
        workers: int = 4,
        seed: int = 0,
        judged_edge: int | None = None,
        allow_absent_classes: bool = False,
    ) -> None:
        super().__init__()
        if judged_edge is not None:
            warnings.warn("data.judged_edge is deprecated; use data.eval_edge.", FutureWarning, stacklevel=2)
            eval_edge = judged_edge if eval_edge is None else eval_edge
        self.root, self.sources, self.targets, self.validation = Path(root), list(sources), list(targets), list(validation)
        self.held_out, self.predict, self.batch_size, self.workers, self.seed = held_out, predict, batch_size, workers, seed
        self.protocol = find_protocol(protocol)
        self.eval_edge, self.limit, self.allow_absent_classes = eval_edge, limit, allow_absent_classes
        self.transform = TrainingTransform(crop, scales, max_share, photometric=photometric)
        sizes = (batch_size, 1 if eval_edge is None else eval_edge, 1 if limit is None else limit)
        if min(sizes) < 1 or min(held_out, workers) < 0:
            raise InputError(
                f"batch_size is {batch_size}, held_out {held_out}, eval_edge {eval_edge}, limit {limit} and workers {workers}; "
                "expected at least 0 for held_out and workers, and at least 1 for the others."
            )
        domains = [(domain, "train") for domain in self.sources]
        domains += [(domain, "val") for domain in (*self.targets, *self.validation)]
        if not domains:
            raise InputError(
                "no domain was given. Set data.sources to train on and data.targets to evaluate on, or use a recipe."
            )
        titles = [domain.name for domain in self.targets]
        if len(set(titles)) < len(titles):
            raise InputError(f"two targets have the same title, in {', '.join(titles)}. Give each a title of its own.")
        self.space = self._common_space(domains)
        self.submission: str | None = None

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.space.names)

    @property
    def validates(self) -> bool:
        """Whether there are source validation pairs."""
        return bool(self.validation) or self.held_out > 0

    def preparation(self, domain: Domain) -> Preparation:
        """What is done to the pairs of a domain before they are evaluated."""
        return self.protocol.preparation(domain.dataset, self.eval_edge)

    def roles(self) -> dict[str, str]:
        """The role of each target, by its name.

        A target is a `source` if it is the same split of a source's domain; a `held-out source` if it is another split of such a
        domain, is of a domain in `validation`, or has the title of one of these; a `part of another target` if an unseen target
        has all of its pairs (acdc in fog beside acdc), so that a mean counts them once; otherwise `unseen`.
        """
        titles = {domain.title for domain in (*self.sources, *self.validation)} - {None}
        sources = [domain.part(self.root, "train") for domain in self.sources]
        known = [*sources, *(domain.part(self.root, "val") for domain in self.validation)]
        found = {}
        for target in self.targets:
            part = target.part(self.root, "val")
            if any(part.shares_domain(source) and part.split == source.split for source in sources):
                found[target.name] = SOURCE
            else:
                held_out = target.title in titles or any(map(part.shares_domain, known))
                found[target.name] = HELD_OUT if held_out else UNSEEN
        unseen = {target.name: target.part(self.root, "val") for target in self.targets if found[target.name] == UNSEEN}
        return found | {name: PART for name, part in unseen.items() if any(other.contains(part) for other in unseen.values())}

    def _common_space(self, domains: Sequence[tuple[Domain, str]]) -> LabelSpace:
        spaces = [(domain.name, domain.space(self.root, split)) for domain, split in domains]
        first_name, first = spaces[0]
        for name, space in spaces:
            if space.names != first.names:
                raise InputError(
                    f"{name} has the classes {', '.join(space.names)}, {first_name} has {', '.join(first.names)}; expected the same "
                    "classes in all sources and targets."
                )
        return first

    # -- opening

    def _open(self, domain: Domain, split: str) -> Pairs:
        return domain.open(self.root, split, self.protocol.options(domain.dataset))

    def _open_sources(self) -> tuple[list[Opened], list[Opened]]:
        """(training pairs, validation pairs) of each domain."""
        if not self.sources:
            raise InputError("no source was given to train on. Set data.sources, or use a recipe.")
        opened = [(domain, self._open(domain, "train")) for domain in self.sources]
        if self.validation:
            validation = [(domain, self._open(domain, "val")) for domain in self.validation]
            return [(*pair, range(len(pair[1]))) for pair in opened], [(*pair, range(len(pair[1]))) for pair in validation]
        train: list[Opened] = []
        held_out: list[Opened] = []
        for index, (domain, pairs) in enumerate(opened):
            share = self.held_out // len(opened) + (index < self.held_out % len(opened))
            kept = len(pairs) - share
            if kept < 1:
                raise InputError(
                    f"{domain.name} has {len(pairs)} pairs, of which {share} were to be held out for validation; "
                    f"expected 0 to {len(pairs) - 1}. Change data.held_out, or set data.validation."
                )
            train.append((domain, pairs, range(kept)))
            held_out.append((domain, pairs, range(kept, len(pairs))))
        return train, held_out

    def _describe_absent(self, training: Sequence[Opened]) -> str:
        """Why a run cannot use its sources: a class never occurs in their labels. Empty if every class occurs.

        Labels are read only where users state how labels encode classes, and until every class was seen.

        Raises:
            InputError: a label cannot be read.
        """
        stated = [opened for opened in training if _states_coding(opened)]
        if self.allow_absent_classes or not stated:
            return ""
        specs = [DATASETS[domain.dataset] for domain, *_ in training]
        published = {name for spec in specs if spec.absent is not None for name in spec.space.names if name not in spec.absent}
        found = find_classes([opened[1:] for opened in stated], self.space, self.num_classes, frozenset(published))
        names = ", ".join(repr(domain.name) for domain, *_ in stated)
        if not found.absent:
            return ""
        held_out = sum(len(pairs) - len(indices) for _, pairs, indices in stated)
        remark = f" {held_out:,} other pairs are held out and do not train; data.held_out sets their number." if held_out else ""
        return found.describe_absent(f"the source{'s' * (len(stated) > 1)} {names}") + remark

    def _check_fit(self, training: Sequence[Opened], validation: Sequence[Opened]) -> None:
        """Refuse sources without a class, and validation pairs that cannot choose a state; log how labels encode classes.

        Raises:
            InputError: a class never occurs in `training`, or fewer than two in `validation`; or a label cannot be read.
        """
        for domain, pairs, indices in training:
            left_out = f"; left out: {len(pairs.left_out):,}" if pairs.left_out else ""
            rank_zero_info(f"source {domain.name}: {len(indices):,} of {len(pairs):,} pairs train{left_out}")
        for domain, pairs, indices in filter(_states_coding, training):
            rank_zero_info(f"labels of {domain.name}: {pairs.coding_of(indices[0])}")
        absent = self._describe_absent(training)
        if absent:
            raise InputError(absent)
        if self.validates and all(map(_states_coding, validation)):
            found = find_classes([opened[1:] for opened in validation], self.space, 2)
            present = self.num_classes - len(found.absent)
            if present < 2:
                raise InputError(
                    f"the {found.labels} labels of the source validation pairs have pixels of {present} of {self.num_classes} "
                    "classes; expected two or more, by which the best state is chosen. Set data.validation, or change data.held_out."
                )

    def _check_test(self) -> None:
        """As `_check_fit`, but only for sources that are on this machine: evaluation does not need them.

        Raises:
            InputError: a class never occurs in the sources.
        """
        try:
            absent = self._describe_absent(self._open_sources()[0])
        except ReinError:
            return
        if absent:
            raise InputError(absent)

    # -- loaders

    def train_dataloader(self) -> RunLoader:
        """Batches of the whole run."""
        assert self.trainer is not None
        training, validation = self._open_sources()
        self._check_fit(training, validation)
        pairs = _concatenated(training)
        sampler = RunSampler(
            len(pairs),  # type: ignore[arg-type]
            self.batch_size,
            self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return RunLoader(TransformedDataset(pairs, self.transform, self.seed), sampler, self.workers)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Source validation pairs, one by one; no loader if there are none.

        Raises:
            InputError: `rein validate` was called, and there are none.
        """
        if not self.validates:
            if self.trainer is not None and self.trainer.state.fn == "validate":
                raise InputError(
                    "data.held_out is 0 and data.validation is empty, so that there are no source validation pairs. Set one of them."
                )
            return []
        opened = self._open_sources()[1]
        return self._evaluation_loader(
            ConcatDataset(
                [
                    EvaluationDataset(Subset(pairs, indices), self.preparation(domain))
                    for domain, pairs, indices in opened
                    if indices
                ]
            )
        )

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per target."""
        if not self.targets:
            raise InputError("no target was given to evaluate on. Set data.targets, or use a recipe.")
        self._check_test()
        return [
            self._evaluation_loader(EvaluationDataset(self._open(domain, "val"), self.preparation(domain)))
            for domain in self.targets
        ]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every image of `predict`, with its index."""
        images = self.open_images()
        preparation = self.protocol.preparation(self.submission or "", self.eval_edge)
        return self._one_by_one(PredictionDataset(images, preparation), range(len(images)))

    def open_images(self) -> Images:
        """The images of `predict`, or else the test images of `submission`.

        Raises:
            InputError: no folder was given, or it has no images.
        """
        if self.predict is None and self.submission is not None:
            paths = (domain.path for domain in self.targets if domain.dataset == self.submission)
            folder = Path(next(filter(None, paths), self.root / self.submission))
            test = open_dataset(self.submission, folder, "test", labels=False)
            return Images(folder, [image for image, _ in test.pairs])
        if self.predict is None:
            raise InputError("no images were given. Pass a folder of images with --data.predict FOLDER.")
        return Images(Path(self.predict))

    def _evaluation_loader(self, pairs: Dataset[Any]) -> DataLoader[Any]:
        return self._one_by_one(pairs, evenly_spaced(len(pairs), self.limit))  # type: ignore[arg-type]

    def _one_by_one(self, dataset: Dataset[Any], indices: Sequence[int]) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(
            dataset,
            batch_size=1,
            sampler=_FixedSampler(indices[self.trainer.global_rank :: self.trainer.world_size]),
            num_workers=self.workers,
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=self.workers > 0,
        )


def _states_coding(opened: Opened) -> bool:
    """Whether the user states how the labels of a domain encode classes; other data sets have a fixed class map."""
    return DATASETS[opened[0].dataset].absent is None


def _concatenated(opened: Sequence[Opened]) -> Dataset[Sample]:
    return ConcatDataset([Subset(pairs, indices) for _, pairs, indices in opened])


class EvaluationDataset(Dataset[Any]):
    """(image, label, index) of each pair, both as they are evaluated.

    Args:
        dataset: the pairs.
        preparation: what is done to image and label.
    """

    def __init__(self, dataset: Dataset[Any], preparation: Preparation) -> None:
        self.dataset, self.preparation = dataset, preparation

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return *self.preparation.pair(*self.dataset[index]), index


class PredictionDataset(Dataset[Any]):
    """(image as it is predicted, its own size, index, error) of each image; the error is empty for an image that can be read.

    Args:
        dataset: the images.
        preparation: what is done to an image.
    """

    def __init__(self, dataset: Images, preparation: Preparation) -> None:
        self.dataset, self.preparation = dataset, preparation

    def __getitem__(self, index: int) -> Any:
        try:
            image = self.dataset[index]
        except InputError as error:  # one bad image must not stop the others
            return torch.zeros(3, 1, 1, dtype=torch.uint8), (1, 1), index, str(error)
        return self.preparation.image(image), tuple(image.shape[-2:]), index, ""


class _FixedSampler(Sampler[int]):
    """Fixed indices in a fixed order."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
