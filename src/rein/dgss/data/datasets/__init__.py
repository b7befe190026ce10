"""Data sets by name, in the folder layouts of their publishers.

`table.py` holds the specification of each data set: where images and labels are, how labels are encoded, and the class map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rein.dgss.data.datasets.files import Images as Images
from rein.dgss.data.datasets.spec import BOOL, Request
from rein.dgss.data.datasets.spec import DatasetSpec as DatasetSpec
from rein.dgss.data.datasets.spec import Option as Option
from rein.dgss.data.datasets.spec import Part as Part
from rein.dgss.data.datasets.table import DATASETS as DATASETS
from rein.dgss.data.pairs import Pairs as Pairs
from rein.dgss.labels import LabelSpace
from rein.errors import InputError

_LABELS = Option("load labels (true) or only images (false)", BOOL, True)


def open_dataset(name: str, path: str | Path | None, split: str = "train", **options: Any) -> Pairs:
    """Open a data set.

    Opening lists the folders and checks that every image has a label. Files are read on access; `rein data check` reads all of them.

    Args:
        name: a key of `DATASETS`.
        path: folder of the data set, in its publisher's layout; None for generated scenes.
        split: name of the split.
        options: options of the data set (`rein data list` shows them). Every data set also has `labels`: False opens images only,
            and every label is filled with 255.

    Raises:
        InputError: the data set, split, option or folder does not exist, there are no images, or an image has no label.
        MissingExtraError: the data set needs an extra that is not installed.
    """
    return open_spec(name, path, split, options)


def open_spec(name: str, path: str | Path | None, split: str, options: dict[str, Any], skip_unlabelled: bool = False) -> Pairs:
    """As `open_dataset`; `skip_unlabelled` lists images without a label in `left_out` instead of raising."""
    spec, request = _resolve(name, path, split, options, skip_unlabelled)
    return spec.open(request)


def space_of(name: str, path: str | Path | None, split: str = "train", **options: Any) -> LabelSpace:
    """The classes of a data set, without opening it. Arguments are those of `open_dataset`.

    Raises:
        InputError: the data set, split or option does not exist, or the class names of a plain folder are unknown.
    """
    spec, request = _resolve(name, path, split, options, False)
    return spec.find_space(request) if spec.find_space else spec.space


def part_of(name: str, path: str | Path | None, split: str = "train", **options: Any) -> Part:
    """Which part of which domain a data set is, without opening it: the folder need not exist.

    Raises:
        InputError: the data set, split or option does not exist.
    """
    spec, request = _resolve(name, path, split, options, False)
    return spec.part(request)


def _find_spec(name: str) -> DatasetSpec:
    if name not in DATASETS:
        raise InputError(f"Unknown data set {name!r}; expected one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def _resolve(
    name: str, path: str | Path | None, split: str, options: dict[str, Any], skip_unlabelled: bool
) -> tuple[DatasetSpec, Request]:
    spec = _find_spec(name)
    if spec.splits and split not in spec.splits:
        raise InputError(f"{name} has no split {split!r}; expected one of {', '.join(spec.splits)}.")
    values = {option: spec.options[option].default for option in spec.options}
    known = {**spec.options, "labels": _LABELS}
    for option, value in options.items():
        if option not in known:
            raise InputError(f"{name} has no option {option!r}; expected one of {', '.join(_settable(known))}.")
        if value is not None:
            values[option] = _check_value(name, option, value, known[option])
    labels = values.pop("labels", True)
    return spec, Request(Path(path) if path is not None else None, split, values, labels, skip_unlabelled)


def parse_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Parse options of a data set from texts such as `condition=night`.

    Raises:
        InputError: the data set or the option does not exist, or a value cannot be parsed.
    """
    known = {**_find_spec(name).options, "labels": _LABELS}
    options = {}
    for text in texts:
        option, sign, value = text.partition("=")
        parse = known[option].kind.parse if option in known and sign else None
        if parse is None:
            raise InputError(
                f"{text!r} is not an option of {name}; expected one of {', '.join(f'{key}=' for key in _settable(known))}."
            )
        try:
            options[option] = parse(value)
        except ValueError as error:
            raise InputError(
                f"{option} of {name} cannot be {value!r}; expected {known[option].kind.expected}, to {known[option].help}."
            ) from error
    return options


def _settable(options: Mapping[str, Option]) -> list[str]:
    """Names of the options that a command line or a configuration can set."""
    return [name for name, option in options.items() if option.kind.parse is not None]


def _check_value(name: str, option: str, value: Any, known: Option) -> Any:
    if known.choices is not None and value not in known.choices:
        raise InputError(f"{option} of {name} is {value!r}; expected one of {', '.join(map(str, known.choices))}.")
    if not known.kind.accepts(value):
        raise InputError(f"{option} of {name} is {value!r}; expected {known.kind.expected}.")
    return value
