"""Rein: turn a frozen vision transformer into a domain-general dense predictor by training about 1 % of it.

Method: Wei et al., CVPR 2024, arXiv 2312.04265.

    >>> import timm, rein
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> rein.wrap(vit) is vit
    True
"""

from importlib import import_module
from typing import Any

from rein import heads
from rein._version import __version__
from rein.adapter import ReinAdapter
from rein.checkpoint import load, save
from rein.config import ReinConfig
from rein.errors import (
    CheckpointError,
    DivergedError,
    InputError,
    MissingExtraError,
    ReinError,
    UnsupportedBackboneError,
    WrapError,
)
from rein.hub import push_to_hub
from rein.injection import disabled, unwrap, wrap
from rein.merging import merge
from rein.parameters import param_groups, summary
from rein.routing import routed
from rein.segmenter import Segmenter

__all__ = [
    "CheckpointError",
    "DivergedError",
    "InputError",
    "MissingExtraError",
    "ReinAdapter",
    "ReinConfig",
    "ReinError",
    "Segmenter",
    "UnsupportedBackboneError",
    "WrapError",
    "__version__",
    "disabled",
    "heads",
    "load",
    "merge",
    "param_groups",
    "push_to_hub",
    "routed",
    "save",
    "summary",
    "unwrap",
    "wrap",
]

_LAZY = ("export", "official", "testing")  # imported when they are first used, because `testing` imports timm


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"rein.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
