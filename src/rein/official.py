"""The authors' checkpoints -> rein, and back.

Layout: a dictionary with `state_dict`, or one alone. Keys of the adapter begin with `backbone.reins.` (`backbone.reins.<stage>.`
where there are several widths), those of the head with `decode_head.`, with OpenMMLab's names for Mask2Former's parts; the rest of
`backbone.` is the backbone. Written from a description of that layout (SPEC.md), not from the authors' code.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rein import backbones, checkpoint, heads
from rein.adapter import build_adapter
from rein.config import ReinConfig
from rein.errors import CheckpointError, InputError
from rein.injection import ADAPTER, is_wrapped
from rein.segmenter import Segmenter, default_indices

_ADAPTER, _HEAD, _BACKBONE = "backbone.reins.", "decode_head.", "backbone."
_ADAPTER_NAMES = {  # the authors' -> ours
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


@dataclass(frozen=True)
class Official:
    """What an official checkpoint holds, under rein's and timm's names.

    Attributes:
        config: of the adapter, or None where there is none.
        adapter: its tensors, named as in `ReinAdapter.state_dict()`; with several stages as in `StagewiseAdapter.state_dict()`.
        head: arguments of `heads.Mask2FormerHead`, or None where there is none.
        head_tensors: named as in its `state_dict()`.
        backbone: named as in timm's model; empty where the file does not carry it.
    """

    config: ReinConfig | None
    adapter: dict[str, Tensor]
    head: dict[str, Any] | None
    head_tensors: dict[str, Tensor]
    backbone: dict[str, Tensor]


def read(path: str | os.PathLike[str], *, use_softmax: bool = True, zero_init: bool = False) -> Official:
    """Read an official `.pth` file and rename what it holds. Nothing but tensors is unpickled.

    Args:
        path: the file.
        use_softmax: of the adapter's configuration, which the file does not say.
        zero_init: the adapter has no s, since it started at zero.

    Raises:
        CheckpointError: the file cannot be read safely, or holds keys that are not known, which are listed.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read with weights_only=True ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Only tensors are read from such files; if it is trusted, save its state_dict alone where it was made."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict of tensors.")
    return convert(state, path, use_softmax=use_softmax, zero_init=zero_init)


def convert(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str] = "the state dict",
    *,
    use_softmax: bool = True,
    zero_init: bool = False,
) -> Official:
    """Rename the tensors of an official state dict.

    Raises:
        CheckpointError: as `read`.
    """
    parts: dict[str, dict[str, Tensor]] = {_ADAPTER: {}, _HEAD: {}, _BACKBONE: {}}
    unknown: list[str] = []
    for key, value in state.items():
        prefix = next((prefix for prefix in parts if str(key).startswith(prefix)), None)
        if prefix is None:
            unknown.append(str(key))
        elif not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{path} holds {key}, which is not of finite floating point numbers ({value.dtype}).")
        else:
            parts[prefix][key.removeprefix(prefix)] = value
    try:
        config, adapter = _adapter_from(parts[_ADAPTER], unknown, use_softmax, zero_init)
        head, head_tensors = _head_from(parts[_HEAD], unknown, path)
    except CheckpointError:
        raise
    except (LookupError, RuntimeError, ValueError, ZeroDivisionError, TypeError) as error:
        raise CheckpointError(f"{path} is not in the official layout: {type(error).__name__}: {error}") from error
    if unknown:
        raise CheckpointError(f"{path} holds {len(unknown)} keys that rein does not know: {', '.join(sorted(unknown))}.")
    return Official(config, adapter, head, head_tensors, _backbone_from(parts[_BACKBONE]))


def _adapter_from(
    state: Mapping[str, Tensor], unknown: list[str], use_softmax: bool, zero_init: bool
) -> tuple[ReinConfig | None, dict[str, Tensor]]:
    tensors = {}
    for key, value in state.items():
        match = re.fullmatch(r"(\d+)\.(.+)", key)
        stage, name = (f"stages.{match[1]}.", match[2]) if match else ("", key)
        if name in _ADAPTER_NAMES:
            tensors[stage + _ADAPTER_NAMES[name]] = value
        else:
            unknown.append(_ADAPTER + key)
    if not state:
        return None, {}
    first = {key.removeprefix("stages.0."): value for key, value in tensors.items()}
    tokens = first.get("tokens", first.get("tokens_a"))
    if tokens is None:
        raise CheckpointError(
            f"its adapter lacks the tokens of its first stage: {_ADAPTER}[0.]learnable_tokens or learnable_tokens_a; it has "
            f"{', '.join(sorted(_ADAPTER + key for key in state))}."
        )
    if ("scale" in first) == zero_init:
        raise CheckpointError(
            f"its adapter has {_ADAPTER}scale, with zero_init=True there is none."
            if zero_init
            else f"its adapter lacks {_ADAPTER}scale; where it was trained from zero and has none, say zero_init=True (--zero-init)."
        )
    config = ReinConfig(
        num_tokens=tokens.shape[1],
        rank=None if "tokens" in first else tokens.shape[2],
        query_dim=first["query_proj.weight"].shape[0] if "query_proj.weight" in first else None,
        use_softmax=use_softmax,
        zero_init=zero_init,
    )
    return config, tensors


def _head_table(encoder_layers: int, decoder_layers: int, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """OpenMMLab's key -> ours; where there are several of ours, theirs is all of them joined along the first axis."""
    table: dict[str, tuple[str, ...]] = {}

    def same(theirs: str, ours: str, parts: tuple[str, ...] = ("weight", "bias")) -> None:
        for part in parts:
            table[f"{theirs}.{part}"] = (f"{ours}.{part}",)

    for level in range(3):
        same(f"pixel_decoder.input_convs.{level}.conv", f"pixel_decoder.input_projections.{level}.0")
        same(f"pixel_decoder.input_convs.{level}.gn", f"pixel_decoder.input_projections.{level}.1")
    for layer in range(encoder_layers):
        theirs, ours = f"pixel_decoder.encoder.layers.{layer}", f"pixel_decoder.encoder.layers.{layer}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            same(f"{theirs}.self_attn.{part}", f"{ours}.self_attn.{part}")
        same(f"{theirs}.ffn.layers.0.0", f"{ours}.fc1")
        same(f"{theirs}.ffn.layers.1", f"{ours}.fc2")
        same(f"{theirs}.norms.0", f"{ours}.self_attn_layer_norm")
        same(f"{theirs}.norms.1", f"{ours}.final_layer_norm")
    for theirs, ours in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        same(f"pixel_decoder.{theirs}.0.conv", f"pixel_decoder.{ours}.0", ("weight",))
        same(f"pixel_decoder.{theirs}.0.gn", f"pixel_decoder.{ours}.1")
    same("pixel_decoder.mask_feature", "pixel_decoder.mask_projection")
    table["pixel_decoder.level_encoding.weight"] = ("pixel_decoder.level_embed",)
    for layer in range(decoder_layers):
        theirs, ours = f"transformer_decoder.layers.{layer}", f"decoder.layers.{layer}"
        for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            table[f"{theirs}.cross_attn.attn.{part}"] = (f"{ours}.cross_attn.{part}",)
        for part in ("weight", "bias"):
            table[f"{theirs}.self_attn.attn.in_proj_{part}"] = tuple(f"{ours}.self_attn.{p}_proj.{part}" for p in "qkv")
        same(f"{theirs}.self_attn.attn.out_proj", f"{ours}.self_attn.out_proj")
        same(f"{theirs}.ffn.layers.0.0", f"{ours}.fc1")
        same(f"{theirs}.ffn.layers.1", f"{ours}.fc2")
        for number, norm in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
            same(f"{theirs}.norms.{number}", f"{ours}.{norm}")
    same("transformer_decoder.post_norm", "decoder.layernorm")
    same("level_embed", "level_embed", ("weight",))
    same("cls_embed", "class_predictor")
    for number in range(3):
        same(f"mask_embed.{2 * number}", f"decoder.mask_predictor.mask_embedder.{number}.0")
    keys = set(keys)
    if keys & {"decoder_input_projs.0.weight", "level_projections.0.weight"}:
        for level in range(3):
            same(f"decoder_input_projs.{level}", f"level_projections.{level}")
    if keys & {"query_embed.weight", "query_positions.weight"}:  # learned queries: a head without an adapter
        table["query_embed.weight"], table["query_feat.weight"] = ("query_positions.weight",), ("query_features.weight",)
    else:
        same("querys2feat", "query_features")
    return table


def _count(keys: Iterable[str], pattern: str) -> int:
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def _head_from(
    state: Mapping[str, Tensor], unknown: list[str], path: str | os.PathLike[str]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    if not state:
        return None, {}
    encoder_layers = _count(state, r"pixel_decoder\.encoder\.layers\.(\d+)\.")
    decoder_layers = _count(state, r"transformer_decoder\.layers\.(\d+)\.")
    table = _head_table(encoder_layers, decoder_layers, state)
    missing = sorted(f"{_HEAD}{key}" for key in table.keys() - state.keys())
    unknown.extend(f"{_HEAD}{key}" for key in state.keys() - table.keys())
    if missing:
        more = f" Not known: {', '.join(sorted(unknown))}." if unknown else ""
        raise CheckpointError(f"{path} lacks {len(missing)} keys of a Mask2Former head: {', '.join(missing)}.{more}")
    tensors: dict[str, Tensor] = {}
    for theirs, ours in table.items():
        tensors |= dict(zip(ours, state[theirs].chunk(len(ours)), strict=True))
    projections = [tensors[f"pixel_decoder.input_projections.{level}.0.weight"] for level in (2, 1, 0)]
    queries = tensors.get("query_positions.weight")
    settings = {
        "in_channels": [weight.shape[1] for weight in (tensors["pixel_decoder.adapter_1.0.weight"], *projections)],
        "num_classes": tensors["class_predictor.weight"].shape[0] - 1,
        "channels": tensors["level_embed.weight"].shape[1],
        "num_queries": None if queries is None else queries.shape[0],
        "encoder_layers": encoder_layers,
        "encoder_feedforward": tensors["pixel_decoder.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_layers": decoder_layers,
        "decoder_feedforward": tensors["decoder.layers.0.fc1.weight"].shape[0],
        "attention_heads": tensors["pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.weight"].shape[0] // (3 * 4 * 2),
        "project_levels": "level_projections.0.weight" in tensors,
    }
    return settings, {key: value.contiguous() for key, value in tensors.items()}


# (theirs, timm's) of the parts that are named otherwise; DINOv2's own names are timm's but for the giant's MLP
_BACKBONE_NAMES = (
    (r"mlp\.w12\.", "mlp.fc1."),
    (r"attn\.(q|v)_bias$", r"attn.\1_proj.bias"),
    (r"attn\.inner_attn_ln\.", "attn.norm."),
    (r"mlp\.w1\.", "mlp.fc1_g."),
    (r"mlp\.w2\.", "mlp.fc1_x."),
    (r"mlp\.ffn_ln\.", "mlp.norm."),
    (r"mlp\.w3\.", "mlp.fc2."),
)


def _backbone_from(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's or EVA02's weights under timm's names."""
    tensors = {}
    for key, value in state.items():
        if key == "mask_token" or re.search(r"(^|\.)rope\.", key):  # of the pretraining; computed anew
            continue
        for theirs, ours in _BACKBONE_NAMES:
            key = re.sub(theirs, ours, key)
        tensors[key] = value
    return tensors


def resample(state: Mapping[str, Tensor], patch_size: int = 16, grid: int = 32) -> dict[str, Tensor]:
    """DINOv2's patch kernel and position embedding at another patch size, the authors' way: plain bicubic, no antialiasing.

    Timm's own resampling (`create_model(..., patch_size=16)`) gives other weights, with which an official adapter does not agree.

    Args:
        state: with `patch_embed.proj.weight` (C, 3, P, P) and `pos_embed` (1, 1 + N, C), the class token's entry first.
        patch_size: the new P.
        grid: the new side of the position embedding, N = grid^2; 32 for images of 512 x 512 at P = 16.

    Returns:
        A new dictionary; the other tensors are shared.
    """
    if not {"patch_embed.proj.weight", "pos_embed"} <= state.keys():
        raise InputError("the state dict has no patch_embed.proj.weight and pos_embed, as DINOv2's has.")
    kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    side = round((positions.shape[1] - 1) ** 0.5)
    if side * side != positions.shape[1] - 1:
        raise InputError(f"pos_embed of shape {tuple(positions.shape)} is no class token and a square grid.")
    patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches.float(), (grid, grid), mode="bicubic", align_corners=False)
    return {
        **state,
        "patch_embed.proj.weight": F.interpolate(
            kernel.float(), (patch_size, patch_size), mode="bicubic", align_corners=False
        ).to(kernel.dtype),
        "pos_embed": torch.cat((positions[:, :1], patches.flatten(2).mT.to(positions.dtype)), 1),
    }


def load(path: str | os.PathLike[str], backbone: nn.Module, *, use_softmax: bool = True, zero_init: bool = False) -> nn.Module:
    """Give a timm backbone what an official checkpoint holds, in place.

    Args:
        path: the authors' `.pth` file.
        backbone: the bare timm model; with the public weights, unless the file carries them. DINOv2 at patch 16 must have been
            resampled the authors' way (`resample`).
        use_softmax: of the adapter's configuration, which the file does not say.
        zero_init: as in `read`.

    Returns:
        A `Segmenter` over `backbone`, wrapped, where the file holds a head; else `backbone` itself.

    Raises:
        CheckpointError: as `read`; or the tensors do not fit, and nothing was changed.
    """
    official = read(path, use_softmax=use_softmax, zero_init=zero_init)
    if is_wrapped(backbone):
        raise CheckpointError("rein.official.load wants a bare backbone; call rein.unwrap(backbone) first.")
    if official.backbone:
        _check_backbone(backbone, official.backbone, path)
    head = _head_over(backbone, official, path)
    if official.config is not None:
        found = backbones.find_sites(backbone)
        header = checkpoint.Header(
            "adapter", official.config, checkpoint.describe_sites(backbones.architecture(backbone), found) | {"given": {}}
        )
        checkpoint.load_adapter(backbone, official.adapter, header, path)
    if official.backbone:
        backbone.load_state_dict(official.backbone, strict=False)
    if head is None:
        return backbone
    head.load_state_dict(official.head_tensors)
    reference = next(backbone.parameters())
    head.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
    return Segmenter(backbone, head)


def _head_over(backbone: nn.Module, official: Official, path: str | os.PathLike[str]) -> heads.Mask2FormerHead | None:
    """The head that a checkpoint describes, with fresh weights, after checking that it fits file and backbone."""
    if official.head is None:
        return None
    config, channels = official.config, official.head["channels"]
    if official.head["num_queries"] is None and (config is None or config.query_dim != channels):
        got = "no adapter" if config is None else f"an adapter with query_dim={config.query_dim}"
        raise CheckpointError(f"{path} has a head that is linked to queries {channels} wide, but {got}.")
    try:
        head = heads.Mask2FormerHead(**official.head)
    except InputError as error:
        raise CheckpointError(f"{path} describes an impossible head: {error}") from error
    checkpoint.match_tensors(head, official.head_tensors, path)
    maps = backbones.map_channels(backbone)
    given = [maps[index] for index in default_indices(len(maps), 4)] if len(maps) >= 4 else maps
    if given != official.head["in_channels"]:
        raise CheckpointError(
            f"{path} does not fit this {backbones.architecture(backbone)}: its head wants maps of {official.head['in_channels']} "
            f"channels, the model's are {given}."
        )
    return head


def _check_backbone(backbone: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    own = {key: value for key, value in backbone.state_dict().items() if not key.startswith(("head.", "fc_norm."))}
    # persistent tables that timm computes itself (rotary embeddings) are in no file
    missing = sorted(key for key in own.keys() - tensors.keys() if "rope" not in key and not key.startswith("norm."))
    extra = sorted(key for key in tensors.keys() - own.keys() if not key.startswith("norm."))
    shapes = sorted(
        f"{key} is {tuple(tensors[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in own.keys() & tensors.keys()
        if own[key].shape != tensors[key].shape
    )
    if missing or extra or shapes:
        found = [("missing", missing), ("unexpected", extra), ("wrong shape", shapes)]
        raise CheckpointError(
            f"{path} does not fit this {backbones.architecture(backbone)}: "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in found if names)
        )


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    use_softmax: bool = True,
    zero_init: bool = False,
) -> list[Path]:
    """Official `.pth` -> rein's safetensors file, and beside it the backbone's weights where the file carries them.

    Args:
        source: the authors' file.
        target: where to write; `rein.load` or `rein.Segmenter.load` reads it.
        backbone: the bare timm model that it is for; only shapes are looked at, so it may be on the meta device.
        use_softmax: as in `read`.
        zero_init: as in `read`.

    Returns:
        The files that were written: `target` and, where there are weights of a backbone, `<target's stem>.backbone.safetensors`,
        which timm reads (`create_model(..., checkpoint_path=...)`).

    Raises:
        CheckpointError: as `load`.
    """
    official = read(source, use_softmax=use_softmax, zero_init=zero_init)
    if official.config is None and official.head is None:
        raise CheckpointError(f"{source} holds neither an adapter nor a head.")
    name = backbones.architecture(backbone)
    facts: dict[str, Any] = {"architecture": name}
    tensors: dict[str, Tensor] = {}
    if official.config is not None:
        sites = backbones.find_sites(backbone)
        facts = checkpoint.describe_sites(name, sites) | {"given": {}}
        with torch.device("meta"):
            widths = [site.width for site in sites]
            checkpoint.match_tensors(build_adapter(widths, official.config, patch_size=1), official.adapter, source)
        tensors = dict(official.adapter)
    header = checkpoint.Header("adapter", official.config, facts)
    head = _head_over(backbone, official, source)
    if head is not None:
        tensors = {f"{ADAPTER}.{key}": value for key, value in tensors.items()}
        tensors |= {f"head.{key}": value for key, value in official.head_tensors.items()}
        indices = default_indices(len(backbones.map_channels(backbone)), 4)
        entry = {"name": "Mask2FormerHead", "arguments": head.arguments, "indices": indices}
        header = checkpoint.Header("segmenter", official.config, facts, entry)
    if official.backbone:
        _check_backbone(backbone, official.backbone, source)
    checkpoint.write(target, tensors, header)
    written = [Path(target)]
    if official.backbone:
        beside = Path(target).with_suffix(".backbone.safetensors")
        checkpoint.replace_file(beside, to_bytes({key: value.contiguous() for key, value in official.backbone.items()}))
        written.append(beside)
    return written


def to_official(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rein's safetensors file -> the authors' layout, `{"state_dict": ...}`; `convert_file` is the exact way back.

    The layout does not say `use_softmax` nor `zero_init`: where they are not the defaults, `convert_file` must be told.

    Raises:
        CheckpointError: the file cannot be read, its head is no `Mask2FormerHead` over the paper's blocks, or its adapter is of a
            kind that the authors do not have (`share=False`).
    """
    tensors, header = checkpoint.read(source)
    if header.config is not None and not header.config.share:
        raise CheckpointError(f"{source} holds an adapter with share=False, which the authors' layout has no names for.")
    prefix = f"{ADAPTER}." if header.kind == "segmenter" else ""
    adapter = {key.removeprefix(prefix): value for key, value in tensors.items() if not key.startswith("head.")}
    state: dict[str, Tensor] = {}
    theirs = {ours: name for name, ours in _ADAPTER_NAMES.items()}
    for key, value in adapter.items():
        match = re.fullmatch(r"stages\.(\d+)\.(.+)", key)
        state[f"{_ADAPTER}{match[1]}.{theirs[match[2]]}" if match else f"{_ADAPTER}{theirs[key]}"] = value
    if header.head is not None:
        if header.head["name"] != "Mask2FormerHead":
            raise CheckpointError(f"{source} holds a {header.head['name']}, which the authors' layout has no names for.")
        widths = header.backbone.get("widths")
        depth = None if widths is None else len(widths) if len(set(widths)) == 1 else len(list(groupby(widths)))
        indices = header.head["indices"]
        if depth is not None and (depth < 4 or indices != default_indices(depth, 4)):
            raise CheckpointError(f"{source} has a head over the maps {indices}, which the authors' layout cannot say.")
        head = {key.removeprefix("head."): value for key, value in tensors.items() if key.startswith("head.")}
        arguments = header.head["arguments"]
        for name, ours in _head_table(arguments["encoder_layers"], arguments["decoder_layers"], head).items():
            state[f"{_HEAD}{name}"] = torch.cat([head[key] for key in ours])
    _write_pth(target, state)


def _write_pth(target: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(state), "meta": {}}, buffer)
    checkpoint.replace_file(target, buffer.getvalue())
