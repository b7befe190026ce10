"""`pocket_vit`: a small timm `VisionTransformer` whose pretrained weights are part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from rein.errors import InputError

POCKET = "pocket_vit"  # its name where names of timm models are expected; timm does not know it
POCKET_VERSION = "v2"  # of the weights: an adapter for one version does not fit another
POCKET_WEIGHTS = Path(__file__).parents[1] / "testing" / f"pocket_vit_{POCKET_VERSION}.safetensors"
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


def pocket_vit(pretrained: bool = True, **settings: Any) -> nn.Module:
    """Build a timm `VisionTransformer` that is pretrained without labels on generated street scenes, in many lights and weathers.

    It has 8 blocks of width 144 and accepts images whose sides are multiples of 8 pixels, the patch size. Normalise the images with
    `rein.backbones.normalization`. It is not a foundation model and was not trained on photographs. `benchmarks/pocket` has the model
    card and the pretraining script.

    Args:
        pretrained: load the weights that are part of rein. Otherwise weights are drawn from torch's global random state.
        settings: arguments of `timm.models.VisionTransformer`; they override the values above. For another `img_size` or
            `patch_size`, the position embeddings or the patch embedding are interpolated. The weights of a classifier are random.

    Raises:
        InputError: the pretrained weights do not fit `settings`.
    """
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    model: Any = VisionTransformer(**{**POCKET_VIT, **settings})
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size[0]
    # an adapter for one patch size must not load into a model with another, so the name differs
    name = POCKET if patch == POCKET_VIT["patch_size"] else f"{POCKET}_patch{patch}"
    model.pretrained_cfg = {
        "architecture": f"{name}.{POCKET_VERSION}",
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
        if model.blocks[0].attn.num_heads != POCKET_VIT["num_heads"]:  # shapes do not depend on it
            raise InputError(f"the weights of pocket_vit have 3 heads and do not fit {settings}; pass pretrained=False.")
        state = {name: tensor.float() for name, tensor in load_file(POCKET_WEIGHTS).items()}
        try:
            classifier = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}  # stays random
            model.load_state_dict({**classifier, **checkpoint_filter_fn(state, model)})
        except RuntimeError as error:
            raise InputError(f"the weights of pocket_vit do not fit {settings}; pass pretrained=False. {error}") from error
    return model
