"""The families of timm: which classes are known, and what differs between them. A new family is a new name in a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from rein.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class Family:
    """What cannot be measured about a class of timm models.

    Attributes:
        blocks: where the blocks are: a path in which N stands for a number.
        columnar: every block gives the same tokens: one width, one grid.
        items: where in a block's output the tokens are, for blocks that return several tensors.
        any_size: the class takes images of any size although it says otherwise.
    """

    blocks: str
    columnar: bool = False
    items: tuple[int, ...] | None = None
    any_size: bool = False


# VisionTransformer is CLIP, SigLIP, DINOv2, AIMv2, TIPS, hybrids, ViTamin, distilled DeiT and more; Eva is EVA02, DINOv3, Perception
# Encoder and RoPE-ViT; ResNet is SE-ResNet, ResNeXt, ResNeSt, SKNet and Res2Net
_CLASSES = {
    Family("blocks.N", columnar=True): """
        VisionTransformer Eva Beit VisionTransformerRelPos VisionTransformerSAM NaFlexVit Cait ConVit MlpMixer ConvMixer
        Qwen3VitEncoder DeepseekVitEncoder Gemma4VitEncoder""",
    Family("encoder.blocks.N", columnar=True): "Qwen3VitClassifier DeepseekVitClassifier Gemma4VitClassifier",
    Family("blocks.N", columnar=True, any_size=True): "Xcit",
    Family("blocks.N", columnar=True, items=(1,)): "TNT",  # (pixel tokens, patch tokens)
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
_FAMILIES = {name: family for family, names in _CLASSES.items() for name in names.split()}


def family_of(model: nn.Module) -> Family | None:
    """What is known of a model's class, or None where it is not timm's or not known."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.models."):
            if cls.__name__ in _FAMILIES:
                return _FAMILIES[cls.__name__]
            if cls.__name__ in ("FeatureDictNet", "FeatureListNet"):
                return _rewritten(model)
    return None


def _rewritten(model: nn.Module) -> Family | None:
    """The family of a `features_only` model that timm put together anew, so that its class is lost: by where its blocks are."""
    found = [family for family in _CLASSES if family.items is None and not family.columnar and any(blocks_in(model, family))]
    return max(found, key=lambda family: family.blocks.count("."), default=None)


def blocks_in(model: nn.Module, family: Family) -> Iterator[str]:
    """The names of a model's blocks, in order; modules without parameters (identities, reshapes) are none."""
    # `features_only` makes `stages_0.` of `stages.0.`
    pattern = re.compile("[._]".join(part.replace("N", r"\d+") for part in family.blocks.split(".")))
    for name, module in model.named_modules():
        if pattern.fullmatch(name) and next(module.parameters(), None) is not None:
            yield name


def core_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The backbone of a known family that `model` is, or holds, and its path in it (`features_only`, other libraries' encoders).

    Raises:
        UnsupportedBackboneError: there is none, or there are several.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found) and family_of(module):
            found.append((name, module))
    if len(found) > 1:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} holds {len(found)} backbones, {', '.join(repr(name) for name, _ in found)}; wrap one of them, "
            "or name its blocks with blocks=[...]."
        )
    if not found:
        raise UnsupportedBackboneError(
            f"where the blocks of {type(model).__name__} are is not known. "
            "Give them with blocks=[...], the modules or their names, in the order in which they run."
        )
    return found[0]


def known_core(model: nn.Module) -> Any:
    """As `core_of`, or `model` itself where nothing in it is known."""
    try:
        return core_of(model)[1]
    except UnsupportedBackboneError:
        return model
