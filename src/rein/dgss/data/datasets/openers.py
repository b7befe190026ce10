"""Openers of data sets that need more than a list of layouts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rein.dgss.data.datasets import class_maps
from rein.dgss.data.datasets.corruptions import Corrupted
from rein.dgss.data.datasets.encodings import Colours, Encoding, class_numbers, colour_table, png_header, read_values
from rein.dgss.data.datasets.files import IMAGE_SUFFIXES, Files, Layout
from rein.dgss.data.datasets.generated import Scenes, scene_seeds
from rein.dgss.data.datasets.matlab import read_matrices
from rein.dgss.data.datasets.spec import DatasetSpec, Part, Request
from rein.dgss.data.pairs import Pairs
from rein.dgss.labels import LabelSpace, label_space, read_index
from rein.errors import InputError, one_line
from rein.files import describe_missing, read_text

CONDITIONS = ("fog", "night", "rain", "snow")


def open_gtav(spec: DatasetSpec, request: Request) -> Files:
    """All images, or those of a split in the publisher's split.mat.

    Labels of another size than their image are resized to it, as in the published settings; `skip_misfits` removes such pairs.
    """
    split_file = request.options["split_file"]
    if split_file is None and request.split != "train":
        raise InputError(
            f"gtav has the split {request.split!r} only with its publisher's split.mat. Set split_file=split.mat, or use the split "
            "train, which has all images."
        )
    data = spec.files(request)
    data.resize_labels = True
    if split_file is not None:
        numbers = _split_numbers(request.root / split_file, request.split)
        data.keep({image for image, _ in data.pairs if _image_number(image) in numbers})
    if request.options["skip_misfits"] and request.labels:
        with ThreadPoolExecutor(16) as pool:  # 50,000 headers take seconds; decoding the images takes an hour
            sizes = list(pool.map(_sizes, data.pairs))
        data.leave_out(
            {
                image: f"{size[0]} x {size[1]} pixels, its label {label_size[0]} x {label_size[1]}"
                for (image, _), (size, label_size) in zip(data.pairs, sizes, strict=True)
                if size and label_size and size != label_size
            }
        )
    return data


def _split_numbers(path: Path, split: str) -> set[int]:
    try:
        return {int(number) for number in read_matrices(path)[f"{split}Ids"]}
    except (OSError, KeyError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read as the publisher's split.mat: {type(error).__name__} {one_line(error)}"
        ) from error


def _image_number(image: Path) -> int:
    return int(image.stem) if image.stem.isdecimal() else -1


def _sizes(pair: tuple[Path, Path | None]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    image, label = pair
    return _png_size(image), _png_size(label) if label else None


def _png_size(path: Path) -> tuple[int, int] | None:
    header = png_header(path)
    return None if header is None else header[:2]


_MAPILLARY_FOLDERS = {"train": ("training", "train"), "val": ("validation", "val"), "test": ("testing", "test")}
# version -> folder of labels in a split, and config file
_MAPILLARY_VERSIONS = {
    "v1.2": ("v1.2/labels", "config_v1.2.json"),
    "v2.0": ("v2.0/labels", "config_v2.0.json"),
    "v1.1": ("labels", "config.json"),
}


def open_mapillary(spec: DatasetSpec, request: Request) -> Files:
    """The labels of one version, mapped by the names in its config file."""
    version, mapping = request.options["version"], class_maps.MAPILLARY[request.options["class_map"]]
    layouts = []
    for candidate in [version] if version else _MAPILLARY_VERSIONS:
        labels, config = _MAPILLARY_VERSIONS[candidate]
        class_map = _mapillary_classes(request.root / config, mapping) or (mapping.v2 if candidate == "v2.0" else mapping.v1)
        name = f"Mapillary Vistas {candidate}, mapped as in {request.options['class_map']}"
        encoding = Encoding(name, class_map, read_values)
        for folder in _MAPILLARY_FOLDERS[request.split]:
            layouts.append((Layout(f"{folder}/images", ("{}.jpg",), f"{folder}/{labels}", "{}.png", encoding, recursive=False),))
    return spec.files(request, layouts)


def _mapillary_classes(config: Path, mapping: class_maps.MapillaryMap) -> dict[int, int] | None:
    if not config.exists():
        return None
    try:
        names = [label["name"] for label in json.loads(read_text(config, 10_000_000))["labels"]]
        return {value: mapping.class_of(name) for value, name in enumerate(names)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{config} cannot be read as a config file of Mapillary Vistas: {type(error).__name__} {one_line(error)}"
        ) from error


def open_acdc(spec: DatasetSpec, request: Request) -> Files:
    """All conditions, or one."""
    condition = request.options["condition"]
    return spec.files(
        request,
        [[layout for layout in alternative if condition in (None, layout.prefix.rstrip("/"))] for alternative in spec.layouts],
    )


def open_corrupted(spec: DatasetSpec, request: Request) -> Corrupted:
    """Cityscapes under one corruption."""
    kind, severity = request.options["kind"], request.options["severity"]
    for name, value in (("kind", kind), ("severity", severity)):
        if value is None:
            choices = ", ".join(map(str, spec.options[name].choices or ()))
            raise InputError(f"{name} of {spec.name} is not set; expected one of {choices}. Set {name}=.")
    return Corrupted(spec.files(request), kind, severity)


def open_folder(spec: DatasetSpec, request: Request) -> Files:
    """`images` and `labels` in the folder, or in its subfolder with the name of the split."""
    domain = _domain_folder(request)
    if domain == request.root and request.split != "train":
        raise InputError(
            f"{domain} has no split {request.split!r}: it has no folder {request.split}/images. Add the folder, or use the split "
            f"train, which is {domain / 'images'}."
        )
    if not (domain / "images").is_dir():
        splits = sorted(path.parent.name for path in request.root.glob("*/images"))
        remedy = f"The splits of {request.root} are {', '.join(splits)}." if splits else "Check the path."
        raise InputError(
            f"{describe_missing(domain / 'images')}; expected images/* and labels/*.png in {request.root} or in {domain}. {remedy}"
        )
    space = space_of_folder(request)
    names = tuple(f"{{}}{suffix}" for suffix in IMAGE_SUFFIXES)
    layout = Layout("images", names, "labels", "{}.png", _coding_of_folder(request, space), recursive=False)
    return Files(domain, request.split, [[layout]], space, request.labels, request.skip_unlabelled)


def _coding_of_folder(request: Request, space: LabelSpace) -> Encoding | Colours:
    """How labels encode classes: from the options, else from index.json."""
    if not request.labels:
        return class_numbers(space)
    index = read_index(_index_folder(request))
    stated = {key: request.options[key] for key in ("values", "colors", "ignored_colors")}
    if not any(value is not None for value in stated.values()):
        stated = {key: index.get(key) for key in stated}
    if stated["colors"] is None and stated["ignored_colors"] is None:
        return class_numbers(space, stated["values"])
    if stated["values"] is not None or space.ignored or stated["colors"] is None:
        raise InputError(
            f"the labels of {request.root} have colors {one_line(repr(stated['colors']))}, ignored_colors "
            f"{one_line(repr(stated['ignored_colors']))}, values {one_line(repr(stated['values']))} and ignored values "
            f"{one_line(list(space.ignored))}; expected colours or values. Remove one kind."
        )
    return colour_table(space.names, stated["colors"], stated["ignored_colors"])


def space_of_folder(request: Request) -> LabelSpace:
    """The classes of the labels: from the options, else from index.json in the folder, else from index.json in its parent."""
    options = request.options
    if options["space"] is not None:
        space: LabelSpace = options["space"]
        return space
    folder = _index_folder(request)
    if not request.labels and options["classes"] is None and not (folder / "index.json").exists():
        return LabelSpace(("anything",), ((128, 128, 128),))  # images without labels need no class names
    return label_space(folder, options["classes"], tuple(options["ignored"]))


_SPLIT_NAMES = ("train", "training", "trainval", "val", "valid", "validation", "test", "testing")


def part_of_folder(request: Request) -> Part:
    """The folder of `images` is a domain, and the split too, unless its name is that of a split: then its parent is the domain."""
    folder = _domain_folder(request).resolve()
    if folder.name.lower() in _SPLIT_NAMES:
        return Part((str(folder.parent),), folder.name)
    return Part((str(folder),), "")


def _domain_folder(request: Request) -> Path:
    """The folder of `images` and `labels`: the subfolder of the split, unless only the root has `images`."""
    subfolder = request.root / request.split
    return subfolder if (subfolder / "images").is_dir() or not (request.root / "images").is_dir() else request.root


def _index_folder(request: Request) -> Path:
    domain = _domain_folder(request)
    return domain if (domain / "index.json").exists() else domain.parent


def open_scenes(spec: DatasetSpec, request: Request) -> Pairs:
    """Generated scenes."""
    options = request.options
    return Scenes(options["domain"], scene_seeds(request.split, options["count"], options["seed"]), tuple(options["size"]))
