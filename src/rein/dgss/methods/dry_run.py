"""Runs of a backbone on meta tensors: they check that a method fits it, and find the parameters that its feature maps do not use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rein import backbones
from rein.errors import UnsupportedBackboneError


def dry_run(backbone: nn.Module, method: str, change: Callable[[nn.Module], object]) -> None:
    """Apply `change` to a copy of the backbone on the meta device and run the copy. The backbone itself stays as it is.

    Raises:
        UnsupportedBackboneError: the changed copy does not run, or returns other shapes than before.
    """
    model = _meta_copy(backbone)
    name = backbones.architecture(backbone)
    try:
        before = _output_shapes(model)
        change(model)
        after = _output_shapes(model)
    except UnsupportedBackboneError:
        raise
    except Exception as error:
        raise UnsupportedBackboneError(
            f"{name} does not run with {method} on meta tensors ({type(error).__name__}: {error}); expected a model that runs. "
            "Choose another backbone or method."
        ) from error
    if before != after:
        raise UnsupportedBackboneError(
            f"{method} changes the outputs of {name} from the shapes {before} to {after}; expected equal shapes. "
            "Choose another backbone or method."
        )


def find_unused_parameters(backbone: nn.Module, indices: Sequence[int]) -> list[str]:
    """Names of the parameters that the feature maps of these blocks do not depend on, such as those of a final norm.

    Found on meta tensors. Data-parallel training needs a gradient for every parameter that trains.
    """
    model = _meta_copy(backbone)
    spec = backbones.input_spec(model)
    height, width = spec.fixed_size or (4 * spec.multiple[0], 4 * spec.multiple[1])
    with torch.enable_grad():
        model.requires_grad_(True)
        maps = backbones.feature_maps(model, _meta_images(model, 1, height, width), indices)
        torch.stack([each.sum() for each in maps]).sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def _meta_copy(backbone: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without hooks, whose parameters and buffers are empty meta tensors."""
    memo: dict[int, Any] = {}
    for module in backbone.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    model = copy.deepcopy(backbone, memo).eval()
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


@torch.no_grad()
def _output_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of a meta model's feature maps, or of its output if it has no `forward_intermediates`.

    The images have the model's fixed size, or else about 224 x 448 pixels.
    """
    spec = backbones.input_spec(model)
    height, width = spec.fixed_size or tuple(
        -(-side // multiple) * multiple for side, multiple in zip((224, 448), spec.multiple, strict=True)
    )
    images = _meta_images(model, 2, height, width)
    forward_intermediates: Any = getattr(model, "forward_intermediates", None)
    outputs = model(images) if forward_intermediates is None else forward_intermediates(images, intermediates_only=True)
    return [tuple(output.shape) for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def _meta_images(model: nn.Module, batch: int, height: int, width: int) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(batch, backbones.input_spec(model).channels, height, width, dtype=dtype, device="meta")
