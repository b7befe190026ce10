"""What is true of a given backbone: its blocks, their widths, layouts and prefix rows, the images it takes, its maps.

The one place that knows timm facts. What differs between families is a row of `_FAMILIES`; everything that can be measured is
measured, on meta tensors, without touching weights, modes, memory or the random state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rein.errors import InputError, UnsupportedBackboneError

Size = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """One row: what cannot be measured about a class of timm models.

    Attributes:
        blocks: path of the container whose children are the blocks, in order.
        item: where in a block's output the tokens are, for blocks that return a tuple.
        any_size: the class takes images of any size although it records one.
    """

    blocks: str = "blocks"
    item: int | None = None
    any_size: bool = False


_FAMILIES = {
    "VisionTransformer": Family(),  # with CLIP, SigLIP, DINOv2, AIMv2, hybrids, ViTamin, distilled DeiT, ...
    "Eva": Family(),  # with EVA02, DINOv3, Perception Encoder, RoPE-ViT
    "Beit": Family(),
    "VisionTransformerRelPos": Family(),
    "VisionTransformerSAM": Family(),
    "NaFlexVit": Family(),
    "Cait": Family(),
    "Xcit": Family(any_size=True),
    "ConVit": Family(),
    "TNT": Family(item=1),  # (pixel tokens, patch tokens)
    "Qwen3VitClassifier": Family(blocks="encoder.blocks"),
    "Qwen3VitEncoder": Family(),
    "DeepseekVitClassifier": Family(blocks="encoder.blocks"),
    "DeepseekVitEncoder": Family(),
    "Gemma4VitClassifier": Family(blocks="encoder.blocks"),
    "Gemma4VitEncoder": Family(),
}


@dataclass(frozen=True)
class Site:
    """A block whose output an adapter refines.

    Attributes:
        path: the block's name among the model's modules.
        width: C of its output.
        num_prefix_tokens: leading rows of its output that are no patches, measured.
        layout: `NLC` for (B, N, C), `NHWC` for (B, H, W, C), `NCHW` for (B, C, H, W), measured.
        item: where in the output the tokens are, for blocks that return a tuple.
    """

    path: str
    width: int
    num_prefix_tokens: int
    layout: str = "NLC"
    item: int | None = None


@dataclass(frozen=True)
class InputSpec:
    """The images that a backbone takes.

    Attributes:
        fixed_size: (height, width) in pixels that an image must have, or None where any multiple of `multiple` will do.
        multiple: (height, width) of a patch in pixels.
        channels: of the image.
    """

    fixed_size: Size | None
    multiple: Size
    channels: int

    @property
    def covered(self) -> Size | None:
        """What the patches of a `fixed_size` image cover: less than all of it where patches do not divide it."""
        if self.fixed_size is None:
            return None
        (height, width), (down, across) = self.fixed_size, self.multiple
        return height // down * down, width // across * across


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
        UnsupportedBackboneError: the blocks are not known, do not give token tensors or cannot be measured.
    """
    family = _family(model)
    item = family.item if family else None
    if num_prefix_tokens is not None and (isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, int)):
        raise UnsupportedBackboneError(f"num_prefix_tokens is {num_prefix_tokens!r}; it must be a whole number.")
    paths = _block_paths(model, blocks)
    size = _probe_size(model)
    shapes = _measure(model, paths, item, size)
    ran = [path for path in shapes if path in paths]
    if len(ran) == len(paths) and ran != paths:
        raise UnsupportedBackboneError(f"blocks=[...] names {paths}, but they run in the order {ran}; give them in that order.")
    return [_site(model, path, shapes, item, _grid(model, size), num_prefix_tokens) for path in paths]


def _site(
    model: nn.Module,
    path: str,
    shapes: Mapping[str, torch.Size | None],
    item: int | None,
    grid: Size | None,
    num_prefix_tokens: int | None,
) -> Site:
    """What the measured shape of a block's output says; `grid` is (rows, columns) of the patches, where they are known."""
    if path not in shapes:
        raise UnsupportedBackboneError(f"block {path!r} did not run when the model was measured; leave it out of blocks=[...].")
    shape = shapes[path]
    if shape is not None and len(shape) == 4 and grid is not None:
        for layout, rows, channels in (("NHWC", shape[1:3], shape[3]), ("NCHW", shape[2:4], shape[1])):
            if tuple(rows) == grid:
                return Site(path, channels, 0, layout, item)
    if shape is None or len(shape) != 3:
        got = "no tensor" if shape is None else f"a tensor of shape {tuple(shape)}"
        raise UnsupportedBackboneError(
            f"block {path!r} of {architecture(model)} gives {got}; rein adapts blocks that give tokens (B, N, C), or maps of the "
            "patches. Name such blocks with blocks=[...]."
        )
    patches = None if grid is None else grid[0] * grid[1]
    prefix = num_prefix_tokens
    if prefix is None and patches is not None:
        prefix = shape[1] - patches
    if prefix is None or not 0 <= prefix < shape[1]:
        raise UnsupportedBackboneError(
            f"how many prefix tokens (class, register, ...) {architecture(model)} has is not known at block {path!r}: it gives "
            f"{shape[1]} rows for {'an unknown number of' if patches is None else patches} patches. "
            "Give it with num_prefix_tokens=N."
        )
    return Site(path, shape[2], prefix, "NLC", item)


def _family(model: nn.Module) -> Family | None:
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.") and cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    return None


def patch_tokens(output: Any, site: Site) -> Tensor:
    """The patch tokens (..., C) in a block's output."""
    tokens = output if site.item is None else output[site.item]
    if site.layout == "NCHW":
        return tokens.permute(0, 2, 3, 1)
    return tokens[:, site.num_prefix_tokens :] if site.num_prefix_tokens else tokens


def with_patch_tokens(output: Any, site: Site, refined: Tensor) -> Any:
    """A block's output with its patch tokens replaced, everything else as it was."""
    tokens = output if site.item is None else output[site.item]
    if site.layout == "NCHW":
        refined = refined.permute(0, 3, 1, 2)
    elif site.num_prefix_tokens:
        refined = torch.cat((tokens[:, : site.num_prefix_tokens], refined), 1)
    if site.item is None:
        return refined
    return type(output)([*output[: site.item], refined, *output[site.item + 1 :]])


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


def _measure(model: nn.Module, paths: Sequence[str], item: int | None, size: Size) -> dict[str, torch.Size | None]:
    """Output shape of every block on a meta image of `size`; None where the output is no tensor."""
    shapes: dict[str, torch.Size | None] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if item is not None and isinstance(output, tuple | list):
                output = output[item]
            shapes[path] = output.shape if isinstance(output, Tensor) else None

        return hook

    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
    }
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, input_spec(model).channels, *size, dtype=dtype, device="meta")
    # some models remember tensors between calls: whatever they set on themselves meanwhile is taken back, modes included
    found = [(module, dict(module.__dict__)) for module in model.modules()]
    handles = [model.get_submodule(path).register_forward_hook(record(path)) for path in paths]
    try:
        model.eval()
        with torch.no_grad():
            functional_call(model, tensors, (image,))
    except Exception as error:
        if len(shapes) < len(paths):  # else the blocks were seen, and only what follows them failed
            raise UnsupportedBackboneError(
                f"the blocks of {architecture(model)} could not be measured on a meta image of shape {tuple(image.shape)} "
                f"({type(error).__name__}: {error}); rein cannot adapt it. If other blocks can be, name them with blocks=[...]."
            ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, attributes in found:
            module.__dict__.clear()
            module.__dict__.update(attributes)
    return shapes


def _probe_size(model: nn.Module) -> Size:
    """(height, width) of an image that the model takes, with more patches across than down where it takes those."""
    spec = input_spec(model)
    return spec.fixed_size or (6 * spec.multiple[0], 12 * spec.multiple[1])  # 2 and 3 divide both, for models that pool patches


def _grid(model: nn.Module, size: Size) -> Size | None:
    """(rows, columns) of patches of an image, or None where the model has none."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        rows, columns = embed.dynamic_feat_size(size)
        return rows, columns
    reduction = _reduction(model)
    return None if reduction is None else (size[0] // reduction, size[1] // reduction)


def _reduction(model: nn.Module) -> int | None:
    """Pixels per patch along a side as timm records them, for models of known families."""
    info = getattr(model, "feature_info", None)
    if _family(model) is None or not isinstance(info, list) or not info:
        return None
    return int(info[0]["reduction"])


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class's name for other models."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    return name or type(model).__name__


def patch_size(model: nn.Module) -> Size:
    """(height, width) of a patch in pixels, a convolutional stem included; 16 x 16 where the model has no patches."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):
        size = embed.feat_ratio(as_scalar=False)
    else:
        size = _reduction(model) or getattr(embed, "patch_size", 16)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def input_spec(model: nn.Module) -> InputSpec:
    """The images that `model` takes."""
    embed: Any = getattr(model, "patch_embed", None) or getattr(model, "pixel_embed", None)
    family = _family(model)
    any_size = getattr(model, "dynamic_img_size", False) or (family is not None and family.any_size)
    fixed = None if any_size else getattr(embed, "img_size", None)
    return InputSpec(
        fixed_size=None if fixed is None else (int(fixed[0]), int(fixed[1])),
        multiple=patch_size(model),
        channels=_image_channels(embed or model),
    )


def _image_channels(module: nn.Module) -> int:
    """What the first convolution takes; 3 where there is none."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    return 3


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
