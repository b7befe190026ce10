"""Figures of evaluated runs: one `Result` per method, printed as tables, kept as JSON in the folder of a run.

`rein test` writes `test/results.json`, a page of tables and examples, and the image, label and prediction of a few pairs of each
domain as PNG files, from which `rein compare` draws panels later.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning
import numpy as np
import timm
import torch
from PIL import Image

import rein
from rein.checkpoint import replace_file
from rein.dgss import pages, panels
from rein.dgss.data.datamodule import UNSEEN
from rein.dgss.data.datasets.encodings import load_image
from rein.dgss.labels import LabelSpace, is_colours, is_integer
from rein.errors import InputError, one_line
from rein.files import read_text


@dataclass(frozen=True)
class Published:
    """The figure that a recipe aims at.

    Attributes:
        miou: domain -> mIoU in per cent.
        mean: mean over the domains, in per cent.
        source: the paper and its table.
        note: what else is needed to compare.
    """

    miou: dict[str, float] = field(default_factory=dict)
    mean: float | None = None
    source: str = ""
    note: str = ""

    def __str__(self) -> str:
        figures = [f"{name} {value}" for name, value in self.miou.items()]
        figures += [] if self.mean is None else [f"mean {self.mean}"]
        return f"{', '.join(figures) or 'no figure'} ({self.source}){'; ' + self.note if self.note else ''}"


@dataclass(frozen=True)
class Result:
    """Figures of one method or run.

    Attributes:
        method: name in tables.
        backbone_parameters: parameters of the bare backbone.
        tuned_parameters: trainable parameters besides the head's: the adapter's, or the backbone's own.
        head_parameters: parameters of the decode head.
        miou: domain -> mean IoU, 0 to 1; NaN where fewer than two classes are labelled (null in JSON).
        iou: domain -> class -> IoU, 0 to 1, NaN where the class is neither labelled nor predicted (null in JSON).
        step: optimizer step of the evaluated state, if known.
        source_miou: mean IoU of that state on the source validation pairs, 0 to 1, if known.
    """

    method: str
    backbone_parameters: int
    tuned_parameters: int
    head_parameters: int
    miou: dict[str, float]
    iou: dict[str, dict[str, float]]
    step: int | None = None
    source_miou: float | None = None

    def unseen(self, roles: Mapping[str, str]) -> list[str]:
        """The domains that `mean_of_unseen` covers: those with a mean IoU whose role is `unseen`.

        Args:
            roles: domain -> role, as `DomainData.roles` gives them; a domain without a role is unseen.
        """
        return [name for name, value in self.miou.items() if roles.get(name, UNSEEN) == UNSEEN and not isnan(value)]

    def mean_of_unseen(self, roles: Mapping[str, str]) -> float:
        """Mean mIoU over the domains of `unseen`, 0 to 1; NaN if there are none."""
        covered = self.unseen(roles)
        return fmean(self.miou[name] for name in covered) if covered else float("nan")


@dataclass(frozen=True)
class Example:
    """One evaluated pair.

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
class EvaluatedRun:
    """What `rein test` left in the folder of a run.

    Attributes:
        folder: the run's folder.
        result: its figures.
        space: the classes.
        examples: domain -> names of the pairs whose pictures are kept.
        sources: names of the source domains.
        roles: evaluated domain -> its role, as `DomainData.roles` gives it.
        evaluation: targets and settings that must be equal in runs that are compared.
        settings: backbone, method and other settings, as in the JSON file.
    """

    folder: Path
    result: Result
    space: LabelSpace
    examples: dict[str, list[str]]
    sources: list[str]
    roles: dict[str, str]
    evaluation: dict[str, Any]
    settings: dict[str, Any]

    def example(self, domain: str, name: str) -> Example:
        """Read the pictures of one pair."""
        image, label, prediction = (
            _read_png(_example_path(self.folder, domain, name, kind)) for kind in ("image", "truth", "prediction")
        )
        if image.ndim != 3 or not image.shape[:2] == label.shape == prediction.shape:
            raise InputError(f"the pictures of {name} in {self.folder / 'test'} do not belong together. Run rein test again.")
        return Example(name, image, label, prediction)


# -- tables


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns: the first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def result_table(results: Sequence[Result], roles: Mapping[str, str]) -> str:
    """One line per result: parameters, and mIoU in per cent. Below, which domains the mean covers, and why there are dashes.

    Args:
        results: results on the same domains.
        roles: as in `Result.unseen`. A star marks domains that are not unseen.
    """
    domains = list(results[0].miou)
    names = _marked(domains, roles)
    rows = [
        [
            result.method,
            f"{result.head_parameters:,}",
            f"{result.tuned_parameters:,}",
            f"{100 * result.tuned_parameters / result.backbone_parameters:.1f}",
            *(_percent(result.miou[name]) for name in domains),
            _percent(result.mean_of_unseen(roles)),
        ]
        for result in results
    ]
    table = text_table(["method", "head", "tuned in backbone", "%", *names, "mean of unseen"], rows)
    return "\n".join([table, "", *_role_notes(results[0], roles), *_dash_notes(results[0])])


def _marked(domains: Sequence[str], roles: Mapping[str, str]) -> list[str]:
    """The domains; a star marks those that are not unseen."""
    return [name if roles.get(name, UNSEEN) == UNSEEN else f"{name}*" for name in domains]


def _role_notes(result: Result, roles: Mapping[str, str]) -> list[str]:
    notes = [f"* {name}: {roles[name]}" for name in result.miou if roles.get(name, UNSEEN) != UNSEEN]
    return [*notes, f"mean of unseen: {', '.join(result.unseen(roles)) or 'no domain'}"]


def _dash_notes(result: Result) -> list[str]:
    without = [name for name, value in result.miou.items() if isnan(value)]
    return [f"{name}: no mean IoU, because fewer than two classes are labelled" for name in without]


def class_table(result: Result) -> str:
    """IoU of every class in every domain, in per cent; a dash where a class is neither labelled nor predicted."""
    domains = list(result.iou)
    rows = [[name, *(_percent(result.iou[domain][name]) for domain in domains)] for name in result.iou[domains[0]]]
    table = text_table(["class", *domains], [*rows, ["mean", *(_percent(result.miou[domain]) for domain in domains)]])
    notes = []
    for domain, ious in result.iou.items():
        count = sum(not isnan(value) for value in ious.values())
        if count < len(ious) and not isnan(result.miou[domain]):
            notes.append(f"{domain}: mean over {count} of {len(ious)} classes")
    notes += _dash_notes(result)
    return "\n".join([table, *(["", *notes] if notes else [])])


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:.1f}"


# -- pages


def method_table(results: Sequence[Result], roles: Mapping[str, str]) -> pages.Table:
    """The figures of `result_table` for a page: mIoU of each method in each domain."""
    domains = list(results[0].miou)
    rows = {result.method: [100 * value for value in (*result.miou.values(), result.mean_of_unseen(roles))] for result in results}
    return pages.Table("mIoU in per cent", ["method", *_marked(domains, roles), "mean of unseen"], rows)


def class_figures(columns: Mapping[str, Mapping[str, float]], means: Sequence[float], *, best: bool = False) -> pages.Table:
    """IoU of every class, in per cent.

    Args:
        columns: heading -> class -> IoU, 0 to 1.
        means: mean IoU of each column, 0 to 1.
        best: mark the largest figure of each class.
    """
    classes = list(next(iter(columns.values())))
    rows = {name: [100 * ious[name] for ious in columns.values()] for name in classes}
    footer = [100 * value for value in means]
    return pages.Table("IoU in per cent; a dash: neither labelled nor predicted", ["class", *columns], rows, footer, best)


def page_notes(result: Result, roles: Mapping[str, str]) -> list[str]:
    """What a star and a dash mean, and which domains the mean covers."""
    return [*_role_notes(result, roles), *_dash_notes(result)]


def protocol_fact(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The name of the protocol, for a page; empty if it is not known."""
    protocol = evaluation.get("protocol")
    return {"protocol": str(protocol["name"])} if isinstance(protocol, dict) and "name" in protocol else {}


def page_picture(
    name: str, image: np.ndarray, label: np.ndarray, predictions: Mapping[str, np.ndarray], error_names: Sequence[str]
) -> pages.Picture:
    """An evaluated pair for a page: truth, and each prediction with its errors.

    Args:
        name: of the pair.
        image: (H, W, 3) uint8.
        label: (H, W) uint8.
        predictions: name -> classes (H, W) uint8.
        error_names: names of the errors of each prediction.
    """
    layers = [pages.Layer("truth", label)]
    for (predicted, classes), of_errors in zip(predictions.items(), error_names, strict=True):
        layers += [pages.Layer(predicted, classes), pages.errors(of_errors, label, classes)]
    return pages.Picture(name, Image.fromarray(image), layers).shrunk()


# -- files


def write_results(path: Path, settings: Mapping[str, Any], results: Sequence[Result], roles: Mapping[str, str]) -> None:
    """Write settings, roles of the domains, versions and results as JSON; a figure that is not known is null."""
    content = {
        **settings,
        "roles": {name: roles.get(name, UNSEEN) for name in results[0].miou},
        "unseen": results[0].unseen(roles),
        "versions": {module.__name__: module.__version__ for module in (rein, torch, timm, lightning)},
        "results": [asdict(result) | {"mean_miou_of_unseen": result.mean_of_unseen(roles)} for result in results],
    }
    replace_file(path, (json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n").encode())


def _without_nan(value: Any) -> Any:
    """NaN, which JSON does not have, becomes None."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and isnan(value) else value


def write_run(
    folder: Path,
    settings: Mapping[str, Any],
    result: Result,
    space: LabelSpace,
    examples: Mapping[str, Sequence[Example]],
    sources: Sequence[str],
    roles: Mapping[str, str],
) -> None:
    """Write `test/results.json`, `test/index.html` and the pictures of the examples into the folder of a run."""
    colours = panels.colour_table(space).tobytes()
    for domain, chosen in examples.items():
        for example in chosen:
            _write_png(_example_path(folder, domain, example.name, "image"), Image.fromarray(example.image))
            for kind, classes in (("truth", example.label), ("prediction", example.prediction)):
                picture = Image.fromarray(classes, "P")
                picture.putpalette(colours)
                _write_png(_example_path(folder, domain, example.name, kind), picture)
    described = {
        **settings,
        "sources": list(sources),
        "classes": list(space.names),
        "palette": [list(colour) for colour in space.palette[: len(space.names)]],
        "examples": {domain: [example.name for example in chosen] for domain, chosen in examples.items()},
    }
    (folder / "test").mkdir(parents=True, exist_ok=True)
    write_results(folder / "test" / "results.json", described, [result], roles)
    _write_run_page(folder, settings, result, space, examples, sources, roles)


def _write_run_page(
    folder: Path,
    settings: Mapping[str, Any],
    result: Result,
    space: LabelSpace,
    examples: Mapping[str, Sequence[Example]],
    sources: Sequence[str],
    roles: Mapping[str, str],
) -> None:
    facts = {
        "method": result.method,
        "backbone": str(settings.get("backbone")),
        "trained on": ", ".join(sources),
        "tuned in backbone": f"{result.tuned_parameters:,} of {result.backbone_parameters:,} parameters",
        "head": f"{result.head_parameters:,} parameters",
        "checkpoint": str(settings.get("checkpoint")),
        **protocol_fact(settings.get("evaluation", {})),
    }
    columns = dict(zip(_marked(list(result.iou), roles), result.iou.values(), strict=True))
    shown = {
        domain: [page_picture(each.name, each.image, each.label, {"prediction": each.prediction}, ["errors"]) for each in chosen]
        for domain, chosen in examples.items()
    }
    tables = [method_table([result], roles), class_figures(columns, list(result.miou.values()))]
    page = pages.evaluation(f"Test of {folder.resolve().name}", facts, tables, {}, shown, space, page_notes(result, roles))
    replace_file(folder / "test" / "index.html", page)


def read_run(folder: Path) -> EvaluatedRun:
    """Read what `rein test` left.

    Raises:
        InputError: the folder holds no results of `rein test`, or they cannot be read.
    """
    path = folder / "test" / "results.json"
    try:
        content = json.loads(read_text(path, 10_000_000))
        stored = content["results"][0]
        result = Result(**{entry.name: stored[entry.name] for entry in fields(Result)})
        nan = float("nan")
        result.miou.update({name: nan for name, value in result.miou.items() if value is None})
        for ious in result.iou.values():
            ious.update({name: nan for name, value in ious.items() if value is None})
        space = LabelSpace(tuple(content["classes"]), tuple(tuple(colour) for colour in content["palette"]))
        kept = ("backbone", "pretrained", "method", "method_settings", "seed", "steps", "checkpoint")
        settings = {name: content[name] for name in kept}
        roles = {name: content["roles"][name] for name in result.miou}
        run = EvaluatedRun(folder, result, space, content["examples"], content["sources"], roles, content["evaluation"], settings)
        _check_types(run)
        return run
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no results. Run rein test --out {folder} first.") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as results of rein test ({type(error).__name__}: {one_line(error)}). Run rein test again."
        ) from error


def _check_types(run: EvaluatedRun) -> None:
    """Raise ValueError unless the values have the types that tables and panels expect."""
    result = run.result
    counts = (result.backbone_parameters, result.tuned_parameters, result.head_parameters)
    figures = [*result.miou.values(), *(value for ious in result.iou.values() for value in ious.values())]
    pairs = [name for names in run.examples.values() for name in names]
    texts = [result.method, *result.miou, *run.examples, *pairs, *run.sources, *run.roles.values(), *run.evaluation]
    if (
        not all(is_integer(count, 10**15) for count in counts)
        or not result.backbone_parameters
        or not all(type(figure) in (int, float) and not abs(figure) > 1 for figure in figures)
        or not all(isinstance(text, str) and text.isprintable() for text in texts)
        or not all(isinstance(names, list) for names in (run.sources, *run.examples.values()))
        or not is_colours(run.space.palette)
    ):
        raise ValueError("a value has another type than rein test writes")


def slug(name: str) -> str:
    """A name that is safe in a path; different names stay different."""
    return re.sub(r'[<>:"/\\|?*%\x00-\x1f]|^\.', lambda match: f"%{ord(match[0]):02X}", name)


def _example_path(folder: Path, domain: str, name: str, kind: str) -> Path:
    return folder / "test" / "examples" / slug(domain) / f"{slug(name)}-{kind}.png"


def _write_png(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def _read_png(path: Path) -> np.ndarray:
    try:
        return np.array(load_image(path))
    except InputError as error:
        raise InputError(f"{error}. Run rein test again.") from error
