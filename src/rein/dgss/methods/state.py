"""What training a method changes, to save it and to put it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from rein.errors import CheckpointError


def tuned_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def tuned_state(backbone: nn.Module) -> dict[str, Tensor]:
    """What must be saved to restore the method, by the names of `state_dict`; the tensors are not copied.

    These are the parameters that require gradients, and the buffers of modules in which all parameters do, such as the
    statistics of a BatchNorm that trains. Where the whole backbone trains, it is the whole state.
    """
    state = backbone.state_dict(keep_vars=True)
    if all(parameter.requires_grad for parameter in backbone.parameters()):
        return {name: value.detach() for name, value in state.items()}
    buffers = set(_buffers_that_change(backbone))
    return {
        name: value.detach()
        for name, value in state.items()
        if name in buffers or (isinstance(value, nn.Parameter) and value.requires_grad)
    }


def load_tuned(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `tuned_state` took out, in place, into a backbone with the same method and settings.

    Raises:
        CheckpointError: names that are missing or not expected, or shapes that differ. Nothing was changed.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in tuned_state(backbone).items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = [f"{name} is {got[name]}, wanted {wanted[name]}" for name in wanted.keys() & got.keys() if wanted[name] != got[name]]
    wrong = {"missing": wanted.keys() - got.keys(), "unexpected": got.keys() - wanted.keys(), "wrong shape": shapes}
    if any(wrong.values()):
        found = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names)
        raise CheckpointError(
            f"the state does not fit this {type(backbone).__name__}: {found}. Apply the method with its settings first."
        )
    backbone.load_state_dict(dict(state), strict=False)


def _buffers_that_change(backbone: nn.Module) -> Iterator[str]:
    for path, module in backbone.named_modules():
        trains = [parameter.requires_grad for parameter in module.parameters()]
        if trains and all(trains):
            yield from (f"{path}.{name}" for name in module._buffers)
