"""Context managers that restore the train or eval mode of every submodule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Restore the `training` flag of every submodule on exit."""
    found = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in found:
            child.training = training


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set eval mode inside, and restore the `training` flag of every submodule on exit."""
    with modes_restored(module):
        module.eval()
        yield
