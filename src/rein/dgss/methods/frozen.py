"""What the methods share: keeping a backbone frozen, trying a change on a copy without weights, and checking settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rein import backbones
from rein.backbones import Site
from rein.errors import InputError, UnsupportedBackboneError

FROZEN = "frozen_backbone"


class Frozen(nn.Module):
    """Keeps the bare backbone's modules in eval mode: no dropout, no drop path, normalisation statistics untouched.

    A child without parameters, because `train()` is told to children. It must be the last that is added.

    Args:
        backbone: the backbone, after the method has changed it.
        modules: those that the bare backbone had; those that it still has are kept in eval mode.
        handles: of hooks. They must be kept: unpickled in a fresh process, they keep torch from giving their numbers to hooks that
            are added there.
    """

    def __init__(self, backbone: nn.Module, modules: Iterable[nn.Module], handles: Iterable[RemovableHandle] = ()) -> None:
        super().__init__()
        present = {id(module) for module in backbone.modules()}
        kept = tuple(module for module in modules if id(module) in present)
        # in tuples, which nn.Module does not register
        self._kept, self._handles, self._backbone = kept, tuple(handles), (backbone,)

    def attach(self) -> None:
        """Become a child of the backbone."""
        (backbone,) = self._backbone
        setattr(backbone, FROZEN, self)
        self.train(backbone.training)

    def train(self, mode: bool = True) -> Frozen:
        """Called by the backbone's own `train()`, after the other children.

        The backbone's own flag does as told where a part of the backbone trains.
        """
        super().train(mode)
        (backbone,) = self._backbone
        for module in self._kept:
            if module is not backbone or not any(parameter.requires_grad for parameter in backbone.parameters()):
                module.training = False
        return self

    def forward(self, x: Any) -> Any:
        """`x`, for models that run all their children in turn."""
        return x


def block_sites(backbone: nn.Module, method: str) -> list[Site]:
    """The blocks of a backbone, each giving one tensor of tokens.

    Raises:
        UnsupportedBackboneError: blocks that are not known, or that give several tensors or maps (B, C, H, W).
    """
    sites = backbones.find_sites(backbone)
    for site in sites:
        if site.item is not None or site.layout == "NCHW":
            gives = "several tensors" if site.item is not None else "maps (B, C, H, W)"
            raise UnsupportedBackboneError(
                f"{method} wants blocks that give one tensor of tokens; block {site.path!r} of {backbones.architecture(backbone)} "
                f"gives {gives}."
            )
    return sites


def rehearse(backbone: nn.Module, method: str, change: Callable[[nn.Module], object]) -> None:
    """Try `change` on a copy of the backbone that has no weights, and run that: what goes wrong goes wrong here.

    Raises:
        UnsupportedBackboneError: the changed copy does not run, or gives other shapes than before.
    """
    twin = _without_weights(backbone)
    try:
        before = _shapes(twin)
        change(twin)
        after = _shapes(twin)
    except UnsupportedBackboneError:
        raise
    except Exception as error:
        raise UnsupportedBackboneError(
            f"{method} does not fit {backbones.architecture(backbone)}: the model does not run without its "
            f"weights ({type(error).__name__}: {error})."
        ) from error
    if before != after:
        raise UnsupportedBackboneError(f"{method} does not fit {backbones.architecture(backbone)}: maps {before} became {after}.")


def _without_weights(backbone: nn.Module) -> nn.Module:
    """A deep copy in eval mode whose parameters and buffers are empty meta tensors, without hooks."""
    memo: dict[int, Any] = {}
    for module in backbone.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(backbone, memo).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


@torch.no_grad()
def _shapes(twin: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of a weightless model's maps, or of its output, for an image of about 224 x 448 pixels or of its fixed size."""
    spec = backbones.input_spec(twin)
    height, width = spec.fixed_size or tuple(
        -(-side // unit) * unit for side, unit in zip((224, 448), spec.multiple, strict=True)
    )
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(2, spec.channels, height, width, dtype=dtype, device="meta")
    taps: Any = getattr(twin, "forward_intermediates", None)
    outputs = twin(image) if taps is None else taps(image, intermediates_only=True)
    return [tuple(output.shape) for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def unused_by_maps(backbone: nn.Module, indices: Sequence[int]) -> list[str]:
    """Names of the parameters on which the maps of these blocks do not depend, as a final norm; found without weights.

    Data-parallel training wants a gradient for everything that trains.
    """
    twin = _without_weights(backbone)
    spec = backbones.input_spec(twin)
    height, width = spec.fixed_size or (4 * spec.multiple[0], 4 * spec.multiple[1])
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    with torch.enable_grad():
        twin.requires_grad_(True)
        maps = backbones.feature_maps(twin, torch.empty(1, spec.channels, height, width, dtype=dtype, device="meta"), indices)
        torch.stack([each.sum() for each in maps]).sum().backward()
    return [name for name, parameter in twin.named_parameters() if parameter.grad is None]


def adapter_dtype(backbone: nn.Module) -> torch.dtype:
    """What trains is float32 beside a half-precision backbone, and float64 in a float64 one."""
    return torch.float64 if any(p.dtype == torch.float64 for p in backbone.parameters()) else torch.float32


def check_count(method: str, name: str, value: Any) -> None:
    """InputError unless `value` is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise InputError(f"{method}: {name} is {value!r}; it must be a whole number of at least 1.")


def check_number(method: str, name: str, value: Any, below: float = float("inf")) -> None:
    """InputError unless `value` is a number from 0 to under `below`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        raise InputError(f"{method}: {name} is {value!r}; it must be a number from 0 to under {below:g}.")
