"""The images that a backbone takes, and the maps that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rein.backbones.families import core_of, family_of, known_core
from rein.errors import InputError

Size = tuple[int, int]


@dataclass(frozen=True)
class InputSpec:
    """The images that a backbone takes.

    Attributes:
        fixed_size: (height, width) in pixels that an image must have, or None where any multiple of `multiple` will do.
        multiple: (height, width) in pixels of a patch, or where sizes are free of a pixel of the coarsest map; of as many of them
            as the model takes together, where it works by cells.
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


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(known_core(model), "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def architecture(model: nn.Module) -> str:
    """Timm's name of the architecture, or the class's name for other models."""
    return _config(model).get("architecture") or type(model).__name__


def _reductions(core: nn.Module) -> list[int]:
    """Pixels per token along a side at each of timm's feature taps; empty for other models."""
    info: Any = getattr(core, "feature_info", [])
    info = info if isinstance(info, list) else info.get_dicts() if hasattr(info, "get_dicts") else []
    return [int(entry["reduction"]) for entry in info] if family_of(core) else []


def patch_size(model: nn.Module) -> Size:
    """(height, width) of a patch in pixels, a convolutional stem included.

    16 x 16 where the model has none: that is what the authors start their adapters of ConvNeXt and ResNet with.
    """
    core = known_core(model)
    family = family_of(core)
    embed: Any = getattr(core, "patch_embed", None)
    if family is not None and not family.columnar:
        return 16, 16
    if hasattr(embed, "feat_ratio"):
        size = embed.feat_ratio(as_scalar=False)
    else:
        size = (_reductions(core) or [getattr(embed, "patch_size", 16)])[0]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def input_spec(model: nn.Module) -> InputSpec:
    """The images that `model` takes."""
    core = known_core(model)
    family = family_of(core)
    embed: Any = next((part for name in ("patch_embed", "pixel_embed", "stem") if (part := getattr(core, name, None))), None)
    coarsest = max(_reductions(core), default=16)
    any_size = getattr(core, "dynamic_img_size", False) or (family is not None and family.any_size)
    fixed = None if any_size else getattr(embed, "img_size", None)
    if fixed is None and family is not None and not family.columnar and _config(core).get("fixed_input_size"):
        fixed = _config(core)["input_size"][1:]
    if family is None or family.columnar:
        pooled = int(getattr(core, "pooling_kernel_size", 1))  # Gemma pools whole cells of tokens
        height, width = patch_size(core)
        multiple = height * pooled, width * pooled
    elif fixed is None:
        cell = max((int(m.block_size) for m in core.modules() if hasattr(m, "halo_size")), default=1)  # halo attention's blocks
        multiple = coarsest * cell, coarsest * cell
    else:
        multiple = 1, 1  # stages round up, and so cover all of an image
    return InputSpec(
        fixed_size=None if fixed is None else (int(fixed[0]), int(fixed[1])),
        multiple=multiple,
        channels=_image_channels(embed if isinstance(embed, nn.Module) else core),
    )


def _image_channels(module: nn.Module) -> int:
    """What the first convolution takes; 3 where there is none."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    return 3


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for images from 0 to 1, that the weights were trained with; ImageNet's by default."""
    config = _config(model)
    return (
        tuple(config.get("mean", (0.485, 0.456, 0.406))),
        tuple(config.get("std", (0.229, 0.224, 0.225))),
    )


def map_channels(model: nn.Module) -> list[int]:
    """C of every map that `feature_maps` can give: of every block, or of every stage where the backbone has stages.

    Raises:
        UnsupportedBackboneError: the model's family is not known.
        InputError: the model has no `forward_intermediates`.
    """
    _, core = core_of(model)
    _check_maps(model)
    info: Any = core.feature_info
    return [int(entry["num_chs"]) for entry in info]


def feature_maps(model: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The outputs of blocks or stages as maps (B, C, h, w), without prefix tokens and without the final norm.

    Args:
        model: a timm model, bare or wrapped.
        images: (B, 3, H, W), H and W as `input_spec` says.
        indices: which of `map_channels`, from 0.

    Raises:
        InputError: the model has no `forward_intermediates`.
    """
    _check_maps(model)
    forward_intermediates: Any = model.forward_intermediates
    return forward_intermediates(images, indices=list(indices), intermediates_only=True)


def _check_maps(model: nn.Module) -> None:
    if not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"{type(model).__name__} has no forward_intermediates, as timm models have; maps cannot be taken from it."
        )
