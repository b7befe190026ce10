"""Build a timm backbone by name, with pretrained weights from the hub, from a file, or with random ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from rein import pytorch_files
from rein.backbones.blocks import find_blocks
from rein.backbones.pocket import POCKET, pocket_vit
from rein.backbones.resampling import resample
from rein.errors import CheckpointError, InputError, ReinError, one_line
from rein.files import read_safetensors, reason_of
from rein.remote import ask_hub_once


def make_backbone(
    name: str,
    pretrained: bool,
    patch_size: int | None = None,
    *,
    img_size: int | tuple[int, ...] | None = None,
    weights: Path | None = None,
    dynamic_img_size: bool = True,
    resample_as_authors: bool = True,
) -> nn.Module:
    """A timm model, or `rein.testing.pocket_vit`, without a classifier; it takes images of any size if its class can.

    Random weights come from torch's global random state.

    Args:
        name: timm's name, or `pocket_vit`.
        pretrained: load timm's pretrained weights from the hub; those of `pocket_vit` are part of the package.
        patch_size: side in pixels; None means the model's own. Weights of a ViT with a class token are resampled the authors' way
            (`rein.official.resample`), others, and those of `pocket_vit`, timm's way.
        img_size: side, or (height, width), in pixels of the images to build for; None means timm's own.
        weights: file with weights under timm's names, for the model's own patch size.
        dynamic_img_size: accept images of any size, where the class can; otherwise those of `img_size` only.
        resample_as_authors: False resamples every backbone timm's way.

    Raises:
        InputError: timm has no such model or no pretrained weights for it, they cannot be downloaded, or the file does not fit.
        CheckpointError: the file cannot be read, or asks for more memory than its size.
        UnsupportedBackboneError: rein does not know the model's blocks.
    """
    if name != POCKET and not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        remedy = f"Similar names: {', '.join(near)}." if near else f"See timm.list_models(); {POCKET} is part of rein."
        raise InputError(f"timm has no model {name!r}. {remedy}")
    sizes = {"patch_size": patch_size, "img_size": img_size}
    settings: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    if not dynamic_img_size:
        settings["dynamic_img_size"] = False
    state: Mapping[str, Tensor] | None = None
    try:
        if weights is not None:
            state = _read_weights(weights)
        elif name == POCKET and pretrained:
            model = pocket_vit(**settings)
        elif pretrained:
            model = _download(name)
            if settings:
                state = model.state_dict()
        if state is not None or not pretrained:
            model = _create(name, False, settings)
        if state is not None:
            model = _fill(model, state, name, settings, patch_size if resample_as_authors else None)
    except ReinError:
        raise
    except Exception as error:  # each model checks its settings in its own way, or not at all
        raise InputError(f"timm cannot build {name!r} with {settings}: {one_line(error)}") from error
    if weights is not None or not pretrained:
        forget_weights(model)
    find_blocks(model)
    return model


def forget_weights(model: nn.Module) -> None:
    """Take the tag, licence and address of timm's weights out of a model that does not have them."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in ("tag", "license", "hf_hub_id", "url", "source")}
        model.pretrained_cfg = kept  # type: ignore[assignment]


def _download(name: str) -> nn.Module:
    """The model with timm's pretrained weights."""
    try:
        with ask_hub_once():
            return _create(name, True, {})
    except Exception as error:  # each kind of hub failure has a class of its own
        if "pretrained" in str(error):  # timm's message for an unknown tag or a model without weights
            raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].partition(". ")[0]
        raise InputError(
            f"the weights of {name} cannot be downloaded ({reason}). Pass a file of weights: weights=FILE in Python, "
            "--weights FILE on the command line, --model.weights FILE for a run (or random ones: --model.pretrained false)."
        ) from error


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    if name == POCKET:
        return pocket_vit(pretrained=False, **settings)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **{"dynamic_img_size": True, **settings})
    except TypeError:  # the class does not have that argument
        others = {key: value for key, value in settings.items() if key != "dynamic_img_size"}
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **others)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a PyTorch file whose code does not run."""
    if path.suffix == ".safetensors":
        try:
            return read_safetensors(path)[0]
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file: {one_line(error)}. If it is a PyTorch file, let its name end in .pth."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {reason_of(error, path)}. Pass an existing file (--weights, for a run --model.weights)."
            ) from error
    found = pytorch_files.load(path)
    for key in ("state_dict", "model"):  # usual names of the entry that holds the tensors
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} holds no tensors by name; expected a state dict.")
    return found


def _fill(
    model: nn.Module, state: Mapping[str, Tensor], name: str, settings: dict[str, Any], patch_size: int | None
) -> nn.Module:
    """Load weights into `model`; timm's own filter converts them to its patch and image size.

    Raises:
        InputError: tensors are missing or have another shape.
    """
    wanted = model.state_dict()
    _check_shapes(state, wanted)
    try:
        own_grid, grid = (_grid_side(tensors.get("pos_embed")) for tensors in (wanted, state))
        if patch_size and own_grid and grid and state["patch_embed.proj.weight"].shape[-1] != patch_size:
            state = resample(state, patch_size, own_grid)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        tensors = dict(state) if convert is None else convert(dict(state), model)
        tensors |= {key: _resized(key, tensors[key], wanted[key].shape) for key in wanted if key in tensors}
    except Exception as error:  # timm's filters take it that the tensors fit
        raise InputError(
            f"the weights do not fit {name} with {settings}: they cannot be converted ({type(error).__name__}: {one_line(error)}). "
            "Pass weights of this model: weights=FILE in Python, --weights FILE, or --model.weights FILE for a run."
        ) from error
    missing = [key for key in wanted if key not in tensors or not _are_alike(tensors[key], wanted[key])]
    if missing:
        raise InputError(
            f"the weights do not fit {name} with {settings}: {', '.join(missing[:6])} are missing or have another shape or type. "
            "Pass weights of this model: weights=FILE in Python, --weights FILE, or --model.weights FILE for a run."
        )
    model.load_state_dict({key: tensors[key] for key in wanted})
    return model


def _check_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise InputError for a table or a kernel with which timm's resampling would take far more memory than the file."""
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise InputError(f"the weights have an entry {one_line(repr(key))}; expected tensors by name.")
        shape = tuple(tensor.shape)
        sides = shape[2:] if len(shape) == 4 and not key.endswith("pos_embed") else ()
        if shape and (key not in wanted or wanted[key].shape != shape) and (max(sides, default=0) > 64 or shape[-1] > 16_384):
            raise InputError(
                f"the weights have {one_line(key)} of shape {shape}; expected kernels of at most 64 pixels and no other tensor wider "
                "than 16,384. Pass weights of this model: weights=FILE in Python, --weights FILE, or --model.weights FILE for a run."
            )


def _are_alike(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor has the shape of another one and numbers that can replace its numbers."""
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return tensor.shape == wanted.shape and (tensor.dtype in floats) == wanted.is_floating_point()


def _resized(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """SAM's position embedding (1, H, W, C) and relative positions (2 N - 1, C) for another image size, which timm does not convert.

    Relative positions are interpolated linearly, as SAM itself does for another size; the embedding bicubically.
    """
    if tensor.shape == shape or tensor.shape[-1] != shape[-1]:
        return tensor
    if name == "pos_embed" and tensor.ndim == len(shape) == 4:
        grid = F.interpolate(tensor.float().permute(0, 3, 1, 2), shape[1:3], mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).to(tensor.dtype).contiguous()
    if name.endswith((".rel_pos_h", ".rel_pos_w")) and tensor.ndim == len(shape) == 2:
        return F.interpolate(tensor.float().mT[None], shape[0], mode="linear", align_corners=False)[0].mT.to(tensor.dtype)
    return tensor


def _grid_side(positions: Tensor | None) -> int | None:
    """Side of the square grid of a position embedding (1, 1 + N, C) with a class token first; None for any other tensor."""
    if positions is None or positions.ndim != 3:
        return None
    side = round(max(0, positions.shape[1] - 1) ** 0.5)
    return side if side and side * side == positions.shape[1] - 1 else None
