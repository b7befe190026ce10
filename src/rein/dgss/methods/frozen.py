"""`FrozenModules`, which keeps the frozen modules of a backbone in eval mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

FROZEN = "frozen_backbone"


class FrozenModules(nn.Module):
    """Keeps the bare backbone's modules in eval mode: no dropout, no drop path, fixed normalisation statistics.

    It is a child module without parameters because `nn.Module.train` calls `train` of each child. It must be the last child, so that
    its `train` runs after that of the other children.

    Args:
        backbone: the backbone, after the method has changed it.
        modules: the modules of the bare backbone. Those that `backbone` still contains stay in eval mode.
        handles: handles of the method's hooks. A stored handle reserves its hook id: without it, torch may give the id of a hook from
            a pickle file to another hook.
    """

    def __init__(self, backbone: nn.Module, modules: Iterable[nn.Module], handles: Iterable[RemovableHandle] = ()) -> None:
        super().__init__()
        present = {id(module) for module in backbone.modules()}
        # in tuples, which nn.Module does not register
        self._frozen = tuple(module for module in modules if id(module) in present)
        self._handles, self._backbone = tuple(handles), (backbone,)

    def attach(self) -> None:
        """Add this module to the backbone as its last child."""
        (backbone,) = self._backbone
        setattr(backbone, FROZEN, self)
        self.train(backbone.training)

    def train(self, mode: bool = True) -> FrozenModules:
        """Set the frozen modules to eval mode. `nn.Module.train` of the backbone calls this.

        The `training` flag of the backbone itself follows `mode` if any of its parameters trains.
        """
        super().train(mode)
        (backbone,) = self._backbone
        for module in self._frozen:
            if module is not backbone or not any(parameter.requires_grad for parameter in backbone.parameters()):
                module.training = False
        return self

    def forward(self, x: Any) -> Any:
        """Return `x`, for models that run all their children in sequence."""
        return x
