"""Read the frames of videos, and write them under the colours of their classes (extra `video`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rein import Segmenter
from rein.dgss.prediction.folder import PredictionFolder, make_folder, read_mask
from rein.dgss.prediction.sources import Source
from rein.errors import InputError, ReinError, one_line
from rein.extras import require
from rein.files import check_regular_file
from rein.images import Segmentation


def frame_name(source: Source, number: int) -> str:
    """Name of the outputs of a frame of a video."""
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


def stated_frames(path: Path) -> int | None:
    """Number of frames of a video, as far as it states it; 0 if it cannot be read."""
    try:
        with _open_video(path) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return int(stream.frames)
            return round(container.duration / 1e6 * stream.average_rate) if container.duration and stream.average_rate else None
    except InputError:
        return 0


def frames(path: Path, problems: list[str]) -> Iterator[tuple[int, Tensor]]:
    """Number and pixels (3, H, W) uint8 of each frame, turned as the video states. Notes where decoding ends early."""
    number = -1
    try:
        with _open_video(path) as container:
            for number, frame in enumerate(container.decode(video=0)):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                yield number, pixels.rot90(frame.rotation // 90 % 4, (1, 2)).contiguous()
            stated, found = container.streams.video[0].frames, number + 1
            expected = stated or stated_frames(path) or 0
            if found == 0 or found < (
                expected if stated else 0.9 * expected - 2
            ):  # without a number, the duration is an estimate
                problems.append(f"{path} ends early: {found} of {expected} frames could be read")
    except InputError as error:
        problems.append(str(error))
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be decoded after {number + 1} frames: {one_line(error)}")


def write_overlay_video(source: Source, folder: PredictionFolder, segmenter: Segmenter) -> None:
    """Encode the frames under the colours of their masks. The file appears when it is complete, and only if no frame is missing.

    Raises:
        InputError: the file cannot be written.
    """
    av = require("av", "video")
    target = folder.overlay(source.name)
    unfinished = target.with_name(f".{target.name}.part")
    problems: list[str] = []
    make_folder(target.parent)
    try:
        with _open_video(source.path) as container, av.open(str(unfinished), "w", format="mp4") as output:
            rate = container.streams.video[0].average_rate or 25
            stream = output.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
            stream.pix_fmt = "yuv420p"
            for number, pixels in frames(source.path, problems):
                mask = folder.mask(frame_name(source, number))
                if not mask.exists():
                    return
                segmentation = Segmentation(read_mask(mask), pixels, segmenter.classes, segmenter.palette)
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
