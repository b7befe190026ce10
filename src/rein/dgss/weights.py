"""A timm backbone by name, with its pretrained weights where they can be had."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rein import backbones, official
from rein.errors import InputError, ReinError
from rein.testing.models import pocket_vit

POCKET = "pocket_vit"  # no name of timm's: its weights come with rein


def make_backbone(
    name: str,
    pretrained: bool,
    patch_size: int | None,
    say: Callable[[str], None] = print,
    *,
    img_size: int | None = None,
    weights: Path | None = None,
    required: bool = False,
) -> tuple[nn.Module, bool]:
    """A timm model, or `rein.testing.pocket_vit`, without classifier, and whether its weights are pretrained.

    It takes images of any size where its class can.

    Where the pretrained weights cannot be had, one line says so and the weights are random, from torch's random state; or that is an
    error, where they are `required`.

    Args:
        name: timm's, or `pocket_vit`.
        pretrained: whether to ask the hub for timm's weights; those of `pocket_vit` need none.
        patch_size: side in pixels; None means the model's own. Weights of a ViT with a class token are brought to it the authors' way
            (`rein.official.resample`), others, and those of `pocket_vit`, timm's way.
        say: told what did not work.
        img_size: side in pixels of the images to build for; None means timm's own.
        weights: a file with weights under timm's names, for the model's own patch size.
        required: weights that cannot be had are an error.

    Raises:
        InputError: timm has no such model, no pretrained weights for it, or they cannot be had; or the file does not fit.
        UnsupportedBackboneError: rein does not know its blocks.
    """
    if name != POCKET and not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        found = f"near it are {', '.join(near)}." if near else f"see timm.list_models(); {POCKET} comes with rein."
        raise InputError(f"timm has no model {name!r}; {found}")
    settings: dict[str, Any] = {
        key: value for key, value in {"patch_size": patch_size, "img_size": img_size}.items() if value is not None
    }
    state: Mapping[str, Tensor] | None = None
    loaded = False
    try:
        if weights is not None:
            state = _read_weights(weights)
        elif name == POCKET and pretrained:
            model, loaded = pocket_vit(**settings), True
        elif pretrained:
            try:
                with _hub_asked_once():
                    model = _create(name, True, {})
                loaded = True
            except Exception as error:  # each kind of hub failure has its own class
                if "pretrained" in str(error):  # timm's own words for a tag or weights that do not exist
                    raise
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].partition(". ")[0]
                if required:
                    raise InputError(
                        f"the weights of {name} cannot be downloaded ({reason}); give a file of them, or ask for random ones."
                    ) from error
                say(f"The weights of {name} cannot be downloaded ({reason}); using RANDOM weights instead.")
            else:
                if settings:
                    state = model.state_dict()
        if not loaded or state is not None:
            model = _create(name, False, settings)
        if state is not None:
            model = _fill(model, state, name, settings, patch_size)
            loaded = True
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if isinstance(error, ReinError):
            raise
        raise InputError(f"timm cannot build {name!r} with {settings}: {error}") from error
    backbones.find_sites(model)
    return model, loaded


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    if name == POCKET:
        return pocket_vit(pretrained=False, **settings)
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **settings)
    except TypeError:  # a class without that setting
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **settings)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a pickle-free read of another."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own
        raise InputError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model"):  # the usual wrappings
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} holds no tensors by name.")
    return found


def _fill(
    model: nn.Module, state: Mapping[str, Tensor], name: str, settings: dict[str, Any], patch_size: int | None
) -> nn.Module:
    """Give `model` the weights, made anew by timm's own filter where its patch or image size differs.

    Raises:
        InputError: tensors are missing or do not fit.
    """
    own, found = (_square(each.get("pos_embed")) for each in (model.state_dict(), state))
    if patch_size and own and found and state["patch_embed.proj.weight"].shape[-1] != patch_size:
        state = official.resample(state, patch_size, own)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    tensors = dict(state) if convert is None else convert(dict(state), model)
    wanted = model.state_dict()
    tensors |= {key: _stretched(key, tensors[key], wanted[key].shape) for key in wanted if key in tensors}
    missing = [key for key in wanted if key not in tensors or tensors[key].shape != wanted[key].shape]
    if missing:
        raise InputError(
            f"the weights do not fit {name} with {settings}: {', '.join(missing[:6])} are missing or of another shape."
        )
    model.load_state_dict({key: tensors[key] for key in wanted})
    return model


def _stretched(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """SAM's position embedding (1, H, W, C) and relative positions (2 N - 1, C) for another image size, which timm does not bring.

    Relative positions are interpolated linearly, as SAM itself does when it meets another size; the embedding bicubically.
    """
    if tensor.shape == shape or tensor.shape[-1] != shape[-1]:
        return tensor
    if name == "pos_embed" and tensor.ndim == len(shape) == 4:
        grid = F.interpolate(tensor.float().permute(0, 3, 1, 2), shape[1:3], mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).to(tensor.dtype).contiguous()
    if name.endswith((".rel_pos_h", ".rel_pos_w")) and tensor.ndim == len(shape) == 2:
        return F.interpolate(tensor.float().mT[None], shape[0], mode="linear", align_corners=False)[0].mT.to(tensor.dtype)
    return tensor


def _square(positions: Tensor | None) -> int | None:
    """The side of the grid in a position embedding (1, 1 + N, C) with a class token's entry first, or None for another."""
    if positions is None or positions.ndim != 3:
        return None
    side = round(max(0, positions.shape[1] - 1) ** 0.5)
    return side if side and side * side == positions.shape[1] - 1 else None


@contextmanager
def _hub_asked_once() -> Iterator[None]:
    """Where the hub does not answer at once, use what was downloaded before; its client would try for most of a minute."""
    from huggingface_hub import constants

    found = constants.HF_HUB_OFFLINE
    try:
        if not found and not getproxies():
            address = urlsplit(constants.ENDPOINT)
            socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = found
