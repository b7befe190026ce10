"""Run a model on meta tensors and record the shapes of its blocks' outputs.

Meta tensors have shapes and no data. Measuring a model therefore needs no memory, draws no random numbers, and leaves its weights and
modes unchanged.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rein.backbones.images import architecture
from rein.errors import UnsupportedBackboneError


@dataclass
class Measurement:
    """The shapes that one forward pass on meta tensors gives.

    Attributes:
        outputs: per block name, the shapes of the tensors in its output, keyed by their index in the output; the key is None if the
            output is a single tensor.
        batch: batch size of the inputs, or None for inputs without a tensor.
        pixels: number of pixels of the image, or None for inputs that are not one image batch.
        maps: shapes (B, C, h, w) of the feature maps that the model returns.
    """

    outputs: dict[str, dict[int | None, torch.Size]]
    batch: int | None
    pixels: int | None
    maps: list[torch.Size]


def measure(model: nn.Module, paths: Sequence[str], inputs: Any, intermediates: bool = False) -> Measurement:
    """Run `model` on meta tensors and record the shapes of the outputs of the blocks named `paths`.

    Args:
        model: the model; it is left unchanged.
        paths: module names of the blocks.
        inputs: a tensor, a tuple of positional or a dictionary of keyword arguments. Only shapes and dtypes are used.
        intermediates: call `forward_intermediates` of a timm model, which also returns feature maps.

    Raises:
        UnsupportedBackboneError: the forward pass fails before every block has run.
    """
    found = Measurement({}, None, None, [])
    inputs = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
    arguments, keywords = (
        ((), inputs) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    found.batch = tensors[0].shape[0] if tensors else None
    if len(tensors) == 1 and tensors[0].ndim == 4:
        found.pixels = tensors[0].shape[2] * tensors[0].shape[3]

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            entries = enumerate(output) if isinstance(output, tuple | list) else [(None, output)]
            found.outputs[path] = {item: entry.shape for item, entry in entries if isinstance(entry, Tensor) and entry.ndim > 2}

        return hook

    with _on_meta(model):
        handles = [model.get_submodule(path).register_forward_hook(record(path)) for path in paths]
        try:
            model.eval()
            with torch.no_grad():
                forward_intermediates: Any = getattr(model, "forward_intermediates", None)
                forward = partial(forward_intermediates, intermediates_only=True) if intermediates else model
                output = forward(*arguments, **keywords)
            # a rebuilt `features_only` model may return channels last
            channels_last = not intermediates and "NHWC" in str(getattr(model, "output_fmt", ""))
            maps = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim == 4)
            found.maps = [(leaf.permute(0, 3, 1, 2) if channels_last else leaf).shape for leaf in maps]
        except Exception as error:
            if len(found.outputs) < len(paths):  # otherwise every block was recorded, and only a later layer failed
                shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
                raise UnsupportedBackboneError(
                    f"the blocks of {architecture(model)} could not be measured on meta tensors of shape "
                    f"{', '.join(map(str, shapes))} ({type(error).__name__}: {error}). If the model expects other inputs, pass an "
                    "example with example_inputs=...; to measure other blocks, name them with blocks=[...]. A module must "
                    "register every tensor that it uses as a parameter or a buffer."
                ) from error
        finally:
            for handle in handles:
                handle.remove()
    return found


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter and buffer is an empty meta tensor. On exit, tensors, modes and attributes are as on entry.

    Attributes are restored too, because some models cache tensors between calls. `torch.func.functional_call` is not used: it leaves
    its own tensors in modules that a model holds under several names.
    """
    found = [(module, dict(module.__dict__), _tensors(module)) for module in model.modules()]
    caches = [
        (value, copy.copy(value))
        for _, attributes, _ in found
        for name, value in attributes.items()
        if isinstance(value, dict | list | set) and name not in _MODULE_ATTRIBUTES
    ]
    metas = {id(tensor): torch.empty_like(tensor, device="meta") for *_, tensors in found for tensor in tensors.values()}

    def restore() -> None:
        for module, attributes, tensors in found:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, tensor in tensors.items():
                setattr(module, name, tensor)
        for cache, before in caches:
            cache.clear()
            cache.extend(before) if isinstance(cache, list) else cache.update(before)

    try:
        try:
            for module, _, tensors in found:
                # users' hooks must not see meta tensors; torch's own hooks (weight norm) are part of the module and stay
                module.__dict__["_forward_hooks"] = OrderedDict()
                hooks = module._forward_pre_hooks.items()
                module.__dict__["_forward_pre_hooks"] = OrderedDict((key, hook) for key, hook in hooks if _is_from_torch(hook))
                for name, tensor in tensors.items():  # setattr, because recurrent layers keep a second list of their weights
                    meta = metas[id(tensor)]
                    setattr(module, name, nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta)
            yield
        finally:
            restore()
    except BaseException:  # Ctrl-C may also have interrupted `restore`
        restore()
        raise


_MODULE_ATTRIBUTES = set(nn.Module().__dict__)  # attributes that every module has


def _is_from_torch(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers, without those of its children."""
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
