"""What training changes in a model: its names, and how to save and restore it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from rein.errors import CheckpointError


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


def tuned_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The part of `backbone.state_dict()` that training changes, see `tuned_names`; the tensors are not copied."""
    state = backbone.state_dict()
    return {name: state[name] for name in tuned_names(backbone)}


def load_tuned(backbone: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the result of `tuned_state` in place into a backbone with the same method and settings.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ. The backbone is unchanged.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in tuned_state(backbone).items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = [
        f"{name} is {got[name]}, expected {expected[name]}"
        for name in expected.keys() & got.keys()
        if expected[name] != got[name]
    ]
    wrong = {"missing": expected.keys() - got.keys(), "unexpected": got.keys() - expected.keys(), "wrong shape": shapes}
    if any(wrong.values()):
        found = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names)
        raise CheckpointError(
            f"the state does not match this {type(backbone).__name__}: {found}. Apply the method with the same settings first."
        )
    backbone.load_state_dict(dict(state), strict=False)


def _tuned_buffers(module: nn.Module) -> Iterator[str]:
    trains: dict[str, bool] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        required = [parameter.requires_grad for parameter in submodule.parameters()]
        # without parameters: as its parent, which named_modules yields first
        trains[path] = all(required) if required else trains.get(path.rpartition(".")[0], True)
        if trains[path]:
            yield from (f"{path}.{name}" if path else name for name in submodule._buffers)
