"""Web pages of predictions and results, each one HTML file that needs no network and no other file.

Pictures are data URIs; style and script are inside the page, and its content security policy forbids everything else. Every text is
escaped by the serializer of the standard library. Pictures, tables and texts in, bytes of HTML out; `panels` draws PNG files instead.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from math import isnan
from string import Template
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from rein.dgss.labels import IGNORE_LABEL, LabelSpace

MOST = 100  # pictures in a page of predictions; about 100 kB each
SIDE = 640  # pixels of the longer side of a picture
_ERROR_COLOUR = (220, 30, 30)

Element = ElementTree.Element


@dataclass(frozen=True)
class Layer:
    """What is laid over a photograph.

    Attributes:
        name: shown below it.
        classes: (H, W) uint8; 255 is transparent.
        is_errors: the layer marks wrong pixels by 0 and has no classes.
    """

    name: str
    classes: np.ndarray
    is_errors: bool = False


@dataclass(frozen=True)
class Picture:
    """A photograph and its layers.

    Attributes:
        name: shown above it.
        image: the photograph as it is shown, in any mode that Pillow converts to RGB.
        layers: one or more.
        shares: class -> its share of the pixels, 0 to 1; shown beside a prediction.
    """

    name: str
    image: Image.Image
    layers: Sequence[Layer]
    shares: Mapping[str, float] = field(default_factory=dict)

    def shrunk(self) -> Picture:
        """The picture at the size at which a page shows it, at most `SIDE` pixels long."""
        image = self.image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        layers = [replace(layer, classes=_resized(layer.classes, image.size)) for layer in self.layers]
        return replace(self, image=image, layers=layers)


@dataclass(frozen=True)
class Table:
    """A table that a click on a heading sorts.

    Attributes:
        caption: what the figures are.
        headings: of all columns.
        rows: the name and the figures of each row, as they are shown; NaN shows a dash.
        footer: a row that stays last; empty shows none.
        best: print the largest figure of each row bold, if the figures that are shown differ.
    """

    caption: str
    headings: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    footer: Sequence[float] = ()
    best: bool = False


# -- pages


def predictions(
    title: str,
    facts: Mapping[str, str],
    pictures: Iterable[Picture],
    space: LabelSpace,
    *,
    left_out: int = 0,
    problems: Sequence[str] = (),
) -> bytes:
    """A page of predictions: photograph, overlay and legend side by side.

    Args:
        title: heading of the page.
        facts: what a reader needs to know, name -> text.
        pictures: each has one layer. They are taken one at a time, so that only one need be in memory.
        space: names and colours of the classes.
        left_out: number of predictions without a picture in the page.
        problems: why an image has no prediction, one text for each.
    """
    main = _main(title, facts)
    if problems:
        box = _add(main, "section", class_="problems", aria_label="images without a prediction")
        _add(box, "strong", f"{len(problems)} without a prediction")
        listing = _add(box, "ul")
        for text in problems[:MOST]:
            _add(listing, "li", text)
        if len(problems) > MOST:
            _add(listing, "li", f"and {len(problems) - MOST} more")
    if left_out:
        _add(main, "p", f"{left_out} more predictions have no picture here; the files of all are in the folder.", class_="note")
    _controls(main, [])
    for picture in pictures:
        _picture(main, picture, space, with_legend=True)
    return _render(title, main)


def evaluation(
    title: str,
    facts: Mapping[str, str],
    tables: Sequence[Table],
    folded: Mapping[str, Table],
    examples: Mapping[str, Sequence[Picture]],
    space: LabelSpace,
    notes: Sequence[str] = (),
) -> bytes:
    """A page of results: tables, and examples with a slider between two layers.

    Args:
        title: heading of the page.
        facts: what a reader needs to know, name -> text.
        tables: shown one below the other.
        folded: summary -> table; shown on a click, the first one at once.
        examples: domain -> pictures. All have layers of the same names: the truth first, then predictions and their errors.
        space: names and colours of the classes.
        notes: texts below the tables.
    """
    main = _main(title, facts)
    for table in tables:
        _table(main, table, space)
    for number, (summary, table) in enumerate(folded.items()):
        details = _add(main, "details", **({"open": ""} if number == 0 else {}))
        _add(details, "summary", summary)
        _table(details, table, space)
    for note in notes:
        _add(main, "p", note, class_="note")
    pictures = [picture for chosen in examples.values() for picture in chosen]
    if pictures:
        _add(main, "h2", "Examples")
        _legend(main, space, _occurring(pictures, space))
        _controls(main, pictures[0].layers)
    for domain, chosen in examples.items():
        if chosen:
            _add(main, "h2", domain)
        for picture in chosen:
            _picture(main, picture, space, with_legend=False)
    return _render(title, main)


def errors(name: str, label: np.ndarray, prediction: np.ndarray) -> Layer:
    """The layer of the pixels where a prediction (H, W) differs from the label (H, W); ignored pixels are not wrong."""
    wrong = (label != IGNORE_LABEL) & (prediction != label)
    return Layer(name, np.where(wrong, 0, IGNORE_LABEL).astype(np.uint8), is_errors=True)


# -- parts of a page


def _main(title: str, facts: Mapping[str, str]) -> Element:
    main = Element("main")
    _add(main, "h1", title)
    listing = _add(main, "dl")
    for name, text in facts.items():
        _add(listing, "dt", name)
        _add(listing, "dd", text)
    return main


def _table(parent: Element, table: Table, space: LabelSpace) -> None:
    element = _add(_add(parent, "div", class_="scroll", tabindex="0", role="region", aria_label=table.caption), "table")
    _add(element, "caption", table.caption)
    heading = _add(_add(element, "thead"), "tr")
    for text in table.headings:
        _add(_add(heading, "th", scope="col", aria_sort="none"), "button", text, type="button")
    body = _add(element, "tbody")
    for name, figures in table.rows.items():
        _row(body, name, figures, space, best=table.best)
    if table.footer:
        _row(_add(element, "tfoot"), "mean", table.footer, None, best=table.best)


def _row(parent: Element, name: str, figures: Sequence[float], space: LabelSpace | None, *, best: bool) -> None:
    row = _add(parent, "tr")
    heading = _add(row, "th", scope="row")
    if space is not None and name in space.names:
        _chip(heading, space, name)
    else:
        heading.text = name
    texts = ["–" if isnan(figure) else f"{figure:.1f}" for figure in figures]
    largest = max((figure for figure in figures if not isnan(figure)), default=0.0)
    differ = len(set(texts)) > 1
    for figure, text in zip(figures, texts, strict=True):
        if isnan(figure):
            _add(row, "td", text)
            continue
        marked = {"class_": "best"} if best and differ and text == f"{largest:.1f}" else {}
        _add(row, "td", text, data_value=f"{figure:.6g}", style=f"--share: {min(100.0, max(0.0, figure)):.1f}%", **marked)


def _controls(parent: Element, layers: Sequence[Layer]) -> None:
    """The bar above the pictures, which the script shows: opacity of the overlays, and the two layers that the sliders compare."""
    bar = _add(parent, "div", class_="controls", hidden="")
    label = _add(bar, "label", "overlay")
    _add(label, "input", type="range", min="0", max="100", value="60", aria_label="opacity of the overlays in per cent")
    with_classes = [number for number, layer in enumerate(layers) if not layer.is_errors]
    if len(with_classes) < 2:
        return
    for side, chosen in zip(("left", "right"), with_classes[-2:], strict=True):
        select = _add(_add(bar, "label", side), "select", aria_label=f"{side} side of the sliders")
        for number, layer in enumerate(layers):
            _add(select, "option", layer.name, value=str(number), **({"selected": ""} if number == chosen else {}))


def _picture(parent: Element, picture: Picture, space: LabelSpace, *, with_legend: bool) -> None:
    section = _add(parent, "section", class_=f"picture {'predicted' if with_legend else 'compared'}", aria_label=picture.name)
    content = section if with_legend else _add(section, "div")
    _add(content, "h3", picture.name)
    row = _add(content, "div", class_="row")
    picture = picture.shrunk()
    photo = _data_uri(picture.image, "JPEG", quality=80, optimize=True)
    sides = {"width": str(picture.image.width), "height": str(picture.image.height)}
    figure = _add(row, "figure")
    _add(figure, "img", class_="photo", src=photo, alt=f"photograph {picture.name}", **sides)
    _add(figure, "figcaption", "image")
    for number, layer in enumerate(picture.layers):
        figure = _add(row, "figure")
        kind = "mask errors" if layer.is_errors else "mask"
        source = _mask(layer.classes, _ERROR_PALETTE if layer.is_errors else np.array(space.palette, np.uint8))
        stack = _add(figure, "div", class_="stack")
        _add(stack, "img", class_=kind, src=source, alt=f"{layer.name} of {picture.name}", data_layer=str(number), **sides)
        _add(figure, "figcaption", layer.name)
    if with_legend:
        _legend(row, space, list(picture.shares), picture.shares)


def _legend(parent: Element, space: LabelSpace, names: Sequence[str], shares: Mapping[str, float] | None = None) -> None:
    listing = _add(parent, "ul", class_="legend", aria_label="classes")
    for name in names:
        entry = _add(listing, "li")
        _chip(entry, space, name)
        if shares:
            text = f"{100 * shares[name]:.1f} %" if shares[name] >= 0.0005 else "below 0.1 %"
            _add(entry, "span", f" {text}", class_="note")


def _chip(parent: Element, space: LabelSpace, name: str) -> None:
    red, green, blue = space.palette[space.names.index(name)]
    chip = _add(parent, "span", class_="chip", style=f"background: rgb({red}, {green}, {blue})", aria_hidden="true")
    chip.tail = name


def _occurring(pictures: Sequence[Picture], space: LabelSpace) -> list[str]:
    """Names of the classes in the layers."""
    found = set[int]()
    for picture in pictures:
        for layer in picture.layers:
            if not layer.is_errors:
                found |= set(np.unique(layer.classes).tolist())
    return [name for number, name in enumerate(space.names) if number in found]


# -- pictures as data URIs

_ERROR_PALETTE = np.array([_ERROR_COLOUR], np.uint8)


def _resized(classes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Classes (H, W) of the nearest pixels, at a width and height."""
    return np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))


def _mask(classes: np.ndarray, palette: np.ndarray) -> str:
    """Classes (H, W) as PNG; 255 is transparent."""
    picture = Image.fromarray(classes)
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    picture.putpalette(table.tobytes())
    return _data_uri(picture, "PNG", optimize=True, transparency=IGNORE_LABEL)


def _data_uri(picture: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- HTML


def _add(parent: Element, tag: str, text: str | None = None, **attributes: str) -> Element:
    """Append an element. Attribute names are written as in Python: `class_`, `aria_label`."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    element = ElementTree.SubElement(parent, tag, named)
    element.text = text
    return element


def _render(title: str, main: Element) -> bytes:
    heading = Element("title")
    heading.text = title
    return (
        _template()
        .substitute(
            title=ElementTree.tostring(heading, "unicode", method="html"),
            style=_file("page.css"),
            script=_file("page.js"),
            body=ElementTree.tostring(main, "unicode", method="html"),
        )
        .encode("utf-8", "replace")
    )


@cache
def _template() -> Template:
    return Template(_file("page.html"))


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
