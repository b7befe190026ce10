"""What `rein test` leaves of a run, and `rein compare`, which puts several runs side by side.

A run's folder then has `test/results.json` and, for a few pairs of each domain, image, truth and prediction as PNG files, so that
panels can be drawn later from any runs that judged the same pairs.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rein.checkpoint import replace_file
from rein.dgss import panel, report
from rein.dgss.labels import LabelSpace
from rein.dgss.report import Result
from rein.errors import InputError


@dataclass(frozen=True)
class Example:
    """One judged pair to show.

    Attributes:
        name: of the image in its data set.
        image: (H, W, 3) uint8.
        label: (H, W) uint8.
        prediction: (H, W) uint8.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


@dataclass(frozen=True)
class Run:
    """What one run judged.

    Attributes:
        folder: where it is.
        result: its figures.
        space: the classes.
        examples: domain -> names of the pairs that are shown.
        sources: domains that were fitted on.
        judged: what was judged, and how.
    """

    folder: Path
    result: Result
    space: LabelSpace
    examples: dict[str, list[str]]
    sources: list[str]
    judged: dict[str, Any]

    def example(self, domain: str, name: str) -> Example:
        """Read one example."""
        image, label, prediction = (_read(_picture(self.folder, domain, name, kind)) for kind in ("image", "truth", "prediction"))
        return Example(name, image, label, prediction)


def write(
    folder: Path,
    settings: Mapping[str, Any],
    result: Result,
    space: LabelSpace,
    examples: Mapping[str, Sequence[Example]],
    sources: Collection[str] = (),
) -> None:
    """Write `test/results.json` and the examples below a run's folder."""
    for domain, chosen in examples.items():
        for example in chosen:
            path = _picture(folder, domain, example.name, "image")
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, Image.fromarray(example.image))
            for kind, classes in (("truth", example.label), ("prediction", example.prediction)):
                picture = Image.fromarray(classes, "P")
                picture.putpalette(panel.colour_table(space).tobytes())
                _write(_picture(folder, domain, example.name, kind), picture)
    described = {
        **settings,
        "classes": list(space.names),
        "palette": [list(colour) for colour in space.palette[: len(space.names)]],
        "examples": {domain: [example.name for example in chosen] for domain, chosen in examples.items()},
    }
    (folder / "test").mkdir(parents=True, exist_ok=True)
    report.write_results(folder / "test" / "results.json", described, [result], sources)


def read(folder: Path) -> Run:
    """What a run judged.

    Raises:
        InputError: the folder holds no results of `rein test`, or they cannot be read.
    """
    path = folder / "test" / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored = content["results"][0]
        result = Result(**{field.name: stored[field.name] for field in fields(Result)})
        nan = float("nan")
        result.miou.update({name: nan for name, value in result.miou.items() if value is None})
        for ious in result.iou.values():
            ious.update({name: nan for name, value in ious.items() if value is None})
        space = LabelSpace(tuple(content["classes"]), tuple(tuple(colour) for colour in content["palette"]))
        return Run(folder, result, space, content["examples"], content["sources"], content["judged"])
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no results; run rein test --out {folder} first.") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as results of rein test: {type(error).__name__}: {error}") from error


def compare(folders: Sequence[Path], out: Path, names: Sequence[str] | None = None) -> str:
    """Write one panel for each domain, with every run's predictions and their errors in red, and return the table of the runs.

    Args:
        folders: of the runs, in the order of the columns.
        out: the panels' folder, `<domain>.png`, and `table.txt`.
        names: what the runs are called; None calls them by their methods, or where those are equal by their folders.

    Raises:
        InputError: a folder holds no results, or the runs did not judge the same domains and classes.
    """
    if not folders:
        raise InputError("no run was given to compare.")
    runs = [read(folder) for folder in folders]
    names = names or _names(runs)
    if len(names) != len(runs) or len(set(names)) < len(names):
        raise InputError(f"{len(runs)} runs want as many different names; got {', '.join(names)}.")
    first = runs[0]
    for run in runs[1:]:
        if run.space.names != first.space.names or list(run.result.miou) != list(first.result.miou):
            raise InputError(
                f"{run.folder} judged {', '.join(run.result.miou)} with {len(run.space.names)} classes, {first.folder} "
                f"{', '.join(first.result.miou)} with {len(first.space.names)}; runs to compare must have judged the same."
            )
        differing = [key for key, value in first.judged.items() if run.judged.get(key) != value]
        if differing:
            said = "; ".join(f"{key} {run.judged.get(key)} and {first.judged[key]}" for key in differing)
            raise InputError(f"{run.folder} and {first.folder} were not judged alike, {said}; judge them alike to compare them.")
    out.mkdir(parents=True, exist_ok=True)
    for domain in first.result.miou:
        shared = [name for name in first.examples.get(domain, []) if all(name in run.examples.get(domain, []) for run in runs)]
        if not shared:
            continue
        rows = []
        for name in shared:
            examples = [run.example(domain, name) for run in runs]
            rows.append(
                panel.Row(
                    name="",
                    image=examples[0].image,
                    label=examples[0].label,
                    predictions={called: example.prediction for called, example in zip(names, examples, strict=True)},
                    miou={called: run.result.miou[domain] for called, run in zip(names, runs, strict=True)},
                )
            )
        title = f"{domain}: predictions, and below them their errors in red (mIoU of the whole domain, %)"
        picture = io.BytesIO()
        panel.draw(rows, first.space, title, errors=True).save(picture, "PNG")
        replace_file(out / f"{slug(domain)}.png", picture.getvalue())
    text = report.table([_renamed(run.result, called) for run, called in zip(runs, names, strict=True)], first.sources)
    replace_file(out / "table.txt", (text + "\n").encode())
    return text


def slug(name: str) -> str:
    """A name as it may stand in a path; other names give others."""
    return re.sub(r'[<>:"/\\|?*%\x00-\x1f]|^\.', lambda match: f"%{ord(match[0]):02X}", name)


def _names(runs: Sequence[Run]) -> list[str]:
    methods = [run.result.method for run in runs]
    return methods if len(set(methods)) == len(methods) else [run.folder.name for run in runs]


def _renamed(result: Result, name: str) -> Result:
    return Result(**{field.name: getattr(result, field.name) for field in fields(Result)} | {"method": name})


def _picture(folder: Path, domain: str, name: str, kind: str) -> Path:
    return folder / "test" / "examples" / slug(domain) / f"{slug(name)}-{kind}.png"


def _write(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read; judge the run again with rein test: {error}") from error
