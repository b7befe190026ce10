"""What a file states about a backbone: how to build it again, and a sample of its weights, by which `load` recognises others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rein.backbones.families import inner_backbone
from rein.backbones.images import architecture, normalization, pretrained_config
from rein.backbones.pocket import POCKET
from rein.errors import InputError, UnsupportedBackboneError, one_line

SAMPLED, VALUES = 16, 4  # number of tensors of each kind in the sample, and of values of each
_LONGEST_PATCH, _LONGEST_IMAGE, _MOST_PATCHES = 64, 8192, 2**17  # that a file may declare
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def full_name(model: nn.Module) -> str:
    """Timm's name with the tag of the pretrained weights; the architecture's name for other models."""
    name, tag = architecture(model), pretrained_config(model).get("tag")
    return f"{name}.{tag}" if tag else name


def describe(model: nn.Module) -> dict[str, Any]:
    """What a file states about the backbone, in JSON's types.

    Returns:
        `name` is timm's full name; `create` has the sides (height, width) in pixels of `patch_size` and `img_size` that the model was
        built for, and `dynamic_img_size`, as far as it has them; `built` is what `_structure` returns; `normalization` has `mean` and
        `std` of every channel; `license` is that of the weights, if timm states it; `timm_version`; `dtype` and `weights` are the
        sample of the weights.
    """
    import timm  # not above: it imports every model

    mean, std = normalization(model)
    facts: dict[str, Any] = {
        "name": full_name(model),
        "create": _settings(model),
        "built": _structure(model),
        "normalization": {"mean": list(mean), "std": list(std)},
        "timm_version": timm.__version__,
    }
    if isinstance(license_name := pretrained_config(model).get("license"), str):
        facts["license"] = license_name
    return facts | sample(model)


def summary(stated: Mapping[str, Any]) -> str:
    """What a file states about its backbone, on one line."""
    sizes = {title: stated.get("create", {}).get(key) for title, key in (("patches", "patch_size"), ("images", "img_size"))}
    parts = [stated.get("name", stated["architecture"])]
    parts += [f"{title} of {size[0]} x {size[1]} pixels" for title, size in sizes.items() if size]
    parts += [f"{title} {stated[key]}" for title, key in (("licence", "license"), ("timm", "timm_version")) if key in stated]
    return ", ".join(map(one_line, parts))


def make(stated: Mapping[str, Any], weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build the backbone that a file states, frozen, with timm's pretrained weights or those of a file.

    Weights for other patches are resampled the authors' way, as `rein fit` does, or timm's way, as `timm.create_model` does. The
    sample of the weights decides.

    Args:
        stated: what `describe` returned.
        weights: file with weights under timm's names; None means timm's pretrained weights, or those of `pocket_vit`.

    Raises:
        UnsupportedBackboneError: timm has no model of that name, or its patches are not square.
        InputError, CheckpointError: as `make_backbone`.
    """
    import timm

    from rein.backbones.creation import make_backbone

    name, create = stated["name"], stated["create"]
    if name.partition(".")[0].startswith(POCKET):
        name = POCKET
    elif not timm.is_model(name):
        raise UnsupportedBackboneError(f"timm {timm.__version__} has no model {one_line(name)!r}.")
    else:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns about weights, which are not needed here
            try:
                own = _settings(timm.create_model(name, num_classes=0))
            except Exception as error:  # timm takes some tags for addresses, and raises several kinds of errors
                raise UnsupportedBackboneError(
                    f"timm {timm.__version__} cannot build {one_line(name)!r}: {one_line(error)}"
                ) from error
        create = {key: value for key, value in create.items() if key == "dynamic_img_size" or value != own.get(key)}
    patch, size = create.get("patch_size"), create.get("img_size")
    if patch is not None and patch[0] != patch[1]:
        raise UnsupportedBackboneError(f"its patches are {patch[0]} x {patch[1]} pixels; rein builds square ones only.")
    build = partial(
        make_backbone,
        name,
        pretrained=weights is None,
        patch_size=None if patch is None else patch[0],
        img_size=None if size is None else tuple(size),
        weights=None if weights is None else Path(weights),
        dynamic_img_size=create.get("dynamic_img_size", True),
    )
    backbone = build()
    if patch is not None and find_difference(backbone, stated) is not None:
        other = build(resample_as_authors=False)
        backbone = backbone if find_difference(other, stated) is not None else other
    expected, got = stated.get("built"), _structure(backbone)
    if expected is not None and expected != got:
        raise UnsupportedBackboneError(
            f"it was built with options that the name does not imply: it has {one_line(_as_text(expected))}, and a new "
            f"{one_line(name)} has {_as_text(got)}."
        )
    if name != POCKET and weights is not None:
        pretrained_config(backbone)["tag"] = stated["name"].partition(".")[2]  # of the weights in the file
    return backbone.requires_grad_(False)


def _structure(model: nn.Module) -> dict[str, Any]:
    """What shows options of the model beside its name and `_settings`, such as `init_values`, `qk_norm` or `num_heads`.

    Returns:
        `tensors`: number of parameters in the numbered modules (the blocks), besides those of the adapter and the classifier;
        `num_heads`: the different numbers of attention heads, sorted; `activations`: the different classes of activations, sorted.
    """
    backbone = inner_backbone(model)
    names = [name for name, _ in backbone.named_parameters() if not name.startswith(("rein.", "head."))]
    modules = [module for name, module in backbone.named_modules() if not name.startswith("rein.")]
    heads = {getattr(module, "num_heads", None) for module in modules}
    activations = {type(module).__name__ for module in modules if type(module).__module__ in _ACTIVATIONS}
    return {
        "tensors": sum(any(part.isdigit() for part in name.split(".")) for name in names),
        "num_heads": sorted(count for count in heads if type(count) is int),
        "activations": sorted(activations),
    }


def _as_text(structure: Mapping[str, Any]) -> str:
    heads, activations = (" or ".join(map(str, structure[key])) or "no" for key in ("num_heads", "activations"))
    return f"{structure['tensors']} tensors in its blocks, {heads} attention heads and {activations} activations"


def _settings(model: nn.Module) -> dict[str, Any]:
    """The settings with which the model was built, as far as it has them; sizes are (height, width) in pixels."""
    backbone = inner_backbone(model)
    dynamic, embed = getattr(backbone, "dynamic_img_size", None), getattr(backbone, "patch_embed", None)
    found = {key: getattr(embed, key, None) for key in ("patch_size", "img_size")}
    pairs = {key: [value, value] if isinstance(value, int) else value for key, value in found.items()}
    create: dict[str, Any] = {key: [*pair] for key, pair in pairs.items() if isinstance(pair, list | tuple)}
    if isinstance(dynamic, bool):
        create["dynamic_img_size"] = dynamic
    return create if _are_settings(create) else {}


@torch.no_grad()
def sample(model: nn.Module) -> dict[str, Any]:
    """A sample of the weights, by which other weights of the same architecture are recognised.

    It takes milliseconds, because at most 128 numbers are read: of all matrices and kernels of floating-point numbers whose names end
    in `weight`, and of all vectors, besides those of the adapter, 16 each at even distances in the order of the model, first and last
    included; of each of these, 4 numbers at even distances, first and last included. It does not depend on the device or on an
    adapter, and on the dtype only by its rounding. Position embeddings are not in it, because they depend on the size of the images.

    Returns:
        `weights`: name of a tensor -> 4 numbers, rounded to 6 digits; `dtype`: the coarsest dtype of these tensors. Empty if the
        model has no such parameters, is on meta tensors, or has numbers that are not finite.
    """
    readable = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith("rein.") and _is_readable(parameter)
    ]
    chosen = []
    for kind in (
        [each for each in readable if each[1].ndim >= 2 and each[0].endswith("weight")],
        [each for each in readable if each[1].ndim == 1],
    ):
        count = min(SAMPLED, len(kind))
        chosen += [kind[round(number * (len(kind) - 1) / max(1, count - 1))] for number in range(count)]
    read = torch.stack([_read(parameter) for _, parameter in chosen]).cpu() if chosen else torch.empty(0)
    if not chosen or not read.isfinite().all():
        return {}
    coarsest = max((parameter.dtype for _, parameter in chosen), key=lambda dtype: torch.finfo(dtype).eps)
    return {
        "dtype": str(coarsest).removeprefix("torch."),
        "weights": {name: [float(f"{value:.6g}") for value in row] for (name, _), row in zip(chosen, read.tolist(), strict=True)},
    }


def _is_readable(parameter: Tensor) -> bool:
    """Whether single numbers can be read: not quantised, not on meta, and not emptied by a sharding library."""
    plain = type(parameter.data) is Tensor or hasattr(parameter, "full_tensor")
    return plain and not parameter.is_meta and parameter.dtype in _FLOATS.values() and parameter.numel() > 0


def _read(parameter: Tensor) -> Tensor:
    """(VALUES,) float32, at even distances. Sharded tensors are gathered."""
    full: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    positions = torch.linspace(0, full.numel() - 1, VALUES, dtype=torch.float64).round().long()
    return full.detach().reshape(-1)[positions.to(full.device)].float()


@torch.no_grad()
def find_difference(model: nn.Module, stated: Mapping[str, Any]) -> str | None:
    """Compare the weights of a model with the sample in a file.

    Numbers are equal if they differ by less than the precision of the coarser dtype of the two, or 0.0001 of the number, because
    resampling and conversion round. A tensor that the model does not have under its name, or that is quantised, is not compared.

    Args:
        model: bare or wrapped, in any dtype and on any device.
        stated: what `describe` returned; without a sample, nothing is compared.

    Returns:
        None, or a text that says what differs: a tensor and both numbers.
    """
    parameters = dict(model.named_parameters())
    for name, values in stated.get("weights", {}).items():
        parameter = parameters.get(name)
        if parameter is None or not _is_readable(parameter):
            continue
        tolerance = max(1e-4, *(torch.finfo(dtype).eps for dtype in (parameter.dtype, _FLOATS[stated["dtype"]])))
        found, expected = _read(parameter).cpu(), torch.tensor(values)
        differs = ~torch.isclose(found, expected, rtol=tolerance, atol=1e-6)
        if differs.any():
            position = int(differs.long().argmax())
            return f"{one_line(name)} has {values[position]:.4g} in the file and {found[position]:.4g} in the model"
    return None


def compare(stated: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Compare what two files state about their backbones: the samples of the weights, and other options than the size of the images.

    Returns:
        None, or a text that says what differs: the first file's value, then the other's. Facts that a file lacks are not compared.
    """
    for key in ("built", "patch_size"):
        pair = [(facts if key == "built" else facts.get("create", {})).get(key) for facts in (stated, other)]
        if None not in pair and pair[0] != pair[1]:
            return f"{key} {one_line(pair[0])} and {one_line(pair[1])}"
    samples = [facts.get("weights", {}) for facts in (stated, other)]
    for name in samples[0].keys() & samples[1].keys():
        tolerance = max(1e-4, *(torch.finfo(_FLOATS[facts["dtype"]]).eps for facts in (stated, other)))
        one, two = (torch.tensor(sample[name]) for sample in samples)
        if not torch.allclose(one, two, rtol=tolerance, atol=1e-6):
            return f"other weights: {one_line(name)} has {one[0]:.4g} and {two[0]:.4g}"
    return None


def check(facts: Mapping[str, Any]) -> None:
    """Raise InputError unless the entries of `describe` that are there are valid; a file of format version 1 has none of them."""
    for key in ("name", "license", "timm_version"):
        if not isinstance(facts.get(key, ""), str):
            raise InputError(f"{key} of the backbone is {one_line(repr(facts[key]))}, expected a text")
    if not _are_settings(facts.get("create", {})) or ("name" in facts and "create" not in facts):
        raise InputError(
            f"create of the backbone is {one_line(repr(facts.get('create')))}, expected patch_size and img_size, (height, width) in "
            "pixels, and dynamic_img_size"
        )
    built = facts.get("built", {"tensors": 0, "num_heads": [], "activations": []})
    if not (
        isinstance(built, dict)
        and built.keys() == {"tensors", "num_heads", "activations"}
        and type(built["tensors"]) is int
        and _are(int, built["num_heads"])
        and _are(str, built["activations"])
    ):
        raise InputError(f"built of the backbone is {one_line(repr(built))}, expected tensors, num_heads and activations")
    channels = facts.get("normalization", {"mean": [], "std": []})
    if not (isinstance(channels, dict) and _are_numbers(channels.get("mean")) and _are_numbers(channels.get("std"))):
        raise InputError(f"normalization of the backbone is {one_line(repr(channels))}, expected lists mean and std")
    weights = facts.get("weights", {})
    valid = isinstance(weights, dict) and all(_are_numbers(values) and len(values) == VALUES for values in weights.values())
    if not valid or (weights and facts.get("dtype") not in list(_FLOATS)):
        raise InputError(
            f"weights of the backbone is not a sample of weights; expected {VALUES} numbers for each tensor, and a dtype"
        )


def _are_numbers(values: Any) -> bool:
    """Whether a value is a list of numbers that a float32 can hold."""
    return isinstance(values, list) and all(type(value) in (int, float) and abs(value) < 3e38 for value in values)


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _are_settings(create: Any) -> bool:
    """Whether a value is what `_settings` returns, within limits: a file must not make its reader allocate memory."""
    if not isinstance(create, dict) or not create.keys() <= {"patch_size", "img_size", "dynamic_img_size"}:
        return False
    patch, image = create.get("patch_size", [4, 4]), create.get("img_size", [1, 1])  # the smallest patches of timm's models
    for size, longest in ((patch, _LONGEST_PATCH), (image, _LONGEST_IMAGE)):
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side <= longest for side in size)):
            return False
    few = image[0] * image[1] <= _MOST_PATCHES * patch[0] * patch[1]
    return few and isinstance(create.get("dynamic_img_size", True), bool)
