"""The refinement of one layer from matrices that are folded already, and its backward pass by hand.

`ReinAdapter` says what is folded, and why the result is the paper's equations. Nothing here knows a parameter or a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refined(
    x: Tensor,
    dtype: torch.dtype,
    prefix: int,
    scale: Tensor | None,
    weight: Tensor,
    *thin: Tensor,
    in_place: bool = False,
) -> Tensor:
    """Tokens x (..., N, C), refined by products in `dtype`; the first `prefix` rows pass through.

    `scale`, `weight` and `thin` are those that `ReinAdapter` folds for a layer.
    """
    *inner, values = thin
    weight = scaled(weight, scale, dtype)
    flat = x.reshape(-1, x.shape[-1])
    features = flat.to(dtype)
    same = dtype == x.dtype  # else addmm would round the residual to autocast's dtype
    if inner:
        coefficients = _coefficients(features, inner)[-1]
        out = torch.addmm(flat, coefficients, values) if same else coefficients @ values
    else:  # the raw similarity is linear in f, so all of D is one affine map
        out = flat + values if same else values.expand_as(flat)
    out = out.addmm_(features, weight.mT) if in_place and same else torch.addmm(out, features, weight.mT)
    out = (out if same else flat + out).to(x.dtype).reshape(x.shape)
    if not prefix:
        return out
    if in_place:
        out[..., :prefix, :] = x[..., :prefix, :]
        return out
    return torch.cat((x[..., :prefix, :], out[..., prefix:, :]), -2)


def scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix s W_f in `dtype`; where s is None it is the constant 1."""
    return (weight if scale is None else scale * weight).to(dtype)


def _coefficients(features: Tensor, inner: Sequence[Tensor]) -> list[Tensor]:
    """What the thin factors make of the features, one after the other: f B^T, S, S mix; or S alone for full tokens."""
    if len(inner) == 1:
        return [(features @ inner[0]).softmax(-1)]
    reduced = features @ inner[0]
    similarity = (reduced @ inner[1]).softmax(-1)
    return [reduced, similarity, similarity @ inner[2]]


class Refinement(torch.autograd.Function):
    """`refined`, keeping of what has N rows only the tokens: what is thin is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, prefix: int, *tensors: Tensor) -> Tensor:
        """As `refined`."""
        ctx.save_for_backward(x, *tensors)
        ctx.dtype, ctx.prefix = dtype, prefix
        return refined(x, dtype, prefix, *tensors, in_place=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the matrices; by hand, unless they are to be differentiated again."""
        x, *tensors = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # this backward pass is differentiated itself
            # aliases, since some of these were computed from others, and each is to have its own share alone
            alone: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            inputs = [tensor for tensor, needed in zip(alone, wanted, strict=True) if needed]
            again = refined(alone[0], ctx.dtype, ctx.prefix, *alone[1:])
            made = iter(torch.autograd.grad(again, inputs, gradient, create_graph=True, materialize_grads=True))
            found = [next(made) if needed else None for needed in wanted]
        else:
            found = _gradients(x, ctx.dtype, ctx.prefix, gradient, wanted, *tensors)
        return (found[0], None, None, *found[1:])


def _gradients(
    x: Tensor,
    dtype: torch.dtype,
    prefix: int,
    gradient: Tensor,
    wanted: Sequence[bool],
    scale: Tensor | None,
    weight: Tensor,
    *thin: Tensor,
) -> list[Tensor | None]:
    """The gradients of `refined` for x, s, W_f and the thin factors, by hand.

    With G the gradient of f', rows of the prefix set to zero: G^T f is that of s W_f, (S mix)^T G that of the values, and f has
    G + G (s W_f) + dL B / sqrt(C), where dL is that of the similarity before its softmax.
    """
    *inner, values = thin
    onto_x, onto_scale, onto_weight = None, None, None
    same = dtype == x.dtype
    features, whole = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, gradient))
    features = features.to(dtype)
    above = whole.clone() if same and prefix else whole.to(dtype)
    if prefix:
        above.view(x.shape)[..., :prefix, :] = 0
    if wanted[1] or wanted[2]:
        product = (above.mT @ features).to(weight.dtype)
        if scale is None:
            onto_weight = product
        else:
            onto_scale = (product * weight).sum()  # in pairs, which a dot product does not do
            onto_weight = product.mul_(scale)
    if not inner:
        onto_thin = [above.sum(0)]
    else:
        steps = _coefficients(features, inner)
        onto_thin = [steps[-1].mT @ above]
        passed = above @ values.mT
        if len(inner) == 3:
            onto_thin.insert(0, steps[1].mT @ passed)
            passed = passed @ inner[2].mT
        similarity = steps[-2] if len(inner) == 3 else steps[0]
        passed = torch.ops.aten._softmax_backward_data(passed, similarity, -1, similarity.dtype)
        if len(inner) == 3:
            onto_thin.insert(0, steps[0].mT @ passed)
            passed = passed @ inner[1].mT
        onto_thin.insert(0, features.mT @ passed)
    if wanted[0]:
        wide = scaled(weight, scale, dtype)
        if not same:
            onto_x = above @ wide
        elif prefix:  # G is a copy, which has served
            onto_x = above.addmm_(whole, wide)
        else:
            onto_x = torch.addmm(whole, whole, wide)
        onto_x = (onto_x.addmm_(passed, inner[0].mT) if inner else onto_x).reshape(x.shape)
        if not same:
            onto_x = gradient + onto_x.to(x.dtype)
        elif prefix:
            onto_x[..., :prefix, :] = gradient[..., :prefix, :]
    return [onto_x, onto_scale, onto_weight, *onto_thin]
