"""A row: what is true of one data set, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rein.dgss.data import Pairs
from rein.dgss.datasets.files import Files, Layout
from rein.dgss.labels import CITYSCAPES, LabelSpace
from rein.errors import InputError


@dataclass(frozen=True)
class Option:
    """What may be asked of one data set.

    Attributes:
        help: one line.
        default: what holds where nothing is asked.
        choices: the values there are; None where any is good.
        parse: the value that a text on the command line means.
    """

    help: str
    default: Any = None
    choices: tuple[Any, ...] | None = None
    parse: Callable[[str], Any] = str


def parse_truth(text: str) -> bool:
    """`true` or `false`."""
    return {"true": True, "false": False}[text.lower()]


def parse_size(text: str) -> tuple[int, int]:
    """Height and width, as `128x256`."""
    height, width = text.split("x")
    return int(height), int(width)


def parse_names(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",")]


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    return tuple(int(number) for number in text.split(","))


@dataclass(frozen=True)
class Asked:
    """What `open_dataset` was asked for, checked against the row.

    Attributes:
        path: the data set's folder; None where none is needed.
        split: one of the row's splits.
        options: name -> value, with the defaults filled in.
        labels: False opens the images alone.
        tolerant: leave images without a label out rather than to refuse them.
    """

    path: Path | None
    split: str
    options: Mapping[str, Any]
    labels: bool = True
    tolerant: bool = False

    @property
    def root(self) -> Path:
        """The path.

        Raises:
            InputError: there is none.
        """
        if self.path is None:
            raise InputError("the data set's folder is missing: give its path.")
        return self.path


@dataclass(frozen=True)
class Row:
    """One data set.

    Attributes:
        name: as it is asked for.
        about: one line: what it shows, and how much of it there is.
        layout: where images and labels lie, one line each, for people.
        encoding: how labels encode classes, for people.
        url: where its publisher offers it.
        documentation: what says so of the encoding.
        splits: the splits there are; empty where any folder's name will do.
        ways: where images and labels lie; the first whose labels are there is taken (see `Files`).
        space: what the class numbers mean.
        options: what may be asked of it.
        opener: opens it; None for the plain way of `Files`.
        space_at: finds out what the class numbers mean where that lies beside the images; None where it is `space`.
    """

    name: str
    about: str
    layout: str
    encoding: str
    url: str
    documentation: str
    splits: tuple[str, ...] = ("train", "val", "test")
    ways: Sequence[Sequence[Layout]] = ()
    space: LabelSpace = CITYSCAPES
    options: Mapping[str, Option] = field(default_factory=dict)
    opener: Callable[[Row, Asked], Pairs] | None = None
    space_at: Callable[[Asked], LabelSpace] | None = None

    def open(self, asked: Asked) -> Pairs:
        """The pairs."""
        return self.opener(self, asked) if self.opener else self.files(asked)

    def files(self, asked: Asked, ways: Sequence[Sequence[Layout]] | None = None, split: str | None = None) -> Files:
        """The pairs that lie below the folder that was given, in other ways or under another split's name if need be."""
        return Files(asked.root, split or asked.split, ways or self.ways, self.space, asked.labels, asked.tolerant)
