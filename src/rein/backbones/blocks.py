"""The blocks whose outputs an adapter refines: their widths, layouts and prefix tokens, measured.

Shapes are measured with images of two sizes: axes that grow with the image are spatial, and the growth of the token count shows how
many tokens are prefix tokens. A model of a fixed image size is measured once, and the feature maps that it returns give the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rein.backbones.families import Family, block_paths, find_backbone, get_family
from rein.backbones.images import Size, architecture, input_spec
from rein.backbones.measure import Measurement, measure
from rein.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class BlockInfo:
    """Facts about a block whose output an adapter refines.

    Attributes:
        path: module name of the block.
        width: channels C of its output.
        num_prefix_tokens: leading rows of its output (class token, registers) that are not patches.
        layout: axes of its output: `NLC` for (B, N, C), `NHWC` for (B, H, W, C), `NCHW` for (B, C, H, W).
        item: index of the tokens in its output, or None if the output is a single tensor.
    """

    path: str
    width: int
    num_prefix_tokens: int
    layout: str = "NLC"
    item: int | None = None


def get_tokens(output: Any, block: BlockInfo) -> Tensor:
    """The tokens (..., C) in a block's output, including prefix tokens."""
    tokens: Tensor = output if block.item is None else output[block.item]
    return tokens.permute(0, 2, 3, 1) if block.layout == "NCHW" else tokens


def replace_tokens(output: Any, block: BlockInfo, refined: Tensor) -> Any:
    """A block's output with `refined` (..., C) in place of its tokens; other items of the output are unchanged."""
    if block.layout == "NCHW":
        # autograd forbids changes in place of a view that was created while it did not record; a compiler has no such views
        with nullcontext() if torch.compiler.is_compiling() else torch.enable_grad():
            refined = refined.permute(0, 3, 1, 2)
    if block.item is None:
        return refined
    entries = [*output[: block.item], refined, *output[block.item + 1 :]]
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


_BATCH = 3  # batch size of the measured images; it differs from every other axis


def find_blocks(
    model: nn.Module,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    example_inputs: Any = None,
) -> list[BlockInfo]:
    """Find the blocks of `model` and measure their outputs.

    Args:
        model: a timm model of a known family, or a model that contains one; with `blocks`, any model.
        blocks: the blocks or their module names, in the order in which they run.
        num_prefix_tokens: number of prefix tokens, for models where it cannot be measured.
        example_inputs: inputs of the model, if it does not take an image: a tensor, a tuple of positional or a dictionary of keyword
            arguments. Only shapes and dtypes are used.

    Raises:
        UnsupportedBackboneError: the blocks are unknown, do not return tokens, or cannot be measured.
    """
    if num_prefix_tokens is not None and (isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, int)):
        raise UnsupportedBackboneError(f"num_prefix_tokens is {num_prefix_tokens!r}; expected an int.")
    name, backbone = ("", model) if blocks is not None else find_backbone(model)
    family = get_family(backbone)
    paths = _known_paths(backbone, family) if blocks is None and family is not None else _paths(model, blocks or ())
    if name and example_inputs is not None:  # example inputs are inputs of the whole model
        name, backbone, paths = "", model, [f"{name}.{path}" for path in paths]
    measurements = _measure_sizes(backbone, paths, example_inputs)
    ran = [path for path in measurements[0].outputs if path in paths]
    if len(ran) == len(paths) and ran != paths:
        raise UnsupportedBackboneError(
            f"blocks=[...] is {paths}, but the blocks run in the order {ran}; list them in that order."
        )
    items = {path: _token_items(backbone, path, measurements[0].outputs, family) for path in paths}
    infos = [
        _block_info(backbone, path, items[path][branch], measurements, num_prefix_tokens)
        for branch in range(max(map(len, items.values())))
        for path in paths
        if branch < len(items[path])
    ]
    return [replace(info, path=f"{name}.{info.path}") for info in infos] if name else infos


def _known_paths(model: nn.Module, family: Family) -> list[str]:
    """Names of the blocks of a model of a known family."""
    paths = list(block_paths(model, family))
    if not paths:
        raise UnsupportedBackboneError(
            f"this {architecture(model)} has no blocks named {family.blocks}; other models of class {type(model).__name__} have. "
            "Pass its blocks with blocks=[...]."
        )
    return paths


def _paths(model: nn.Module, blocks: Sequence[str | nn.Module]) -> list[str]:
    """Names of the blocks that the user passed."""
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise UnsupportedBackboneError(f"blocks is {blocks!r}; expected a list of modules or module names.")
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    paths = []
    for block in blocks:
        path = block if isinstance(block, str) else names.get(id(block))
        if path is None or path not in modules:
            unknown = repr(block) if isinstance(block, str) else f"a {type(block).__name__}"
            raise UnsupportedBackboneError(
                f"blocks=[...] contains {unknown}, which is not in the model; use modules or names from model.named_modules()."
            )
        paths.append(path)
    if not paths or len(set(paths)) < len(paths):
        raise UnsupportedBackboneError(f"blocks=[...] is {paths}; expected at least one block, and each block once.")
    return paths


def _measure_sizes(model: nn.Module, paths: Sequence[str], example_inputs: Any) -> list[Measurement]:
    """Two measurements with images of two sizes, or one measurement if the model accepts only one size."""
    if example_inputs is not None:
        tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
        if not tensors:
            raise UnsupportedBackboneError(
                f"example_inputs is a {type(example_inputs).__name__} without a tensor; expected a tensor, a tuple of positional "
                "arguments or a dictionary of keyword arguments."
            )
        if len(tensors) == 1 and tensors[0].ndim == 4 and hasattr(model, "forward_intermediates"):
            return [measure(model, paths, tensors[0], intermediates=True)]
        return [measure(model, paths, example_inputs)]
    spec = input_spec(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def image(height: int, width: int) -> Tensor:
        return torch.empty(_BATCH, spec.channels, height, width, dtype=dtype, device="meta")

    size = spec.fixed_size
    if size is None:
        for unit in (7 * 32, 3 * 7 * 32):  # suits patches of 14, 16 and 32 and windows of 7; then patches that are pooled 3 x 3
            height, width = (math.lcm(unit, side) for side in spec.multiple)
            with suppress(UnsupportedBackboneError):
                return [measure(model, paths, image(height, 2 * width)), measure(model, paths, image(2 * height, 3 * width))]
        size = default_size(model) or (height, width)
    first = measure(model, paths, image(*size), intermediates=hasattr(model, "forward_intermediates"))
    maps = [shape for shapes in first.outputs.values() for shape in shapes.values() if len(shape) == 4]
    if any(len(_layouts([shape], [first])) != 1 for shape in maps):  # ambiguous, for example as many channels as rows and columns
        with suppress(UnsupportedBackboneError):
            return [first, measure(model, paths, image(2 * size[0], 2 * size[1]))]
    return [first]


def default_size(model: nn.Module) -> Size | None:
    """(height, width) in pixels in the configuration of a timm or Hugging Face model."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return config["input_size"][1:]
    size: Any = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, Sequence) and len(size) == 2 else None


def _token_items(
    model: nn.Module, path: str, outputs: Mapping[str, Mapping[int | None, torch.Size]], family: Family | None
) -> Sequence[int | None]:
    """Indices of the token tensors in a block's output."""
    if path not in outputs:
        raise UnsupportedBackboneError(f"block {path!r} did not run when the model was measured; leave it out of blocks=[...].")
    found = outputs[path]
    if family is not None and family.items is not None and set(family.items) <= set(found):
        return family.items
    if len(found) != 1:
        shapes = ", ".join(str(tuple(shape)) for shape in found.values())
        got = f"{len(found)} tensors of shapes {shapes}" if found else "no tensor of at least 3 axes"
        raise UnsupportedBackboneError(
            f"block {path!r} of {architecture(model)} returns {got}; expected one tensor of tokens (B, N, C) or one feature map. "
            "Name blocks that return one with blocks=[...]."
        )
    return list(found)


def _block_info(
    model: nn.Module, path: str, item: int | None, measurements: Sequence[Measurement], num_prefix_tokens: int | None
) -> BlockInfo:
    """Width, layout and prefix tokens of one block, from its measured shapes."""
    shapes = [measurement.outputs[path][item] for measurement in measurements]
    shape, batch, block = shapes[0], measurements[0].batch, f"block {path!r} of {architecture(model)}"
    if batch is not None and shape[0] != batch:
        raise UnsupportedBackboneError(
            f"{block} returns a tensor of shape {tuple(shape)} for {batch} inputs; expected the batch as first axis. "
            "Name blocks that return the batch first with blocks=[...]."
        )
    if len(shape) == 4:
        layouts = _layouts(shapes, measurements)
        if len(layouts) == 1:
            return BlockInfo(path, shape[3 if layouts == ["NHWC"] else 1], 0, layouts[0], item)
    elif len(shape) == 3 and len({each[2] for each in shapes}) == 1:
        measured = _num_prefix_tokens(shapes, measurements)
        count = measured if num_prefix_tokens is None else num_prefix_tokens
        if count is not None and 0 <= count < shape[1]:
            return BlockInfo(path, shape[2], count, "NLC", item)
        if num_prefix_tokens is not None:
            hint = "" if measured is None else f"; the measured number is {measured}"
            raise UnsupportedBackboneError(
                f"num_prefix_tokens is {num_prefix_tokens}, but {block} returns {shape[1]} tokens per image; expected 0 to "
                f"{shape[1] - 1}{hint}."
            )
        raise UnsupportedBackboneError(
            f"the number of prefix tokens (class token, registers) of {block} could not be measured; it returns {shape[1]} tokens "
            f"per image. Pass num_prefix_tokens=N, from 0 to {shape[1] - 1}."
        )
    raise UnsupportedBackboneError(
        f"{block} returns a tensor of shape {tuple(shape)}; expected tokens (B, N, C), or a feature map with more or fewer "
        "channels than rows and columns. Name such blocks with blocks=[...], or pass example_inputs=... of another size."
    )


_AXES = {"NHWC": (1, 2, 3), "NCHW": (2, 3, 1)}  # axes of rows, columns and channels


def _layouts(shapes: Sequence[torch.Size], measurements: Sequence[Measurement]) -> list[str]:
    """Layouts that fit the shapes of a 4-dimensional output.

    With two shapes, rows and columns grow with the image and channels do not. With one shape, the model's own feature maps decide.
    """
    if len(shapes) == 2:
        grew = [first != second for first, second in zip(*shapes, strict=True)]
        return [layout for layout, (h, w, c) in _AXES.items() if grew[h] and grew[w] and not grew[c]]
    (shape,) = shapes
    candidates = {layout: (shape[c], shape[h], shape[w]) for layout, (h, w, c) in _AXES.items()}
    maps = {(m[1], m[2], m[3]) for m in measurements[0].maps}
    same_shape = [layout for layout, (c, h, w) in candidates.items() if (c, h, w) in maps]
    if same_shape:
        return same_shape
    same_grid = [layout for layout, (_, h, w) in candidates.items() if (h, w) in {m[1:] for m in maps}]
    if same_grid:
        return same_grid
    # tokens that are grouped in windows: the same width and as many tokens as a feature map
    return [layout for layout, (c, h, w) in candidates.items() if (c, h * w) in {(m[0], m[1] * m[2]) for m in maps}]


def _num_prefix_tokens(shapes: Sequence[torch.Size], measurements: Sequence[Measurement]) -> int | None:
    """Number of tokens outside the patch grid, or None if it cannot be measured."""
    if len(shapes) == 2 and shapes[0][1] != shapes[1][1]:
        (small, large), (few, many) = (measurement.pixels for measurement in measurements), (shape[1] for shape in shapes)
        if small is None or large is None:
            return None
        patches, remainder = divmod(small * (many - few), large - small)  # the number of patches is proportional to the pixels
        return few - patches if remainder == 0 else None
    tokens = shapes[0][1]
    return min((tokens - m[2] * m[3] for m in measurements[0].maps if m[2] * m[3] <= tokens), default=None)
