"""Trainable parameters of each method in the paper's foundation models and newer ones, in every size that timm has.

Parameters are counted on meta tensors: no weight is allocated or downloaded. A fraction refers to the adapted backbone with the
method's own parameters. If a method does not fit a backbone, the row says why. The published counts are checked: a count that differs
fails the benchmark.
"""

import copy
from collections.abc import Iterator

import timm
import torch
from torch import nn

from benchmarks.options import Options
from rein.dgss import methods
from rein.errors import UnsupportedBackboneError

BACKBONES = {  # family -> variant -> name in timm, smallest first; a sample takes the smallest
    "DINOv2": {
        "S": "vit_small_patch14_dinov2",
        "B": "vit_base_patch14_dinov2",
        "L": "vit_large_patch14_dinov2",
        "g": "vit_giant_patch14_dinov2",
    },
    "DINOv3": {
        "S": "vit_small_patch16_dinov3",
        "S+": "vit_small_plus_patch16_dinov3",
        "B": "vit_base_patch16_dinov3",
        "L": "vit_large_patch16_dinov3",
        "H+": "vit_huge_plus_patch16_dinov3",
        "7B": "vit_7b_patch16_dinov3",
    },
    "DINOv3 ConvNeXt": {"T": "convnext_tiny", "S": "convnext_small", "B": "convnext_base", "L": "convnext_large"},
    "EVA02": {
        "Ti": "eva02_tiny_patch14_224",
        "S": "eva02_small_patch14_224",
        "B": "eva02_base_patch14_224",
        "L": "eva02_large_patch14_224",
    },
    "EVA02-CLIP": {
        "B": "eva02_base_patch16_clip_224",
        "L": "eva02_large_patch14_clip_224",
        "E": "eva02_enormous_patch14_clip_224",
    },
    "CLIP": {
        "B": "vit_base_patch16_clip_224",
        "L": "vit_large_patch14_clip_224",
        "H": "vit_huge_patch14_clip_224",
        "g": "vit_giant_patch14_clip_224",
        "G": "vit_gigantic_patch14_clip_224",
    },
    "SAM": {"B": "samvit_base_patch16", "L": "samvit_large_patch16", "H": "samvit_huge_patch16"},
    "SAM 2": {"T": "sam2_hiera_tiny", "S": "sam2_hiera_small", "B+": "sam2_hiera_base_plus", "L": "sam2_hiera_large"},
    "MAE": {"B": "vit_base_patch16_224", "L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"},
    "SigLIP 2": {
        "B": "vit_base_patch16_siglip_gap_256",
        "L": "vit_large_patch16_siglip_gap_256",
        "So": "vit_so400m_patch16_siglip_gap_256",
        "g": "vit_giantopt_patch16_siglip_gap_256",
    },
    "BEiT v2": {"B": "beitv2_base_patch16_224", "L": "beitv2_large_patch16_224"},
    "BEiT-3": {"B": "beit3_base_patch16_224", "L": "beit3_large_patch16_224", "g": "beit3_giant_patch14_224"},
    "Perception Encoder": {
        "Ti": "vit_pe_spatial_tiny_patch16_512",
        "S": "vit_pe_spatial_small_patch16_512",
        "B": "vit_pe_spatial_base_patch16_512",
        "L": "vit_pe_spatial_large_patch14_448",
        "G": "vit_pe_spatial_gigantic_patch14_448",
    },
    "AIMv2": {
        "L": "aimv2_large_patch14_224",
        "H": "aimv2_huge_patch14_224",
        "1B": "aimv2_1b_patch14_224",
        "3B": "aimv2_3b_patch14_224",
    },
    "RADIO v3": {
        "B": "vit_base_patch16_radio_v3",
        "L": "vit_large_patch16_radio_v3",
        "H": "vit_huge_patch16_radio_v3",
        "g": "vit_giant_patch16_radio_v3",
    },
    "TIPS v2": {
        "B": "vit_base_patch14_reg1_tipsv2",
        "L": "vit_large_patch14_reg1_tipsv2",
        "So": "vit_so400m_patch14_reg1_tipsv2",
        "g": "vit_giant_patch14_reg1_tipsv2",
    },
}
TINY = {"tests": {"ViT": "test_vit", "ConvNeXt": "test_convnext"}}
METHODS = {name: (name, {}) for name in methods.METHODS if name != "rein-lowrank"}  # rein-lowrank is rein
METHODS["dora"] = ("lora", {"dora": True})

LARGE = "vit_large_patch16_224"
PUBLISHED = [  # backbone, method, settings, parameters
    (LARGE, "rein-core", {}, 52_838_400),
    (LARGE, "rein-link", {}, 59_332_864),
    (LARGE, "rein-share", {}, 5_016_065),
    (LARGE, "rein-lowrank", {}, 2_990_081),
    (LARGE, "rein", {"query_dim": None}, 2_530_817),
    (LARGE, "rein", {"rank": 4}, 2_666_369),
    (LARGE, "rein", {"rank": 8}, 2_774_273),
    (LARGE, "rein", {"rank": 16}, 2_990_081),
    (LARGE, "rein", {"rank": 32}, 3_421_697),
    (LARGE, "rein", {"rank": 64}, 4_284_929),
    (LARGE, "rein", {"num_tokens": 50}, 2_970_881),
    (LARGE, "rein", {"num_tokens": 75}, 2_980_481),
    (LARGE, "rein", {"num_tokens": 100}, 2_990_081),
    (LARGE, "rein", {"num_tokens": 125}, 2_999_681),
    (LARGE, "rein", {"num_tokens": 150}, 3_009_281),
    (LARGE, "rein", {"num_tokens": 200}, 3_028_481),
    (LARGE, "soma", {}, 4_718_592),
    ("vit_small_patch16_224", "rein", {}, 684_033),
    ("vit_base_patch16_224", "rein", {}, 1_741_569),
    ("vit_huge_patch14_224", "rein", {}, 4_510_721),
    ("vit_giant_patch14_dinov2", "rein", {}, 6_359_041),
]


def count(bare: nn.Module, method: str, settings: dict) -> tuple[int, int]:
    """Trainable parameters and all parameters after `method` is applied to a copy of a bare meta model."""
    with torch.device("meta"):
        model = methods.apply(method, copy.deepcopy(bare), **settings)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def rows(options: Options) -> Iterator[dict]:
    """The published counts, then those of every method in every backbone."""
    models = {}
    for name, method, settings, published in PUBLISHED:
        models[name] = models.get(name) or bare(name)
        trainable, total = count(models[name], method, settings)
        yield {
            "model": name,
            "method": method,
            "settings": ", ".join(f"{key}={value}" for key, value in settings.items()),
            "published_parameters": published,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "fraction": round(trainable / total, 8),
        }
        if trainable != published:
            raise ValueError(
                f"{method} {settings} trains {trainable:,} parameters in {name}; expected the published {published:,}."
            )
    families = options.choose(
        TINY, {family: dict([next(iter(variants.items()))]) for family, variants in BACKBONES.items()}, BACKBONES
    )
    for family, variants in families.items():
        for variant, name in variants.items():
            yield from backbone_rows({"family": family, "variant": variant, "model": name})


def bare(name: str) -> nn.Module:
    """A bare backbone on meta tensors."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def backbone_rows(case: dict) -> Iterator[dict]:
    """A row for every method, or one row if timm lacks the model."""
    if not timm.is_model(case["model"]):
        yield {**case, "refused": f"timm {timm.__version__} has no such model"}
        return
    model = bare(case["model"])
    for name, (method, settings) in METHODS.items():
        try:
            trainable, total = count(model, method, settings)
        except UnsupportedBackboneError as error:
            yield {**case, "method": name, "refused": str(error)}
        else:
            numbers = {"trainable_parameters": trainable, "total_parameters": total, "fraction": round(trainable / total, 8)}
            yield {**case, "method": name, **numbers}
