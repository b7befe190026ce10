"""`snapshot` records everything that a model consists of, and `assert_unchanged` compares it, bit for bit."""

import torch
from torch import nn

VALUES = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device)


def snapshot(model):
    """Parameters, buffers, gradients, modes, hooks, attributes and state dict of `model`, by (name, what)."""
    found = {("", "state dict"): list(model.state_dict())}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name, "module"] = module
        for key, value in vars(module).items():
            found[name, key] = _shallow(value)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found[name, "value"] = tensor.detach().clone()
        found[name, "state"] = (
            tensor.requires_grad,
            tensor.grad,
            tensor.dtype,
            tensor.device,
            tensor.stride(),
            _shallow(vars(tensor)),
        )
    return found


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert _equal(after[key], value), key


def _shallow(value):
    """A container with its entries, so that later changes of the container show."""
    if isinstance(value, dict):
        return {key: _shallow(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [*value]
    return value


def _equal(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, torch.Tensor) and not isinstance(one, nn.Parameter):
        return one is other or torch.equal(one.nan_to_num(), other.nan_to_num())
    return one is other or (isinstance(one, VALUES) and type(one) is type(other) and one == other)
