"""`rein predict FILE PHOTOS`: the classes of photographs and videos, by a segmenter file, without a run folder.

`find_sources` lists what to predict, and `PredictionFolder` knows what of it is written, so that the same command resumes. `predict`
fills the folder: masks, overlays, probabilities, and a page that shows them. Needs no extra, except `video` for videos.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from rein import Segmenter
from rein.backbones import facts
from rein.dgss import pages
from rein.dgss.data.datasets.encodings import load_image, load_photograph
from rein.dgss.data.datasets.files import IMAGE_SUFFIXES, short_names, walk
from rein.dgss.data.protocols import Preparation
from rein.dgss.labels import LabelSpace
from rein.errors import InputError, MissingExtraError, ReinError, one_line
from rein.extras import require
from rein.files import check_regular_file, describe_missing, read_text, reason_of, replace_file
from rein.images import Segmentation, to_tensor

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".mpg", ".mpeg")
FRAMES = 8  # of each video that the page shows
_STATE = "predictions.json"


# -- what to predict


@dataclass(frozen=True)
class Source:
    """A photograph or a video.

    Attributes:
        name: path of its outputs below their folders, without a suffix. A video's name keeps the suffix and is a folder of frames.
        path: the file.
    """

    name: str
    path: Path

    @property
    def is_video(self) -> bool:
        """Whether the file's suffix is that of a video."""
        return self.path.name.lower().endswith(VIDEO_SUFFIXES)

    def state(self) -> list[Any]:
        """Path, size in bytes and time of the last change: what tells the file from another one of the same name."""
        try:
            found = self.path.stat()
        except OSError:  # a link without a target, for example, which reading names
            return [str(self.path.resolve()), 0, 0]
        return [str(self.path.resolve()), found.st_size, found.st_mtime_ns]


def find_sources(arguments: Sequence[str | os.PathLike[str]], out: Path) -> tuple[list[Source], list[Path]]:
    """List the photographs and videos that the arguments name, each once.

    Args:
        arguments: image files, videos, folders, and patterns such as `photos/**/*.jpg`. All images in a folder and below it are
            taken, whatever the case of their suffix, except hidden ones.
        out: folder of the predictions; a folder that contains it is searched without it.

    Returns:
        The sources, and the videos in the folders. Those are left out, because a video takes long: name it to predict it.

    Raises:
        InputError: an argument does not exist, or nothing is left.
        MissingExtraError: a video is named and PyAV is not installed.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # resolved path -> (path, what it is named relative to)
    videos: list[Path] = []
    out = out.resolve()
    for path in (path for argument in arguments for path in _expand(str(argument))):
        if not path.is_dir():
            found.setdefault(path.resolve(), (path, path.parent))
            continue
        for file in (path / name for name in sorted(walk(path, recursive=True))):
            if out in file.resolve().parents:
                continue
            if file.name.lower().endswith(VIDEO_SUFFIXES):
                videos.append(file)
            elif file.name.lower().endswith(IMAGE_SUFFIXES):
                found.setdefault(file.resolve(), (file, path))
    if not found:
        note = f" The videos in it are predicted if they are named, such as {videos[0]}." if videos else ""
        named = one_line(", ".join(map(str, arguments)))
        raise InputError(f"{named} has no images; expected files that end in {', '.join(IMAGE_SUFFIXES)}.{note}")
    if any(path.name.lower().endswith(VIDEO_SUFFIXES) for path, _ in found.values()):
        require("av", "video")
    return _named(list(found.values())), [path for path in videos if path.resolve() not in found]


def _expand(text: str) -> list[Path]:
    """The path, or what matches it if it is a pattern and not a path."""
    path = Path(text)
    if path.exists():
        return [path]
    if glob.has_magic(text):
        if matches := sorted(glob.glob(text, recursive=True)):
            return [Path(match) for match in matches]
        raise InputError(f"no file matches {one_line(text)}. Check the pattern.")
    raise InputError(f"{describe_missing(path)}; expected an image, a video, a folder or a pattern. Check the path.")


def _named(found: Sequence[tuple[Path, Path]]) -> list[Source]:
    """Sources with different names: paths below the arguments, which start with the folder's name where two would be equal."""
    relative = [path.relative_to(root) for path, root in found]
    if len(set(relative)) < len(relative):
        relative = [Path(root.resolve().name) / path.relative_to(root) for path, root in found]
    if len(set(relative)) < len(relative):
        same = next(name for name in relative if relative.count(name) > 1)
        raise InputError(f"several images are named {same}; expected different names. Predict them with a different --out each.")
    photos = [path for path in relative if not path.name.lower().endswith(VIDEO_SUFFIXES)]
    names = dict(zip(photos, short_names(photos), strict=True))
    return [Source(names.get(name, name.as_posix()), path) for name, (path, _) in zip(relative, found, strict=True)]


# -- where it is written


@dataclass(frozen=True)
class Settings:
    """What the predictions depend on, beside the photographs. The folder of earlier predictions must have equal ones to resume.

    Attributes:
        model: SHA-256 of the segmenter file.
        window: side of the sliding windows in pixels; None takes that of the file, or whole images.
        stride: distance between windows in pixels; None takes that of the file, or two thirds of the window.
        eval_edge: shortest edge in pixels to which images are resized first; None keeps their size. Masks have the image's own size.
        probabilities: write the probabilities of all classes.
    """

    model: str
    window: int | None = None
    stride: int | None = None
    eval_edge: int | None = None
    probabilities: bool = False


class PredictionFolder:
    """The folder of predictions: `predictions/NAME.png`, `overlays/NAME.jpg`, `probabilities/NAME.npy`, `index.html`.

    `predictions.json` states the settings, the classes and the source of each name. Every file is written in one step, the mask last.

    Args:
        out: the folder; it may not exist yet.
        settings: those of the predictions.

    Attributes:
        page: the file of the page.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.settings = out, settings
        self.page = out / "index.html"
        self._sources: dict[str, list[Any]] = {}
        self._replaced: list[Path] = []

    def mask(self, name: str) -> Path:
        """The file of the classes."""
        return self.out / "predictions" / f"{name}.png"

    def overlay(self, name: str) -> Path:
        """The file of the photograph under the colours of its classes; that of a video is a video."""
        return self.out / "overlays" / (name if name.lower().endswith(VIDEO_SUFFIXES) else f"{name}.jpg")

    def probabilities(self, name: str) -> Path:
        """The file of the probabilities, (K, H, W) float16."""
        return self.out / "probabilities" / f"{name}.npy"

    def is_done(self, source: Source) -> bool:
        """Whether the outputs of a source are complete."""
        return (self.overlay(source.name) if source.is_video else self.mask(source.name)).exists()

    def check(self, sources: Sequence[Source], *, overwrite: bool) -> None:
        """Check earlier predictions, and plan to replace those of the sources if `overwrite` is set. Changes no file.

        Raises:
            InputError: the folder holds predictions with other settings or of other images, or an output would replace an input.
        """
        inputs = {source.path.resolve() for source in sources}
        for source in sources:
            if {path.resolve() for path in (self.mask(source.name), self.overlay(source.name))} & inputs:
                raise InputError(f"the prediction of {source.path} would replace an input. Choose another --out.")
        states = {source.name: source.state() for source in sources}
        existing = [source for source in sources if self._outputs(source)]
        earlier = self._read_state()
        known = earlier.get("sources", {})
        others = [source for source in existing if known.get(source.name) != states[source.name]]
        if overwrite:
            self._replaced = [path for source in existing for path in self._outputs(source)]
        elif earlier and earlier["settings"] != asdict(self.settings):
            raise InputError(
                f"{self.out} holds predictions with other settings: {self._difference(earlier['settings'])}. Replace them with "
                "--overwrite, or choose another --out."
            )
        elif others:
            raise InputError(
                f"{len(others)} of {len(sources)} predictions exist already, of other images or of images that have changed, the "
                f"first: {self.mask(others[0].name)}. Replace them with --overwrite, or choose another --out."
            )
        alike = earlier.get("settings") == asdict(self.settings)
        self._sources = {**(known if alike else {}), **states}

    def begin(self, space: LabelSpace) -> None:
        """Remove what is replaced, and write `predictions.json`."""
        for path in self._replaced:
            path.unlink(missing_ok=True)
        _make(self.out)
        state = {
            "settings": asdict(self.settings),
            "classes": space.names,
            "palette": space.palette,
            "sources": self._sources,
        }
        replace_file(self.out / _STATE, (json.dumps(state, indent=1) + "\n").encode())

    def write(self, name: str, segmentation: Segmentation, probabilities: Tensor | None, *, overlay: bool) -> None:
        """Write the outputs of one image; the mask is last, because it marks that they are complete."""
        if probabilities is not None:
            buffer = io.BytesIO()
            np.save(buffer, probabilities.half().cpu().numpy(), allow_pickle=False)
            self._replace(self.probabilities(name), buffer.getvalue())
        if overlay:
            buffer = io.BytesIO()
            segmentation.overlay().save(buffer, "JPEG", quality=90)
            self._replace(self.overlay(name), buffer.getvalue())
        _make(self.mask(name).parent)
        segmentation.save(self.mask(name))

    def masks(self, source: Source) -> list[Path]:
        """The masks of a source that exist: of a photograph one, of a video one for each frame."""
        if source.is_video:
            return sorted((self.out / "predictions" / source.name).glob("[0-9]*.png"))
        return [path for path in [self.mask(source.name)] if path.exists()]

    def sources(self) -> list[Source]:
        """The sources of all predictions in the folder, with those of earlier calls."""
        return [Source(name, Path(state[0])) for name, state in self._sources.items()]

    def _outputs(self, source: Source) -> list[Path]:
        """The outputs of a source that exist, incomplete ones included."""
        name = source.name
        inside = (self.out / "probabilities" / name).glob("[0-9]*.npy") if source.is_video else [self.probabilities(name)]
        return [path for path in (*self.masks(source), self.overlay(name), *inside) if path.is_file()]

    def _read_state(self) -> dict[str, Any]:
        path = self.out / _STATE
        try:
            state = json.loads(read_text(path, 100_000_000))
            known = [source for source in state["sources"].values() if isinstance(source[0], str) and len(source) == 3]
            if not isinstance(state["settings"], dict) or len(known) < len(state["sources"]):
                raise ValueError("expected settings and sources")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {one_line(error)}. Remove the file, or choose another --out.") from error
        return state

    def _difference(self, earlier: Mapping[str, Any]) -> str:
        """The first setting that differs, in words."""
        for name, value in asdict(self.settings).items():
            if earlier.get(name) != value:
                return "another segmenter file" if name == "model" else f"{name} was {one_line(earlier.get(name))} and is {value}"
        return "other names"

    def _replace(self, path: Path, content: bytes) -> None:
        _make(path.parent)
        replace_file(path, content)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


# -- prediction


def load(path: Path, weights: Path | None = None, device: str | None = None) -> Segmenter:
    """The segmenter of a file, with the backbone that the file names.

    Args:
        path: the file.
        weights: file with the weights of the backbone; None downloads timm's.
        device: where it computes; None takes a GPU if there is one.

    Raises:
        InputError: the device does not exist, or the backbone cannot be built.
        CheckpointError: as `Segmenter.load`.
    """
    segmenter = Segmenter.load(path, weights=weights)
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    try:
        return segmenter.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"the device {one_line(device)} cannot be used: {one_line(error)}. Use --device cpu.") from error


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
    if segmenter.head.num_classes < 2:
        raise InputError(
            f"the head of the file is a {type(segmenter.head).__name__}, which predicts no classes; expected a head of two or "
            "more classes. Call the segmenter of the file in Python."
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
                    _write_overlay_video(source, folder, segmenter)
            predicted = _predicted(folder, folder.sources())
            write_page(folder.page, title, _facts(segmenter, folder.settings), space, predicted, problems)
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
            for number, frame in _frames(source.path, problems):
                name = _frame_name(source, number)
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
        probabilities = logits[index].float().softmax(0) if settings.probabilities else None
        segmentation = Segmentation(classes[index], item.pixels, segmenter.classes, segmenter.palette)
        folder.write(item.name, segmentation, probabilities, overlay=item.overlay)
        progress.advance()


def _logits(segmenter: Segmenter, images: Sequence[Tensor], settings: Settings) -> Tensor:
    """Logits (B, K, H, W) at the size of the images, which are equal in size."""
    window, stride = _windows(segmenter, settings)
    preparation = Preparation(edge=settings.eval_edge)
    prepared = torch.cat([segmenter.preprocess(preparation.image(image)) for image in images])
    logits = segmenter.predict(prepared, window, stride)
    size = images[0].shape[-2:]
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _windows(segmenter: Segmenter, settings: Settings) -> tuple[int | None, int | None]:
    """Window and stride: those of the settings, else those that the file states, else whole images."""
    if settings.window is None and isinstance(segmenter.notes.get("window"), int):
        return segmenter.notes["window"], settings.stride or segmenter.notes.get("stride")
    return settings.window, settings.stride


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
        frames = _stated_frames(source.path) if source.is_video else 1
        if frames is None:
            return None
        total += frames
    return total


# -- videos


def _frame_name(source: Source, number: int) -> str:
    return f"{source.name}/{number:06}"


def _open_video(path: Path) -> Any:
    """A container of PyAV with a video stream.

    Raises:
        InputError: the file cannot be read as a video.
    """
    av = require("av", "video")
    try:
        check_regular_file(path)
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # errors of PyAV are kinds of OSError and ValueError
        raise InputError(f"{path} cannot be read as a video: {one_line(error)}") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{path} has no pictures; expected a video.")
    return container


def _stated_frames(path: Path) -> int | None:
    try:
        with _open_video(path) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return int(stream.frames)
            return round(container.duration / 1e6 * stream.average_rate) if container.duration and stream.average_rate else None
    except InputError:
        return 0


def _frames(path: Path, problems: list[str]) -> Iterator[tuple[int, Tensor]]:
    """Number and pixels (3, H, W) uint8 of each frame, turned as the video states. Notes where decoding ends early."""
    number = -1
    try:
        with _open_video(path) as container:
            for number, frame in enumerate(container.decode(video=0)):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                yield number, pixels.rot90(frame.rotation // 90 % 4, (1, 2)).contiguous()
    except InputError as error:
        problems.append(str(error))
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be decoded after {number + 1} frames: {one_line(error)}")


def _write_overlay_video(source: Source, folder: PredictionFolder, segmenter: Segmenter) -> None:
    """Encode the frames under the colours of their masks. The file appears when it is complete, and only if no frame is missing.

    Raises:
        InputError: the file cannot be written.
    """
    av = require("av", "video")
    target = folder.overlay(source.name)
    unfinished = target.with_name(f".{target.name}.part")
    problems: list[str] = []
    _make(target.parent)
    try:
        with _open_video(source.path) as container, av.open(str(unfinished), "w", format="mp4") as output:
            rate = container.streams.video[0].average_rate or 25
            stream = output.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
            stream.pix_fmt = "yuv420p"
            for number, pixels in _frames(source.path, problems):
                mask = folder.mask(_frame_name(source, number))
                if not mask.exists():
                    return
                segmentation = Segmentation(_read_mask(mask), pixels, segmenter.classes, segmenter.palette)
                picture = np.asarray(segmentation.overlay())
                picture = np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)), "edge")  # yuv420p
                if number == 0:
                    stream.height, stream.width = picture.shape[:2]
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                output.mux(stream.encode(frame.reformat(stream.width, stream.height)))  # the size of frames may change
            output.mux(stream.encode(None))
        if not problems:
            os.replace(unfinished, target)
    except (OSError, ValueError) as error:
        if isinstance(error, ReinError):
            raise
        raise InputError(f"{target} cannot be written: {one_line(error)}. Choose another --out.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


# -- the page


def _facts(segmenter: Segmenter, settings: Settings) -> dict[str, str]:
    window, stride = _windows(segmenter, settings)
    steps = [] if settings.eval_edge is None else [f"resized to a shortest edge of {settings.eval_edge} pixels"]
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
            image, classes = each.image(), _read_mask(each.mask)
        except InputError:
            continue
        counts = classes.flatten().bincount(minlength=len(space.names)).tolist()
        shares = {name: count / classes.numel() for name, count in zip(space.names, counts, strict=False) if count}
        ordered = dict(sorted(shares.items(), key=lambda entry: -entry[1]))
        yield pages.Picture(each.name, image, [pages.Layer("overlay", classes.numpy())], ordered)


def _predicted(folder: PredictionFolder, sources: Sequence[Source]) -> list[Predicted]:
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
            for number, pixels in _frames(source.path, []):
                if number in numbers:
                    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                    image.thumbnail((pages.SIDE, pages.SIDE))
                    name = _frame_name(source, number)
                    found.append(Predicted(name, image.copy, folder.mask(name)))
                if number >= max(numbers, default=-1):
                    break
    return found


def _open_photograph(path: Path) -> Image.Image:
    """A photograph, turned as its EXIF data state."""
    image = load_photograph(path)
    return ImageOps.exif_transpose(image) or image


def _read_mask(path: Path) -> Tensor:
    """Classes (H, W) uint8."""
    return torch.from_numpy(np.array(load_image(path)))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {reason_of(error, folder)}. Choose another --out.") from error
