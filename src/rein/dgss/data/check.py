"""Check a data set: read every pair, report counts, sizes, class shares and errors, and draw a few pairs."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from rein.checkpoint import replace_file
from rein.dgss import panels
from rein.dgss.data.datasets import DATASETS, open_spec
from rein.dgss.data.datasets.files import NO_LABEL
from rein.dgss.data.occurrence import Occurrence
from rein.dgss.data.pairs import Pairs
from rein.dgss.data.sampling import evenly_spaced
from rein.dgss.labels import IGNORE_LABEL
from rein.errors import InputError

_MAX_DRAWN = 4


@dataclass
class Report:
    """Result of `check`.

    Attributes:
        name: name of the data set.
        split: name of the split.
        images: number of images on disk.
        usable: number of images that the data set uses.
        found: classes and pixels of the pairs that were read without errors.
        sizes: (width, height) -> number of images.
        codings: how labels encode classes, in words -> number of labels.
        problems: error texts, one per pair, in the order of detection.
        resized: labels that were resized to their image, because its size is another one.
        left_out: image path -> reason, for images that the data set excludes by design.
        unused_labels: labels on disk that have no image.
        without_second: number of labels with pixels of the first of two classes and ignored ones only.
        absent: why `rein fit` refuses the labels as a source: a class never occurs. Empty if it does not refuse them.
    """

    name: str
    split: str
    images: int
    usable: int
    found: Occurrence
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    codings: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    resized: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)
    unused_labels: list[Path] = field(default_factory=list)
    without_second: int = 0
    absent: str = ""

    @property
    def read(self) -> int:
        """Number of pairs that were read without errors."""
        return self.found.labels

    def text(self, max_problems: int | None = None) -> str:
        """The report as text.

        Args:
            max_problems: list at most this many problems of each kind; None lists all.
        """
        names, pixels, ignored = self.found.space.names, self.found.pixels, self.found.ignored
        lines = [f"{self.name}, {self.split}: {self.images:,} images, {self.usable:,} usable, {self.read:,} read without errors"]
        if self.sizes:
            sizes = [f"{width} x {height} ({count:,})" for (width, height), count in self.sizes.most_common(5)]
            lines.append(f"sizes: {', '.join(sizes)}{f' and {len(self.sizes) - 5} more' if len(self.sizes) > 5 else ''}")
        if self.codings:
            lines.append(f"labels: {'; '.join(f'{coding} ({count:,})' for coding, count in self.codings.most_common())}")
        if self.resized:
            lines.append(
                f"labels resized to their image, which has another size: {len(self.resized):,}; the first is {self.resized[0]}"
            )
        if self.left_out:
            image, reason = next(iter(self.left_out.items()))
            lines.append(f"left out: {len(self.left_out):,}; the first is {image}: {reason}")
        labelled = int(pixels.sum())
        if labelled:
            width = max(map(len, names))
            lines.append(f"{'class'.ljust(width)}  % of labelled pixels")
            for name, count in zip(names, pixels, strict=True):
                share = 100 * count / labelled
                lines.append(
                    f"{name.ljust(width)}  {share:6.2f}  {'#' * round(share / 2)}" if count else f"{name.ljust(width)}       -"
                )
            partly = f", of {self.read:,} labels that were read" if self.read < self.usable else ""
            lines.append(f"classes without pixels{partly}: {', '.join(self.found.absent) or 'none'}")
            lines.append(f"ignored: {100 * ignored / (labelled + ignored):.2f} % of all pixels")
        elif self.read:
            lines.append("all pixels are ignored")
        if self.without_second:
            lines.append(
                f"note: labels with only {names[0]!r} and ignored pixels: {self.without_second:,}. If 255 stands for {names[1]!r} in "
                "them, correct these files, or give the class values with 'values'."
            )
        lines += _listed("labels without an image", list(map(str, self.unused_labels)), max_problems)
        lines += _listed("bad pairs", self.problems, max_problems)
        return "\n".join(line.rstrip() for line in lines)

    def verdict(self) -> str:
        """What is wrong, in one line; empty if nothing is."""
        wrong = []
        if self.problems:
            wrong.append(f"bad pairs: {len(self.problems)} of {self.images}; the first: {self.problems[0]}")
        if self.unused_labels:
            wrong.append(
                f"labels without an image: {len(self.unused_labels)}; the first: {self.unused_labels[0]}. Add the images, or remove "
                "the labels."
            )
        if self.absent:
            wrong.append(self.absent)
        return " ".join(wrong)


def _listed(title: str, entries: Sequence[str], limit: int | None) -> list[str]:
    """A title with the number of entries, and at most `limit` of them; nothing if there are none."""
    shown = entries[:limit]
    more = [f"  and {len(entries) - len(shown):,} more"] if len(shown) < len(entries) else []
    return [f"{title}: {len(entries):,}", *(f"  {entry}" for entry in shown), *more] if entries else []


def check(
    name: str,
    path: Path | None,
    split: str = "train",
    options: dict[str, Any] | None = None,
    *,
    limit: int | None = None,
    out: Path | None = None,
) -> Report:
    """Read a data set. On a terminal, a progress bar shows the remaining time.

    Args:
        name: name of the data set, as in `open_dataset`.
        path: folder of the data set; None for generated scenes.
        split: name of the split.
        options: options of the data set.
        limit: read at most `limit` pairs, evenly spaced; None reads all.
        out: path of a PNG file to draw a few pairs in; None draws nothing.

    Raises:
        InputError: the data set cannot be opened or has no usable images. Errors of single pairs are in the report.
    """
    options = options or {}
    problems = []
    try:
        data = open_spec(name, path, split, options)
    except InputError as error:
        data = open_spec(name, path, split, options, skip_unlabelled=True)  # raises again unless only some labels are missing
        problems.append(str(error))
    count = len(data)
    missing = {image: reason for image, reason in data.left_out.items() if reason.startswith(NO_LABEL)}
    problems += [f"{image} has {reason}" for image, reason in list(missing.items())[1:]]  # the error above names the first
    report = Report(name, split, count + len(data.left_out), count, Occurrence(data.space), problems=problems)
    report.left_out = {image: reason for image, reason in data.left_out.items() if image not in missing}
    report.unused_labels = list(data.unused_labels)
    good = []
    for index in tqdm(evenly_spaced(count, limit), desc="read", leave=False, disable=None):
        try:
            image, label = data[index]
        except InputError as error:
            report.problems.append(str(error))
            continue
        good.append(index)
        report.sizes[image.shape[2], image.shape[1]] += 1
        report.codings[data.coding_of(index)] += 1
        report.found.add(label.numpy())
        if len(data.space.names) == 2:
            report.without_second += np.array_equal(np.unique(label), [0, IGNORE_LABEL])
    report.resized = sorted(getattr(data, "resized", ()))
    if DATASETS[name].absent is None and options.get("labels", True) and report.read:
        report.absent = _describe_absent(report, everything=limit is None or limit >= count)
    if out is not None and good:
        drawn = [good[i] for i in evenly_spaced(len(good), _MAX_DRAWN)]
        buffer = io.BytesIO()
        draw(data, drawn, f"{name}, {split}").save(buffer, "PNG")
        replace_file(out, buffer.getvalue())
    return report


def _describe_absent(report: Report, everything: bool) -> str:
    """Why `rein fit` refuses the labels as a source; empty if it does not, or if that is unknown because some were not read."""
    names = report.found.space.names
    if len(names) == 1:
        return (
            f"the only class is {names[0]!r}; expected two or more. Name what is not {names[0]!r}, too: "
            f"classes: [background, {names[0]}]."
        )
    return report.found.describe_absent(f"the split {report.split!r}") if everything and report.found.absent else ""


def draw(data: Pairs, indices: Sequence[int], title: str, cell_width: int = 420) -> Image.Image:
    """Draw one row per pair: image, label, and label over image. Widths are in pixels."""
    rows, classes = [], set[int]()
    for index in indices:
        image, label = (tensor.numpy() for tensor in data[index])
        pixels, colours = image.transpose(1, 2, 0), panels.colourize(label, data.space)
        blend = np.where((label == IGNORE_LABEL)[..., None], pixels // 2, pixels // 2 + colours // 2)
        cells = [panels.Cell(pixels), panels.Cell(colours, Image.Resampling.NEAREST), panels.Cell(blend)]
        rows.append(panels.GridRow(data.name_of(index), [cells]))
        classes |= set(np.unique(label).tolist())
    entries = [(data.space.names[k], data.space.palette[k]) for k in sorted(classes - {IGNORE_LABEL})]
    if IGNORE_LABEL in classes:
        entries.append(("ignored", panels.IGNORED))
    return panels.grid(title, ("image", "label", "label over image"), rows, entries, cell_width, names_below=True)


def table() -> str:
    """The description of every data set, for `rein data list`."""
    blocks = []
    for spec in DATASETS.values():
        lines = [f"{spec.name}: {spec.summary}"]
        lines += [f"    {line}" for line in spec.layout_text.splitlines()]
        lines.append(f"    labels: {spec.encoding_text}")
        if spec.splits:
            lines.append(f"    splits: {', '.join(spec.splits)}")
        for name, option in spec.options.items():
            if option.kind.parse is None:
                continue
            choices = f"; one of {', '.join(map(str, option.choices))}" if option.choices else ""
            lines.append(f"    {name}=: {option.help}{choices}")
        if spec.url:
            lines.append(f"    available at {spec.url}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
