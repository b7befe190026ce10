"""Data sets by name, in their publishers' own folder layouts.

`rows.py` has one row for each: where images and labels lie, how labels encode, which number is which class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rein.dgss.data import Pairs as Pairs
from rein.dgss.datasets.files import Images as Images
from rein.dgss.datasets.row import Asked, parse_truth
from rein.dgss.datasets.row import Option as Option
from rein.dgss.datasets.row import Row as Row
from rein.dgss.datasets.rows import ROWS as ROWS
from rein.dgss.labels import LabelSpace
from rein.errors import InputError


def open_dataset(name: str, path: str | Path | None, split: str = "train", **options: Any) -> Pairs:
    """The images and labels of a data set.

    The folders are listed and every image must have its label; the files are read when they are needed. `rein data check` reads them
    all.

    Args:
        name: a key of `ROWS`.
        path: the data set's folder, as its publisher packs it; None for generated scenes.
        split: which part of it.
        options: what the row offers, and for every data set `labels`: False opens the images alone, with labels of nothing but 255.

    Raises:
        InputError: there is no such data set, split, option, folder or image, or an image has no label.
        MissingExtraError: the data set needs an extra that is not installed.
    """
    return open_row(name, path, split, options)


def open_row(name: str, path: str | Path | None, split: str, options: dict[str, Any], tolerant: bool = False) -> Pairs:
    """As `open_dataset`; `tolerant` leaves images without a label out and says so in `left_out`."""
    row, asked = _ask(name, path, split, options, tolerant)
    return row.open(asked)


def space_of(name: str, path: str | Path | None, split: str = "train", **options: Any) -> LabelSpace:
    """What the class numbers of a data set mean, without opening it.

    Raises:
        InputError: as `open_dataset`, and where the class names of a plain folder are not known.
    """
    row, asked = _ask(name, path, split, options, False)
    return row.space_at(asked) if row.space_at else row.space


def _ask(name: str, path: str | Path | None, split: str, options: dict[str, Any], tolerant: bool) -> tuple[Row, Asked]:
    if name not in ROWS:
        raise InputError(f"there is no data set {name!r}; there are {', '.join(ROWS)}.")
    row = ROWS[name]
    if row.splits and split not in row.splits:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(row.splits)}.")
    values = {option: row.options[option].default for option in row.options}
    labels = True
    for option, value in options.items():
        if option == "labels":
            labels = _choice(name, option, value, (True, False))
        elif option not in row.options:
            raise InputError(f"{name} has no option {option!r}; it has {', '.join([*row.options, 'labels'])}.")
        elif value is not None:
            values[option] = _choice(name, option, value, row.options[option].choices)
    return row, Asked(Path(path) if path is not None else None, split, values, labels, tolerant)


def parse_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Options of a data set from texts as `condition=night`.

    Raises:
        InputError: there is no such data set or option, or the value cannot be read.
    """
    if name not in ROWS:
        raise InputError(f"there is no data set {name!r}; there are {', '.join(ROWS)}.")
    known = {**ROWS[name].options, "labels": Option("False opens the images alone", True, parse=parse_truth)}
    options = {}
    for text in texts:
        option, sign, value = text.partition("=")
        if option not in known or not sign:
            raise InputError(f"{text!r} is no option of {name}; it has {', '.join(f'{key}=' for key in known)}.")
        try:
            options[option] = known[option].parse(value)
        except (ValueError, KeyError) as error:
            raise InputError(f"{option} of {name} cannot be {value!r}: {known[option].help}.") from error
    return options


def _choice(name: str, option: str, value: Any, choices: tuple[Any, ...] | None) -> Any:
    if choices is not None and value not in choices:
        raise InputError(f"{option} of {name} is {value!r}; wanted one of {', '.join(map(str, choices))}.")
    return value
