"""Backbones without downloads: plain timm `VisionTransformer`s, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from rein.errors import InputError

POCKET_WEIGHTS = Path(__file__).with_name("pocket_vit.safetensors")
POCKET_VIT = {
    "img_size": 128,
    "patch_size": 8,
    "embed_dim": 144,
    "depth": 8,
    "num_heads": 3,
    "num_classes": 0,
    "dynamic_img_size": True,
}
POCKET_MEAN, POCKET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny_vit(**settings: Any) -> nn.Module:
    """A timm `VisionTransformer` of 4 blocks, 32 wide, for images of 32 x 32 in patches of 8, with random weights and no classifier.

    Args:
        settings: other or further arguments of `timm.models.VisionTransformer`.
    """
    from timm.models.vision_transformer import VisionTransformer

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**{**small, **settings})


def pocket_vit(pretrained: bool = True, **settings: Any) -> nn.Module:
    """A timm `VisionTransformer` of 8 blocks, 144 wide, in patches of 8, pretrained without labels on generated street scenes.

    It takes images of any multiple of 8 pixels, normalised as `rein.backbones.normalization` says. No foundation model, and it has
    never seen a photograph: `benchmarks/pocket` has the model card, and the script that makes the weights.

    Args:
        pretrained: load the weights that come with rein; otherwise they are random, from torch's random state.
        settings: other or further arguments of `timm.models.VisionTransformer`. Positions are interpolated to another `img_size`, the
            patches' kernel to another `patch_size`; a classifier that is asked for is random.

    Raises:
        InputError: the pretrained weights do not fit these settings.
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    model: Any = VisionTransformer(**{**POCKET_VIT, **settings})
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size[0]
    model.pretrained_cfg = {
        "architecture": "pocket_vit"
        if patch == POCKET_VIT["patch_size"]
        else f"pocket_vit_patch{patch}",  # adapters tell them apart
        "input_size": (3, *size),
        "fixed_input_size": not model.dynamic_img_size,
        "mean": POCKET_MEAN,
        "std": POCKET_STD,
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }
    if pretrained:
        if model.blocks[0].attn.num_heads != POCKET_VIT["num_heads"]:  # which no shape shows
            raise InputError(f"the weights of pocket_vit are of 3 heads and do not fit {settings}; give pretrained=False.")
        state = {name: tensor.float() for name, tensor in load_file(POCKET_WEIGHTS).items()}
        try:
            own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}  # stays random
            model.load_state_dict({**own, **checkpoint_filter_fn(state, model)})
        except RuntimeError as error:
            raise InputError(f"the weights of pocket_vit do not fit {settings}; give pretrained=False. {error}") from error
    return model
