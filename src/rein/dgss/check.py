"""Read a data set from end to end and say what is in it: counts, sizes, the first bad pair, the classes, and a picture to look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rein.checkpoint import replace_file
from rein.dgss import panel
from rein.dgss.classes import IGNORE_LABEL
from rein.dgss.data import Pairs
from rein.dgss.datasets import ROWS, open_row
from rein.dgss.datasets.files import NO_LABEL
from rein.dgss.labels import LabelSpace
from rein.dgss.sampling import spread
from rein.errors import InputError

SHOWN = 4


@dataclass
class Report:
    """What was found.

    Attributes:
        name: of the data set.
        split: of it.
        space: what the class numbers mean.
        images: how many images there are.
        usable: how many of them have a label, and are not left out for another reason.
        read: how many of these were read and are good.
        sizes: (width, height) -> how many images have it.
        pixels: how many pixels each class has in what was read.
        ignored: how many pixels count for nothing.
        problems: what is wrong, one line each, in the order in which it was found.
        left_out: images that the data set leaves out on purpose -> why.
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
        """The classes that no pixel of what was read has."""
        return [name for name, count in zip(self.space.names, self.pixels, strict=True) if not count]

    def text(self) -> str:
        """The report as lines."""
        lines = [f"{self.name}, {self.split}: {self.images:,} images, {self.usable:,} to be used, {self.read:,} read and good"]
        if self.sizes:
            shown = [f"{width} x {height} ({count:,})" for (width, height), count in self.sizes.most_common(5)]
            lines.append(f"sizes: {', '.join(shown)}{f' and {len(self.sizes) - 5} more' if len(self.sizes) > 5 else ''}")
        if self.left_out:
            image, why = next(iter(self.left_out.items()))
            lines.append(f"left out: {len(self.left_out):,}, the first: {image}: {why}")
        labelled = int(self.pixels.sum())
        if labelled:
            width = max(map(len, self.space.names))
            lines.append(f"{'class'.ljust(width)}  % of labelled pixels")
            for name, count in zip(self.space.names, self.pixels, strict=True):
                share = 100 * count / labelled
                lines.append(
                    f"{name.ljust(width)}  {share:6.2f}  {'#' * round(share / 2)}" if count else f"{name.ljust(width)}       -"
                )
            lines.append(f"never: {', '.join(self.absent) or 'none; every class occurs'}")
            if len(self.space.names) == 2 and self.absent and self.ignored:
                lines.append("(255 counts for nothing. Where labels are masks of 0 and 255, say values=0,255.)")
            lines.append(f"counting for nothing: {100 * self.ignored / (labelled + self.ignored):.2f} % of all pixels")
        elif self.read:
            lines.append("no pixel is labelled")
        return "\n".join(line.rstrip() for line in lines)


def check(
    name: str,
    path: Path | None,
    split: str = "train",
    options: dict[str, Any] | None = None,
    *,
    limit: int | None = None,
    out: Path | None = None,
    progress: Callable[[Sequence[int]], Any] = lambda indices: indices,
) -> Report:
    """Read a data set.

    Args:
        name: of the data set, as `open_dataset` takes it.
        path: its folder.
        split: which part of it.
        options: what else it takes.
        limit: read at most so many pairs, evenly spaced.
        out: write a picture of a few pairs there.
        progress: wraps the numbers of the pairs while they are read, as `tqdm` does.

    Raises:
        InputError: there is nothing to read. What is wrong with single pairs is in the report.
    """
    options = options or {}
    problems = []
    try:
        data = open_row(name, path, split, options)
    except InputError as error:
        data = open_row(name, path, split, options, tolerant=True)  # raises the same error where there is nothing to count
        problems.append(str(error))
    count = len(data)
    missing = {image: why for image, why in data.left_out.items() if why.startswith(NO_LABEL)}
    problems += [f"{image}: {why}" for image, why in list(missing.items())[1:]]  # opening told of the first
    report = Report(name, split, data.space, count + len(data.left_out), count, problems=problems)
    report.left_out = {image: why for image, why in data.left_out.items() if image not in missing}
    report.pixels = np.zeros(len(data.space.names), np.int64)
    good = []
    for index in progress(spread(count, limit)):
        try:
            image, label = data[index]
        except InputError as error:
            report.problems.append(str(error))
            continue
        good.append(index)
        report.sizes[image.shape[2], image.shape[1]] += 1
        numbers = np.bincount(label.numpy().ravel(), minlength=IGNORE_LABEL + 1)
        report.pixels += numbers[: len(report.pixels)]
        report.ignored += int(numbers[IGNORE_LABEL])
    report.read = len(good)
    if out is not None and good:
        shown = [good[i] for i in spread(len(good), SHOWN)]
        buffer = io.BytesIO()
        draw(data, shown, f"{name}, {split}").save(buffer, "PNG")
        replace_file(out, buffer.getvalue())
    return report


def draw(data: Pairs, indices: Sequence[int], title: str, cell_width: int = 420) -> Image.Image:
    """A picture of these pairs: image, label, and the label laid over the image."""
    width = 2 * panel.MARGIN + 3 * cell_width + 2 * panel.GAP
    top = panel.MARGIN + 34 + 28
    rows, seen = [], set()
    for index in indices:
        image, label = data[index]
        pixels, numbers = image.permute(1, 2, 0).numpy(), label.numpy()
        seen |= set(np.unique(numbers).tolist())
        colours = panel.colourize(numbers, data.space)
        blend = np.where((numbers == IGNORE_LABEL)[..., None], pixels // 2, pixels // 2 + colours // 2)
        rows.append((data.name_of(index), (pixels, colours, blend)))
    entries = [(data.space.names[k], data.space.palette[k]) for k in sorted(seen - {IGNORE_LABEL})]
    if IGNORE_LABEL in seen:
        entries.append(("counts for nothing", panel.IGNORED))
    legend = panel.legend(entries, width - 2 * panel.MARGIN)
    heights = [round(cell_width * cells[0].shape[0] / cells[0].shape[1]) for _, cells in rows]
    name_height = panel.SMALL + 10
    height = top + sum(heights) + len(rows) * (name_height + panel.GAP) + legend.height + panel.MARGIN
    picture = Image.new("RGB", (width, height), panel.PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((panel.MARGIN, panel.MARGIN - 4), title, fill=panel.INK, font=panel.font(panel.TEXT + 3))
    for column, heading in enumerate(("image", "label", "label over image")):
        x = panel.MARGIN + column * (cell_width + panel.GAP) + cell_width / 2
        pen.text((x, top - 10), heading, fill=panel.INK, font=panel.font(panel.TEXT), anchor="ms")
    y = top
    for (name, cells), cell_height in zip(rows, heights, strict=True):
        for column, cell in enumerate(cells):
            how = Image.Resampling.NEAREST if column == 1 else Image.Resampling.LANCZOS
            resized = Image.fromarray(cell).resize((cell_width, cell_height), how)
            picture.paste(resized, (panel.MARGIN + column * (cell_width + panel.GAP), y))
        y += cell_height + 2
        pen.text((panel.MARGIN, y), name, fill=panel.FAINT, font=panel.font(panel.SMALL))
        y += name_height - 2 + panel.GAP
    picture.paste(legend, (panel.MARGIN, y))
    return picture


def table() -> str:
    """Every data set that there is: what it is, where its files lie, how its labels encode, and where it is offered."""
    blocks = []
    for row in ROWS.values():
        lines = [f"{row.name}: {row.about}"]
        lines += [f"    {line}" for line in row.layout.splitlines()]
        lines.append(f"    labels: {row.encoding}")
        if row.splits:
            lines.append(f"    splits: {', '.join(row.splits)}")
        for name, option in row.options.items():
            choices = f" ({', '.join(map(str, option.choices))})" if option.choices else ""
            lines.append(f"    {name}=: {option.help}{choices}")
        if row.url:
            lines.append(f"    offered at {row.url}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
