"""The images that a backbone accepts, and the feature maps that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rein.backbones.families import find_backbone, get_family, inner_backbone
from rein.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True)
class InputSpec:
    """The images that a backbone accepts.

    Attributes:
        fixed_size: the only (height, width) in pixels that the backbone accepts, or None if it accepts every multiple of `multiple`.
        multiple: (height, width) in pixels of one patch. Where a backbone with stages accepts several sizes, of one pixel of its
            coarsest feature map; where it pools or attends in cells of several patches, of one cell.
        channels: channels of the image.
    """

    fixed_size: Size | None
    multiple: Size
    channels: int

    @property
    def covered(self) -> Size | None:
        """(height, width) that whole patches cover in an image of `fixed_size`, in pixels; None without a fixed size."""
        if self.fixed_size is None:
            return None
        (height, width), (patch_height, patch_width) = self.fixed_size, self.multiple
        return height // patch_height * patch_height, width // patch_width * patch_width


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """Timm's facts about the pretrained weights; empty for other models."""
    config = getattr(inner_backbone(model), "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class name of other models."""
    return pretrained_config(model).get("architecture") or type(model).__name__


def _reductions(backbone: nn.Module) -> list[int]:
    """Strides in pixels of timm's intermediate features (`feature_info`); empty for other models."""
    info: Any = getattr(backbone, "feature_info", [])
    info = info if isinstance(info, list) else info.get_dicts() if hasattr(info, "get_dicts") else []
    return [int(entry["reduction"]) for entry in info] if get_family(backbone) else []


def patch_size(model: nn.Module) -> Size:
    """(height, width) of a patch in pixels, including the stride of a convolutional stem.

    (16, 16) for models without patches: the authors initialise their adapters of ConvNeXt and ResNet with it.
    """
    backbone = inner_backbone(model)
    family = get_family(backbone)
    embed: Any = getattr(backbone, "patch_embed", None)
    if family is not None and not family.isotropic:
        return 16, 16
    if hasattr(embed, "feat_ratio"):
        size = embed.feat_ratio(as_scalar=False)
    else:
        size = (_reductions(backbone) or [getattr(embed, "patch_size", 16)])[0]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def input_spec(model: nn.Module) -> InputSpec:
    """The images that `model` accepts."""
    backbone = inner_backbone(model)
    family = get_family(backbone)
    embed: Any = None
    for name in ("patch_embed", "pixel_embed", "stem"):  # not next(...), which older versions of torch.compile cannot trace
        embed = embed or getattr(backbone, name, None)
    coarsest = max(_reductions(backbone), default=16)
    any_size = getattr(backbone, "dynamic_img_size", False) or (family is not None and family.any_size)
    fixed = None if any_size else getattr(embed, "img_size", None)
    if fixed is None and family is not None and not family.isotropic and pretrained_config(backbone).get("fixed_input_size"):
        fixed = pretrained_config(backbone)["input_size"][1:]
    if family is None or family.isotropic:
        pooled = int(getattr(backbone, "pooling_kernel_size", 1))  # Gemma pools cells of tokens
        height, width = patch_size(backbone)
        multiple = height * pooled, width * pooled
    elif fixed is None:
        cell = max(
            (int(m.block_size) for m in backbone.modules() if hasattr(m, "halo_size")), default=1
        )  # cells of halo attention
        multiple = coarsest * cell, coarsest * cell
    else:
        multiple = 1, 1  # stages round sizes up, so they cover the whole image
    return InputSpec(
        fixed_size=None if fixed is None else (int(fixed[0]), int(fixed[1])),
        multiple=multiple,
        channels=_image_channels(embed if isinstance(embed, nn.Module) else backbone),
    )


def _image_channels(module: nn.Module) -> int:
    """Input channels of the first convolution, or 3 without a convolution."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    return 3


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that the weights were trained with, for images in [0, 1]; ImageNet's by default."""
    config = pretrained_config(model)
    return (
        tuple(config.get("mean", (0.485, 0.456, 0.406))),
        tuple(config.get("std", (0.229, 0.224, 0.225))),
    )


def map_channels(model: nn.Module) -> list[int]:
    """Channels C of every map that `feature_maps` can return: one per block, or one per stage for a backbone with stages.

    Raises:
        UnsupportedBackboneError: rein does not know the model's family.
        InputError: the model has no `forward_intermediates`.
    """
    _, backbone = find_backbone(model)
    _check_maps(model)
    info: Any = backbone.feature_info
    return [int(entry["num_chs"]) for entry in info]


def feature_maps(model: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The outputs of blocks or stages as feature maps (B, C, h, w), without prefix tokens and without the final norm.

    Args:
        model: a timm model, bare or wrapped.
        images: (B, 3, H, W), with H and W that `input_spec` allows.
        indices: positions in `map_channels`, from 0.

    Raises:
        InputError: the model has no `forward_intermediates`.
    """
    _check_maps(model)
    forward_intermediates: Any = model.forward_intermediates
    return forward_intermediates(images, indices=list(indices), intermediates_only=True)


def _check_maps(model: nn.Module) -> None:
    if not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"{type(model).__name__} has no method forward_intermediates, which returns the feature maps of timm models; "
            "use a timm model."
        )
