"""Where an adapter belongs in a model: each block's width, layout and prefix rows, measured.

The model runs on meta tensors: no weights, memory or random state are touched. Where it takes images of two sizes, what grows with
the image is space, and from how much it grows follows how many rows do not. Where its size is fixed, its own maps say what space is.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rein.backbones.families import Family, blocks_in, core_of, family_of
from rein.backbones.images import Size, architecture, input_spec
from rein.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class Site:
    """A block whose output an adapter refines.

    Attributes:
        path: the block's name among the model's modules.
        width: C of its output.
        num_prefix_tokens: leading rows of its output that are no patches, measured.
        layout: `NLC` for (B, N, C), `NHWC` for (B, H, W, C), `NCHW` for (B, C, H, W), measured.
        item: where in the output the tokens are, for blocks that return several things.
    """

    path: str
    width: int
    num_prefix_tokens: int
    layout: str = "NLC"
    item: int | None = None


def tokens_of(output: Any, site: Site) -> Tensor:
    """The tokens (..., C) in a block's output, prefix tokens among them."""
    tokens: Tensor = output if site.item is None else output[site.item]
    return tokens.permute(0, 2, 3, 1) if site.layout == "NCHW" else tokens


def with_tokens(output: Any, site: Site, refined: Tensor) -> Any:
    """A block's output with its tokens replaced, everything else as it was."""
    if site.layout == "NCHW":
        refined = refined.permute(0, 3, 1, 2)
    if site.item is None:
        return refined
    entries = [*output[: site.item], refined, *output[site.item + 1 :]]
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


_BATCH = 3  # images that are measured at once: unlike any other axis


@dataclass
class _Run:
    """What one run on meta tensors showed.

    Attributes:
        outputs: for every block, the shapes of the tensors in its output with their places; None is the place of a lone tensor.
        batch: how many images, or other inputs, it was.
        pixels: of the image, or None where there was none.
        maps: shapes of the model's own maps (B, C, h, w), where it gives some.
    """

    outputs: dict[str, dict[int | None, torch.Size]]
    batch: int | None
    pixels: int | None
    maps: list[torch.Size]


def find_sites(
    model: nn.Module,
    blocks: Sequence[str | nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    example_inputs: Any = None,
) -> list[Site]:
    """Where an adapter belongs in `model`, and what is true there.

    Args:
        model: a timm model of a known family, or one that holds one; with `blocks`, any model.
        blocks: the blocks themselves or their names, in the order in which they run.
        num_prefix_tokens: rows before the patches, where they cannot be measured.
        example_inputs: what the model is called with, where that is not an image: a tensor, a tuple of positional or a dictionary of
            keyword arguments. Only shapes and dtypes are used.

    Raises:
        UnsupportedBackboneError: the blocks are not known, do not give token tensors or cannot be measured.
    """
    if num_prefix_tokens is not None and (isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, int)):
        raise UnsupportedBackboneError(f"num_prefix_tokens is {num_prefix_tokens!r}; it must be a whole number.")
    where, core = ("", model) if blocks is not None else core_of(model)
    family = family_of(core)
    paths = _known_paths(core, family) if blocks is None and family is not None else _paths(model, blocks or ())
    if where and example_inputs is not None:  # they are for the whole model
        where, core, paths = "", model, [f"{where}.{path}" for path in paths]
    runs = _runs(core, paths, example_inputs)
    ran = [path for path in runs[0].outputs if path in paths]
    if len(ran) == len(paths) and ran != paths:
        raise UnsupportedBackboneError(f"blocks=[...] names {paths}, but they run in the order {ran}; give them in that order.")
    places = {path: _places(core, path, runs[0].outputs, family) for path in paths}
    sites = [
        _site(core, path, places[path][turn], runs, num_prefix_tokens)
        for turn in range(max(map(len, places.values())))
        for path in paths
        if turn < len(places[path])
    ]
    return [replace(site, path=f"{where}.{site.path}") for site in sites] if where else sites


def _known_paths(model: nn.Module, family: Family) -> list[str]:
    paths = list(blocks_in(model, family))
    if not paths:
        raise UnsupportedBackboneError(
            f"this {architecture(model)} has no blocks at {family.blocks}, as others of {type(model).__name__} have; give them with "
            "blocks=[...]."
        )
    return paths


def _paths(model: nn.Module, blocks: Sequence[str | nn.Module]) -> list[str]:
    """The names of the blocks that a user gave."""
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise UnsupportedBackboneError(f"blocks is {blocks!r}; it must be a list of modules or of their names.")
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
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


def _runs(model: nn.Module, paths: Sequence[str], example_inputs: Any) -> list[_Run]:
    """Two runs on images of two sizes where the model takes those, else one."""
    if example_inputs is not None:
        tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
        if not tensors:
            raise UnsupportedBackboneError(f"example_inputs holds no tensor; got {type(example_inputs).__name__}.")
        if len(tensors) == 1 and tensors[0].ndim == 4 and hasattr(model, "forward_intermediates"):
            return [_run(model, paths, tensors[0], intermediates=True)]
        return [_run(model, paths, example_inputs)]
    spec = input_spec(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def image(height: int, width: int) -> Tensor:
        return torch.empty(_BATCH, spec.channels, height, width, dtype=dtype, device="meta")

    fixed = spec.fixed_size
    if fixed is None:
        for unit in (7 * 32, 3 * 7 * 32):  # patches of 14, 16 and 32, windows of 7; patches that are pooled by threes
            down, across = (math.lcm(unit, side) for side in spec.multiple)
            with suppress(UnsupportedBackboneError):
                return [_run(model, paths, image(down, 2 * across)), _run(model, paths, image(2 * down, 3 * across))]
        fixed = _usual_size(model) or (down, across)
    run = _run(model, paths, image(*fixed), intermediates=hasattr(model, "forward_intermediates"))
    maps = [shape for shapes in run.outputs.values() for shape in shapes.values() if len(shape) == 4]
    if any(
        len(_layouts([shape], [run])) != 1 for shape in maps
    ):  # as many channels as rows and columns: does it take another size?
        with suppress(UnsupportedBackboneError):
            return [run, _run(model, paths, image(2 * fixed[0], 2 * fixed[1]))]
    return [run]


def _usual_size(model: nn.Module) -> Size | None:
    """(height, width) that timm, or a configuration of Hugging Face's kind, says the model was made for."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return config["input_size"][1:]
    size: Any = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, Sequence) and len(size) == 2 else None


def _run(model: nn.Module, paths: Sequence[str], inputs: Any, intermediates: bool = False) -> _Run:
    """Run the model, or its `forward_intermediates`, on empty meta tensors shaped as `inputs` and look at its blocks' outputs."""
    run = _Run({}, None, None, [])
    inputs = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), inputs)
    arguments, keywords = (
        ((), inputs) if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    run.batch = tensors[0].shape[0] if tensors else None
    if len(tensors) == 1 and tensors[0].ndim == 4:
        run.pixels = tensors[0].shape[2] * tensors[0].shape[3]

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            entries = enumerate(output) if isinstance(output, tuple | list) else [(None, output)]
            run.outputs[path] = {place: entry.shape for place, entry in entries if isinstance(entry, Tensor) and entry.ndim > 2}

        return hook

    with _on_meta(model):
        handles = [model.get_submodule(path).register_forward_hook(record(path)) for path in paths]
        try:
            model.eval()
            with torch.no_grad():
                taps: Any = getattr(model, "forward_intermediates", None)
                forward = partial(taps, intermediates_only=True) if intermediates else model
                output = forward(*arguments, **keywords)
            channels_last = not intermediates and "NHWC" in str(
                getattr(model, "output_fmt", "")
            )  # a rewritten `features_only` model
            maps = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim == 4)
            run.maps = [(leaf.permute(0, 3, 1, 2) if channels_last else leaf).shape for leaf in maps]
        except Exception as error:
            if len(run.outputs) < len(paths):  # else the blocks were seen, and only what follows them failed
                shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
                raise UnsupportedBackboneError(
                    f"the blocks of {architecture(model)} could not be measured on meta tensors of shape "
                    f"{', '.join(map(str, shapes))} ({type(error).__name__}: {error}). If it takes something else, give that with "
                    "example_inputs=...; if other blocks can be measured, name them with blocks=[...]. Tensors that "
                    "a module uses must be its parameters or buffers."
                ) from error
        finally:
            for handle in handles:
                handle.remove()
    return run


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter and buffer is an empty meta tensor. Afterwards everything that modules hold is as it was: the tensors,
    the modes, and whatever modules set on themselves meanwhile, since some models remember tensors between calls.

    `torch.func.functional_call` is not used because it leaves its own tensors in modules that a model holds under several names.
    """
    found = [(module, dict(module.__dict__), _tensors(module)) for module in model.modules()]
    caches = [
        (value, copy.copy(value))
        for _, attributes, _ in found
        for name, value in attributes.items()
        if isinstance(value, dict | list | set) and name not in _OF_MODULES
    ]
    metas = {id(tensor): torch.empty_like(tensor, device="meta") for *_, tensors in found for tensor in tensors.values()}
    try:
        for module, _, tensors in found:
            # users' hooks are not to see meta tensors; torch's own (weight norm) belong to the module
            module.__dict__["_forward_hooks"] = OrderedDict()
            hooks = module._forward_pre_hooks.items()
            module.__dict__["_forward_pre_hooks"] = OrderedDict((key, hook) for key, hook in hooks if _is_torchs(hook))
            for name, tensor in tensors.items():  # through setattr: recurrent layers keep a second list of their weights
                meta = metas[id(tensor)]
                setattr(module, name, nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta)
        yield
    finally:
        for module, attributes, tensors in found:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, tensor in tensors.items():
                setattr(module, name, tensor)
        for cache, before in caches:
            cache.clear()
            cache.extend(before) if isinstance(cache, list) else cache.update(before)


_OF_MODULES = set(nn.Module().__dict__)  # what every module has


def _is_torchs(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _places(
    model: nn.Module, path: str, outputs: Mapping[str, Mapping[int | None, torch.Size]], family: Family | None
) -> Sequence[int | None]:
    """Where in the block's output the tokens are."""
    if path not in outputs:
        raise UnsupportedBackboneError(f"block {path!r} did not run when the model was measured; leave it out of blocks=[...].")
    found = outputs[path]
    if family is not None and family.items is not None and set(family.items) <= set(found):
        return family.items
    if len(found) != 1:
        got = "no tensor of tokens" if not found else f"{len(found)} tensors, {', '.join(str(tuple(s)) for s in found.values())}"
        raise UnsupportedBackboneError(
            f"block {path!r} of {architecture(model)} gives {got}; rein adapts blocks that give one tensor of tokens "
            "(B, N, C), or a map. Name such blocks with blocks=[...]."
        )
    return list(found)


def _site(model: nn.Module, path: str, item: int | None, runs: Sequence[_Run], num_prefix_tokens: int | None) -> Site:
    """What the measured shapes of one block say."""
    shapes = [run.outputs[path][item] for run in runs]
    shape = shapes[0]
    if runs[0].batch is not None and shape[0] != runs[0].batch:
        raise UnsupportedBackboneError(
            f"block {path!r} of {architecture(model)} gives a tensor of shape {tuple(shape)} for {runs[0].batch} inputs; rein adapts "
            "blocks whose first axis is the batch. Name such blocks with blocks=[...]."
        )
    if len(shape) == 4:
        layouts = _layouts(shapes, runs)
        if len(layouts) == 1:
            return Site(path, shape[3 if layouts == ["NHWC"] else 1], 0, layouts[0], item)
    elif len(shape) == 3 and len({each[2] for each in shapes}) == 1:
        measured = _prefix_tokens(shapes, runs)
        prefix = measured if num_prefix_tokens is None else num_prefix_tokens
        if prefix is not None and 0 <= prefix < shape[1]:
            return Site(path, shape[2], prefix, "NLC", item)
        if num_prefix_tokens is not None:
            known = "" if measured is None else f"; {measured} were measured"
            raise UnsupportedBackboneError(
                f"num_prefix_tokens is {num_prefix_tokens}, but block {path!r} of {architecture(model)} gives {shape[1]} rows{known}."
            )
        raise UnsupportedBackboneError(
            f"how many prefix tokens (class, register, ...) {architecture(model)} has is not known at block {path!r}, which gives "
            f"{shape[1]} rows. Give it with num_prefix_tokens=N, below that."
        )
    raise UnsupportedBackboneError(
        f"block {path!r} of {architecture(model)} gives a tensor of shape {tuple(shape)}; rein adapts blocks that give "
        "tokens (B, N, C), or maps whose channels it can tell from their rows and columns. Name such blocks with blocks=[...], "
        "or give example_inputs=... of another size."
    )


_AXES = {"NHWC": (1, 2, 3), "NCHW": (2, 3, 1)}  # of rows, columns and channels


def _layouts(shapes: Sequence[torch.Size], runs: Sequence[_Run]) -> list[str]:
    """How 4-dimensional outputs can be read: by what grew with the image, or else by the model's own maps."""
    if len(shapes) == 2:
        grew = [first != second for first, second in zip(*shapes, strict=True)]
        return [layout for layout, (h, w, c) in _AXES.items() if grew[h] and grew[w] and not grew[c]]
    (shape,), maps = shapes, runs[0].maps
    grids = [(shape[c], shape[h], shape[w]) for h, w, c in _AXES.values()]
    of_maps = {(m[1], m[2], m[3]) for m in maps}
    fits = [layout for layout, grid in zip(_AXES, grids, strict=True) if grid in of_maps]  # a map of this very shape
    fits = fits or [layout for layout, grid in zip(_AXES, grids, strict=True) if grid[1:] in {m[1:] for m in of_maps}]
    if fits:
        return fits
    sizes = {(c, h * w) for c, h, w in of_maps}  # in windows: as many tokens as a map of this width has
    return [layout for layout, (c, h, w) in zip(_AXES, grids, strict=True) if (c, h * w) in sizes]


def _prefix_tokens(shapes: Sequence[torch.Size], runs: Sequence[_Run]) -> int | None:
    """Rows that do not belong to the grid, or None where nothing says which do."""
    if len(shapes) == 2 and shapes[0][1] != shapes[1][1]:
        (small, large), (few, many) = (run.pixels for run in runs), (shape[1] for shape in shapes)
        if small is None or large is None:
            return None
        patches, left = divmod(small * (many - few), large - small)  # rows grow as pixels do
        return few - patches if left == 0 else None
    rows = shapes[0][1]
    return min((rows - m[2] * m[3] for m in runs[0].maps if m[2] * m[3] <= rows), default=None)
