"""Small timm models without downloads, one for each property in which families differ. To test a new family, add an entry.

`FAMILIES` are isotropic transformers: all blocks return tokens of the same shape. `STAGED` are all other models.
"""

from functools import partial

import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.convmixer import ConvMixer
from timm.models.eva import Eva
from timm.models.focalnet import FocalNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
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
_NEWER = {
    "qwen3": "qwen3_vit_88m",
    "deepseek": "deepseek_vit_412m",
    "gemma4": "gemma4_vit_167m",
}  # newer than the oldest supported timm
if hasattr(ConVit, "forward_intermediates"):
    FAMILIES["convit"] = partial(ConVit, **{**_SMALL, "embed_dim": 16}, local_up_to_layer=2)
FAMILIES |= {key: partial(timm.create_model, name, **_ENCODER) for key, name in _NEWER.items() if timm.is_model(name)}


def _by_name(name, **settings):
    return partial(timm.create_model, name, num_classes=0, **settings)


_DEPTHS, _WIDTHS, _HEADS = (1, 1, 2, 1), (24, 48, 64, 96), (1, 2, 4, 4)
_SWIN = {"img_size": 64, "depths": _DEPTHS, "embed_dim": 24, "num_heads": _HEADS}
STAGED = {
    "ConvMixer": partial(ConvMixer, 16, 3, kernel_size=3, patch_size=8, num_classes=0),
    "CrossVit": _by_name("crossvit_tiny_240", embed_dim=(24, 48), depth=((1, 2, 0), (1, 2, 0)), num_heads=(2, 4)),
    "FocalNet": partial(FocalNet, depths=_DEPTHS, embed_dim=24, num_classes=0),
    "MlpMixer": partial(MlpMixer, img_size=32, patch_size=8, num_blocks=3, embed_dim=32, num_classes=0),
    "Nest": partial(Nest, img_size=64, embed_dims=(24, 48, 64), num_heads=(1, 2, 4), depths=(1, 1, 2), num_classes=0),
    "PoolingVisionTransformer": partial(
        PoolingVisionTransformer, 64, 16, 8, "overlap", (12, 12, 12), (1, 2, 1), (2, 4, 4), 2, num_classes=0
    ),
    "SwinTransformer": _by_name("swin_tiny_patch4_window7_224", **{**_SWIN, "img_size": (64, 128)}, window_size=4),
    "SwinTransformerV2": _by_name("swinv2_tiny_window8_256", **_SWIN, window_size=4),
    "SwinTransformerV2Cr": _by_name("swinv2_cr_tiny_224", **_SWIN, window_size=2),
    "Hiera": _by_name("hiera_tiny_224", embed_dim=24, stages=_DEPTHS),
    "HieraDet": _by_name("sam2_hiera_tiny", embed_dim=24, stages=_DEPTHS, global_att_blocks=(3,)),
    "DaVit": _by_name("davit_tiny", depths=_DEPTHS, embed_dims=_WIDTHS, num_heads=_HEADS),
    "EfficientFormer": _by_name("efficientformer_l1", depths=_DEPTHS, embed_dims=_WIDTHS),
    "EfficientFormerV2": _by_name("efficientformerv2_s0", depths=(1, 1, 2, 2)),
    "EfficientVitLarge": _by_name("efficientvit_l1", widths=(8, 16, 32, 48, 64), depths=(1,) * 5, head_dim=16),
    "FasterNet": _by_name("fasternet_t0", depths=_DEPTHS),
    "Levit": _by_name("levit_256d", embed_dim=(32, 48, 64), depth=(1, 1, 2), num_heads=(2, 3, 4), key_dim=8),
    "LevitDistilled": _by_name("levit_128s", embed_dim=(32, 48, 64), depth=(1, 1, 2), num_heads=(2, 3, 4), key_dim=8),
    "MetaNeXt": _by_name("inception_next_atto", depths=_DEPTHS),
    "TinyVit": _by_name("tiny_vit_5m_224", depths=_DEPTHS, embed_dims=_WIDTHS, num_heads=_HEADS),
    "Twins": _by_name("twins_svt_small", embed_dims=_WIDTHS, num_heads=_HEADS, depths=_DEPTHS),
    "Sequencer2d": _by_name(
        "sequencer2d_s", img_size=56, layers=(1,) * 4, embed_dims=(16, 32, 32, 32), hidden_sizes=(4, 8, 8, 8)
    ),
}
_UNCHANGED = {  # small enough without changes
    "ByobNet": "test_byobnet",
    "MaxxVit": "test_maxvit",
    "ConvNeXt": "test_convnext",
    "NormFreeNet": "test_nfnet",
    "ResNet": "test_resnet",
    "EfficientNet": "test_efficientnet",
    "MambaOut": "test_mambaout",
    "VovNet": "ese_vovnet19b_slim_dw",
    "EdgeNeXt": "edgenext_xx_small",
    "EfficientVit": "efficientvit_b0",
    "EfficientVitMsra": "efficientvit_m0",
    "FastVit": "fastvit_t8",
    "MobileNetV3": "lcnet_035",
    "GhostNet": "ghostnet_050",
    "HighPerfGpuNet": "hgnetv2_b0",
    "PyramidVisionTransformerV2": "pvt_v2_b0",
    "RegNet": "regnetx_002",
    "RepGhostNet": "repghostnet_050",
    "RepVit": "repvit_m1",
    "ResNetV2": "resnetv2_18",
    "SENet": "legacy_seresnet18",
    "SHViT": "shvit_s1",
    "StarNet": "starnet_s050",
    "SwiftFormer": "swiftformer_xs",
    "Visformer": "visformer_tiny",
    "MultiScaleVit": "mvitv2_tiny",
    "NextViT": "nextvit_small",
    "CPUBone": "cpubone_nano",
    "IFormer": "iformer_t",
    "LCNetV2": "lcnetv2_small",
    "LowFormer": "lowformer_b0",
    "MobileNetV5": "mobilenetv5_base",
    "CoaT": "coat_lite_tiny",
    "GlobalContextVit": "gcvit_xxtiny",
    "MetaFormer": "caformer_s18",
    "VOLO": "volo_d1_224",
}
STAGED |= {key: _by_name(name) for key, name in _UNCHANGED.items()}
_ONE, _NONE = [1] * 4, [0] * 4
PREFIX_TOKENS = dict.fromkeys(FAMILIES, _ONE) | {
    "vit without class token": _NONE,
    "vit with registers": [5] * 4,
    "dinov3": [5] * 4,
    "relative positions": _NONE,
    "sam": _NONE,
    "naflex": [2] * 4,
    "cait": _NONE,  # the class token is added in later blocks of another class
    "xcit": _NONE,
    "convit": [0, 0, 1, 1],  # the class token is added halfway
    "qwen3": _NONE,
    "deepseek": _NONE,
    "gemma4": _NONE,
}


def build(name: str, seed: int = 0, **settings):
    """A model of `FAMILIES` in eval mode. Its weights depend on the seed alone."""
    torch.manual_seed(seed)
    return FAMILIES[name](**settings).eval()


def get_blocks(model):
    """The blocks of a model of `FAMILIES`."""
    return [*(model.encoder if hasattr(model, "encoder") else model).blocks]


def images(count: int = 2, height: int = 32, width: int = 32, seed: int = 1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def amplify_adapter(model):
    """Set the adapter's scale s to 0.5, so that it changes the features measurably; the change of s = 0.001 is lost in rounding."""
    with torch.no_grad():
        for name, parameter in model.rein.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.5)
    return model
