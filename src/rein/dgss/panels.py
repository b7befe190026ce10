"""Pictures that compare: image, ground truth and predictions side by side, with a legend of the classes.

`grid` lays out labelled rows of cells; `comparison` fills it with predictions. Arrays in, Pillow images out; reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rein.dgss.labels import IGNORE_LABEL, LabelSpace

GAP, MARGIN, TEXT, SMALL = 8, 24, 17, 14  # pixels
INK, FAINT, PAPER = (28, 30, 34), (110, 114, 120), (255, 255, 255)
IGNORED = (0, 0, 0)
_ERROR = (220, 30, 30)

Entry = tuple[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Cell:
    """One picture in a grid.

    Attributes:
        pixels: (H, W, 3) uint8.
        resample: how it is scaled to the cell's size.
        badge: text in its upper right corner.
    """

    pixels: np.ndarray
    resample: Image.Resampling = Image.Resampling.LANCZOS
    badge: str = ""


@dataclass(frozen=True)
class GridRow:
    """One row of a grid: a name, and one or more strips of cells below each other; None leaves a cell empty."""

    name: str
    strips: Sequence[Sequence[Cell | None]]


@dataclass(frozen=True)
class Example:
    """One image with its ground truth and the predictions of several methods.

    Attributes:
        name: shown at the left; the domain, for example.
        image: (H, W, 3) uint8.
        label: (H, W) uint8.
        predictions: method -> (H, W) classes.
        miou: method -> mean IoU of the whole domain, 0 to 1; NaN shows none.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    predictions: Mapping[str, np.ndarray]
    miou: Mapping[str, float]


def colourize(label: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Classes (H, W) -> colours (H, W, 3) uint8; ignored pixels are black."""
    return colour_table(space)[label]


def colour_table(space: LabelSpace) -> np.ndarray:
    """(256, 3) uint8: the colour of every value of a label; black for values that are ignored."""
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(space.names)] = space.palette[: len(space.names)]
    table[IGNORE_LABEL] = IGNORED
    return table


def mark_errors(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) in pale grey, with red where the prediction differs from the label; ignored pixels stay grey."""
    grey = np.repeat((image.mean(2, keepdims=True) * 0.5 + 120).astype(np.uint8), 3, axis=2)
    grey[(label != IGNORE_LABEL) & (prediction != label)] = _ERROR
    return grey


def comparison(
    examples: Sequence[Example], space: LabelSpace, title: str, cell_width: int = 300, *, errors: bool = False
) -> Image.Image:
    """One row per example: image, ground truth, and the prediction of each method with the domain's mIoU in per cent.

    Pixels without ground truth are black in every column.

    Args:
        examples: they have the same methods in the same order.
        space: names and colours of the classes.
        title: text above the grid.
        cell_width: width of each picture in pixels.
        errors: add a strip below each row that marks wrong pixels in red.
    """
    methods = list(examples[0].predictions)
    rows = [GridRow(example.name, _strips(example, methods, space, errors)) for example in examples]
    classes = sorted({int(c) for example in examples for c in np.unique(example.label)} - {IGNORE_LABEL})
    entries = [(space.names[c], space.palette[c]) for c in classes]
    if any((example.label == IGNORE_LABEL).any() for example in examples):
        entries.append(("ignored", IGNORED))
    return grid(title, ["image", "truth", *methods], rows, entries, cell_width)


def _strips(example: Example, methods: Sequence[str], space: LabelSpace, errors: bool) -> list[list[Cell | None]]:
    image, label = example.image, example.label
    strip: list[Cell | None] = [Cell(image), Cell(colourize(label, space), Image.Resampling.NEAREST)]
    for method in methods:
        prediction = np.where(label == IGNORE_LABEL, IGNORE_LABEL, example.predictions[method]).astype(np.uint8)
        miou = example.miou[method]
        badge = "" if np.isnan(miou) else f"{100 * miou:.1f}"
        strip.append(Cell(colourize(prediction, space), Image.Resampling.NEAREST, badge))
    if not errors:
        return [strip]
    sized = np.array(Image.fromarray(image).resize(label.shape[::-1], Image.Resampling.BILINEAR))
    marked = [Cell(mark_errors(sized, label, example.predictions[m]), Image.Resampling.BILINEAR) for m in methods]
    return [strip, [None, None, *marked]]


def grid(
    title: str,
    headings: Sequence[str],
    rows: Sequence[GridRow],
    entries: Sequence[Entry],
    cell_width: int,
    *,
    names_below: bool = False,
) -> Image.Image:
    """Lay out rows of cells under headings, with a legend at the bottom.

    Args:
        title: text above the headings.
        headings: one for each column.
        rows: each row has the height that its first cell needs.
        entries: (name, colour) pairs of the legend.
        cell_width: width of each cell in pixels.
        names_below: write the rows' names below them, for long names; otherwise at the left.
    """
    left = MARGIN if names_below else MARGIN + 24 + max(round(font(TEXT).getlength(row.name)) for row in rows)
    width = left + len(headings) * (cell_width + GAP) - GAP + MARGIN
    explained = legend(entries, width - 2 * MARGIN)
    top = MARGIN + 34 + 28
    name_height = SMALL + 10 if names_below else 0
    heights = [_cell_height(row, cell_width) for row in rows]
    strips = sum(len(row.strips) * (height + GAP) for row, height in zip(rows, heights, strict=True))
    picture = Image.new("RGB", (width, top + strips + len(rows) * name_height + explained.height + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN - 4), title, fill=INK, font=font(TEXT + 3))
    for column, heading in enumerate(headings):
        x = left + column * (cell_width + GAP) + cell_width / 2
        pen.text((x, top - 10), heading, fill=INK, font=font(TEXT), anchor="ms")
    y = top
    for row, height in zip(rows, heights, strict=True):
        if not names_below:
            pen.text((left - 16, y + height / 2), row.name, fill=INK, font=font(TEXT), anchor="rm")
        for strip in row.strips:
            for column, cell in enumerate(strip):
                if cell is not None:
                    x = left + column * (cell_width + GAP)
                    picture.paste(Image.fromarray(cell.pixels).resize((cell_width, height), cell.resample), (x, y))
                    if cell.badge:
                        _draw_badge(pen, x + cell_width - 6, y + 6, cell.badge)
            y += height + GAP
        if names_below:
            pen.text((left, y - GAP + 2), row.name, fill=FAINT, font=font(SMALL))
            y += name_height
    picture.paste(explained, (MARGIN, y + 4))
    return picture


def _cell_height(row: GridRow, cell_width: int) -> int:
    height, width = next(cell for cell in row.strips[0] if cell is not None).pixels.shape[:2]
    return round(cell_width * height / width)


def _draw_badge(pen: ImageDraw.ImageDraw, right: float, top: float, text: str) -> None:
    """Draw text on a white plate, readable on any colour."""
    small = font(SMALL)
    width = small.getlength(text)
    pen.rounded_rectangle((right - width - 12, top, right, top + SMALL + 8), 4, fill=PAPER, outline=FAINT)
    pen.text((right - 6, top + (SMALL + 8) / 2), text, fill=INK, font=small, anchor="rm")


def legend(entries: Sequence[Entry], width: int) -> Image.Image:
    """Squares of colour with their names, in as many lines as a width in pixels requires."""
    small = font(SMALL)
    items, x, y = [], 0, 8
    for name, colour in entries:
        needed = 22 + round(small.getlength(name)) + 18
        if x + needed > width and x > 0:
            x, y = 0, y + 24
        items.append((x, y, name, colour))
        x += needed
    picture = Image.new("RGB", (width, y + 24), PAPER)
    pen = ImageDraw.Draw(picture)
    for x, y, name, colour in items:
        pen.rectangle((x, y, x + 14, y + 14), fill=colour)
        pen.text((x + 22, y + 7), name, fill=INK, font=small, anchor="lm")
    return picture


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of every picture."""
    return ImageFont.load_default(size)
