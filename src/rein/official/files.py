"""Read official `.pth` files, load them into a backbone, and convert them to rein's files and back."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rein import backbones, checkpoint, heads, pytorch_files
from rein.backbones import facts
from rein.errors import CheckpointError, one_line
from rein.injection import ADAPTER, is_wrapped
from rein.official.state_dict import Official, convert, to_official_state
from rein.segmenter import Segmenter, default_indices


def read(path: str | os.PathLike[str], *, use_softmax: bool = True, zero_init: bool = False) -> Official:
    """Read an official `.pth` file and convert its names. No code in the file runs (see `rein.pytorch_files`).

    Args:
        path: the file: a state dict, or a dictionary with the key `state_dict`.
        use_softmax: `use_softmax` of the adapter's configuration, which the file does not store.
        zero_init: `zero_init` of the adapter's configuration; such an adapter has no parameter s (`scale`).

    Raises:
        CheckpointError: the file cannot be read safely, lacks keys, or has unknown keys.
    """
    content = pytorch_files.load(path)
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise CheckpointError(f"{pytorch_files.describe(path)} Expected a checkpoint of the authors' code.")
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} has no state dict; expected a dictionary of tensors, or one under the key 'state_dict'.")
    return convert(state, path, use_softmax=use_softmax, zero_init=zero_init)


def load(path: str | os.PathLike[str], backbone: nn.Module, *, use_softmax: bool = True, zero_init: bool = False) -> nn.Module:
    """Load an official checkpoint into a timm backbone, in place.

    Args:
        path: the official `.pth` file.
        backbone: the bare timm model. If the file has no backbone weights, the model must have the public pretrained weights; for
            DINOv2 with patch size 16, resampled with `resample`.
        use_softmax: as in `read`.
        zero_init: as in `read`.

    Returns:
        A `Segmenter` over the wrapped `backbone` if the file has a head, else `backbone` itself.

    Raises:
        CheckpointError: as `read`, or the tensors do not fit; the backbone stays unchanged.
    """
    official = read(path, use_softmax=use_softmax, zero_init=zero_init)
    if is_wrapped(backbone):
        raise CheckpointError("rein.official.load expects a bare backbone, got a wrapped one; call rein.unwrap(backbone) first.")
    if official.backbone:
        _check_backbone(backbone, official.backbone, path)
    head = _build_head(backbone, official, path)
    if official.config is not None:
        entry = _backbone_entry(backbone, backbones.find_blocks(backbone))
        checkpoint.check_adapter(backbone, official.adapter, checkpoint.Header("adapter", official.config, entry), path)()
    if official.backbone:
        backbone.load_state_dict(official.backbone, strict=False)
    if head is None:
        return backbone
    reference = next(backbone.parameters())
    head.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
    return Segmenter(backbone, head)


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    use_softmax: bool = True,
    zero_init: bool = False,
) -> list[Path]:
    """Convert an official `.pth` file to rein's safetensors file, and its backbone weights, if any, to a second file.

    Args:
        source: the official file.
        target: the file to write, for `rein.load` or `rein.Segmenter.load`. If the source has backbone weights, it states how to
            build the backbone, and a sample of the weights.
        backbone: the bare timm model that the file fits. Only shapes are used, so the model may be on the meta device.
        use_softmax: as in `read`.
        zero_init: as in `read`.

    Returns:
        The files written: `target` and, if the source has backbone weights, `<stem of target>.backbone.safetensors`, which timm
        reads with `create_model(..., checkpoint_path=...)`.

    Raises:
        CheckpointError: as `load`, or the file has neither adapter nor head, or `target` cannot be written.
    """
    official = read(source, use_softmax=use_softmax, zero_init=zero_init)
    if official.config is None and official.head is None:
        raise CheckpointError(f"{source} has neither an adapter nor a head; expected at least one of them.")
    entry: dict[str, Any] = {"architecture": backbones.architecture(backbone)}
    tensors: dict[str, Tensor] = {}
    if official.config is not None:
        blocks = backbones.find_blocks(backbone)
        entry = _backbone_entry(backbone, blocks)
        checkpoint.match_adapter([block.width for block in blocks], official.config, official.adapter, source)
        tensors = dict(official.adapter)
    header = checkpoint.Header("adapter", official.config, entry)
    head = _build_head(backbone, official, source)
    if head is not None:
        tensors = {f"{ADAPTER}.{name}": value for name, value in tensors.items()}
        tensors |= {f"head.{name}": value for name, value in official.head_tensors.items()}
        indices = default_indices(len(backbones.map_channels(backbone)), 4)
        head_entry = {"name": "Mask2FormerHead", "arguments": head.arguments, "indices": indices}
        header = checkpoint.Header("segmenter", official.config, entry, head_entry)
    if official.backbone:
        _check_backbone(backbone, official.backbone, source)
        header.backbone.update(facts.describe(_filled(backbone, official.backbone)))
    checkpoint.write(target, tensors, header)
    written = [Path(target)]
    if official.backbone:
        backbone_file = Path(target).with_suffix(".backbone.safetensors")
        checkpoint.replace_file(backbone_file, to_bytes({name: value.contiguous() for name, value in official.backbone.items()}))
        written.append(backbone_file)
    return written


def to_official(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Convert rein's safetensors file to an official file, `{"state_dict": ...}`; the inverse of `convert_file`.

    The official layout does not store `use_softmax` and `zero_init`. Pass values other than the defaults to `convert_file`.

    Raises:
        CheckpointError: the source cannot be read, or the official layout has no names for its content: an adapter with
            `share=False`, another head than `Mask2FormerHead`, or other blocks than the paper's.
    """
    tensors, header = checkpoint.read(source)
    if header.config is not None and not header.config.share:
        raise CheckpointError(f"{source} has an adapter with share=False; the official layout supports only share=True.")
    if header.head is not None:
        if header.head["name"] != "Mask2FormerHead":
            raise CheckpointError(f"{source} has a {header.head['name']}; the official layout supports only Mask2FormerHead.")
        widths = header.backbone.get("widths")
        # the backbone gives one map per block, or one map per stage if the widths differ
        num_maps = None if widths is None else len(widths) if len(set(widths)) == 1 else len(list(groupby(widths)))
        indices = header.head["indices"]
        if num_maps is not None and (num_maps < 4 or indices != default_indices(num_maps, 4)):
            raise CheckpointError(
                f"{source} has a head with block indices {indices}; the official layout supports only the default."
            )
    prefix = f"{ADAPTER}." if header.kind == "segmenter" else ""
    adapter = {name.removeprefix(prefix): value for name, value in tensors.items() if not name.startswith("head.")}
    head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    arguments = {} if header.head is None else header.head["arguments"]
    checkpoint.check_head_sizes(arguments, head, source)
    try:
        state = to_official_state(adapter, head, arguments)
    except (LookupError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{source} lacks a tensor of its adapter or head: {one_line(error)}. Restore it from a copy."
        ) from error
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "meta": {}}, buffer)
    checkpoint.replace_file(target, buffer.getvalue())


def _backbone_entry(backbone: nn.Module, blocks: list[backbones.BlockInfo]) -> dict[str, Any]:
    """The `backbone` entry of a header for an adapter on all blocks of `backbone`."""
    return checkpoint.describe_blocks(backbones.architecture(backbone), blocks) | {"given": {}}


def _build_head(backbone: nn.Module, official: Official, path: str | os.PathLike[str]) -> heads.Head | None:
    """Build the head of a checkpoint, and check that it fits the file and the backbone."""
    if official.head is None:
        return None
    config, query_dim = official.config, official.head["channels"]
    if official.head["num_queries"] is None and (config is None or config.query_dim != query_dim):
        adapter = "no adapter" if config is None else f"an adapter with query_dim={config.query_dim}"
        raise CheckpointError(f"{path} has a head that expects an adapter with query_dim={query_dim}, but {adapter}.")
    channels = backbones.map_channels(backbone)
    got = [channels[index] for index in default_indices(len(channels), 4)] if len(channels) >= 4 else channels
    if got != official.head["in_channels"]:
        raise CheckpointError(
            f"{path} does not fit this {backbones.architecture(backbone)}: its head expects maps of "
            f"{official.head['in_channels']} channels, the model's maps have {got}."
        )
    return checkpoint.build_head(heads.Mask2FormerHead, official.head, official.head_tensors, path)


def _filled(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A frozen copy of the backbone with these weights; the backbone stays unchanged."""
    with torch.device("meta"):
        filled = copy.deepcopy(backbone).to("meta")
    filled.load_state_dict(tensors, strict=False, assign=True)
    return filled.requires_grad_(False)


def _check_backbone(backbone: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `tensors` fit `backbone`. They may lack the classifier, and either may lack the final norm."""
    expected = {key: value for key, value in backbone.state_dict().items() if not key.startswith(("head.", "fc_norm."))}
    # timm stores tables of rotary embeddings that it computes itself; no official file has them
    missing = [key for key in expected.keys() - tensors.keys() if "rope" not in key and not key.startswith("norm.")]
    unexpected = [key for key in tensors.keys() - expected.keys() if not key.startswith("norm.")]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected.keys() & tensors.keys()
        if expected[key].shape != tensors[key].shape
    ]
    differences = checkpoint.list_differences(missing, unexpected, shapes)
    if differences:
        raise CheckpointError(f"{path} does not fit this {backbones.architecture(backbone)}: {differences}.")
