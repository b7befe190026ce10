"""What is true of a given backbone: its blocks, their widths, layouts and prefix rows, the images it takes, its maps.

The one place that knows timm facts. What differs between families is a row of `_FAMILIES`; everything that can be measured is
measured, on meta tensors, without touching weights, modes, memory or the random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rein.errors import InputError, UnsupportedBackboneError
from rein.modes import evaluating


@dataclass(frozen=True)
class Family:
    """One row: how timm names the parts of a class of models."""

    blocks: str  # path of the container whose children are the blocks, in order


_FAMILIES = {
    "VisionTransformer": Family(blocks="blocks"),
    "Eva": Family(blocks="blocks"),
}


@dataclass(frozen=True)
class Site:
    """A block whose output an adapter refines.

    Attributes:
        path: the block's name among the model's modules.
        width: C of its output (B, N, C).
        num_prefix_tokens: leading rows of its output that are no patches, measured.
    """

    path: str
    width: int
    num_prefix_tokens: int


@dataclass(frozen=True)
class InputSpec:
    """The images that a backbone takes.

    Attributes:
        fixed_size: (height, width) in pixels, or None where any multiple of `multiple` will do.
        multiple: (height, width) of a patch in pixels.
        channels: of the image.
    """

    fixed_size: tuple[int, int] | None
    multiple: tuple[int, int]
    channels: int


def find_sites(
    model: nn.Module,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
) -> list[Site]:
    """Where an adapter belongs in `model`, and what is true there.

    Args:
        model: a timm model of a known family; with `blocks`, any model that maps an image to something.
        blocks: the blocks themselves or their names, in the order in which they run.
        num_prefix_tokens: rows before the patches, where they cannot be measured.

    Raises:
        UnsupportedBackboneError: the blocks are not known, do not give (B, N, C) tensors or cannot be measured.
    """
    paths = _block_paths(model, blocks)
    shapes, num_patches = _measure(model, paths)
    sites = []
    for path in paths:
        if path not in shapes:
            raise UnsupportedBackboneError(
                f"block {path!r} did not run when the model was measured; leave it out of blocks=[...]."
            )
        shape = shapes[path]
        if shape is None or len(shape) != 3:
            got = "no tensor" if shape is None else f"a tensor of shape {tuple(shape)}"
            raise UnsupportedBackboneError(
                f"block {path!r} of {architecture(model)} gives {got}; rein adapts blocks that give (B, N, C) tokens. "
                "Name such blocks with blocks=[...]."
            )
        prefix = num_prefix_tokens
        if prefix is None and num_patches is not None:
            prefix = shape[1] - num_patches
        if prefix is None or not 0 <= prefix < shape[1]:
            raise UnsupportedBackboneError(
                f"how many prefix tokens (class, register, ...) {architecture(model)} has is not known at block {path!r}: it "
                f"gives {shape[1]} rows for {num_patches if num_patches is not None else 'an unknown number of'} patches. "
                "Give it with num_prefix_tokens=N."
            )
        sites.append(Site(path, shape[2], prefix))
    return sites


def _family(model: nn.Module) -> Family | None:
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.") and cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    return None


def _block_paths(model: nn.Module, blocks: Sequence[str | nn.Module] | None) -> list[str]:
    if blocks is None:
        family = _family(model)
        if family is None:
            raise UnsupportedBackboneError(
                f"where the blocks of {type(model).__name__} are is not known; known are timm's {', '.join(_FAMILIES)}. "
                "Give them with blocks=[...], the modules or their names, in the order in which they run."
            )
        container = model.get_submodule(family.blocks)
        return [f"{family.blocks}.{name}" for name, _ in container.named_children()]
    if isinstance(blocks, str):
        raise UnsupportedBackboneError(f"blocks is the string {blocks!r}; it must be a list of modules or of their names.")
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    paths = []
    for block in blocks:
        path = block if isinstance(block, str) else names.get(id(block))
        if path is None or path not in modules:
            what = repr(block) if isinstance(block, str) else f"a {type(block).__name__}"
            raise UnsupportedBackboneError(
                f"blocks=[...] names {what}, which is not in the model; take names from model.named_modules()."
            )
        paths.append(path)
    if not paths or len(set(paths)) < len(paths):
        raise UnsupportedBackboneError(f"blocks=[...] must name at least one block, and none twice; got {paths}.")
    return paths


def _measure(model: nn.Module, paths: Sequence[str]) -> tuple[dict[str, torch.Size | None], int | None]:
    """Output shape of every block (None: no tensor) on a meta image, and the patches of that image where they are known."""
    shapes: dict[str, torch.Size | None] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            shapes[path] = output.shape if isinstance(output, Tensor) else None

        return hook

    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
    }
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    spec = input_spec(model)
    # patches that are not as many along both sides, where the model takes them
    size = spec.fixed_size or (2 * spec.multiple[0], 3 * spec.multiple[1])
    image = torch.empty(1, spec.channels, *size, dtype=dtype, device="meta")
    handles = [model.get_submodule(path).register_forward_hook(record(path)) for path in paths]
    try:
        with evaluating(model), torch.no_grad():
            functional_call(model, tensors, (image,))
    except Exception as error:
        if len(shapes) < len(paths):  # else the blocks were seen, and only what follows them failed
            raise UnsupportedBackboneError(
                f"the blocks of {architecture(model)} could not be measured on a meta image of shape {tuple(image.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    finally:
        for handle in handles:
            handle.remove()
    patch_embed: Any = getattr(model, "patch_embed", None)
    if hasattr(patch_embed, "dynamic_feat_size"):
        height, width = patch_embed.dynamic_feat_size(size)
        return shapes, height * width
    return shapes, None


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class's name for other models."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    return name or type(model).__name__


def patch_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of a patch in pixels, a convolutional stem included; 16 x 16 where the model has no patches."""
    embed: Any = getattr(model, "patch_embed", None)
    size = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else getattr(embed, "patch_size", 16)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def input_spec(model: nn.Module) -> InputSpec:
    """The images that `model` takes."""
    embed: Any = getattr(model, "patch_embed", None)
    first = next((module for module in (embed or model).modules() if isinstance(module, nn.Conv2d)), None)
    fixed = None if getattr(model, "dynamic_img_size", False) else getattr(embed, "img_size", None)
    return InputSpec(
        fixed_size=None if fixed is None else (int(fixed[0]), int(fixed[1])),
        multiple=patch_size(model),
        channels=3 if first is None else first.in_channels,
    )


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for images from 0 to 1, that the weights were trained with; ImageNet's by default."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return (
        tuple(config.get("mean", (0.485, 0.456, 0.406))),
        tuple(config.get("std", (0.229, 0.224, 0.225))),
    )


def widths(model: nn.Module) -> list[int]:
    """C of every block's output, in order.

    Raises:
        UnsupportedBackboneError: as `find_sites`.
    """
    return [site.width for site in find_sites(model)]


def num_blocks(model: nn.Module) -> int:
    """How many blocks `feature_maps` can index.

    Raises:
        UnsupportedBackboneError: the model's family is not known.
    """
    return len(_block_paths(model, None))


def feature_maps(model: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The blocks' outputs as maps (B, C, h, w), without prefix tokens and without the final norm.

    Args:
        model: a timm model, bare or wrapped.
        images: (B, 3, H, W), H and W as `input_spec` says.
        indices: the blocks, from 0.

    Raises:
        InputError: the model has no `forward_intermediates`.
    """
    forward_intermediates: Any = getattr(model, "forward_intermediates", None)
    if forward_intermediates is None:
        raise InputError(
            f"{type(model).__name__} has no forward_intermediates, as timm models have; maps cannot be taken from it."
        )
    return forward_intermediates(images, indices=list(indices), intermediates_only=True)
