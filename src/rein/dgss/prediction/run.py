"""Predict photographs and frames in batches, and write what `folder` describes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rein import Segmenter
from rein.dgss.data.datasets.encodings import load_photograph
from rein.dgss.data.protocols import Preparation
from rein.dgss.labels import LabelSpace
from rein.dgss.prediction.folder import PredictionFolder, Settings
from rein.dgss.prediction.page import describe, predicted_in, write_page
from rein.dgss.prediction.sources import Source
from rein.dgss.prediction.videos import frame_name, frames, stated_frames, write_overlay_video
from rein.errors import InputError, one_line
from rein.extras import require
from rein.images import Segmentation, to_tensor


def load(path: Path, weights: Path | None = None, device: str | None = None, *, compiled: bool = False) -> Segmenter:
    """The segmenter of a file, with the backbone that the file names.

    Args:
        path: the file.
        weights: file with the weights of the backbone; None downloads timm's.
        device: where it computes; None takes a GPU if there is one.
        compiled: compile the segmenter with `torch.compile`. It takes a minute for the first image of each size of windows.

    Raises:
        InputError: the device does not exist, or the backbone cannot be built.
        CheckpointError: as `Segmenter.load`.
    """
    segmenter = Segmenter.load(path, weights=weights)
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    if device == "meta":
        raise InputError("the device meta holds no values; expected a device that computes. Use --device cpu.")
    try:
        segmenter = segmenter.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"the device {one_line(device)} cannot be used: {one_line(error)}. Use --device cpu.") from error
    if compiled:
        segmenter.compile()
    return segmenter


@dataclass(frozen=True)
class Report:
    """What a call of `predict` did.

    Attributes:
        written: number of masks that it wrote.
        kept: number of masks of an earlier call.
        problems: why a photograph or a part of a video has no prediction, one text each.
    """

    written: int
    kept: int
    problems: list[str]


@dataclass(frozen=True)
class _Item:
    """One image to predict: a photograph or a frame."""

    name: str
    pixels: Tensor  # (3, H, W) uint8
    overlay: bool


def predict(
    segmenter: Segmenter,
    sources: Sequence[Source],
    folder: PredictionFolder,
    *,
    batch_size: int = 1,
    title: str = "Predictions",
) -> Report:
    """Predict all sources that are not done, and write the page of all predictions in the folder.

    Args:
        segmenter: on the device that computes.
        sources: those that `folder.check` has accepted.
        folder: where the outputs go.
        batch_size: number of images of equal size in one forward pass.
        title: heading of the page.

    Raises:
        InputError: the head predicts no classes, the device has not enough memory, or a folder cannot be made.
        CheckpointError: a file cannot be written.
        KeyboardInterrupt: after Ctrl-C, with a text that says what is done.
    """
    if not segmenter.classes:
        raise InputError(
            f"the head of the file is a {type(segmenter.head).__name__}, which predicts no classes; expected a head with classes. "
            "Call the segmenter in Python: segmenter.predict(segmenter.preprocess(image))."
        )
    windows = folder.settings.windows(segmenter)
    if isinstance(windows["window"], int) and isinstance(windows["stride"], int) and windows["stride"] > windows["window"]:
        raise InputError(
            f"the stride is {windows['stride']} pixels, and the window {windows['window']}; expected a stride no larger than the "
            "window. Lower --stride."
        )
    space = LabelSpace(tuple(segmenter.classes), tuple(segmenter.palette))
    folder.begin(space)
    problems: list[str] = []
    pending = [source for source in sources if not folder.is_done(source)]
    done = [source for source in sources if folder.is_done(source)]
    progress = _Progress(_count(pending), kept=sum(len(folder.masks(source)) for source in done))
    try:
        with progress:
            for batch in _batched(_read(pending, folder, problems, progress), batch_size):
                _predict_batch(segmenter, batch, folder, problems, progress)
            for source in pending:
                if source.is_video and folder.masks(source):
                    write_overlay_video(source, folder, segmenter)
            predicted = predicted_in(folder, folder.sources())
            write_page(folder.page, title, describe(segmenter, folder.settings), space, predicted, problems)
    except KeyboardInterrupt as interruption:
        count = progress.written + progress.kept
        raise KeyboardInterrupt(
            f"interrupted; {count} predictions are in {folder.out / 'predictions'}. The same command resumes."
        ) from interruption
    return Report(progress.written, progress.kept, problems)


def _read(sources: Sequence[Source], folder: PredictionFolder, problems: list[str], progress: _Progress) -> Iterator[_Item]:
    """The images of all sources, without those that have a mask."""
    for source in sources:
        if source.is_video:
            for number, frame in frames(source.path, problems):
                name = frame_name(source, number)
                if folder.mask(name).exists():
                    progress.keep()
                else:
                    yield _Item(name, frame, overlay=False)
            continue
        try:
            yield _Item(source.name, to_tensor(load_photograph(source.path)), overlay=True)
        except InputError as error:  # one bad image must not stop the others
            problems.append(str(error))
            progress.advance(written=False)


def _batched(items: Iterable[_Item], batch_size: int) -> Iterator[list[_Item]]:
    """Batches of consecutive images of equal size."""
    for _, group in groupby(items, key=lambda item: tuple(item.pixels.shape)):
        batch: list[_Item] = []
        for item in group:
            batch.append(item)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _predict_batch(
    segmenter: Segmenter, batch: Sequence[_Item], folder: PredictionFolder, problems: list[str], progress: _Progress
) -> None:
    settings, size = folder.settings, batch[0].pixels.shape[-2:]
    try:
        logits = _logits(segmenter, [item.pixels for item in batch], settings)
    except InputError as error:
        problems.extend(f"{item.name}: {error}" for item in batch)
        for _ in batch:
            progress.advance(written=False)
        return
    except RuntimeError as error:
        on_cpu = "allocate memory" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"the device has not enough memory for {len(batch)} images of {size[1]} x {size[0]} pixels. Use a smaller --batch-size, "
            "--window or --eval-edge."
        ) from error
    classes = logits.argmax(1).to(torch.uint8).cpu()
    for index, item in enumerate(batch):
        probabilities = segmenter.head.probabilities(logits[index : index + 1])[0] if settings.probabilities else None
        segmentation = Segmentation(classes[index], item.pixels, segmenter.classes, segmenter.palette)
        folder.write(item.name, segmentation, probabilities, overlay=item.overlay)
        progress.advance()


def _logits(segmenter: Segmenter, images: Sequence[Tensor], settings: Settings) -> Tensor:
    """Logits (B, K, H, W) at the size of the images, which are equal in size."""
    preparation = Preparation(edge=settings.edge(segmenter))
    prepared = torch.cat([segmenter.preprocess(preparation.image(image)) for image in images])
    logits = segmenter.predict(prepared, **settings.windows(segmenter))
    size = images[0].shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


class _Progress:
    """A line with the number of images that are done and the time left."""

    def __init__(self, total: int | None, kept: int) -> None:
        tqdm = require("tqdm", "train").tqdm
        self.written, self.kept = 0, kept
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(total=total, unit="image", mininterval=interval, file=sys.stderr, disable=total == 0, delay=1)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *arguments: object) -> None:
        self._bar.close()

    def advance(self, *, written: bool = True) -> None:
        self.written += written
        self._bar.update()

    def keep(self) -> None:
        self.kept += 1
        self._bar.update()


def _count(sources: Sequence[Source]) -> int | None:
    """Number of images in the sources; None if a video does not state its number of frames."""
    total = 0
    for source in sources:
        frames = stated_frames(source.path) if source.is_video else 1
        if frames is None:
            return None
        total += frames
    return total
