"""Convert official state dicts to rein's and timm's names and back, and resample the weights of DINOv2."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rein.checkpoint import list_names
from rein.config import ReinConfig
from rein.errors import CheckpointError, one_line
from rein.official.names import (
    ADAPTER_PREFIX,
    BACKBONE_PREFIX,
    HEAD_PREFIX,
    adapter_name,
    backbone_name,
    head_names,
    official_adapter_name,
)


@dataclass(frozen=True)
class Official:
    """Content of an official checkpoint under rein's and timm's names.

    Attributes:
        config: configuration of the adapter; None if the checkpoint has no adapter.
        adapter: tensors of the adapter, named as in `ReinAdapter.state_dict()` or, for several stages, as in
            `StagewiseAdapter.state_dict()`.
        head: arguments of `heads.Mask2FormerHead`; None if the checkpoint has no head.
        head_tensors: tensors of the head, named as in its `state_dict()`.
        backbone: weights of the backbone under timm's names; empty if the checkpoint has none.
    """

    config: ReinConfig | None
    adapter: dict[str, Tensor]
    head: dict[str, Any] | None
    head_tensors: dict[str, Tensor]
    backbone: dict[str, Tensor]


def convert(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str] = "the state dict",
    *,
    use_softmax: bool = True,
    zero_init: bool = False,
) -> Official:
    """Convert an official state dict to rein's and timm's names.

    Args:
        state: the official state dict.
        path: name of the source in error messages.
        use_softmax: as in `read`.
        zero_init: as in `read`.

    Raises:
        CheckpointError: as `read`.
    """
    parts: dict[str, dict[str, Tensor]] = {ADAPTER_PREFIX: {}, HEAD_PREFIX: {}, BACKBONE_PREFIX: {}}
    unknown: list[str] = []
    for key, value in state.items():
        prefix = next((prefix for prefix in parts if str(key).startswith(prefix)), None)
        if prefix is None:
            unknown.append(str(key))
        elif not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(
                f"{path} has a tensor {one_line(key)} of dtype {value.dtype}; expected finite floating point numbers."
            )
        else:
            parts[prefix][key.removeprefix(prefix)] = value
    try:
        config, adapter = _convert_adapter(parts[ADAPTER_PREFIX], unknown, path, use_softmax, zero_init)
        head, head_tensors = _convert_head(parts[HEAD_PREFIX], unknown, path)
    except CheckpointError:
        raise
    except (LookupError, RuntimeError, ValueError, ZeroDivisionError, TypeError) as error:
        raise CheckpointError(f"{path} is not in the official layout: {type(error).__name__}: {one_line(error)}") from error
    if unknown:
        raise CheckpointError(f"{path} has {len(unknown)} unknown keys: {list_names(sorted(unknown))}.")
    backbone = {name: value for key, value in parts[BACKBONE_PREFIX].items() if (name := backbone_name(key)) is not None}
    return Official(config, adapter, head, head_tensors, backbone)


def _convert_adapter(
    state: Mapping[str, Tensor], unknown: list[str], path: str | os.PathLike[str], use_softmax: bool, zero_init: bool
) -> tuple[ReinConfig | None, dict[str, Tensor]]:
    """Return configuration and tensors of the adapter; append unknown keys to `unknown`."""
    tensors = {}
    for key, value in state.items():
        name = adapter_name(key)
        if name is None:
            unknown.append(ADAPTER_PREFIX + key)
        else:
            tensors[name] = value
    if not state:
        return None, {}
    first = {name.removeprefix("stages.0."): value for name, value in tensors.items()}
    tokens = first.get("tokens", first.get("tokens_a"))
    if tokens is None:
        keys = list_names(sorted(ADAPTER_PREFIX + key for key in state))
        raise CheckpointError(
            f"{path} has an adapter without tokens in its first stage: expected {ADAPTER_PREFIX}[0.]learnable_tokens or "
            f"learnable_tokens_a, got {keys}."
        )
    if "scale" in first and zero_init:
        raise CheckpointError(
            f"{path} has {ADAPTER_PREFIX}scale, which an adapter with zero_init=True lacks; leave zero_init out."
        )
    if "scale" not in first and not zero_init:
        raise CheckpointError(
            f"{path} lacks {ADAPTER_PREFIX}scale; if the adapter was trained with zero_init, pass zero_init=True (--zero-init)."
        )
    config = ReinConfig(
        num_tokens=tokens.shape[1],
        rank=None if "tokens" in first else tokens.shape[2],
        query_dim=first["query_proj.weight"].shape[0] if "query_proj.weight" in first else None,
        use_softmax=use_softmax,
        zero_init=zero_init,
    )
    return config, tensors


def _convert_head(
    state: Mapping[str, Tensor], unknown: list[str], path: str | os.PathLike[str]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return arguments and tensors of the head; append unknown keys to `unknown`."""
    if not state:
        return None, {}
    encoder_layers = _count(state, r"pixel_decoder\.encoder\.layers\.(\d+)\.")
    decoder_layers = _count(state, r"transformer_decoder\.layers\.(\d+)\.")
    names = head_names(encoder_layers, decoder_layers, state.keys())
    missing = sorted(f"{HEAD_PREFIX}{key}" for key in names.keys() - state.keys())
    unknown.extend(f"{HEAD_PREFIX}{key}" for key in state.keys() - names.keys())
    if missing:
        more = f" Unknown keys: {list_names(sorted(unknown))}." if unknown else ""
        raise CheckpointError(f"{path} lacks {len(missing)} keys of a Mask2Former head: {list_names(missing)}.{more}")
    tensors: dict[str, Tensor] = {}
    for key, ours in names.items():
        tensors |= dict(zip(ours, state[key].chunk(len(ours)), strict=True))
    projections = [tensors[f"pixel_decoder.input_projections.{level}.0.weight"] for level in (2, 1, 0)]
    queries = tensors.get("query_positions.weight")
    arguments = {
        "in_channels": [weight.shape[1] for weight in (tensors["pixel_decoder.adapter_1.0.weight"], *projections)],
        "num_classes": tensors["class_predictor.weight"].shape[0] - 1,
        "channels": tensors["level_embed.weight"].shape[1],
        "num_queries": None if queries is None else queries.shape[0],
        "encoder_layers": encoder_layers,
        "encoder_feedforward": tensors["pixel_decoder.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_layers": decoder_layers,
        "decoder_feedforward": tensors["decoder.layers.0.fc1.weight"].shape[0],
        # rows of the weight: heads x 3 levels x 4 points x 2 coordinates
        "attention_heads": tensors["pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.weight"].shape[0] // (3 * 4 * 2),
        "project_levels": "level_projections.0.weight" in tensors,
    }
    return arguments, {name: value.contiguous() for name, value in tensors.items()}


def _count(keys: Iterable[str], pattern: str) -> int:
    return len({match[1] for key in keys if (match := re.match(pattern, key))})


def to_official_state(
    adapter: Mapping[str, Tensor], head: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the official state dict; the inverse of `convert`.

    Args:
        adapter: state dict of the adapter; may be empty.
        head: state dict of the `Mask2FormerHead`; may be empty.
        arguments: the arguments of the head.
    """
    state = {ADAPTER_PREFIX + official_adapter_name(name): value for name, value in adapter.items()}
    if head:
        for key, names in head_names(arguments["encoder_layers"], arguments["decoder_layers"], head.keys()).items():
            state[HEAD_PREFIX + key] = torch.cat([head[name] for name in names])
    return state
