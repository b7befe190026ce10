"""Names of parameters in official checkpoints, and the corresponding names in rein and timm.

Keys of the adapter begin with `backbone.reins.` (`backbone.reins.<stage>.` if the widths of the blocks differ). Keys of the head
begin with `decode_head.` and use OpenMMLab's names for Mask2Former. All other keys with `backbone.` belong to the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Collection

ADAPTER_PREFIX, HEAD_PREFIX, BACKBONE_PREFIX = "backbone.reins.", "decode_head.", "backbone."

# official name -> rein's name, for one adapter
ADAPTER_NAMES = {
    "scale": "scale",
    "learnable_tokens": "tokens",
    "learnable_tokens_a": "tokens_a",
    "learnable_tokens_b": "tokens_b",
    "mlp_token2feat.weight": "token_mlp.weight",
    "mlp_token2feat.bias": "token_mlp.bias",
    "mlp_delta_f.weight": "delta_mlp.weight",
    "mlp_delta_f.bias": "delta_mlp.bias",
    "transform.weight": "query_proj.weight",
    "transform.bias": "query_proj.bias",
    "merge.weight": "query_merge.weight",
    "merge.bias": "query_merge.bias",
}

# (official pattern, timm's name) for EVA02, and for the MLP of DINOv2 giant; all other names of both backbones are equal
_BACKBONE_NAMES = (
    (r"mlp\.w12\.", "mlp.fc1."),
    (r"attn\.(q|v)_bias$", r"attn.\1_proj.bias"),
    (r"attn\.inner_attn_ln\.", "attn.norm."),
    (r"mlp\.w1\.", "mlp.fc1_g."),
    (r"mlp\.w2\.", "mlp.fc1_x."),
    (r"mlp\.ffn_ln\.", "mlp.norm."),
    (r"mlp\.w3\.", "mlp.fc2."),
)


def adapter_name(official_name: str) -> str | None:
    """Return rein's name for a key without `ADAPTER_PREFIX`, or None if the key is unknown."""
    match = re.fullmatch(r"(\d+)\.(.+)", official_name)
    stage, name = (f"stages.{match[1]}.", match[2]) if match else ("", official_name)
    return stage + ADAPTER_NAMES[name] if name in ADAPTER_NAMES else None


def official_adapter_name(name: str) -> str:
    """Return the key without `ADAPTER_PREFIX` for a name in the state dict of an adapter; the inverse of `adapter_name`."""
    official_names = {ours: official_name for official_name, ours in ADAPTER_NAMES.items()}
    match = re.fullmatch(r"stages\.(\d+)\.(.+)", name)
    return f"{match[1]}.{official_names[match[2]]}" if match else official_names[name]


def backbone_name(official_name: str) -> str | None:
    """Return timm's name for a key of DINOv2 or EVA02, or None for entries that timm's models do not store."""
    if official_name == "mask_token" or re.search(r"(^|\.)rope\.", official_name):  # for pretraining; recomputed by timm
        return None
    name = official_name
    for pattern, ours in _BACKBONE_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def head_names(encoder_layers: int, decoder_layers: int, keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the map from official keys, without `HEAD_PREFIX`, to names in the state dict of `heads.Mask2FormerHead`.

    If a key maps to several names, the official tensor is their concatenation along the first axis.

    Args:
        encoder_layers: number of layers of the pixel decoder.
        decoder_layers: number of layers of the masked-attention decoder.
        keys: the keys of the state dict, in official or in rein's names. They show whether the head has level projections and
            learned queries.
    """
    table: dict[str, tuple[str, ...]] = {}

    def add(official_name: str, ours: str, parameters: tuple[str, ...] = ("weight", "bias")) -> None:
        for parameter in parameters:
            table[f"{official_name}.{parameter}"] = (f"{ours}.{parameter}",)

    for level in range(3):
        add(f"pixel_decoder.input_convs.{level}.conv", f"pixel_decoder.input_projections.{level}.0")
        add(f"pixel_decoder.input_convs.{level}.gn", f"pixel_decoder.input_projections.{level}.1")
    for layer in range(encoder_layers):
        prefix = f"pixel_decoder.encoder.layers.{layer}"  # the same in both
        for module in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            add(f"{prefix}.self_attn.{module}", f"{prefix}.self_attn.{module}")
        add(f"{prefix}.ffn.layers.0.0", f"{prefix}.fc1")
        add(f"{prefix}.ffn.layers.1", f"{prefix}.fc2")
        add(f"{prefix}.norms.0", f"{prefix}.self_attn_layer_norm")
        add(f"{prefix}.norms.1", f"{prefix}.final_layer_norm")
    for official_name, ours in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        add(f"pixel_decoder.{official_name}.0.conv", f"pixel_decoder.{ours}.0", ("weight",))
        add(f"pixel_decoder.{official_name}.0.gn", f"pixel_decoder.{ours}.1")
    add("pixel_decoder.mask_feature", "pixel_decoder.mask_projection")
    table["pixel_decoder.level_encoding.weight"] = ("pixel_decoder.level_embed",)
    for layer in range(decoder_layers):
        official_name, ours = f"transformer_decoder.layers.{layer}", f"decoder.layers.{layer}"
        for parameter in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            table[f"{official_name}.cross_attn.attn.{parameter}"] = (f"{ours}.cross_attn.{parameter}",)
        for parameter in ("weight", "bias"):
            projections = tuple(f"{ours}.self_attn.{projection}_proj.{parameter}" for projection in "qkv")
            table[f"{official_name}.self_attn.attn.in_proj_{parameter}"] = projections
        add(f"{official_name}.self_attn.attn.out_proj", f"{ours}.self_attn.out_proj")
        add(f"{official_name}.ffn.layers.0.0", f"{ours}.fc1")
        add(f"{official_name}.ffn.layers.1", f"{ours}.fc2")
        for number, norm in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
            add(f"{official_name}.norms.{number}", f"{ours}.{norm}")
    add("transformer_decoder.post_norm", "decoder.layernorm")
    add("level_embed", "level_embed", ("weight",))
    add("cls_embed", "class_predictor")
    for number in range(3):
        add(f"mask_embed.{2 * number}", f"decoder.mask_predictor.mask_embedder.{number}.0")
    if "decoder_input_projs.0.weight" in keys or "level_projections.0.weight" in keys:
        for level in range(3):
            add(f"decoder_input_projs.{level}", f"level_projections.{level}")
    if "query_embed.weight" in keys or "query_positions.weight" in keys:  # learned queries: a head without an adapter
        table["query_embed.weight"], table["query_feat.weight"] = ("query_positions.weight",), ("query_features.weight",)
    else:
        add("querys2feat", "query_features")
    return table
