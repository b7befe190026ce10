"""Context managers that restore the train or eval mode of every submodule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Restore the `training` flag of every submodule on exit."""
    found = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        restore_modes(found)


def restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Restore `training` flags. A module whose class overrides `train` changes through it, because it may also clear a cache."""
    for module, training in modes:
        if module.training != training and type(module).train is not nn.Module.train:
            module.train(training)
    for module, training in modes:
        module.training = training


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set eval mode inside, and restore the `training` flag of every submodule on exit."""
    with modes_restored(module):
        module.eval()
        yield
