"""The specification of a data set (`DatasetSpec`), its options, and a validated request to open it (`Request`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rein.dgss.data.datasets.files import Files, Layout
from rein.dgss.data.pairs import Pairs
from rein.dgss.labels import CITYSCAPES, LabelSpace
from rein.errors import InputError


@dataclass(frozen=True)
class Option:
    """An option of a data set.

    Attributes:
        help: one line that starts with a verb.
        default: the value if the option is not set.
        choices: the allowed values; None allows any value.
        parse: converts a text from the command line to a value.
    """

    help: str
    default: Any = None
    choices: tuple[Any, ...] | None = None
    parse: Callable[[str], Any] = str


def parse_bool(text: str) -> bool:
    """Parse `true` or `false`."""
    return {"true": True, "false": False}[text.lower()]


def parse_size(text: str) -> tuple[int, int]:
    """Parse height and width, such as `128x256`."""
    height, width = text.split("x")
    return int(height), int(width)


def parse_names(text: str) -> list[str]:
    """Parse names separated by commas."""
    return [name.strip() for name in text.split(",")]


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parse integers separated by commas."""
    return tuple(int(number) for number in text.split(","))


@dataclass(frozen=True)
class Request:
    """The arguments of `open_dataset`, validated against the specification.

    Attributes:
        path: folder of the data set; None if it needs no folder.
        split: a split of the data set.
        options: option -> value, including defaults.
        labels: False opens images only.
        skip_unlabelled: list images without a label in `left_out` instead of raising.
    """

    path: Path | None
    split: str
    options: Mapping[str, Any]
    labels: bool = True
    skip_unlabelled: bool = False

    @property
    def root(self) -> Path:
        """The path.

        Raises:
            InputError: the path is None.
        """
        if self.path is None:
            raise InputError("No folder given for the data set. Pass its path.")
        return self.path


@dataclass(frozen=True)
class DatasetSpec:
    """The specification of one data set.

    Attributes:
        name: name of the data set.
        summary: content and number of images, in one line, for `rein data list`.
        layout_text: paths of images and labels, one line each, for `rein data list`.
        encoding_text: how labels encode classes, for `rein data list`.
        url: where the publisher offers the data set.
        documentation: source of the class map.
        splits: names of the splits; empty if any subfolder may be a split.
        layouts: alternative layouts of images and labels; the first alternative with labels is used (see `Files`).
        space: the classes of the labels.
        options: options of the data set.
        opener: opens the data set; None opens `layouts` with `Files`.
        find_space: finds the classes in the data set's folder; None means `space`.
    """

    name: str
    summary: str
    layout_text: str
    encoding_text: str
    url: str
    documentation: str
    splits: tuple[str, ...] = ("train", "val", "test")
    layouts: Sequence[Sequence[Layout]] = ()
    space: LabelSpace = CITYSCAPES
    options: Mapping[str, Option] = field(default_factory=dict)
    opener: Callable[[DatasetSpec, Request], Pairs] | None = None
    find_space: Callable[[Request], LabelSpace] | None = None

    def open(self, request: Request) -> Pairs:
        """Open the data set."""
        return self.opener(self, request) if self.opener else self.files(request)

    def files(self, request: Request, layouts: Sequence[Sequence[Layout]] | None = None) -> Files:
        """Open the images and labels of the requested folder in `layouts`; None uses the layouts of the specification."""
        return Files(request.root, request.split, layouts or self.layouts, self.space, request.labels, request.skip_unlabelled)
