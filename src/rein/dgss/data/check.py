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
from rein.dgss.data.pairs import Pairs
from rein.dgss.data.sampling import evenly_spaced
from rein.dgss.labels import IGNORE_LABEL, LabelSpace
from rein.errors import InputError

_MAX_DRAWN = 4


@dataclass
class Report:
    """Result of `check`.

    Attributes:
        name: name of the data set.
        split: name of the split.
        space: the classes of the labels.
        images: number of images on disk.
        usable: number of images that the data set uses.
        read: number of pairs that were read without errors.
        sizes: (width, height) -> number of images.
        pixels: number of pixels of each class in the pairs that were read.
        ignored: number of ignored pixels in the pairs that were read.
        problems: error texts, one per pair, in the order of detection.
        left_out: image path -> reason, for images that the data set excludes by design.
    """

    name: str
    split: str
    space: LabelSpace
    images: int
    usable: int
    read: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ignored: int = 0
    problems: list[str] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    @property
    def absent(self) -> list[str]:
        """Names of the classes without pixels."""
        return [name for name, count in zip(self.space.names, self.pixels, strict=True) if not count]

    def text(self) -> str:
        """The report as text."""
        lines = [f"{self.name}, {self.split}: {self.images:,} images, {self.usable:,} usable, {self.read:,} read without errors"]
        if self.sizes:
            sizes = [f"{width} x {height} ({count:,})" for (width, height), count in self.sizes.most_common(5)]
            lines.append(f"sizes: {', '.join(sizes)}{f' and {len(self.sizes) - 5} more' if len(self.sizes) > 5 else ''}")
        if self.left_out:
            image, reason = next(iter(self.left_out.items()))
            lines.append(f"left out: {len(self.left_out):,}; the first is {image}: {reason}")
        labelled = int(self.pixels.sum())
        if labelled:
            width = max(map(len, self.space.names))
            lines.append(f"{'class'.ljust(width)}  % of labelled pixels")
            for name, count in zip(self.space.names, self.pixels, strict=True):
                share = 100 * count / labelled
                lines.append(
                    f"{name.ljust(width)}  {share:6.2f}  {'#' * round(share / 2)}" if count else f"{name.ljust(width)}       -"
                )
            lines.append(f"classes without pixels: {', '.join(self.absent) or 'none'}")
            if len(self.space.names) == 2 and self.absent and self.ignored:
                lines.append("(255 is ignored. If the labels are masks of 0 and 255, set values=0,255.)")
            lines.append(f"ignored: {100 * self.ignored / (labelled + self.ignored):.2f} % of all pixels")
        elif self.read:
            lines.append("all pixels are ignored")
        return "\n".join(line.rstrip() for line in lines)


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
    problems += [f"{image}: {reason}" for image, reason in list(missing.items())[1:]]  # the error above names the first
    report = Report(name, split, data.space, count + len(data.left_out), count, problems=problems)
    report.left_out = {image: reason for image, reason in data.left_out.items() if image not in missing}
    report.pixels = np.zeros(len(data.space.names), np.int64)
    good = []
    for index in tqdm(evenly_spaced(count, limit), desc="read", leave=False, disable=None):
        try:
            image, label = data[index]
        except InputError as error:
            report.problems.append(str(error))
            continue
        good.append(index)
        report.sizes[image.shape[2], image.shape[1]] += 1
        counts = np.bincount(label.numpy().ravel(), minlength=IGNORE_LABEL + 1)
        report.pixels += counts[: len(report.pixels)]
        report.ignored += int(counts[IGNORE_LABEL])
    report.read = len(good)
    if out is not None and good:
        drawn = [good[i] for i in evenly_spaced(len(good), _MAX_DRAWN)]
        buffer = io.BytesIO()
        draw(data, drawn, f"{name}, {split}").save(buffer, "PNG")
        replace_file(out, buffer.getvalue())
    return report


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
            choices = f"; one of {', '.join(map(str, option.choices))}" if option.choices else ""
            lines.append(f"    {name}=: {option.help}{choices}")
        if spec.url:
            lines.append(f"    available at {spec.url}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
