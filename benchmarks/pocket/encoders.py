"""The encoders that the pretraining can train: with random weights by name, or with the weights of an exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import VisionTransformer
from torch import nn

from rein.backbones.creation import make_backbone
from rein.errors import InputError
from rein.testing.models import POCKET, POCKET_VIT, POCKET_WEIGHTS


def settings(name: str) -> dict[str, int]:
    """Arguments of `make_backbone`: every encoder has position embeddings for images of 128 x 128, as `pocket_vit` has."""
    return {} if name == POCKET else {"img_size": POCKET_VIT["img_size"]}


def build(name: str) -> nn.Module:
    """A `VisionTransformer` of timm, or `pocket_vit`, with random weights from torch's global random state.

    Raises:
        InputError: timm has no such model, or the pretraining cannot use it.
    """
    model = make_backbone(name, pretrained=False, **settings(name))
    fits = type(model) is VisionTransformer and model.cls_token is not None and model.num_prefix_tokens == 1
    fits = fits and isinstance(model.norm_pre, nn.Identity)  # which the objective leaves out
    if not fits or model.patch_embed.patch_size not in ((4, 4), (8, 8), (16, 16)):
        wanted = (
            "a VisionTransformer of timm with a class token and no other prefix token, no norm before the blocks (as CLIP's), "
        )
        wanted += "and patches of 4, 8 or 16 pixels"
        raise InputError(f"the pretraining cannot use {name}; expected {wanted}.")
    return model


def load(path: Path) -> nn.Module:
    """The encoder of an exported file.

    Raises:
        InputError: as `about`.
    """
    name = about(path)["encoder"]
    return make_backbone(name, pretrained=False, weights=path, **settings(name))


def about(path: Path = POCKET_WEIGHTS) -> dict[str, Any]:
    """What the header of an exported file says of the run that made it: `encoder`, `step`, `steps`, `images`, ...

    Raises:
        InputError: the pretraining did not export this file.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})["about"])
        return {"encoder": POCKET, **found}  # the packaged file does not say it
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a file that `python -m benchmarks.pocket.pretrain --export --to FILE` wrote.") from error
