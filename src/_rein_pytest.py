"""The pytest plugin of rein: fixtures for the tests of projects that use rein. pytest finds it by its entry point.

It lies outside the package because importing anything of `rein` imports torch: the plugin is loaded in every pytest run of an
environment, so it imports rein only when a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import nn


@pytest.fixture
def rein_tiny_vit() -> nn.Module:
    """A bare timm VisionTransformer with random weights: 4 blocks, width 32, 32 x 32 images, 8 x 8 patches.

    Each test gets a model of its own with the same weights, in eval mode. For other sizes call `rein.testing.tiny_vit`.
    """
    import torch

    from rein.testing import tiny_vit

    with torch.random.fork_rng(devices=[]):  # the random state of the test stays as it is
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs, too
        return tiny_vit().eval()


@pytest.fixture
def rein_pocket_vit() -> nn.Module:
    """A bare pretrained timm VisionTransformer of two million parameters, for images whose sides are multiples of 8; no download.

    Each test gets a model of its own, in eval mode. For other settings call `rein.testing.pocket_vit`.
    """
    import torch

    from rein.testing import pocket_vit

    with torch.random.fork_rng(devices=[]):
        return pocket_vit().eval()


@pytest.fixture
def rein_check_backbone() -> Callable[..., list[str]]:
    """The function `rein.testing.check_backbone`, which raises `BackboneCheckError` if a backbone does not work with rein."""
    from rein.testing import check_backbone

    return check_backbone
