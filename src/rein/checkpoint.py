"""The file format of adapters and segmenters, and `save` and `load` for adapters.

A file is checked completely before the model changes. Writing replaces an existing file in one step. `docs/file-format.md` describes
the format, version 1: tensors named as in `model.rein.state_dict()` (with the prefixes `rein.` and `head.` in a segmenter file), and
the metadata `rein_format`, `kind`, `rein_version`, `config`, `backbone`, `head` and `sha256`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rein import backbones
from rein._version import __version__
from rein.backbones import BlockInfo
from rein.config import ReinConfig
from rein.errors import CheckpointError, InputError, UnsupportedBackboneError
from rein.injection import ADAPTER, Model, get_injection, is_wrapped, wrap
from rein.stagewise import build_adapter

VERSION_KEY, FORMAT_VERSION = "rein_format", 1


@dataclass(frozen=True)
class Header:
    """Metadata of an adapter or segmenter file.

    Attributes:
        kind: `adapter` or `segmenter`.
        config: configuration of the adapter; None for a segmenter without an adapter.
        backbone: the backbone that the file fits: `architecture` and, with an adapter, the lists `blocks`, `widths` and
            `num_prefix_tokens` with one entry per adapter layer, and `given`, the facts that the user passed to `wrap`.
        head: `name`, `arguments` and block `indices` of a segmenter's head; None in an adapter file.
        rein_version: version of rein that wrote the file.
    """

    kind: str
    config: ReinConfig | None
    backbone: dict[str, Any]
    head: dict[str, Any] | None = None
    rein_version: str = __version__

    def to_metadata(self) -> dict[str, str]:
        """Return the header as safetensors metadata: a dictionary of strings."""
        values = {
            "kind": self.kind,
            "rein_version": self.rein_version,
            "config": None if self.config is None else self.config.to_dict(),
            "backbone": self.backbone,
            "head": self.head,
        }
        fixed = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION)}  # `format` is a convention of safetensors
        return fixed | {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Header:
        """Parse the metadata that `to_metadata` returns.

        Raises:
            InputError, KeyError, TypeError, ValueError: an entry is missing or invalid.
        """
        entries = {key: json.loads(metadata.get(key, "null")) for key in ("kind", "rein_version", "backbone", "config", "head")}
        kind, version, backbone, config, head = entries.values()
        if kind not in ("adapter", "segmenter"):
            raise InputError(f"kind is {kind!r}, expected 'adapter' or 'segmenter'")
        if not (isinstance(backbone, dict) and isinstance(backbone.get("architecture"), str)):
            raise InputError("backbone has no architecture name")
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
                raise InputError(f"given of the backbone is {backbone['given']!r}, expected a dictionary")
        if kind == "segmenter" and not (
            isinstance(head, dict)
            and isinstance(head.get("name"), str)
            and isinstance(head.get("arguments"), dict)
            and _is_list(head.get("indices"), int)
        ):
            raise InputError(f"head is {head!r}, expected a dictionary with name, arguments and indices")
        return cls(kind, None if config is None else ReinConfig.from_dict(config), backbone, head, str(version))


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of a wrapped model to one safetensors file (about 12 MB for a ViT-L).

    Writing is atomic: after a crash, `path` holds the previous file or the new one, never a part of one.

    Raises:
        WrapError: the model is not wrapped.
        CheckpointError: the folder does not exist or cannot be written.
    """
    get_injection(model)
    adapter = getattr(model, ADAPTER)
    write(path, adapter.state_dict(), Header("adapter", adapter.config, describe_backbone(model)))


def load(model: Model, path: str | os.PathLike[str], *, strict: bool = True, example_inputs: Any = None) -> Model:
    """Load an adapter into `model`, in place; wrap the model first if it is bare.

    The function checks the file and the model completely before it changes anything. In a wrapped model only parameter values
    change: hooks, optimizers and compiled code stay valid.

    Args:
        model: the backbone that the adapter was trained on.
        path: a file that `save` wrote.
        strict: require the same architecture and block names; with False, equal widths, depth and prefix tokens suffice.
        example_inputs: as for `wrap`; needed if `model` is bare and was wrapped with them before.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is missing, damaged, not an adapter file, or does not fit the model.
        UnsupportedBackboneError, WrapError: as `wrap`.
    """
    tensors, header = read(path)
    if header.kind != "adapter":
        raise CheckpointError(f"{path} is a {header.kind} file, expected an adapter file; load it with rein.Segmenter.load.")
    return load_adapter(model, tensors, header, path, strict=strict, example_inputs=example_inputs)


def load_adapter(
    model: Model,
    tensors: Mapping[str, Tensor],
    header: Header,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    example_inputs: Any = None,
) -> Model:
    """Load an adapter from the tensors and header of a file; arguments, result and errors as for `load`."""
    config = header.config
    if config is None:
        raise CheckpointError(f"{path} holds no adapter, only a head for a bare backbone; load it with rein.Segmenter.load.")
    given = header.backbone["given"].get("num_prefix_tokens")
    name = backbones.architecture(model)
    if strict:
        check_architecture(model, header, path)
    wrapped = is_wrapped(model)
    try:
        names = None if wrapped else _blocks_to_wrap(model, header.backbone, strict, given, example_inputs)
        blocks = get_injection(model).blocks if wrapped else tuple(backbones.find_blocks(model, names, given, example_inputs))
    except UnsupportedBackboneError as error:
        raise CheckpointError(f"{path} does not fit this {name}: {error}") from error
    expected, got = header.backbone, describe_blocks(name, blocks)
    for key in _compared_keys(strict):
        if expected[key] != got[key]:
            raise CheckpointError(
                f"{path} does not fit this {name}: the file has {key} {expected[key]}, the model has {got[key]}."
            )
    if wrapped and getattr(model, ADAPTER).config != config:
        raise CheckpointError(
            f"{path} holds an adapter with {config}, the model is wrapped with {getattr(model, ADAPTER).config}; "
            "call rein.unwrap(model) first, then rein.load wraps the model with the file's configuration."
        )
    with torch.device("meta"):
        match_tensors(build_adapter([block.width for block in blocks], config, patch_size=1), tensors, path)
    if not wrapped:
        with torch.random.fork_rng():  # the file overwrites the initial values: keep the caller's random state
            wrap(model, config, blocks=names, num_prefix_tokens=given, example_inputs=example_inputs)
    getattr(model, ADAPTER).load_state_dict(dict(tensors))
    return model


def _compared_keys(strict: bool) -> list[str]:
    """Keys of the `backbone` entry that must agree; the same blocks may have other paths in another architecture."""
    return ["widths", "num_prefix_tokens", *(["blocks"] if strict else [])]


def _blocks_to_wrap(
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
    name, expected = backbones.architecture(model), header.backbone["architecture"]
    if name != expected:
        raise CheckpointError(
            f"{path} was trained on {expected}, the model is {name}; pass a {expected}, or strict=False if both compute the "
            "same features."
        )


def describe_backbone(model: nn.Module) -> dict[str, Any]:
    """Return the `backbone` entry of the header for a wrapped or bare model."""
    name = backbones.architecture(model)
    if not is_wrapped(model):
        return {"architecture": name}
    injection = get_injection(model)
    return describe_blocks(name, injection.blocks) | {"given": injection.given}


def describe_blocks(name: str, blocks: Sequence[BlockInfo]) -> dict[str, Any]:
    """Return the `backbone` entry of the header, without `given`, for an architecture name and its adapted blocks."""
    return {
        "architecture": name,
        "blocks": [block.path for block in blocks],
        "widths": [block.width for block in blocks],
        "num_prefix_tokens": [block.num_prefix_tokens for block in blocks],
    }


def describe_file(path: str | os.PathLike[str]) -> str:
    """Return a readable summary of a file: tensors, backbone, configuration, head and how to load it.

    Raises:
        CheckpointError: as `read`.
    """
    tensors, header = read(path)
    backbone = header.backbone
    lines = [
        f"{path}: {header.kind}, format {FORMAT_VERSION}, written by rein {header.rein_version}",
        f"tensors   {len(tensors)}, {sum(t.numel() for t in tensors.values()):,} numbers, {Path(path).stat().st_size / 1e6:.2f} MB",
        f"backbone  {backbone['architecture']}",
    ]
    if header.config is not None:
        blocks = backbone["blocks"]
        widths, prefix = (", ".join(str(value) for value, _ in groupby(backbone[key])) for key in ("widths", "num_prefix_tokens"))
        lines += [
            f"blocks    {len(blocks)}, {blocks[0]} to {blocks[-1]}; width {widths}; prefix tokens {prefix}",
            "config    " + ", ".join(f"{key}={value}" for key, value in header.config.to_dict().items()),
        ]
    if header.head is not None:
        settings = ", ".join(f"{key}={value}" for key, value in header.head["arguments"].items())
        lines.append(f"head      {header.head['name']}({settings}) over blocks {header.head['indices']}")
    reader = "rein.load(model, path)" if header.kind == "adapter" else "rein.Segmenter.load(path, backbone)"
    return "\n".join([*lines, f"load      {reader}"])


def match_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `tensors` have the names and shapes of the state dict of `module`."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in tensors.items()}
    shapes = [
        f"{key} is {got[key]}, expected {expected[key]}" for key in expected.keys() & got.keys() if expected[key] != got[key]
    ]
    differences = list_differences(expected.keys() - got.keys(), got.keys() - expected.keys(), shapes)
    if differences:
        raise CheckpointError(f"{path} does not match: {differences}.")


def list_differences(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> str:
    """Return the differences between two state dicts as text for an error message; empty if there is none."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": sorted(shapes)}
    return "; ".join(f"{kind}: {', '.join(entries)}" for kind, entries in kinds.items() if entries)


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write tensors and header to `path`, atomically as `replace_file`.

    Tensors that are sharded over devices (FSDP2) are gathered, so every process must call this function. Each process writes the
    same file.

    Raises:
        CheckpointError: the folder does not exist or cannot be written; an existing file stays unchanged.
    """
    on_cpu = {name: _gather(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    metadata = header.to_metadata()
    replace_file(path, to_bytes(on_cpu, metadata | {"sha256": _digest(on_cpu, metadata)}))


def _gather(tensor: Tensor) -> Tensor:
    """Return a sharded tensor (DTensor) as one tensor, and any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, sync it, and rename it to `path`.

    A reader sees the previous file or the new one, never a part of one.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    path = Path(path).resolve()  # replace the target of a symbolic link, not the link
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}.") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Header]:
    """Read the tensors and the header of a file, and check its digest.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not written by rein, or of a newer format.
    """
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    version = metadata.get(VERSION_KEY)
    if version is None:
        raise CheckpointError(
            f"{path} is a safetensors file that rein did not write: its metadata has no {VERSION_KEY!r}. Pass a file written by "
            "rein.save or Segmenter.save."
        )
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}, rein {__version__} reads version {FORMAT_VERSION}; upgrade rein-adapter."
        )
    digest = metadata.pop("sha256", None)
    if digest != _digest(tensors, metadata):
        raise CheckpointError(f"{path} was altered or damaged: its content does not match its sha256. Restore it from a copy.")
    try:
        return tensors, Header.from_metadata(metadata)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a header that rein {__version__} cannot read: {error}") from error


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
