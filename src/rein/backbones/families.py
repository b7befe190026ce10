"""The model classes of timm that rein knows, and what differs between them.

To support a new class, add its name to a family in the table below, or add a family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from rein.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class Family:
    """Facts about a class of timm models that cannot be measured.

    Attributes:
        blocks: module names of the blocks, with N for each number.
        isotropic: all blocks have the same width and the same grid.
        items: indices of the token tensors in a block's output, for blocks that return several tensors.
        any_size: the class takes images of any size, although its `img_size` says otherwise.
    """

    blocks: str
    isotropic: bool = False
    items: tuple[int, ...] | None = None
    any_size: bool = False


# VisionTransformer covers CLIP, SigLIP, DINOv2, AIMv2, TIPS, hybrids, ViTamin, distilled DeiT and more; Eva covers EVA02, DINOv3,
# Perception Encoder and RoPE-ViT; ResNet covers SE-ResNet, ResNeXt, ResNeSt, SKNet and Res2Net.
_CLASSES_OF_FAMILY = {
    Family("blocks.N", isotropic=True): """
        VisionTransformer Eva Beit VisionTransformerRelPos VisionTransformerSAM NaFlexVit Cait ConVit MlpMixer ConvMixer
        Qwen3VitEncoder DeepseekVitEncoder Gemma4VitEncoder""",
    Family("encoder.blocks.N", isotropic=True): "Qwen3VitClassifier DeepseekVitClassifier Gemma4VitClassifier",
    Family("blocks.N", isotropic=True, any_size=True): "Xcit",
    Family("blocks.N", isotropic=True, items=(1,)): "TNT",  # (pixel tokens, patch tokens)
    Family("blocks.N", items=(0, 1)): "CrossVit",  # one tensor per branch
    Family("blocks.N"): "Hiera HieraDet",
    Family("blocks.N.N"): """
        EfficientNet EfficientNetFeatures MobileNetV3 MobileNetV3Features MobileNetV5 MobileNetV5Encoder GhostNet RepGhostNet
        Twins""",
    Family("layers.N.blocks.N"): "SwinTransformer SwinTransformerV2 FocalNet",
    Family("stages.N.blocks.N"): """
        ConvNeXt ResNetV2 MetaNeXt EdgeNeXt MetaFormer IFormer MambaOut VovNet HighPerfGpuNet MaxxVit SwinTransformerV2Cr DaVit
        MultiScaleVit PyramidVisionTransformerV2 TinyVit GlobalContextVit Levit LevitDistilled EfficientVit EfficientVitLarge
        EfficientVitMsra NextViT Sequencer2d FastVit EfficientFormer EfficientFormerV2 SwiftFormer RepVit FasterNet SHViT""",
    Family("stages.N.N"): "ByobNet NormFreeNet CPUBone LowFormer StarNet LCNetV2",
    Family("layerN.N"): "ResNet SENet",
    Family("stageN.N"): "Visformer",
    Family("sN.bN"): "RegNet",
    Family("network.N.N"): "VOLO",
    Family("levels.N.transformer_encoder.N"): "Nest",
    Family("transformers.N.blocks.N"): "PoolingVisionTransformer",
    Family("serial_blocksN.N"): "CoaT",
}
_FAMILY_OF_CLASS = {name: family for family, names in _CLASSES_OF_FAMILY.items() for name in names.split()}


def get_family(model: nn.Module) -> Family | None:
    """The family of a model's class, or None for a class that is not in the table."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.models."):
            if cls.__name__ in _FAMILY_OF_CLASS:
                return _FAMILY_OF_CLASS[cls.__name__]
            if cls.__name__ in ("FeatureDictNet", "FeatureListNet"):
                return _features_only_family(model)
    return None


def _features_only_family(model: nn.Module) -> Family | None:
    """The family of a rebuilt `features_only` model. Its original class is lost, so the names of its blocks decide."""
    found = [
        family
        for family in _CLASSES_OF_FAMILY
        if family.items is None and not family.isotropic and any(block_paths(model, family))
    ]
    return max(found, key=lambda family: family.blocks.count("."), default=None)


def block_paths(model: nn.Module, family: Family) -> Iterator[str]:
    """Names of a model's blocks, in order. Modules without parameters (identities, reshapes) are skipped."""
    # `features_only` renames `stages.0.` to `stages_0.`
    pattern = re.compile("[._]".join(part.replace("N", r"\d+") for part in family.blocks.split(".")))
    for name, module in model.named_modules():
        if pattern.fullmatch(name) and next(module.parameters(), None) is not None:
            yield name


def find_backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """The backbone of a known family: `model` itself, or a module inside it (`features_only`, encoders of other libraries).

    Returns:
        The backbone's module name in `model` ("" for `model` itself) and the backbone.

    Raises:
        UnsupportedBackboneError: `model` holds no backbone of a known family, or several.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found) and get_family(module):
            found.append((name, module))
    if len(found) > 1:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} holds {len(found)} backbones, {', '.join(repr(name) for name, _ in found)}; expected one. "
            "Wrap one of them, or pass the blocks to adapt with blocks=[...]."
        )
    if not found:
        raise UnsupportedBackboneError(
            f"rein does not know the blocks of {type(model).__name__}. "
            "Pass them with blocks=[...]: the modules or their names, in the order in which they run."
        )
    return found[0]


def enclosing_backbones(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Module names of the backbones in `model` that contain the blocks named `paths`.

    If the blocks are not all inside backbones of known families, this is the base model of a Hugging Face model with a head, or else
    the smallest module that holds the blocks, and not only them, and every parameter that was registered before them: the encoder of
    a U-Net, for example, whose decoder stays as it is, but all of a ViT whose embeddings stand beside the list of its blocks.
    """
    inside: set[str] = set()
    names: list[str] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        found = {path for path in paths if path.startswith(prefix)} - inside
        if found and get_family(module):
            names.append(name)
            inside |= found
    if inside >= set(paths):
        return names
    for name, module in model.named_children():
        if module is getattr(model, "base_model", None) and all(path.startswith(f"{name}.") for path in paths):
            return [name]
    return [_smallest_backbone(model, list(paths))]


def _smallest_backbone(model: nn.Module, paths: list[str]) -> str:
    with_parameters = [name for name, module in model.named_modules() if any(p is not None for p in module._parameters.values())]
    of_blocks = [name for name in with_parameters if any(_is_inside(name, path) for path in paths)]
    before = with_parameters[: with_parameters.index(of_blocks[0])] if of_blocks else []
    parts = paths[0].split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        if not all(path.startswith(f"{name}.") for path in paths):
            continue
        inside = {each for each in with_parameters if _is_inside(each, name)}
        if inside - set(of_blocks) and inside.issuperset(before):
            return name
    return ""


def _is_inside(name: str, container: str) -> bool:
    return name == container or name.startswith(f"{container}.")


def inner_backbone(model: nn.Module) -> Any:
    """The backbone that `find_backbone` finds in `model`, or `model` itself if there is none."""
    try:
        return find_backbone(model)[1]
    except UnsupportedBackboneError:
        return model
