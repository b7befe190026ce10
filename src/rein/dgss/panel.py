"""The picture of a comparison: one row per domain; image, truth and each method's prediction side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rein.dgss.classes import IGNORE_LABEL
from rein.dgss.data import LabelSpace

_GAP, _MARGIN, _TEXT, _SMALL = 8, 24, 17, 14
_INK, _FAINT, _PAPER = (28, 30, 34), (110, 114, 120), (255, 255, 255)
_IGNORED = (0, 0, 0)


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
    table = np.full((256, 3), _IGNORED, np.uint8)
    table[: len(space.names)] = space.palette[: len(space.names)]
    table[IGNORE_LABEL] = _IGNORED
    return table[label]


def draw(rows: Sequence[Row], space: LabelSpace, title: str, cell_width: int = 300) -> Image.Image:
    """The panel as a picture. Predictions are shown where the truth is known; each carries the domain's mIoU in per cent."""
    methods = list(rows[0].predictions)
    heights = [round(cell_width * row.image.shape[0] / row.image.shape[1]) for row in rows]
    name_width = 24 + max(round(_font(_TEXT).getlength(row.name)) for row in rows)
    columns = ["image", "truth", *methods]
    left = _MARGIN + name_width
    width = left + len(columns) * (cell_width + _GAP) - _GAP + _MARGIN
    shown = sorted({int(c) for row in rows for c in np.unique(row.label)} - {IGNORE_LABEL})
    entries = [(space.names[c], space.palette[c]) for c in shown]
    if any((row.label == IGNORE_LABEL).any() for row in rows):
        entries.append(("not counted", _IGNORED))
    legend = _legend(entries, width - 2 * _MARGIN)
    top = _MARGIN + 34 + 28
    height = top + sum(heights) + _GAP * len(rows) + legend.height + _MARGIN
    picture = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=_font(_TEXT + 3))
    for column, name in enumerate(columns):
        x = left + column * (cell_width + _GAP)
        pen.text((x + cell_width / 2, top - 10), name, fill=_INK, font=_font(_TEXT), anchor="ms")
    y = top
    for row, cell_height in zip(rows, heights, strict=True):
        size = (cell_width, cell_height)
        pen.text((left - 16, y + cell_height / 2), row.name, fill=_INK, font=_font(_TEXT), anchor="rm")
        cells = [Image.fromarray(row.image).resize(size, Image.Resampling.LANCZOS)]
        for classes in (row.label, *(np.where(row.label == IGNORE_LABEL, IGNORE_LABEL, row.predictions[m]) for m in methods)):
            cells.append(Image.fromarray(colourize(classes.astype(np.uint8), space)).resize(size, Image.Resampling.NEAREST))
        for column, cell in enumerate(cells):
            picture.paste(cell, (left + column * (cell_width + _GAP), y))
        for column, method in enumerate(methods, start=2):
            _badge(
                pen,
                left + column * (cell_width + _GAP) + cell_width - 6,
                y + 6,
                "-" if np.isnan(row.miou[method]) else f"{100 * row.miou[method]:.1f}",
            )
        y += cell_height + _GAP
    picture.paste(legend, (_MARGIN, y + 4))
    return picture


def _badge(pen: ImageDraw.ImageDraw, right: float, top: float, text: str) -> None:
    """The domain's mIoU, readable on any colour."""
    font = _font(_SMALL)
    width = font.getlength(text)
    pen.rounded_rectangle((right - width - 12, top, right, top + _SMALL + 8), 4, fill=(255, 255, 255), outline=_FAINT)
    pen.text((right - 6, top + (_SMALL + 8) / 2), text, fill=_INK, font=font, anchor="rm")


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    font = _font(_SMALL)
    places, x, y = [], 0, 8
    for name, colour in entries:
        needed = 22 + round(font.getlength(name)) + 18
        if x + needed > width and x > 0:
            x, y = 0, y + 24
        places.append((x, y, name, colour))
        x += needed
    picture = Image.new("RGB", (width, y + 24), _PAPER)
    pen = ImageDraw.Draw(picture)
    for x, y, name, colour in places:
        pen.rectangle((x, y, x + 14, y + 14), fill=colour)
        pen.text((x + 22, y + 7), name, fill=_INK, font=font, anchor="lm")
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
