"""What training changes in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def tuned_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def tuned_names(module: nn.Module) -> list[str]:
    """Names of what training changes, in the order of `module.state_dict()`.

    These are the parameters that require gradients, and the buffers of modules in which every parameter does, such as the statistics
    of a BatchNorm that trains. A module without parameters counts as part of the module that contains it. If every parameter of
    `module` requires gradients, these are all names of its state.
    """
    names = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    names |= set(_tuned_buffers(module))
    return [name for name in module.state_dict(keep_vars=True) if name in names]


def _tuned_buffers(module: nn.Module) -> Iterator[str]:
    trains: dict[str, bool] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        required = [parameter.requires_grad for parameter in submodule.parameters()]
        # without parameters: as its parent, which named_modules yields first
        trains[path] = all(required) if required else trains.get(path.rpartition(".")[0], True)
        if trains[path]:
            yield from (f"{path}.{name}" if path else name for name in submodule._buffers)
