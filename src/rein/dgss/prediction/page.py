"""The page of predictions: image, overlay and legend side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from rein import Segmenter
from rein.backbones import facts
from rein.dgss import pages
from rein.dgss.data.datasets.encodings import load_photograph
from rein.dgss.labels import LabelSpace
from rein.dgss.prediction.folder import PredictionFolder, Settings, read_mask
from rein.dgss.prediction.sources import Source
from rein.dgss.prediction.videos import frame_name, frames
from rein.errors import InputError, MissingExtraError
from rein.files import replace_file

FRAMES = 8  # of each video that the page shows


def describe(segmenter: Segmenter, settings: Settings) -> dict[str, str]:
    """What the page states about the segmenter and the settings: titles and texts."""
    windows = settings.windows(segmenter)
    window, stride = windows["window"], windows["stride"]
    edge = settings.edge(segmenter)
    steps = [] if edge is None else [f"resized to a shortest edge of {edge} pixels"]
    steps += ["whole images" if window is None else f"windows of {window} pixels, stride {stride or window * 2 // 3}"]
    return {
        "backbone": facts.full_name(segmenter.backbone),
        "head": type(segmenter.head).__name__,
        "classes": str(len(segmenter.classes)),
        "predicted in": ", ".join(steps),
    }


@dataclass(frozen=True)
class Predicted:
    """A prediction on disk.

    Attributes:
        name: heading in the page.
        image: opens the image at the orientation of its mask.
        mask: the file of the classes.
    """

    name: str
    image: Callable[[], Image.Image]
    mask: Path


def write_page(
    path: Path, title: str, stated: Mapping[str, str], space: LabelSpace, predicted: Sequence[Predicted], problems: Sequence[str]
) -> None:
    """Write a page of predictions. Of more than `pages.MOST`, as many are shown, at even distances.

    Raises:
        CheckpointError: the page cannot be written.
    """
    count = min(len(predicted), pages.MOST)
    chosen = [predicted[round((place + 0.5) * len(predicted) / count - 0.5)] for place in range(count)]
    content = pages.predictions(
        title, stated, _pictures(chosen, space), space, left_out=len(predicted) - count, problems=problems
    )
    replace_file(path, content)


def _pictures(predicted: Sequence[Predicted], space: LabelSpace) -> Iterator[pages.Picture]:
    """Pictures for the page, one at a time, since photographs may be large; none of those whose files have gone meanwhile."""
    for each in predicted:
        try:
            image, classes = each.image(), read_mask(each.mask)
        except InputError:
            continue
        counts = classes.flatten().bincount(minlength=len(space.names)).tolist()
        shares = {name: count / classes.numel() for name, count in zip(space.names, counts, strict=False) if count}
        ordered = dict(sorted(shares.items(), key=lambda entry: -entry[1]))
        yield pages.Picture(each.name, image, [pages.Layer("overlay", classes.numpy())], ordered)


def predicted_in(folder: PredictionFolder, sources: Sequence[Source]) -> list[Predicted]:
    """The predictions of the sources: every photograph, and a few frames of each video."""
    found = []
    for source in sources:
        if not source.is_video:
            if folder.mask(source.name).exists():
                found.append(Predicted(source.name, partial(_open_photograph, source.path), folder.mask(source.name)))
            continue
        masks = folder.masks(source)
        shown = sorted({round((place + 0.5) * len(masks) / FRAMES - 0.5) for place in range(FRAMES)}) if masks else []
        numbers = {int(masks[index].stem) for index in shown}
        with suppress(MissingExtraError):  # the video of an earlier call
            for number, pixels in frames(source.path, []):
                if number in numbers:
                    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                    image.thumbnail((pages.SIDE, pages.SIDE))
                    name = frame_name(source, number)
                    found.append(Predicted(name, image.copy, folder.mask(name)))
                if number >= max(numbers, default=-1):
                    break
    return found


def _open_photograph(path: Path) -> Image.Image:
    """A photograph, turned as its EXIF data state."""
    image = load_photograph(path)
    return ImageOps.exif_transpose(image) or image
