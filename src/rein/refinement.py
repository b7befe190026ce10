"""Exact evaluation of the adapter's equations with less computation and memory.

`ReinAdapter.reference_forward` has the equations. This module folds the parameters of a layer into matrices that do not depend on
the features (`fold_layer`), keeps them for one inference pass (`PassCache`), and applies them to the features (`apply_folded`),
with a backward pass that stores no (N, C) tensor but the features (`FoldedRefinement`). `refine` chooses the form. Outside compilers
the result is a tensor of its own, which hooks and later layers may change in place.

Folding. Let e (m, 1) be 0 for the first token, the null slot, and 1 for all others, and let * multiply row by row. Then
S[:, 1:] V = S (e * (T W_t^T + b_t)). The rows of S sum to 1, so S e = 1 - S_1 and S 1 = 1. With T = A B this gives

    s D = s (S[:, 1:] V + f) W_f^T + s b_f = f (s W_f)^T + (S mix) values

    S      = softmax((f B^T / sqrt(C)) A^T)               (N, m)
    mix    = [e * A, e, 1]                                (m, r + 2); S mix = [S (e * A), 1 - S_1, 1]
    values = s [B W_t^T W_f^T; b_t W_f^T; b_f]            (r + 2, C)

Full tokens need no mix: values = s ((e * (T W_t^T + b_t)) W_f^T + b_f), (m, C). The raw similarity S = f T^T is linear in f, so s D
is a single linear layer:

    s D = f (s W)^T + s b_f,   W = W_f + W_f (e * (T W_t^T + b_t))^T T        (C, C)

The product A B is not needed. s multiplies small matrices, never an (N, C) tensor. The residual f stays a separate term, because
adding the identity to s W_f would round s W_f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from rein.adapter import ReinAdapter


class FoldedLayer(NamedTuple):
    """The folded matrices of one layer: everything that does not depend on the features.

    Attributes:
        scale: s, not yet multiplied onto `weight`; None if it is 1 or multiplied already.
        weight: the (C, C) matrix that is applied to the features: W_f, or W with the raw similarity.
        factors: the thin matrices. Low-rank tokens: B^T / sqrt(C), (C, r); A^T, (r, m); mix, (m, r + 2); values, (r + 2, C). Full
            tokens: T^T / sqrt(C), (C, m); values, (m, C). Raw similarity: s b_f, (C,).
    """

    scale: Tensor | None
    weight: Tensor
    factors: Sequence[Tensor]


def refine(adapter: ReinAdapter, x: Tensor, layer: int, num_prefix_tokens: int, pass_cache: PassCache | None) -> Tensor:
    """Refine tokens x (..., N, C) of one layer; arguments as in `ReinAdapter.forward`. All forms give the same function:

    * function transforms (`torch.func`) and forward-mode differentiation (`torch.autograd.forward_ad`): the equations,
      `ReinAdapter.reference_forward`, which are plain operations;
    * no gradients: `write_folded`, with the matrices of the cache if there is one;
    * `torch.compile`, `torch.export` and `torch.jit.trace`: folding and `apply_folded` as plain operations;
    * gradients: folding as plain operations, then `FoldedRefinement`.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _refine_by_reference(adapter, x, layer, num_prefix_tokens)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # folding runs in float32; only the folded matrices are cast
            return _refine_folded(adapter, x, layer, dtype, num_prefix_tokens, pass_cache)
    return _refine_folded(adapter, x, layer, x.dtype, num_prefix_tokens, pass_cache)


def _refine_by_reference(adapter: ReinAdapter, x: Tensor, layer: int, num_prefix_tokens: int) -> Tensor:
    """The equations for the patch tokens of `x`, in the precision of the parameters if that is higher."""
    features = x.to(torch.promote_types(x.dtype, adapter.token_parameters()[0].dtype))
    if not num_prefix_tokens:
        return adapter.reference_forward(features, layer).to(x.dtype)
    refined = adapter.reference_forward(features[..., num_prefix_tokens:, :], layer).to(x.dtype)
    return torch.cat((x[..., :num_prefix_tokens, :], refined), -2)


def _refine_folded(
    adapter: ReinAdapter, x: Tensor, layer: int, dtype: torch.dtype, num_prefix_tokens: int, pass_cache: PassCache | None
) -> Tensor:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    exported = traced and not torch.compiler.is_dynamo_compiling()
    if pass_cache is not None and not (torch.is_grad_enabled() or exported):  # a cache must not keep the tensors of an export
        folded = pass_cache.get(adapter, layer, dtype, x.device)
        return (apply_folded if traced else write_folded)(x, dtype, num_prefix_tokens, folded)
    scale, weight, factors = fold_layer(adapter, layer)
    factors = [factor.to(dtype) for factor in factors]
    if traced:
        return apply_folded(x, dtype, num_prefix_tokens, FoldedLayer(scale, weight, factors))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, *factors)):
        return cast(Tensor, FoldedRefinement.apply(x, dtype, num_prefix_tokens, scale, weight, *factors))
    return write_folded(x, dtype, num_prefix_tokens, FoldedLayer(scale, weight, factors))


class PassCache:
    """The folded matrices of all layers of one `ReinAdapter`, computed once per pass without gradients.

    A pass begins at layer 0, which folds all layers at once. An entry is valid only for the layer after the last one that was
    read, so a pass never uses matrices of an earlier pass: it sees every change of a parameter, even one that torch does not count
    (`parameter.data.fill_(1)`). A change that torch counts (an optimizer step, `rein.load`, a replaced parameter) takes effect at the
    next layer. The last layer empties the cache.
    """

    def __init__(self) -> None:
        self._entry: tuple[Any, int, list[FoldedLayer]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}

    def get(self, adapter: ReinAdapter, layer: int, dtype: torch.dtype, device: torch.device) -> FoldedLayer:
        """The matrices of `layer` in `dtype`, from the cache or newly folded."""
        versions = None  # a compiled program contains the whole pass and reads the parameters when it starts
        if not torch.compiler.is_compiling():
            versions = [(id(parameter), parameter.is_inference() or parameter._version) for parameter in adapter.parameters()]
        key = (dtype, device, versions)
        entry = self._entry if layer else None  # read once: another thread may run its own pass
        layers = entry[2] if entry is not None and entry[:2] == (key, layer) else fold_layers(adapter, dtype)
        self._entry = None if layer + 1 == adapter.num_layers else (key, layer + 1, layers)
        return layers[layer]


def fold_layers(adapter: ReinAdapter, dtype: torch.dtype) -> list[FoldedLayer]:
    """The folded matrices of every layer in `dtype`, with s multiplied onto each weight."""
    if adapter.config.share and adapter.config.use_softmax:  # all layers at once, in few large products
        scale, weight, factors = _fold_softmax(adapter, slice(None))
        weight, factors = _scaled(weight, scale, dtype), [factor.to(dtype) for factor in factors]
        return [FoldedLayer(None, weight, layer) for layer in zip(*factors, strict=True)]
    layers = []
    for layer in range(adapter.num_layers):
        scale, weight, factors = fold_layer(adapter, layer)
        layers.append(FoldedLayer(None, _scaled(weight, scale, dtype), [factor.to(dtype) for factor in factors]))
    return layers


def fold_layer(adapter: ReinAdapter, layer: int) -> FoldedLayer:
    """The folded matrices of one layer, in the dtype of the parameters. No `.mT`: the legacy ONNX exporter does not know it."""
    return _fold_softmax(adapter, layer) if adapter.config.use_softmax else _fold_raw(adapter, layer)


def _fold_softmax(adapter: ReinAdapter, layer: int | slice) -> FoldedLayer:
    """Fold one layer. With a slice of layers, which share their MLPs, the factors are stacked along a first axis."""
    token_mlp, delta_mlp = adapter.layer_mlps(layer)
    weight, scale = delta_mlp.weight, adapter.scale
    tokens = [parameter[layer] for parameter in adapter.token_parameters()]
    e = _null_mask(tokens[0])
    keys = tokens[-1].transpose(-2, -1) * (1 / math.sqrt(adapter.dim))
    if len(tokens) == 1:
        values = (e * (tokens[0] @ token_mlp.weight.T + token_mlp.bias)) @ weight.T + delta_mlp.bias
        factors = [keys]
    else:
        a, b = tokens
        mix = torch.cat((e * a, e, torch.ones_like(e)), -1)
        row = (*b.shape[:-2], 1, adapter.dim)
        values = torch.cat((b @ token_mlp.weight.T, token_mlp.bias.expand(row)), -2) @ weight.T
        values = torch.cat((values, delta_mlp.bias.expand(row)), -2)
        factors = [keys, a.transpose(-2, -1), mix]
    return FoldedLayer(scale, weight, [*factors, values if scale is None else scale * values])


def _fold_raw(adapter: ReinAdapter, layer: int) -> FoldedLayer:
    """Fold one layer with the raw similarity S = f T^T."""
    token_mlp, delta_mlp = adapter.layer_mlps(layer)
    weight, scale = delta_mlp.weight, adapter.scale
    tokens = [parameter[layer] for parameter in adapter.token_parameters()]
    e = _null_mask(tokens[0])
    if len(tokens) == 1:
        keys = tokens[0]
        values = e * (keys @ token_mlp.weight.T + token_mlp.bias)
    else:  # A^T values instead of values, because values^T T = (A^T values)^T B
        a, keys = tokens
        values = (a.T @ torch.cat((e * a, e), 1)) @ torch.cat((keys @ token_mlp.weight.T, token_mlp.bias[None]))
    bias = delta_mlp.bias if scale is None else scale * delta_mlp.bias
    return FoldedLayer(scale, weight + (weight @ values.T) @ keys, [bias])


def _null_mask(tokens: Tensor) -> Tensor:
    """The mask e, (..., m, 1), for tokens (..., m, columns): 0 for the first token, 1 for all others."""
    mask = torch.ones(*tokens.shape[:-1], 1, dtype=tokens.dtype, device=tokens.device)
    mask[..., 0, :] = 0
    return mask


def _scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight times s, in `dtype`. A scale of None is s = 1."""
    return (weight if scale is None else scale * weight).to(dtype)


def apply_folded(x: Tensor, dtype: torch.dtype, num_prefix_tokens: int, folded: FoldedLayer) -> Tensor:
    """Refine tokens x (..., N, C) with the folded matrices of a layer, in operations that autograd and compilers can record.

    Args:
        x: tokens. The first `num_prefix_tokens` rows pass through unchanged.
        dtype: dtype of the products, and of `folded.factors`.
        num_prefix_tokens: number of leading rows that are not patches.
        folded: the folded matrices of the layer.
    """
    if num_prefix_tokens and (torch.is_grad_enabled() or torch.jit.is_tracing()):  # type: ignore[attr-defined]
        # a NaN in a prefix row must not reach the gradients, and 0 * NaN is NaN; torch.jit.trace compares graphs of both grad modes
        refined = apply_folded(x[..., num_prefix_tokens:, :], dtype, 0, folded)
        return torch.cat((x[..., :num_prefix_tokens, :], refined), -2)
    *inner, values = folded.factors
    weight = _scaled(folded.weight, folded.scale, dtype)
    flat = x.reshape(-1, x.shape[-1])
    features = flat.to(dtype)
    same = dtype == x.dtype  # otherwise addmm would round the residual to the autocast dtype
    if inner:
        coefficients = inner_products(features, inner)[-1]
        out = torch.addmm(flat, coefficients, values) if same else coefficients @ values
    else:  # raw similarity: the only factor is the bias
        out = flat + values if same else values.expand_as(flat)
    out = torch.addmm(out, features, weight.T)
    out = (out if same else flat + out).to(x.dtype).reshape(x.shape)
    return torch.cat((x[..., :num_prefix_tokens, :], out[..., num_prefix_tokens:, :]), -2) if num_prefix_tokens else out


def write_folded(x: Tensor, dtype: torch.dtype, num_prefix_tokens: int, folded: FoldedLayer) -> Tensor:
    """As `apply_folded`, but the products are written into the result, without copies. Autograd must not record this.

    The result is a new tensor and not a view: autograd forbids changes in place of a view that was created while it did not record.
    """
    *inner, values = folded.factors
    weight = _scaled(folded.weight, folded.scale, dtype)
    flat = x.reshape(-1, x.shape[-1])
    features = flat.to(dtype)
    result = x.new_empty(x.shape)
    out = result.view(flat.shape)
    coefficients = inner_products(features, inner)[-1] if inner else None  # None with the raw similarity
    if dtype == x.dtype:
        torch.add(flat, values, out=out) if coefficients is None else torch.addmm(flat, coefficients, values, out=out)
        out.addmm_(features, weight.mT)
    else:  # addmm would round the residual to the autocast dtype
        delta = values if coefficients is None else coefficients @ values
        torch.add(flat, torch.addmm(delta, features, weight.mT), out=out)
    if num_prefix_tokens:
        result[..., :num_prefix_tokens, :] = x[..., :num_prefix_tokens, :]
    return result


def inner_products(features: Tensor, inner: Sequence[Tensor]) -> list[Tensor]:
    """The products of the features with the factors, one after the other: f B^T / sqrt(C), S, S mix; with full tokens S only."""
    if len(inner) == 1:
        return [(features @ inner[0]).softmax(-1)]
    reduced = features @ inner[0]
    similarity = (reduced @ inner[1]).softmax(-1)
    return [reduced, similarity, similarity @ inner[2]]


class FoldedRefinement(torch.autograd.Function):
    """`write_folded` with its own backward pass.

    It stores the tokens and the folded matrices. The backward pass recomputes the coefficients, which have few columns.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, num_prefix_tokens: int, scale: Tensor | None, weight: Tensor, *factors: Tensor
    ) -> Tensor:
        """As `write_folded`."""
        ctx.save_for_backward(x, scale, weight, *factors)
        ctx.dtype, ctx.num_prefix_tokens = dtype, num_prefix_tokens
        return write_folded(x, dtype, num_prefix_tokens, FoldedLayer(scale, weight, factors))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the folded matrices: explicit products, or autograd's own for higher derivatives."""
        x, scale, weight, *factors = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # create_graph=True: this backward pass is differentiated itself
            # Some saved tensors were computed from others. Views separate them, so that each receives only its own gradient.
            views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            inputs = [view for view, need in zip(views, needed, strict=True) if need]
            folded = FoldedLayer(views[1], views[2], views[3:])
            output = apply_folded(views[0], ctx.dtype, ctx.num_prefix_tokens, folded)
            found = iter(torch.autograd.grad(output, inputs, gradient, create_graph=True, materialize_grads=True))
            gradients = [next(found) if need else None for need in needed]
        else:
            folded = FoldedLayer(scale, weight, factors)
            gradients = _gradients(x, ctx.dtype, ctx.num_prefix_tokens, folded, gradient, needed)
        return (gradients[0], None, None, *gradients[1:])


def _gradients(
    x: Tensor, dtype: torch.dtype, num_prefix_tokens: int, folded: FoldedLayer, gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of `apply_folded` with respect to x, s, the weight and the factors.

    Let G be the gradient of f', and f the features, both with the prefix rows set to zero. Then s W_f has the gradient G^T f,
    values (S mix)^T G, and f has G + G (s W_f) + dL B / sqrt(C), where dL is the gradient of the similarity before the softmax.
    """
    scale, weight, (*inner, values) = folded
    grad_x, grad_scale, grad_weight = None, None, None
    same = dtype == x.dtype
    features, grad_out = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, gradient))
    features, g = features.to(dtype), grad_out.to(dtype)
    if num_prefix_tokens:
        if same:
            features, g = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (features, g))
        for tensor in (features, g):  # both, because a prefix row may hold NaN, and 0 * NaN is NaN
            tensor.view(x.shape)[..., :num_prefix_tokens, :] = 0
    if needed[1] or needed[2]:
        product = (g.mT @ features).to(weight.dtype)
        if scale is None:
            grad_weight = product
        else:
            grad_scale = (product * weight).sum()  # pairwise summation, more exact than a dot product
            grad_weight = product.mul_(scale)
    if not inner:
        grad_factors = [g.sum(0)]
    else:
        coefficients = inner_products(features, inner)
        grad_factors = [coefficients[-1].mT @ g]
        grad_inner = g @ values.mT
        if len(inner) == 3:
            grad_factors.insert(0, coefficients[1].mT @ grad_inner)
            grad_inner = grad_inner @ inner[2].mT
        similarity = coefficients[-2] if len(inner) == 3 else coefficients[0]
        grad_inner = torch.ops.aten._softmax_backward_data(grad_inner, similarity, -1, similarity.dtype)
        if len(inner) == 3:
            grad_factors.insert(0, coefficients[0].mT @ grad_inner)
            grad_inner = grad_inner @ inner[1].mT
        grad_factors.insert(0, features.mT @ grad_inner)
    if needed[0]:
        scaled_weight = _scaled(weight, scale, dtype)
        if not same:
            grad_x = g @ scaled_weight
        elif num_prefix_tokens:  # g is a copy that is not used again
            grad_x = g.addmm_(grad_out, scaled_weight)
        else:
            grad_x = torch.addmm(grad_out, grad_out, scaled_weight)
        grad_x = (grad_x.addmm_(grad_inner, inner[0].mT) if inner else grad_x).reshape(x.shape)
        if not same:
            grad_x = gradient + grad_x.to(x.dtype)
        elif num_prefix_tokens:
            grad_x[..., :num_prefix_tokens, :] = gradient[..., :num_prefix_tokens, :]
    return [grad_x, grad_scale, grad_weight, *grad_factors]
