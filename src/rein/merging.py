"""Weighted mixtures of adapters, where one adapter can compute them exactly.

A mixture of adapters i with weights w_i refines a layer's features f by the weighted sum of their updates,

    f' = f + sum_i w_i s_i D_i(f),   s D(f) = S[:, 1:] (T[1:] (s W_f W_t)^T + s W_f b_t) + f (s W_f)^T + s b_f.

S is not linear in the tokens T, because of the softmax, so a mixture of tokens is no mixture of updates, and two softmax similarities
of different tokens have different denominators, so their sum is none of one adapter. Two cases remain:

* equal tokens, hence equal S: the mixture has s W_f = M = sum_i w_i s_i W_fi, s b_f = sum_i w_i s_i b_fi, and a W_t and b_t with
  M W_t = sum_i w_i s_i W_fi W_ti, and so for b_t;
* the raw similarity S = f T^T: s D is one linear layer (`refinement.py`), so the mixture is one per layer, without tokens.

Queries depend on the tokens only. With equal tokens and W_q, their mixture is that of W_m and b_m.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rein import checkpoint
from rein.adapter import ReinAdapter
from rein.backbones import facts
from rein.checkpoint import Header
from rein.config import ReinConfig
from rein.errors import InputError, one_line
from rein.named_adapters import Adapter
from rein.refinement import fold_layer
from rein.stagewise import StagewiseAdapter, build_adapter

_TOLERANCE = 1e-5  # largest error of the products M W_t, relative to them: some roundings of float32
_LINEAR = ReinConfig(num_tokens=1, rank=None, query_dim=None, use_softmax=False, share=False)  # one linear layer per block


def merge(
    files: Sequence[str | os.PathLike[str]], weights: Sequence[float], path: str | os.PathLike[str], *, queries: bool = True
) -> None:
    """Write the weighted mixture of adapters to one file: its update of every layer is the weighted sum of theirs.

    It is exact, up to rounding, or refused. It exists

    * for adapters with equal tokens, such as those that were trained from one adapter with its tokens frozen. Queries are mixed
      too if W_q is equal;
    * for adapters with `use_softmax=False`. The result has one linear layer per block and no queries: C^2 + C numbers per block
      for W_f, and as many zeros for W_t.

    The mixture of updates is taken in every layer. It is not the mixture of the models' outputs, because the backbone is not linear.

    Args:
        files: adapter files of one backbone, from `rein.save`.
        weights: the weight of each file, of any sign and sum. A file of weight 0 is left out.
        path: the file to write.
        queries: mix the queries too. False leaves them out, for decode heads without queries.

    Raises:
        CheckpointError: a file cannot be read, or `path` cannot be written.
        InputError: the weights are invalid, the files are no adapters of one backbone, or no adapter computes the mixture; the
            message says why.
    """
    if not isinstance(queries, bool):
        raise InputError(f"queries is {one_line(repr(queries))}; expected True or False.")
    chosen = _check_weights(files, weights)
    loaded = [_read(file) for file in chosen]
    header, first = loaded[0][0], next(iter(chosen))
    for file, (other, _) in zip(chosen, loaded, strict=True):
        for key in ("architecture", "blocks", "widths", "num_prefix_tokens"):
            if other.backbone[key] != header.backbone[key]:
                raise InputError(
                    f"{file} has {key} {one_line(other.backbone[key])}, {first} has {one_line(header.backbone[key])}; expected "
                    "adapters of one backbone. Merge those of each backbone on their own."
                )
        if difference := facts.compare(header.backbone, other.backbone):
            raise InputError(
                f"{first} and {file} were trained on different backbones, with {difference}; expected adapters of one backbone. "
                "Merge those of each backbone on their own."
            )
    adapters = [adapter for _, adapter in loaded]
    if reason := _no_common_tokens(adapters):
        merged = _merge_linear(adapters, list(chosen.values()), queries, reason)
    else:
        merged = _merge_equal_tokens(adapters, list(chosen.values()), queries)
    dtype = torch.float64 if any(_dtype(adapter) == torch.float64 for adapter in adapters) else torch.float32
    tensors = {key: value.to(dtype) for key, value in merged.state_dict().items()}
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise InputError(f"the mixture has values that are not finite in {key}; pass smaller weights.")
    checkpoint.write(path, tensors, Header("adapter", merged.config, header.backbone))


def _check_weights(files: Sequence[str | os.PathLike[str]], weights: Sequence[float]) -> dict[str | os.PathLike[str], float]:
    """The weight of each file, without those of weight 0; a file that is given twice has the sum."""
    for name, given in (("files", files), ("weights", weights)):
        if isinstance(given, str | bytes | os.PathLike) or not isinstance(given, Sequence) or not given:
            raise InputError(f"{name} is {one_line(repr(given))}; expected a list of files, and a list of weights.")
    for file in files:
        if not isinstance(file, str | os.PathLike):
            raise InputError(f"files has {one_line(repr(file))}; expected paths of adapter files.")
    if len(files) != len(weights):
        raise InputError(f"got {len(files)} files and {len(weights)} weights; expected one weight for each file.")
    chosen: dict[str | os.PathLike[str], float] = {}
    for file, weight in zip(files, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= sys.float_info.max:
            raise InputError(f"the weight of {file} is {one_line(repr(weight))}; expected a finite number.")
        chosen[file] = chosen.get(file, 0.0) + weight
    chosen = {file: weight for file, weight in chosen.items() if weight}
    if not chosen:
        raise InputError("all weights are 0, which leaves no adapter; pass a weight other than 0, or use the bare backbone.")
    return chosen


def _read(path: str | os.PathLike[str]) -> tuple[Header, Adapter]:
    """The header and the adapter of a file."""
    tensors, header = checkpoint.read(path)
    if header.kind != "adapter" or header.config is None:
        raise InputError(f"{Path(path)} is a {header.kind} file; expected a file of rein.save, which holds an adapter alone.")
    widths = header.backbone["widths"]
    checkpoint.match_adapter(widths, header.config, tensors, path)
    with torch.device("meta"):
        adapter = build_adapter(widths, header.config, patch_size=1)
    adapter.load_state_dict(tensors, assign=True)
    return header, adapter.requires_grad_(False)


def _stages(adapter: Adapter) -> list[ReinAdapter]:
    return list(adapter.stages) if isinstance(adapter, StagewiseAdapter) else [adapter]  # type: ignore[arg-type]


def _dtype(adapter: Adapter) -> torch.dtype:
    return next(adapter.parameters()).dtype


def _no_common_tokens(adapters: Sequence[Adapter]) -> str:
    """Why the adapters do not have the same tokens; empty if they have."""
    for key in ("num_tokens", "rank", "use_softmax", "share"):
        values = list(dict.fromkeys(getattr(adapter.config, key) for adapter in adapters))
        if len(values) > 1:
            return f"they have different {key}, {' and '.join(map(str, values))}"
    for stages in zip(*map(_stages, adapters), strict=True):
        if not all(_equal(stages[0].token_parameters(), stage.token_parameters()) for stage in stages):
            return "their tokens differ"
    return ""


def _equal(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the values and shapes are equal; the dtypes may differ."""
    return [one.shape for one in tensors] == [other.shape for other in others] and all(
        torch.equal(one.double(), other.double()) for one, other in zip(tensors, others, strict=True)
    )


def _empty(widths: Sequence[int], config: ReinConfig) -> Adapter:
    """An adapter in float64 whose parameters are zero."""
    with torch.device("meta"):
        merged = build_adapter(widths, config, patch_size=1)
    merged = merged.double().to_empty(device="cpu").requires_grad_(False)
    for parameter in merged.parameters():
        parameter.zero_()
    return merged


def _merge_equal_tokens(adapters: Sequence[Adapter], weights: Sequence[float], queries: bool) -> Adapter:
    """The mixture of adapters with equal tokens."""
    config = adapters[0].config
    widths = list(dict.fromkeys(adapter.config.query_dim for adapter in adapters))
    if queries and len(widths) > 1:
        raise InputError(
            f"no adapter computes the mixture of the queries: they have query_dim {' and '.join(map(str, widths))}. Pass "
            "queries=False to leave the queries out, for a decode head that does not use them."
        )
    if not queries:
        config = replace(config, query_dim=None)
    merged = _empty(adapters[0].widths, config)
    for target, *stages in zip(_stages(merged), *map(_stages, adapters), strict=True):
        for parameter, value in zip(target.token_parameters(), stages[0].token_parameters(), strict=True):
            parameter.copy_(value)
        scales = [1.0 if stage.scale is None else stage.scale.item() for stage in stages]
        coefficients = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
        scale = 1.0 if target.scale is None else sum(map(abs, coefficients)) or 1.0
        if target.scale is not None:
            target.scale.fill_(scale)
        for layer in range(1 if config.share else target.num_layers):
            mlps = [stage.layer_mlps(layer) for stage in stages]
            token_mlps, delta_mlps = ([_joined(mlp.weight, mlp.bias) for mlp in column] for column in zip(*mlps, strict=True))
            delta = _sum(coefficients, delta_mlps)  # [M, s b_f]
            pairs = zip(delta_mlps, token_mlps, strict=True)
            products = _sum(coefficients, [one[:, :-1] @ other for one, other in pairs])
            token, factor = _factor(token_mlps, delta[:, :-1], products), delta / scale
            for mlp, value in zip(target.layer_mlps(layer), (token, factor), strict=True):
                mlp.weight.copy_(value[:, :-1])
                mlp.bias.copy_(value[:, -1])
        if config.query_dim is not None:
            _merge_queries(target, stages, weights)
    return merged


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    """[W, b], (out, in + 1), in float64."""
    return torch.cat((weight, bias[:, None]), 1).double()


def _sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The weighted sum of tensors."""
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _factor(token_mlps: Sequence[Tensor], m: Tensor, products: Tensor) -> Tensor:
    """[W_t, b_t] with M [W_t, b_t] = products, or an error if there is none in float32."""
    if all(torch.equal(each, token_mlps[0]) for each in token_mlps):
        return token_mlps[0]
    found = torch.linalg.lstsq(m, products).solution
    error = (m.float().double() @ found.float().double() - products).norm() / products.norm()
    if products.any() and not error <= _TOLERANCE:
        raise InputError(
            f"no adapter computes this mixture: the weighted sum of W_f is nearly singular, and the adapters differ in W_t, so that "
            f"no W_t gives their products (relative error {error:.1e}, expected {_TOLERANCE:.0e}). Pass other weights, or use "
            "rein.routed to use the adapters side by side."
        )
    return found


def _merge_queries(target: ReinAdapter, stages: Sequence[ReinAdapter], weights: Sequence[float]) -> None:
    """Mix W_m and b_m, given that W_q is the same."""
    projections = [list(stage.query_proj.parameters()) for stage in stages]
    if not all(_equal(projections[0], each) for each in projections):
        raise InputError(
            "no adapter computes the mixture of the queries: W_q differs, and the maximum over the layers is not linear in it. Pass "
            "queries=False to leave the queries out, for a decode head that does not use them."
        )
    for parameter, value in zip(target.query_proj.parameters(), projections[0], strict=True):
        parameter.copy_(value)
    for name, parameter in target.query_merge.named_parameters():
        values = [stage.query_merge.get_parameter(name).double() for stage in stages]
        parameter.copy_(_sum(weights, values))


def _merge_linear(adapters: Sequence[Adapter], weights: Sequence[float], queries: bool, reason: str) -> Adapter:
    """The mixture of adapters with the raw similarity: one linear layer per block. `reason` says why tokens are not kept."""
    if any(adapter.config.use_softmax for adapter in adapters):
        raise InputError(
            f"no adapter computes this mixture: {reason}, and the softmax over the tokens is not linear, so a weighted sum of "
            "softmax similarities is none of one adapter. Expected adapters with equal tokens (trained from one adapter with frozen "
            "tokens) or with use_softmax=False. To use these side by side, pass them to rein.load by name and call rein.routed."
        )
    if queries and any(adapter.config.query_dim is not None for adapter in adapters):
        raise InputError(
            f"no adapter computes the mixture of the queries: {reason}, and the maximum over the layers is not linear. Pass "
            "queries=False to leave the queries out, for a decode head that does not use them."
        )
    merged = _empty(adapters[0].widths, _LINEAR)
    for target, *stages in zip(_stages(merged), *map(_stages, adapters), strict=True):
        for stage, weight in zip(stages, weights, strict=True):
            stage.double()
            for layer in range(target.num_layers):
                folded, (_, mlp) = fold_layer(stage, layer), target.layer_mlps(layer)
                scaled = folded.weight if folded.scale is None else folded.scale * folded.weight
                mlp.weight.add_(scaled, alpha=weight)
                mlp.bias.add_(folded.factors[0], alpha=weight)
    return merged
