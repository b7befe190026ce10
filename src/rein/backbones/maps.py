"""Where a segmenter gets its feature maps: from timm's `forward_intermediates`, or from the outputs of the adapted blocks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from rein.backbones.blocks import BlockInfo, default_size, get_tokens
from rein.backbones.families import find_backbone, get_family, inner_backbone
from rein.backbones.images import InputSpec, Size, architecture, feature_maps, input_spec, map_channels
from rein.backbones.measure import Measurement, measure
from rein.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class TimmMaps:
    """The feature maps that timm's `forward_intermediates` returns: one per block, or one per stage."""

    channels: tuple[int, ...]

    def input_spec(self, model: nn.Module) -> InputSpec:
        """The images that `model` accepts."""
        return input_spec(model)

    def __call__(self, model: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """As `feature_maps`."""
        return feature_maps(model, images, indices)


@dataclass(frozen=True)
class BlockMaps:
    """Feature maps from the outputs of blocks, of any model that is called with images.

    Under `torch.compile` the model runs without being compiled.

    Attributes:
        blocks: the blocks, one per map.
        strides: (height, width) in pixels of one pixel of each map.
        spec: the images that the model accepts; None for models that `input_spec` knows.
    """

    blocks: tuple[BlockInfo, ...]
    strides: tuple[Size, ...]
    spec: InputSpec | None

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels C of each map."""
        return tuple(block.width for block in self.blocks)

    def input_spec(self, model: nn.Module) -> InputSpec:
        """The images that `model` accepts."""
        return self.spec or input_spec(model)

    def __call__(self, model: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The outputs of blocks as feature maps (B, C, h, w), without prefix tokens; refined if the model is wrapped.

        Args:
            model: the model, which is called once with the images.
            images: (B, 3, H, W), with H and W that `input_spec` allows.
            indices: positions in `channels`, from 0.

        Raises:
            UnsupportedBackboneError: a block did not run, or its tokens are not a grid.
        """
        run = _block_outputs
        if torch.compiler.is_dynamo_compiling():  # it cannot add hooks; not as a decorator, because that imports the compiler
            run = torch.compiler.disable(run)
        outputs = run(model, images, {self.blocks[index].path for index in indices})
        size = (images.shape[-2], images.shape[-1])
        return [self._to_map(outputs, index, size) for index in indices]

    def _to_map(self, outputs: dict[str, Any], index: int, size: Size) -> Tensor:
        block = self.blocks[index]
        if block.path not in outputs:
            raise UnsupportedBackboneError(
                f"block {block.path!r} did not run, but its output is one of the feature maps; expected a block that runs for every "
                "image. Choose other blocks with indices=[...]."
            )
        tokens = get_tokens(outputs[block.path], block)
        if tokens.ndim == 4:
            return tokens.permute(0, 3, 1, 2)
        patches = tokens[:, block.num_prefix_tokens :]
        grid = _grid(patches.shape[1], size, self.strides[index])
        if grid is None:
            raise _no_grid(block, patches.shape[1], size)
        return patches.unflatten(1, grid).permute(0, 3, 1, 2)


def find_maps(model: nn.Module, find_blocks: Callable[[], Sequence[BlockInfo]]) -> TimmMaps | BlockMaps:
    """Find where the feature maps of a model come from.

    Models of timm return them. For other models they are the outputs of the blocks that an adapter refines: of all blocks, or, if
    their widths differ, of the last block of each width. Such a model is measured with images on meta tensors.

    Args:
        model: the model, bare or wrapped.
        find_blocks: called to find the blocks of a model that does not return feature maps.

    Raises:
        UnsupportedBackboneError: the blocks are unknown, the model cannot be called with images, or tokens are not a grid.
    """
    if hasattr(model, "forward_intermediates"):
        try:
            find_backbone(model)
        except UnsupportedBackboneError:
            pass
        else:
            return TimmMaps(tuple(map_channels(model)))
    blocks = find_blocks()
    if len({block.width for block in blocks}) > 1:
        blocks = [list(stage)[-1] for _, stage in groupby(blocks, key=lambda block: block.width)]
    if unordered := [part for part in model.modules() if type(part).__name__ in _UNORDERED]:
        raise UnsupportedBackboneError(
            f"the blocks of {type(unordered[0]).__name__} return their patch tokens in the order of windows; expected the order of "
            "rows and columns. Use timm's Hiera, which returns feature maps."
        )
    return _measure_maps(model, tuple(blocks))


_UNORDERED = {"Hiera", "HieraModel", "HieraEncoder"}  # classes whose blocks return tokens in another order than rows and columns


def _measure_maps(model: nn.Module, blocks: tuple[BlockInfo, ...]) -> BlockMaps:
    """Measure the strides of the blocks' outputs, and the images that the model accepts."""
    known = get_family(inner_backbone(model)) is not None
    spec = input_spec(model)
    sizes: list[Size] = [(224, 448), (672, 1344)]  # multiples of 7, 14, 16 and 32; and of patches that are pooled 3 x 3
    if known and spec.fixed_size is not None:
        sizes = [spec.fixed_size]
    elif known:
        sizes = [(math.lcm(height, spec.multiple[0]), math.lcm(width, spec.multiple[1])) for height, width in sizes]
    any_size, default = len(sizes), default_size(model)
    sizes += [] if known or default is None else [default]
    measured, position = _measure_first(model, blocks, sizes, spec.channels)
    size = sizes[position]
    embedding = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    strides = tuple(_stride(block, measured.outputs[block.path][block.item], size, embedding) for block in blocks)
    if known:
        return BlockMaps(blocks, strides, None)
    coarsest = max(height for height, _ in strides), max(width for _, width in strides)
    fixed = size if position >= any_size else None
    several = len(set(strides)) > 1
    multiple = (1, 1) if fixed and several else coarsest  # stages round sizes up, so they cover the whole image
    return BlockMaps(blocks, strides, InputSpec(fixed, multiple, spec.channels))


def _measure_first(
    model: nn.Module, blocks: Sequence[BlockInfo], sizes: Sequence[Size], channels: int
) -> tuple[Measurement, int]:
    """Measure the blocks' outputs with images of the first size that the model accepts; returns the size's position, too."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    paths = list(dict.fromkeys(block.path for block in blocks))
    reason: BaseException | None = None
    for position, size in enumerate(sizes):
        try:
            measured = measure(model, paths, torch.empty(1, channels, *size, dtype=dtype, device="meta"))
        except UnsupportedBackboneError as error:
            reason = error.__cause__
            continue
        if measured.outputs.keys() >= set(paths):
            return measured, position
        reason = RuntimeError(f"block {next(path for path in paths if path not in measured.outputs)!r} does not run")
    tried = ", ".join(f"{height} x {width}" for height, width in sizes)
    raise UnsupportedBackboneError(
        f"{architecture(model)} does not run with images (B, {channels}, H, W) of {tried} pixels "
        f"({type(reason).__name__}: {reason}); expected a model that is called with images. Use another backbone for segmentation."
    )


def _stride(block: BlockInfo, shape: torch.Size, size: Size, embedding: nn.Conv2d | None) -> Size:
    """(height, width) in pixels of one pixel of a block's output.

    For tokens this is the stride of the first convolution, the patch embedding of a vision transformer, or a multiple of it where the
    width has changed since. The output of a model that drops patches is then no grid.
    """
    if len(shape) == 4:
        rows, columns = shape[1:3] if block.layout == "NHWC" else shape[2:4]
        return -(-size[0] // rows), -(-size[1] // columns)
    count = shape[1] - block.num_prefix_tokens
    height, width = (1, 1) if embedding is None else embedding.stride
    factor = 1
    if embedding is None or embedding.out_channels != block.width:
        factor = max(1, round(math.sqrt(size[0] * size[1] / (height * width * count))))
    stride = height * factor, width * factor
    if _grid(count, size, stride) is None:
        raise _no_grid(block, count, size)
    return stride


def _grid(count: int, size: Size, stride: Size) -> Size | None:
    """Rows and columns of `count` patch tokens in an image of `size`; None if they are not a grid of this stride."""
    floor = size[0] // stride[0], size[1] // stride[1]
    if floor[0] * floor[1] == count:
        return floor
    ceiling = (size[0] + stride[0] - 1) // stride[0], (size[1] + stride[1] - 1) // stride[1]
    return ceiling if ceiling[0] * ceiling[1] == count else None


def _no_grid(block: BlockInfo, count: int, size: Size) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"block {block.path!r} returns {count} patch tokens for an image of {size[0]} x {size[1]} pixels; expected one for each cell "
        "of a grid. Use a backbone whose blocks return all patches, or pass the number of its prefix tokens to rein.wrap with "
        "num_prefix_tokens=N."
    )


def _block_outputs(model: nn.Module, images: Tensor, paths: set[str]) -> dict[str, Any]:
    """Run the model and collect the outputs of the blocks named `paths`."""
    outputs: dict[str, Any] = {}
    thread = threading.get_ident()

    def collect(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # another thread may run the model, too
                outputs[path] = output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(collect(path)) for path in paths]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
