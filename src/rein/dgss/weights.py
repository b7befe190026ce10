"""A timm backbone by name, with its pretrained weights where they can be had."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from torch import nn

from rein import backbones
from rein.errors import InputError


def make_backbone(
    name: str, pretrained: bool, patch_size: int | None, say: Callable[[str], None] = print
) -> tuple[nn.Module, bool]:
    """A timm model without classifier that takes images of any size where its class can, and whether its weights are pretrained.

    Where the pretrained weights cannot be had, one line says so and the weights are random, from torch's random state.

    Raises:
        InputError: timm has no such model, or no pretrained weights for it.
        UnsupportedBackboneError: rein does not know its blocks.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        raise InputError(
            f"timm has no model {name!r}; " + (f"near it are {', '.join(near)}." if near else "see timm.list_models().")
        )
    settings: dict[str, Any] = {"num_classes": 0} | ({"patch_size": patch_size} if patch_size else {})

    def create(pretrained: bool) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **settings)
        except TypeError:  # a class without that setting
            return timm.create_model(name, pretrained=pretrained, **settings)

    loaded = False
    try:
        if pretrained:
            try:
                with _hub_asked_once():
                    model = create(True)
                loaded = True
            except Exception as error:  # each kind of hub failure has its own class
                if "pretrained" in str(error):  # timm's own words for a tag or weights that do not exist
                    raise
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].partition(". ")[0]
                say(f"The weights of {name} cannot be downloaded ({reason}); using RANDOM weights instead.")
        if not loaded:
            model = create(False)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f"timm cannot build {name!r} with {settings}: {error}") from error
    backbones.find_sites(model)
    return model, loaded


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
