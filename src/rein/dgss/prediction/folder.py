"""The folder of predictions: its files, and which of them an earlier call has written."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rein import Segmenter
from rein.dgss.data.datasets.encodings import load_image
from rein.dgss.labels import LabelSpace
from rein.dgss.prediction.sources import VIDEO_SUFFIXES, Source
from rein.errors import InputError, one_line
from rein.files import read_text, reason_of, replace_file
from rein.images import Segmentation

_STATE = "predictions.json"
_FILES = {"model": "segmenter file", "weights": "file of weights"}  # settings that are digests


@dataclass(frozen=True)
class Settings:
    """What the predictions depend on, beside the photographs. The folder of earlier predictions must have equal ones to resume.

    Attributes:
        model: SHA-256 of the segmenter file.
        window: side of the sliding windows in pixels; None takes window and stride of the file (`Segmenter.windows`).
        stride: distance between windows in pixels; None takes that of the file, or two thirds of the window.
        eval_edge: shortest edge in pixels to which images are resized first; 0 keeps their size, None takes that of the file. Masks
            have the image's own size.
        weights: SHA-256 of the file with the backbone's weights; None for timm's.
        probabilities: write the probabilities of all classes.
    """

    model: str
    window: int | None = None
    stride: int | None = None
    eval_edge: int | None = None
    probabilities: bool = False
    weights: str | None = None

    def edge(self, segmenter: Segmenter) -> int | None:
        """The shortest edge, or None for the image's own size."""
        return (segmenter.notes.get("eval_edge") if self.eval_edge is None else self.eval_edge) or None

    def windows(self, segmenter: Segmenter) -> dict[str, Any]:
        """`window` and `stride` for `Segmenter.predict`."""
        if self.window is not None:
            return {"window": self.window, "stride": self.stride}
        stated = segmenter.windows()
        return stated if self.stride is None else {**stated, "stride": self.stride}


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
        if source.is_video:
            return self.overlay(source.name).exists()
        files = [self.mask(source.name), self.overlay(source.name)]
        return all(
            path.exists() for path in (*files, *([self.probabilities(source.name)] if self.settings.probabilities else []))
        )

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
        make_folder(self.out)
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
        make_folder(self.mask(name).parent)
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
                return f"another {_FILES[name]}" if name in _FILES else f"{name} was {one_line(earlier.get(name))} and is {value}"
        return "other names"

    def _replace(self, path: Path, content: bytes) -> None:
        make_folder(path.parent)
        replace_file(path, content)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def read_mask(path: Path) -> Tensor:
    """Classes (H, W) uint8."""
    return torch.from_numpy(np.array(load_image(path)))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they do not exist.

    Raises:
        InputError: the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {reason_of(error, folder)}. Choose another --out.") from error
