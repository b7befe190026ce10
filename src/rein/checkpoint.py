"""`save` and `load`: an adapter in one safetensors file, and the file format itself.

Everything about a file is checked before anything about a model is changed, and a file is replaced only by a complete new one.

Format, version 1: tensors named as in `model.rein.state_dict()`. Metadata: `rein_format`; `kind`, which is `adapter`, or
`segmenter` where the names have the prefixes `rein.` and `head.`; `rein_version`, `config`, `backbone`, `head`; and `sha256`, the
digest of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
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
from rein.adapter import build_adapter
from rein.backbones import Site
from rein.config import ReinConfig
from rein.errors import CheckpointError, InputError, UnsupportedBackboneError
from rein.injection import ADAPTER, Model, injection_of, is_wrapped, wrap

VERSION_KEY, FORMAT_VERSION = "rein_format", 1


@dataclass(frozen=True)
class Header:
    """What a file says of itself, besides its tensors.

    Attributes:
        kind: `adapter` or `segmenter`.
        config: of the adapter; None in a segmenter without one.
        backbone: what the model must be: `architecture` and, with an adapter, `blocks`, `widths` and `num_prefix_tokens`, one
            of each per layer.
        head: how to build a segmenter's head again; None in an adapter file.
        rein_version: the version that wrote the file.
    """

    kind: str
    config: ReinConfig | None
    backbone: dict[str, Any]
    head: dict[str, Any] | None = None
    rein_version: str = __version__

    def to_metadata(self) -> dict[str, str]:
        """The header as safetensors metadata, strings to strings."""
        values = {
            "kind": self.kind,
            "rein_version": self.rein_version,
            "config": None if self.config is None else self.config.to_dict(),
            "backbone": self.backbone,
            "head": self.head,
        }
        plain = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION)}  # `format` is safetensors' own convention
        return plain | {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Header:
        """The way back. Raises InputError, KeyError, TypeError or ValueError on a header that says less or other than it must."""
        entries = {key: json.loads(metadata.get(key, "null")) for key in ("kind", "rein_version", "backbone", "config", "head")}
        kind, version, backbone, config, head = entries.values()
        if kind not in ("adapter", "segmenter"):
            raise InputError(f"its kind is {kind!r}")
        if not (isinstance(backbone, dict) and isinstance(backbone.get("architecture"), str)):
            raise InputError("it does not say which backbone it is for")
        if config is None and kind == "adapter":
            raise InputError("it has no adapter configuration")
        if config is not None:
            facts = [backbone.get(key) for key in ("blocks", "widths", "num_prefix_tokens")]
            if (
                not all(_is_list(fact, kind) for fact, kind in zip(facts, (str, int, int), strict=True))
                or len({len(fact or ()) for fact in facts}) > 1
            ):
                raise InputError("its facts about the backbone's blocks are not one per block")
            if not isinstance(backbone.setdefault("given", {}), dict):
                raise InputError("what was given about its backbone is not a dictionary")
        if kind == "segmenter" and not (
            isinstance(head, dict)
            and isinstance(head.get("name"), str)
            and isinstance(head.get("arguments"), dict)
            and _is_list(head.get("indices"), int)
        ):
            raise InputError("it does not say how to build its head")
        return cls(kind, None if config is None else ReinConfig.from_dict(config), backbone, head, str(version))


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of a wrapped model to one safetensors file (about 12 MB for a ViT-L).

    The file is written beside `path`, synced and renamed: a crash leaves an older file whole.

    Raises:
        WrapError: the model is not wrapped.
        CheckpointError: the folder does not exist or cannot be written.
    """
    injection_of(model)
    adapter = getattr(model, ADAPTER)
    write(path, adapter.state_dict(), Header("adapter", adapter.config, describe(model)))


def load(model: Model, path: str | os.PathLike[str], *, strict: bool = True, example_inputs: Any = None) -> Model:
    """Read an adapter into `model`, in place; an unwrapped model is wrapped first.

    The file and its fit are checked completely before anything is changed. In a wrapped model only values change: hooks,
    optimizers and compiled code stay valid.

    Args:
        model: the backbone that the adapter was trained on.
        path: a file that `save` wrote.
        strict: also require the same architecture name; with False, equal widths, depth and prefix tokens are enough.
        example_inputs: as for `wrap`, where the model is bare and was wrapped with them.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is missing, damaged, no adapter, or does not fit; the message says which.
        UnsupportedBackboneError, WrapError: as `wrap`.
    """
    tensors, header = read(path)
    if header.kind != "adapter":
        raise CheckpointError(f"{path} holds a {header.kind}, not an adapter alone; read it with rein.Segmenter.load.")
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
    """Give `model` the adapter of a file that was read: check the fit, wrap where needed, then copy."""
    config = header.config
    if config is None:
        raise CheckpointError(f"{path} holds no adapter, only a head over a bare backbone.")
    given = header.backbone["given"].get("num_prefix_tokens")
    name = backbones.architecture(model)
    if strict:
        check_architecture(model, header, path)
    wrapped = is_wrapped(model)
    try:
        blocks = None if wrapped else _blocks_to_wrap(model, header.backbone, strict, given, example_inputs)
        sites = injection_of(model).sites if wrapped else tuple(backbones.find_sites(model, blocks, given, example_inputs))
    except UnsupportedBackboneError as error:
        raise CheckpointError(f"{path} does not fit this {name}: {error}") from error
    wanted, got = header.backbone, describe_sites(name, sites)
    # by another name the same blocks may have other paths
    for fact in ("widths", "num_prefix_tokens", *(["blocks"] if strict else [])):
        if wanted[fact] != got[fact]:
            raise CheckpointError(
                f"{path} does not fit this {name}: its {fact} per block are {wanted[fact]}, the model's are {got[fact]}."
            )
    if wrapped and getattr(model, ADAPTER).config != config:
        raise CheckpointError(
            f"{path} holds an adapter with {config}, the model is wrapped with {getattr(model, ADAPTER).config}; "
            "call rein.unwrap(model) first, and load wraps it anew."
        )
    with torch.device("meta"):
        match_tensors(build_adapter([site.width for site in sites], config, patch_size=1), tensors, path)
    if not wrapped:
        with torch.random.fork_rng():  # the initial values are overwritten at once: leave the caller's random state alone
            wrap(model, config, blocks=blocks, num_prefix_tokens=given, example_inputs=example_inputs)
    getattr(model, ADAPTER).load_state_dict(dict(tensors))
    return model


def _blocks_to_wrap(
    model: nn.Module, wanted: Mapping[str, Any], strict: bool, given: int | None, example_inputs: Any
) -> list[str] | None:
    """None where rein finds the wanted blocks by itself, else their names; a block with several outputs is wanted several times."""
    with suppress(UnsupportedBackboneError):
        sites = backbones.find_sites(model, None, given, example_inputs)
        got = describe_sites("", sites)
        if all(got[fact] == wanted[fact] for fact in ("widths", "num_prefix_tokens", *(["blocks"] if strict else []))):
            return None
    return list(dict.fromkeys(wanted["blocks"]))


def check_architecture(model: nn.Module, header: Header, path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless the file was trained over this architecture, by name."""
    name, wanted = backbones.architecture(model), header.backbone["architecture"]
    if name != wanted:
        raise CheckpointError(
            f"{path} was trained on {wanted}, the model is {name}; use that one, or strict=False where both give the same features."
        )


def describe(model: nn.Module) -> dict[str, Any]:
    """What a backbone must be for the adapter of `model`, or for a head over `model` where that is bare."""
    name = backbones.architecture(model)
    if not is_wrapped(model):
        return {"architecture": name}
    injection = injection_of(model)
    return describe_sites(name, injection.sites) | {"given": injection.given}


def describe_sites(name: str, sites: Sequence[Site]) -> dict[str, Any]:
    """The `backbone` entry of the header."""
    return {
        "architecture": name,
        "blocks": [site.path for site in sites],
        "widths": [site.width for site in sites],
        "num_prefix_tokens": [site.num_prefix_tokens for site in sites],
    }


def describe_file(path: str | os.PathLike[str]) -> str:
    """What a file is and what it fits, in a few readable lines.

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
    """Raise CheckpointError unless `tensors` are exactly those of `module`, by name and shape."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in tensors.items()}
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    shapes = [f"{key} is {got[key]}, wanted {wanted[key]}" for key in wanted.keys() & got.keys() if wanted[key] != got[key]]
    if missing or extra or shapes:
        found = [("missing", missing), ("unexpected", extra), ("wrong shape", sorted(shapes))]
        raise CheckpointError(
            f"{path} does not match: " + "; ".join(f"{what}: {', '.join(names)}" for what, names in found if names)
        )


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write a complete file beside `path`, sync it, and rename it over `path`.

    Tensors that are spread over devices (FSDP2) are gathered, for which every process must come here; each writes the same file.

    Raises:
        CheckpointError: the folder does not exist or cannot be written; an older file is untouched.
    """
    on_cpu = {name: _gathered(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    metadata = header.to_metadata()
    replace_file(path, to_bytes(on_cpu, metadata | {"sha256": _digest(on_cpu, metadata)}))


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, wherever its parts are."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put `content` at `path` in one step: whoever looks finds the older file or the newer one, whole.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    path = Path(path).resolve()  # through a link, to what it points to
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
    """Tensors and header of a file, checked against its digest.

    Raises:
        CheckpointError: the file is missing, not one of rein's, newer than this rein, truncated or altered.
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
        raise CheckpointError(f"{path} is a safetensors file, but not one that rein wrote: its metadata has no {VERSION_KEY!r}.")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}, this rein reads version {FORMAT_VERSION}; upgrade rein-adapter."
        )
    digest = metadata.pop("sha256", None)
    if digest != _digest(tensors, metadata):
        raise CheckpointError(f"{path} was altered or damaged: its contents do not match its sha256.")
    try:
        return tensors, Header.from_metadata(metadata)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a header that this rein {__version__} cannot read: {error}") from error


def _is_list(value: Any, kind: type) -> bool:
    """Whether `value` is a list of at least one `kind`, as JSON gives it."""
    return isinstance(value, list) and bool(value) and all(type(entry) is kind for entry in value)


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
