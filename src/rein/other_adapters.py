"""Adapters of peft inside a model: which parameters and modules belong to them.

peft replaces a layer by one that holds the original layer and the adapter's modules, and freezes all other parameters of the model.
It is recognised by its attributes, so this module does not import it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_ORIGINALS = ("base_layer", "original_module")  # the original layer, as peft's layers name it


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of peft inside `model`."""
    # an attribute of the class, because some models forward missing attributes to a module inside them
    return (module for module in model.modules() if getattr(type(module), "adapter_layer_names", ()))


def added_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that peft added inside `model`, such as LoRA's matrices and dropout, without the original layers."""
    for layer in layers(model):
        for name, child in layer.named_children():
            if name not in _ORIGINALS:
                yield from child.modules()


def parameters(model: nn.Module, backbone: nn.Module) -> set[int]:
    """Ids of the parameters of `backbone` whose `requires_grad` peft has set; empty if it has no adapter there.

    Args:
        model: `backbone`, or a model that contains it.
        backbone: the module that is searched for layers of peft.
    """
    adapted = {id(layer) for layer in layers(backbone)}
    if not adapted:
        return set()
    scopes = [module for module in model.modules() if "peft_config" in vars(module)]  # the models into which peft injected
    if not adapted <= {id(module) for scope in scopes for module in scope.modules()}:
        scopes = [backbone]  # it injected into a model that contains `model`
    chosen = [scope for scope in scopes if any(id(module) in adapted for module in scope.modules())]
    return {id(parameter) for scope in chosen for parameter in scope.parameters()}
