"""Tools for the tests of projects that use rein.

`check_backbone` checks that a backbone works with rein. `tiny_vit` (random weights, fast) and `pocket_vit` (pretrained) are backbones
that need no download. No test framework is needed: a failed check raises `BackboneCheckError`.
"""

import warnings
from typing import Any

from rein.testing.checks import BackboneCheckError, check_backbone
from rein.testing.models import pocket_vit, tiny_vit

__all__ = ["BackboneCheckError", "check_backbone", "pocket_vit", "tiny_vit"]


def __getattr__(name: str) -> Any:
    if name == "BrokenPromiseError":
        warnings.warn(
            "rein.testing.BrokenPromiseError is deprecated; use rein.testing.BackboneCheckError.",
            DeprecationWarning,
            stacklevel=2,
        )
        return BackboneCheckError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
