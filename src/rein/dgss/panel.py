"""The picture of a comparison: one row per domain; image, truth and each method's prediction side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rein.dgss.classes import IGNORE_LABEL
from rein.dgss.labels import LabelSpace

GAP, MARGIN, TEXT, SMALL = 8, 24, 17, 14
INK, FAINT, PAPER = (28, 30, 34), (110, 114, 120), (255, 255, 255)
IGNORED = (0, 0, 0)
_WRONG = (220, 30, 30)


@dataclass(frozen=True)
class Row:
    """One domain.

    Attributes:
        name: the domain.
        image: (H, W, 3) uint8.
        label: (H, W) uint8.
        predictions: method -> (H, W) classes.
        miou: method -> mean IoU of the whole domain, 0 to 1.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    predictions: Mapping[str, np.ndarray]
    miou: Mapping[str, float]


def colourize(label: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Classes (H, W) -> colours (H, W, 3) uint8; what does not count is black."""
    return colour_table(space)[label]


def colour_table(space: LabelSpace) -> np.ndarray:
    """(256, 3) uint8: the colour of every number that a label may hold; black for what does not count."""
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(space.names)] = space.palette[: len(space.names)]
    table[IGNORE_LABEL] = IGNORED
    return table


def mark_errors(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) in pale grey, red where the prediction is not the truth; what does not count stays grey."""
    grey = np.repeat((image.mean(2, keepdims=True) * 0.5 + 120).astype(np.uint8), 3, axis=2)
    grey[(label != IGNORE_LABEL) & (prediction != label)] = _WRONG
    return grey


def draw(rows: Sequence[Row], space: LabelSpace, title: str, cell_width: int = 300, *, errors: bool = False) -> Image.Image:
    """The panel as a picture. Predictions are shown where the truth is known; each carries the domain's mIoU in per cent.

    Args:
        rows: one for each domain or example.
        space: names and colours of the classes.
        title: above all.
        cell_width: of each picture in pixels.
        errors: below each prediction, show where it is wrong, in red.
    """
    methods = list(rows[0].predictions)
    heights = [round(cell_width * row.image.shape[0] / row.image.shape[1]) for row in rows]
    name_width = 24 + max(round(font(TEXT).getlength(row.name)) for row in rows)
    columns = ["image", "truth", *methods]
    left = MARGIN + name_width
    width = left + len(columns) * (cell_width + GAP) - GAP + MARGIN
    shown = sorted({int(c) for row in rows for c in np.unique(row.label)} - {IGNORE_LABEL})
    entries = [(space.names[c], space.palette[c]) for c in shown]
    if any((row.label == IGNORE_LABEL).any() for row in rows):
        entries.append(("not counted", IGNORED))
    shown_classes = legend(entries, width - 2 * MARGIN)
    top = MARGIN + 34 + 28
    strips = 2 if errors else 1
    height = top + strips * (sum(heights) + GAP * len(rows)) + shown_classes.height + MARGIN
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN - 4), title, fill=INK, font=font(TEXT + 3))
    for column, name in enumerate(columns):
        x = left + column * (cell_width + GAP)
        pen.text((x + cell_width / 2, top - 10), name, fill=INK, font=font(TEXT), anchor="ms")
    y = top
    for row, cell_height in zip(rows, heights, strict=True):
        size = (cell_width, cell_height)
        pen.text((left - 16, y + cell_height / 2), row.name, fill=INK, font=font(TEXT), anchor="rm")
        cells = [Image.fromarray(row.image).resize(size, Image.Resampling.LANCZOS)]
        for classes in (row.label, *(np.where(row.label == IGNORE_LABEL, IGNORE_LABEL, row.predictions[m]) for m in methods)):
            cells.append(Image.fromarray(colourize(classes.astype(np.uint8), space)).resize(size, Image.Resampling.NEAREST))
        for column, cell in enumerate(cells):
            picture.paste(cell, (left + column * (cell_width + GAP), y))
        for column, method in enumerate(methods, start=2):
            if np.isnan(row.miou[method]):
                continue
            _badge(
                pen,
                left + column * (cell_width + GAP) + cell_width - 6,
                y + 6,
                f"{100 * row.miou[method]:.1f}",
            )
        y += cell_height + GAP
        if errors:
            sized = np.array(Image.fromarray(row.image).resize(row.label.shape[::-1], Image.Resampling.BILINEAR))
            for column, method in enumerate(methods, start=2):
                cell = Image.fromarray(mark_errors(sized, row.label, row.predictions[method]))
                picture.paste(cell.resize(size, Image.Resampling.BILINEAR), (left + column * (cell_width + GAP), y))
            y += cell_height + GAP
    picture.paste(shown_classes, (MARGIN, y + 4))
    return picture


def _badge(pen: ImageDraw.ImageDraw, right: float, top: float, text: str) -> None:
    """The domain's mIoU, readable on any colour."""
    small = font(SMALL)
    width = small.getlength(text)
    pen.rounded_rectangle((right - width - 12, top, right, top + SMALL + 8), 4, fill=(255, 255, 255), outline=FAINT)
    pen.text((right - 6, top + (SMALL + 8) / 2), text, fill=INK, font=small, anchor="rm")


def legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    """Squares of colour with their names, in as many lines as `width` pixels ask for."""
    small = font(SMALL)
    places, x, y = [], 0, 8
    for name, colour in entries:
        needed = 22 + round(small.getlength(name)) + 18
        if x + needed > width and x > 0:
            x, y = 0, y + 24
        places.append((x, y, name, colour))
        x += needed
    picture = Image.new("RGB", (width, y + 24), PAPER)
    pen = ImageDraw.Draw(picture)
    for x, y, name, colour in places:
        pen.rectangle((x, y, x + 14, y + 14), fill=colour)
        pen.text((x + 22, y + 7), name, fill=INK, font=small, anchor="lm")
    return picture


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of every picture."""
    return ImageFont.load_default(size)
