"""The specification of a data set (`DatasetSpec`), its options, and a validated request to open it (`Request`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rein.dgss.data.datasets.files import Files, Layout
from rein.dgss.data.pairs import Pairs
from rein.dgss.labels import CITYSCAPES, LabelSpace, is_colours
from rein.errors import InputError


@dataclass(frozen=True)
class Kind:
    """What values an option takes.

    Attributes:
        expected: the values in words.
        accepts: whether a value, from Python or from a configuration, is one of them.
        parse: converts a text from the command line, or raises ValueError; None if the command line cannot give the value.
    """

    expected: str
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any] | None


@dataclass(frozen=True)
class Option:
    """An option of a data set.

    Attributes:
        help: one line that starts with a verb.
        kind: the values that it takes.
        default: the value if the option is not set.
        choices: the allowed values; None allows every value of the kind.
        domain: pairs with another value are another domain (weather, for example); None, where allowed, means all values.
    """

    help: str
    kind: Kind
    default: Any = None
    choices: tuple[Any, ...] | None = None
    domain: bool = False


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_number, value))


def _are_class_colours(value: Any) -> bool:
    return is_colours(list(value.values()) if isinstance(value, Mapping) else value)


def _is_space(value: Any) -> bool:
    return isinstance(value, LabelSpace)


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _parse_size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def _parse_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _parse_colours(text: str) -> list[list[int]]:
    codes = [code.strip().removeprefix("#") for code in text.split(",")]
    if any(len(code) != 6 for code in codes):
        raise ValueError(text)
    return [list(bytes.fromhex(code)) for code in codes]


BOOL = Kind("true or false", _is_bool, _parse_bool)
TEXT = Kind("a text", _is_text, str)
NUMBER = Kind("an integer", _is_number, int)
SIZE = Kind("height and width in pixels, 128x256 or [128, 256]", _is_size, _parse_size)
NAMES = Kind("names, road,sky or [road, sky]", _are_names, _parse_names)
NUMBERS = Kind("integers, 0,255 or [0, 255]", _are_numbers, _parse_numbers)
COLOURS = Kind("colours, 000000,ff0000 or [[0, 0, 0], [255, 0, 0]]", is_colours, _parse_colours)
CLASS_COLOURS = Kind(f"{COLOURS.expected} or {{road: [0, 0, 0], ...}}", _are_class_colours, _parse_colours)
SPACE = Kind("a LabelSpace", _is_space, None)


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
class Part:
    """Which part of which domain the pairs of a data set are.

    Attributes:
        domain: name of the data set, or folder, and values of the options that select a domain; None means all values.
        split: the split of the domain.
    """

    domain: tuple[Any, ...]
    split: str

    def contains(self, other: Part) -> bool:
        """Whether the other part's pairs are some of this part's pairs, but not all."""
        alike = self.domain[0] == other.domain[0] and self.split == other.split and len(self.domain) == len(other.domain)
        pairs = list(zip(self.domain[1:], other.domain[1:], strict=False))
        return alike and self.domain != other.domain and all(mine in (None, theirs) for mine, theirs in pairs)

    def shares_domain(self, other: Part) -> bool:
        """Whether both are parts of one domain."""
        return len(self.domain) == len(other.domain) and all(
            one == two or None in (one, two) for one, two in zip(self.domain, other.domain, strict=True)
        )


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
        absent: names of the classes that never occur in the publisher's labels. None if users state how their labels encode
            classes: only the labels show which classes occur.
        options: options of the data set.
        opener: opens the data set; None opens `layouts` with `Files`.
        find_space: finds the classes in the data set's folder; None means `space`.
        find_part: finds domain and split in the data set's folder; None means its name and options, and the requested split.
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
    absent: tuple[str, ...] | None = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    opener: Callable[[DatasetSpec, Request], Pairs] | None = None
    find_space: Callable[[Request], LabelSpace] | None = None
    find_part: Callable[[Request], Part] | None = None

    def open(self, request: Request) -> Pairs:
        """Open the data set."""
        return self.opener(self, request) if self.opener else self.files(request)

    def part(self, request: Request) -> Part:
        """Which part of which domain is requested. No file is read, and the folder need not exist."""
        if self.find_part:
            return self.find_part(request)
        selected = (request.options[name] for name, option in self.options.items() if option.domain)
        return Part((self.name, *selected), request.split)

    def files(self, request: Request, layouts: Sequence[Sequence[Layout]] | None = None) -> Files:
        """Open the images and labels of the requested folder in `layouts`; None uses the layouts of the specification."""
        return Files(request.root, request.split, layouts or self.layouts, self.space, request.labels, request.skip_unlabelled)
