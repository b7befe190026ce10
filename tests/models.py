"""Small timm models without downloads: one row for each thing that differs between families. A new family is a new row."""

from functools import partial

import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.eva import Eva
from timm.models.tnt import TNT
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from timm.models.vision_transformer_hybrid import vit_tiny_r_s16_p8_224
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.xcit import Xcit
from torch import nn

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
_EVA02 = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}

_ENCODER = {"num_classes": 0, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}

FAMILIES = {
    "vit": partial(VisionTransformer, **_SMALL),
    "vit without class token": partial(VisionTransformer, **_SMALL, class_token=False, global_pool="avg"),
    "vit with registers": partial(VisionTransformer, **_SMALL, reg_tokens=4, init_values=0.1, dynamic_img_size=True),
    "vit with drop path": partial(
        VisionTransformer, **_SMALL, drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5
    ),
    "vit with patch dropout": partial(VisionTransformer, **_SMALL, patch_drop_rate=0.5),
    "vit with a convolutional stem": partial(vit_tiny_r_s16_p8_224, **{**_SMALL, "patch_size": 2}),
    "vit with parallel blocks": partial(VisionTransformer, **_SMALL, block_fn=ParallelThingsBlock),
    "clip": partial(VisionTransformer, **_SMALL, pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "eva02": partial(Eva, **_SMALL, **_EVA02, ref_feat_shape=(16, 16)),
    "eva with dropout": partial(Eva, **_SMALL, **_EVA02, drop_path_rate=0.5, proj_drop_rate=0.5, patch_drop_rate=0.5),
    "dinov3": partial(
        Eva,
        **_SMALL,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        dynamic_img_size=True,
    ),
    "beit": partial(Beit, **_SMALL),
    "beit with shared position bias": partial(Beit, **_SMALL, use_abs_pos_emb=False, use_shared_rel_pos_bias=True),
    "relative positions": partial(VisionTransformerRelPos, **_SMALL),
    "relative positions with class token": partial(VisionTransformerRelPos, **_SMALL, class_token=True, global_pool="token"),
    "sam": partial(VisionTransformerSAM, **_SMALL, window_size=2, global_attn_indexes=(1, 3), neck_chans=16),
    "naflex": partial(
        timm.create_model,
        "naflexvit_base_patch16_gap",
        num_classes=0,
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=2,
        reg_tokens=2,
    ),
    "cait": partial(Cait, **_SMALL),
    "xcit": partial(Xcit, **_SMALL),
    "tnt": partial(
        TNT, **{k: v for k, v in _SMALL.items() if k != "num_heads"}, num_heads_outer=2, inner_dim=8, num_heads_inner=2
    ),
}
_NEWER = {"qwen3": "qwen3_vit_88m", "deepseek": "deepseek_vit_412m", "gemma4": "gemma4_vit_167m"}  # than the oldest timm claimed
if hasattr(ConVit, "forward_intermediates"):
    FAMILIES["convit"] = partial(ConVit, **{**_SMALL, "embed_dim": 16}, local_up_to_layer=2)
FAMILIES |= {key: partial(timm.create_model, name, **_ENCODER) for key, name in _NEWER.items() if timm.is_model(name)}
_ONE, _NONE = [1] * 4, [0] * 4
PREFIX_ROWS = dict.fromkeys(FAMILIES, _ONE) | {
    "vit without class token": _NONE,
    "vit with registers": [5] * 4,
    "dinov3": [5] * 4,
    "relative positions": _NONE,
    "sam": _NONE,
    "naflex": [2] * 4,
    "cait": _NONE,  # the class token joins in later blocks of another kind
    "xcit": _NONE,
    "convit": [0, 0, 1, 1],  # the class token joins half way
    "qwen3": _NONE,
    "deepseek": _NONE,
    "gemma4": _NONE,
}


def build(name: str, seed: int = 0, **settings):
    """A model of `FAMILIES`, in eval mode, with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return FAMILIES[name](**settings).eval()


def blocks_of(model):
    """The modules whose outputs are adapted."""
    return [*(model.encoder if hasattr(model, "encoder") else model).blocks]


def images(count: int = 2, height: int = 32, width: int = 32, seed: int = 1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def strong(model):
    """Give a wrapped model an adapter that visibly changes the features; the authors' s = 0.001 hides in rounding."""
    with torch.no_grad():
        for name, parameter in model.rein.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)
    return model
