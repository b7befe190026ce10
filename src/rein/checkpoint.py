"""The file format of adapters and segmenters, and `save` and `load` for adapters.

A file is checked completely before the model changes. Writing replaces an existing file in one step. `docs/file-format.md` describes
the format, version 2: tensors named as in `model.rein.state_dict()` (with the prefixes `rein.` and `head.` in a segmenter file), and
the metadata `rein_format`, `kind`, `rein_version`, `config`, `backbone`, `head`, `about` and `sha256`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rein import backbones, pytorch_files
from rein._version import __version__
from rein.backbones import BlockInfo, facts
from rein.config import ReinConfig
from rein.errors import CheckpointError, InputError, MissingExtraError, UnsupportedBackboneError, one_line
from rein.files import MAX_HEADER, read_safetensors, reason_of
from rein.files import replace_file as replace_file
from rein.heads import Head
from rein.images import check_classes, check_normalization, check_palette
from rein.injection import (
    Model,
    add_adapter,
    find_adapter,
    get_adapter,
    get_injection,
    is_wrapped,
    new_adapter,
    unwrap,
    wrap,
)
from rein.named_adapters import check_name
from rein.remote import fetch
from rein.stagewise import build_adapter

VERSION_KEY, FORMAT_VERSION = "rein_format", 2
_READABLE = ("1", "2")
_ENTRIES = ("kind", "rein_version", "backbone", "config", "head", "about")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Header:
    """Metadata of an adapter or segmenter file.

    Attributes:
        kind: `adapter` or `segmenter`.
        config: configuration of the adapter; None for a segmenter without an adapter.
        backbone: the backbone that the file fits: `architecture`; the facts of `backbones.facts.describe`, absent in version 1; and,
            with an adapter, the lists `blocks`, `widths` and `num_prefix_tokens` with one entry per adapter layer, and `given`, the
            facts that the user passed to `wrap`.
        head: `name`, `arguments` and block `indices` of a segmenter's head; None in an adapter file.
        about: what a user of a segmenter needs to know: `classes`, `palette`, `normalization`, `ignore_label` and `notes`; None in
            an adapter file and in version 1.
        rein_version: version of rein that wrote the file.
        format_version: version of the format of the file that was read; files are written in the newest.
    """

    kind: str
    config: ReinConfig | None
    backbone: dict[str, Any]
    head: dict[str, Any] | None = None
    about: dict[str, Any] | None = None
    rein_version: str = __version__
    format_version: str = str(FORMAT_VERSION)

    def to_metadata(self) -> dict[str, str]:
        """Return the header as safetensors metadata: a dictionary of strings."""
        values = {
            "kind": self.kind,
            "rein_version": self.rein_version,
            "config": None if self.config is None else self.config.to_dict(),
            "backbone": self.backbone,
            "head": self.head,
            "about": self.about,
        }
        fixed = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION)}  # `format` is a convention of safetensors
        return fixed | {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Header:
        """Parse the metadata that `to_metadata` returns.

        Raises:
            InputError, KeyError, TypeError, ValueError: an entry is missing or invalid.
        """
        entries = {key: _parse(metadata.get(key, "null")) for key in _ENTRIES}
        kind, version, backbone, config, head, about = entries.values()
        if kind not in ("adapter", "segmenter"):
            raise InputError(f"kind is {one_line(repr(kind))}, expected 'adapter' or 'segmenter'")
        if not (isinstance(backbone, dict) and isinstance(backbone.get("architecture"), str)):
            raise InputError("backbone has no architecture name")
        facts.check(backbone)
        _check_about(about)
        if config is None and kind == "adapter":
            raise InputError("config is missing, expected the configuration of the adapter")
        if config is not None:
            lists = [backbone.get(key) for key in ("blocks", "widths", "num_prefix_tokens")]
            if (
                not all(_is_list(value, entry_type) for value, entry_type in zip(lists, (str, int, int), strict=True))
                or len({len(value or ()) for value in lists}) > 1
            ):
                raise InputError("backbone must have lists blocks, widths and num_prefix_tokens of equal length")
            if not isinstance(backbone.setdefault("given", {}), dict):
                raise InputError(f"given of the backbone is {one_line(repr(backbone['given']))}, expected a dictionary")
        if kind == "segmenter" and not (
            isinstance(head, dict)
            and isinstance(head.get("name"), str)
            and isinstance(head.get("arguments"), dict)
            and _is_list(head.get("indices"), int)
        ):
            raise InputError(f"head is {one_line(repr(head))}, expected a dictionary with name, arguments and indices")
        config = None if config is None else ReinConfig.from_dict(config)
        return cls(kind, config, backbone, head, about, str(version), metadata[VERSION_KEY])


def _check_about(about: Any) -> None:
    """Raise InputError unless the entries of `about` that are there are valid; a file of format version 1 has none of them."""
    if about is None:
        return
    if not (isinstance(about, dict) and isinstance(about.get("notes", {}), dict)):
        raise InputError(f"about is {one_line(repr(about))}, expected a dictionary, with a dictionary notes")
    check_classes(about.get("classes", []))
    check_palette(about.get("palette", []))
    if "normalization" in about:
        stated = about["normalization"]
        if not (isinstance(stated, dict) and {"mean", "std"} <= stated.keys()):
            raise InputError(f"normalization is {one_line(repr(stated))}, expected a dictionary with mean and std")
        check_normalization((stated["mean"], stated["std"]))
    if type(about.get("ignore_label", 255)) not in (int, float):
        raise InputError(f"ignore_label is {one_line(repr(about['ignore_label']))}, expected a number")


def _parse(text: str) -> Any:
    """Parse JSON whose texts can be printed.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has a text with control characters or a number that is not finite.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("a value is nested too deeply") from error
    if not all(entry.isprintable() for entry in _texts(value)):
        raise ValueError("a text has control characters")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Every string in a value of JSON, keys included."""
    if depth > 20:
        raise ValueError("a value is nested too deeply")
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for entry in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _texts(entry, depth + 1)


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Write the adapter of a wrapped model to one safetensors file (about 12 MB for a ViT-L).

    Writing is atomic: after a crash, `path` holds the previous file or the new one, never a part of one. The file does not hold the
    name of the adapter.

    Args:
        model: a wrapped model.
        path: the file to write.
        name: which adapter, if the model has several; None is the active one.

    Raises:
        WrapError: the model is not wrapped.
        InputError: no adapter has this name.
        CheckpointError: the folder does not exist or cannot be written.
    """
    adapter = get_adapter(model, name)
    write(path, adapter.state_dict(), Header("adapter", adapter.config, describe_backbone(model)))


def load(
    model: Model,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    strict: bool = True,
    check_weights: bool = True,
    example_inputs: Any = None,
) -> Model:
    """Load an adapter into `model`, in place; wrap the model first if it is bare.

    The function checks the file and the model completely before it changes anything. In a wrapped model only parameter values
    change: hooks, optimizers and compiled code stay valid. With a new `name`, a wrapped model gets another adapter beside those that
    it has; `model.rein.activate(name)` switches to it.

    Args:
        model: the backbone that the adapter was trained on.
        path: a file that `save` wrote, or the address of one on the Hugging Face hub, `hf://owner/name` or `hf://owner/name@revision`
            (extra `hub`).
        name: name of the adapter, for models with several. None: the only adapter, or the active one.
        strict: require the same architecture and block names; with False, equal widths, depth and prefix tokens suffice.
        check_weights: refuse a model with other weights than those on which the adapter was trained, where it is useless. A file of
            format version 1 does not state them.
        example_inputs: as for `wrap`; needed if `model` is bare and was wrapped with them before.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is missing, damaged, not an adapter file, or does not fit the model.
        InputError: `name` is no name of an adapter.
        UnsupportedBackboneError, WrapError: as `wrap`.
    """
    if name is not None:
        check_name(name)
    tensors, header = read(path)
    if header.kind != "adapter":
        raise CheckpointError(f"{path} is a {header.kind} file, expected an adapter file; load it with rein.Segmenter.load.")
    load_adapter = check_adapter(model, tensors, header, path, name=name, strict=strict, example_inputs=example_inputs)
    if check_weights:
        check_frozen_weights(model, header, path)
    load_adapter()
    return model


def check_adapter(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    header: Header,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    strict: bool = True,
    example_inputs: Any = None,
) -> Callable[[], None]:
    """Check that the adapter of a file fits the model, which stays unchanged; arguments and errors as for `load`.

    Returns:
        A function that loads the adapter into the model.
    """
    config = header.config
    if config is None:
        raise CheckpointError(f"{path} holds no adapter, only a head for a bare backbone; load it with rein.Segmenter.load.")
    given = header.backbone["given"].get("num_prefix_tokens")
    architecture = backbones.architecture(model)
    if strict:
        check_architecture(model, header, path)
    wrapped = is_wrapped(model)
    try:
        names = None if wrapped else blocks_to_wrap(model, header.backbone, strict, given, example_inputs)
        blocks = get_injection(model).blocks if wrapped else tuple(backbones.find_blocks(model, names, given, example_inputs))
    except UnsupportedBackboneError as error:
        raise CheckpointError(f"{path} does not fit this {architecture}: {one_line(error, 1000)}") from error
    expected, got = header.backbone, describe_blocks(architecture, blocks)
    for key in _compared_keys(strict):
        if expected[key] != got[key]:
            raise CheckpointError(
                f"{path} does not fit this {architecture}: the file has {key} {one_line(expected[key], 1000)}, "
                f"the model has {got[key]}."
            )
    match_adapter([block.width for block in blocks], config, tensors, path)
    current = find_adapter(model, name) if wrapped else None
    if current is not None and current.config != config:
        remedy = "call rein.unwrap(model) first, then rein.load wraps the model with the file's configuration"
        raise CheckpointError(
            f"{path} holds an adapter with {config}, the model is wrapped with {current.config}; "
            f"{remedy if name is None else 'load the file under another name'}."
        )

    def change() -> None:
        if current is not None:
            _replace_values(current, tensors)
            return
        with torch.random.fork_rng():  # the file overwrites the initial values: keep the caller's random state
            if wrapped and name is not None:
                added = new_adapter(model, blocks, config)
                added.load_state_dict(dict(tensors))
                add_adapter(model, name, added)
                return
            try:
                wrap(model, config, name=name, blocks=names, num_prefix_tokens=given, example_inputs=example_inputs)
                get_adapter(model).load_state_dict(dict(tensors))
            except BaseException:  # Ctrl-C included
                if is_wrapped(model):
                    unwrap(model)
                raise

    return change


def _replace_values(adapter: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into an adapter, completely or not at all."""
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    try:
        adapter.load_state_dict(dict(tensors))
    except BaseException:  # Ctrl-C included
        adapter.load_state_dict(before)
        raise


def _compared_keys(strict: bool) -> list[str]:
    """Keys of the `backbone` entry that must agree; the same blocks may have other paths in another architecture."""
    return ["widths", "num_prefix_tokens", *(["blocks"] if strict else [])]


def blocks_to_wrap(
    model: nn.Module, expected: Mapping[str, Any], strict: bool, given: int | None, example_inputs: Any
) -> list[str] | None:
    """Names of the blocks to pass to `wrap`, or None if `find_blocks` finds the expected blocks without them."""
    with suppress(UnsupportedBackboneError):
        got = describe_blocks("", backbones.find_blocks(model, None, given, example_inputs))
        if all(got[key] == expected[key] for key in _compared_keys(strict)):
            return None
    return list(dict.fromkeys(expected["blocks"]))  # a block with several outputs has several entries


def check_architecture(model: nn.Module, header: Header, path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `model` has the architecture name in the header."""
    name, expected = backbones.architecture(model), one_line(header.backbone["architecture"])
    if name != expected and name.partition(".")[0] == expected.partition(".")[0]:
        raise CheckpointError(
            f"{path} was trained on the weights {expected}, the model has {name}: other weights of the same architecture, with other "
            "features. Train the adapter again, or install the version of rein that wrote the file."
        )
    if name != expected:
        raise CheckpointError(
            f"{path} was trained on {expected}, the model is {name}; pass a {expected}, or strict=False if both compute the "
            "same features."
        )


def check_frozen_weights(model: nn.Module, header: Header, path: str | os.PathLike[str], *, built: bool = False) -> None:
    """Raise CheckpointError if the weights of the backbone differ from the sample of them in the header.

    Args:
        model: the backbone.
        header: of the file.
        path: the file.
        built: the backbone was built for this file, and not passed.
    """
    difference = facts.find_difference(model, header.backbone)
    if difference is not None:
        name, expected = facts.full_name(model), header.backbone.get("name", header.backbone["architecture"])
        remedy = "Load the weights on which it was trained"
        if built:
            remedy = "Pass a file of the weights on which it was trained: weights=FILE, on the command line --weights FILE"
        raise CheckpointError(
            f"{path} was trained on the weights {one_line(expected)}, the model has {'other ones' if name == expected else name}: "
            f"{difference}. {remedy}, or pass check_weights=False to load it all the same."
        )


def make_backbone(header: Header, path: str | os.PathLike[str], weights: str | os.PathLike[str] | None) -> nn.Module:
    """Build the backbone that a header states, frozen; arguments as for `Segmenter.load`.

    Raises:
        CheckpointError: the header does not state it, or it cannot be built.
        InputError: its weights cannot be downloaded, or do not fit.
    """
    stated, remedy = header.backbone, "Build the backbone, and pass it: rein.Segmenter.load(path, backbone)."
    if "name" not in stated:
        raise CheckpointError(
            f"{path} does not state how to build its backbone, {one_line(stated['architecture'])}; files of format version 1 do not, "
            f"nor do converted ones without the backbone's weights. {remedy}"
        )
    try:
        return facts.make(stated, weights)
    except UnsupportedBackboneError as error:
        raise CheckpointError(f"{path} has a backbone that cannot be built from its name: {one_line(error)} {remedy}") from error


def describe_backbone(model: nn.Module) -> dict[str, Any]:
    """Return the `backbone` entry of the header for a wrapped or bare model.

    Warns if parameters of a wrapped backbone train: files do not hold them.
    """
    name = backbones.architecture(model)
    if not is_wrapped(model):
        return {"architecture": name, **facts.describe(model)}
    injection = get_injection(model)
    trained = injection.unfrozen(model)
    if trained:
        warnings.warn(
            f"{len(trained)} parameters of the backbone are trainable ({list_names(trained, 3)}), but the file does not hold the "
            "backbone's weights. Save model.state_dict() too, or freeze them if they were not trained.",
            stacklevel=3,
        )
    return describe_blocks(name, injection.blocks) | {"given": injection.given, **facts.describe(model)}


def describe_blocks(name: str, blocks: Sequence[BlockInfo]) -> dict[str, Any]:
    """Return the `backbone` entry of the header, without `given`, for an architecture name and its adapted blocks."""
    return {
        "architecture": name,
        "blocks": [block.path for block in blocks],
        "widths": [block.width for block in blocks],
        "num_prefix_tokens": [block.num_prefix_tokens for block in blocks],
    }


def describe_file(path: str | os.PathLike[str]) -> str:
    """Return a readable summary of a file: tensors, backbone, configuration, head, classes, notes, and how to load it.

    Raises:
        CheckpointError: as `read`.
    """
    tensors, header = read(path)
    numbers, size = (sum(counts) for counts in zip(*((t.numel(), t.nbytes) for t in tensors.values()), strict=True))
    reader = "rein.load(model, path)" if header.kind == "adapter" else f"rein.Segmenter.load({arguments_to_load('path', header)})"
    rows = [
        ("tensors", f"{len(tensors)}, {numbers:,} numbers, {size / 1e6:.2f} MB"),
        *describe_header(header),
        ("load", reader),
    ]
    first = f"{path}: {header.kind}, format {header.format_version}, written by rein {header.rein_version}"
    return "\n".join([first, *(f"{title:9} {text}" for title, text in rows)])


def arguments_to_load(path: str, header: Header) -> str:
    """The arguments of `Segmenter.load` for a file, as code: the expression `path`, and the backbone or weights that it needs."""
    weights = ((header.about or {}).get("notes") or {}).get("weights_file")
    if "name" not in header.backbone:
        return f"{path}, backbone"
    return f"{path}, weights={json.dumps(one_line(weights))}" if isinstance(weights, str) else path


def describe_header(header: Header) -> list[tuple[str, str]]:
    """Return what a file states as pairs of a title and a text: backbone, configuration, head, classes and notes."""
    backbone, about = header.backbone, header.about or {}
    rows = [("backbone", facts.summary(backbone))]
    if "weights" in backbone:
        rows.append(("weights", f"compared when the file is loaded, by numbers of {len(backbone['weights'])} tensors"))
    if header.config is not None:
        blocks = backbone["blocks"]
        widths, prefix = (", ".join(str(value) for value, _ in groupby(backbone[key])) for key in ("widths", "num_prefix_tokens"))
        rows.append(("blocks", f"{len(blocks)}, {blocks[0]} to {blocks[-1]}; width {widths}; prefix tokens {prefix}"))
        rows.append(("config", ", ".join(f"{key}={value}" for key, value in header.config.to_dict().items())))
    if header.head is not None:
        settings = ", ".join(f"{key}={value}" for key, value in header.head["arguments"].items())
        rows.append(("head", f"{header.head['name']}({settings}) over blocks {header.head['indices']}"))
    if about.get("classes"):
        rows.append(("classes", f"{len(about['classes'])}: {', '.join(about['classes'])}"))
    if about.get("palette"):
        rows.append(("colours", " ".join("#" + "".join(f"{channel:02x}" for channel in colour) for colour in about["palette"])))
    if "normalization" in about:
        rows.append(("images", "normalised with " + _describe_value(about["normalization"])))
    if "ignore_label" in about:
        rows.append(("ignored", f"label {about['ignore_label']:g}"))
    notes = about.get("notes", {})
    return rows + [
        (one_line(key), one_line(_describe_value(notes[key]), 2000)) for key in notes if notes[key] not in (None, {}, [], "")
    ]


def _describe_value(value: Any) -> str:
    """A value of JSON as text: lists with commas, dictionaries as their keys with values; entries without a value are left out."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_describe_value(entry)}" for key, entry in value.items() if entry not in (None, {}, []))
    if isinstance(value, list):
        return ", ".join(map(_describe_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def match_adapter(widths: Sequence[int], config: ReinConfig, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `tensors` are those of an adapter for layers of these widths."""
    sizes = (config.num_tokens * (config.rank or widths[0]), (config.query_dim or 0) ** 2, len(widths))
    modules = len(list(groupby(widths))) if config.share else len(widths)
    if max(sizes) > _largest(tensors) or modules > len(tensors):  # before anything is built
        raise CheckpointError(f"{path} declares {config}, which is larger than its tensors. Restore the file from a copy.")
    with torch.device("meta"):
        match_tensors(build_adapter(widths, config, patch_size=1), tensors, path)


def build_head(
    head_class: type[Head], arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> Head:
    """Build a head with the arguments and tensors of a file. Keeps the random state.

    Sizes are compared with the tensors first and the head is built on the meta device, so a file cannot make it allocate memory.

    Raises:
        CheckpointError: invalid arguments, or the tensors are not those of such a head.
        MissingExtraError: the head needs an extra that is not installed.
    """
    check_head_sizes(arguments, tensors, path)
    try:
        with torch.device("meta"):
            match_tensors(head_class(**arguments), tensors, path)
        with torch.random.fork_rng(devices=[]):  # the file overwrites the initial values
            head = head_class(**arguments)
    except (CheckpointError, MissingExtraError):
        raise
    except Exception as error:  # the libraries that heads use raise their own kinds
        raise CheckpointError(f"{path} has invalid arguments for {head_class.__name__}: {one_line(error)}") from error
    head.load_state_dict(dict(tensors))
    return head


_LOSS_SETTINGS = {"class_weights", "loss", "num_points", "weights", "depth_range"}  # of a head; they are no sizes of tensors


def check_head_sizes(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if the arguments of a head declare more layers or wider ones than the tensors can hold."""
    for name, value in _numbers("", {key: value for key, value in arguments.items() if key not in _LOSS_SETTINGS}):
        most = len(tensors) if name.endswith("_layers") else _largest(tensors)
        if value > most:
            raise CheckpointError(
                f"{path} declares a head with {one_line(name)}={value}, more than its tensors hold. Restore the file from a copy."
            )


def _largest(tensors: Mapping[str, Tensor]) -> int:
    """Number of entries of the largest tensor."""
    return max((tensor.numel() for tensor in tensors.values()), default=0)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a value of JSON, with the nearest key above it."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(key, entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(name, entry)


def match_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `tensors` have the names and shapes of the state dict of `module`, and finite numbers."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in tensors.items()}
    shapes = [
        f"{key} is {got[key]}, expected {expected[key]}" for key in expected.keys() & got.keys() if expected[key] != got[key]
    ]
    differences = list_differences(expected.keys() - got.keys(), got.keys() - expected.keys(), shapes)
    if differences:
        raise CheckpointError(f"{path} does not match: {differences}.")
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path} has {key} of dtype {tensor.dtype}; expected one of {', '.join(map(str, _DTYPES))}.")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} has values that are not finite in {key}: training has diverged. Use an earlier file.")


def list_differences(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> str:
    """Return the differences between two state dicts as text for an error message; empty if there is none."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": sorted(shapes)}
    return "; ".join(f"{kind}: {list_names(entries)}" for kind, entries in kinds.items() if entries)


def list_names(names: Sequence[str], most: int = 20) -> str:
    """Return names for an error message: on one line, at most `most` of them and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(one_line, names[:most])) + more


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write tensors and header to `path`, atomically as `replace_file`.

    Tensors that are sharded over devices (FSDP2) are gathered, so every process must call this function. Each process writes the
    same file.

    Raises:
        CheckpointError: the folder does not exist or cannot be written; an existing file stays unchanged.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(
            f"{path} was not written: the model is on meta tensors, which hold no values. Load its weights first."
        )
    try:
        metadata = header.to_metadata()
        Header.from_metadata(metadata)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} was not written, because it could not be read again: {one_line(error)}. Expected facts in JSON's types: "
            "printable texts, finite numbers, lists and dictionaries."
        ) from error
    on_cpu = {name: _gather(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    content = to_bytes(on_cpu, metadata | {"sha256": _digest(on_cpu, metadata)})
    if (size := int.from_bytes(content[:8], "little")) > MAX_HEADER:
        raise InputError(
            f"{path} was not written, because it could not be read again: its header has {size:,} bytes, expected at most "
            f"{MAX_HEADER:,}. Shorten the notes."
        )
    replace_file(path, content)


def _gather(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (DTensor) as one tensor, and any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Header]:
    """Read the tensors and the header of a file, and check its digest.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not written by rein, or of a newer format; or, for an address on the
            hub, as `remote.fetch`.
    """
    local = fetch(path)
    try:
        tensors, metadata = read_safetensors(local)
    except SafetensorError as error:
        raise CheckpointError(
            pytorch_files.describe(local)
            or f"{path} is not a complete safetensors file: {one_line(error)}. Pass a file of rein, or restore it from a copy."
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason_of(error, local)}.") from error
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise CheckpointError(
            f"{path} is a safetensors file that rein did not write: its metadata has no {VERSION_KEY!r}. Pass a file written by "
            "rein.save or Segmenter.save."
        )
    if version not in _READABLE:
        raise CheckpointError(
            f"{path} has format version {one_line(version)}, rein {__version__} reads versions {', '.join(_READABLE)}; "
            f"{_how_to_upgrade(metadata)}."
        )
    digest = metadata.pop("sha256", None)
    if digest != _digest(tensors, metadata):
        raise CheckpointError(f"{path} was altered or damaged: its content does not match its sha256. Restore it from a copy.")
    try:
        return tensors, Header.from_metadata(metadata)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a header that rein {__version__} cannot read: {one_line(error)}") from error


def _how_to_upgrade(metadata: Mapping[str, str]) -> str:
    """What to install for a file of another format version."""
    wrote = re.fullmatch(r'"(\d+\.\d+\.\d+)"', metadata.get("rein_version", ""), re.ASCII)
    if wrote is None or _numbers_of(wrote[1]) <= _numbers_of(__version__):
        return "upgrade rein-adapter"
    return f"rein {wrote[1]} wrote it, so run: pip install 'rein-adapter>={wrote[1]}'"


def _numbers_of(version: str) -> list[int]:
    """The numbers with which a version begins."""
    return [int(number) for number in re.findall(r"\d+", version.partition("dev")[0])]


def _is_list(value: Any, entry_type: type) -> bool:
    """Whether `value` is a list with at least one entry, and every entry has exactly the type `entry_type`."""
    return isinstance(value, list) and bool(value) and all(type(entry) is entry_type for entry in value)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
