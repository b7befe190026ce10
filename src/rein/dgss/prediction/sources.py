"""List the photographs and videos that the arguments of `rein predict` name."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rein.dgss.data.datasets.files import IMAGE_SUFFIXES, short_names, walk
from rein.errors import InputError, one_line
from rein.extras import require
from rein.files import describe_missing

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm", ".mpg", ".mpeg")


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
        out: folder of the predictions; what an earlier call wrote there is left out.

    Returns:
        The sources, and the videos in the folders. Those are left out, because a video takes long: name it to predict it.

    Raises:
        InputError: an argument does not exist, or nothing is left.
        MissingExtraError: a video is named and PyAV is not installed.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # resolved path -> (path, what it is named relative to)
    videos: list[Path] = []
    outputs = {out.resolve() / name for name in ("predictions", "overlays", "probabilities")}
    for path, given in ((path, path == Path(argument)) for argument in arguments for path in _expand(str(argument))):
        if not path.is_dir():
            if not given and outputs & set(path.resolve().parents):  # a pattern matches it
                continue
            found.setdefault(path.resolve(), (path, path.parent))
            continue
        for file in (path / name for name in sorted(walk(path, recursive=True))):
            if outputs & set(file.resolve().parents):
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
