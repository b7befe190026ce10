"""Train and eval mode, changed for a moment and given back exactly as found, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """On leaving, every submodule has the `training` flag that it had on entering."""
    found = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in found:
            child.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode again afterwards."""
    with modes_restored(module):
        module.eval()
        yield
