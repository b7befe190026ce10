"""The adapter: the paper's equations on tensors. Read this first.

Method: Wei et al., "Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized Semantic
Segmentation", CVPR 2024, arXiv 2312.04265. Written from the paper; the authors' code was not used.

Nothing here knows a backbone: an adapter maps the patch tokens (B, N, C) of one layer to refined ones, and gives queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from rein.config import ReinConfig
from rein.errors import InputError
from rein.refinement import Refinement, refined, scaled


class Affine(nn.Module):
    """x W^T + b, started as `nn.Linear` is.

    It is no `nn.Linear`, so that what goes over all linear layers of a backbone (timm's `init_weights`, quantisation, LoRA) passes
    the adapter by.

    Args:
        in_features: width of x.
        out_features: width of the result.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Kaiming uniform with a = sqrt(5): weight and bias uniform within 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return nn.functional.linear(x, self.weight, self.bias)


class ReinAdapter(nn.Module):
    """Rein's refinement f' = f + s D for L layers of one width C (arXiv 2312.04265, Eq. 3-10).

    For the patch tokens f of layer l, with tokens T_l (m, C):

        S  = softmax(f T_l^T / sqrt(C))                   similarity over all m tokens        (Eq. 3-4)
        V  = T_l[2..m] W_t^T + b_t                        values; the first token is a null slot
        D  = (S[:, 2..m] V + f) W_f^T + b_f
        f' = f + s D

    It is evaluated in a cheaper, exactly equal form: T = A B is never multiplied out, s and both MLPs are folded into matrices of
    C columns before they meet f, and because the rows of S sum to 1 the biases ride along. The backward pass keeps nothing of N
    rows but f itself, and computes again what is thin.

    Args:
        dim: C, the width of the layers' outputs.
        num_layers: L.
        config: what to build; the default is the authors'.
        patch_size: P of the backbone in pixels; it only sets the range of the tokens' initial values.

    Attributes:
        scale: the learnable scalar s, or None where it is the constant 1 (`zero_init=True` or `share=False`).

    Raises:
        InputError: `dim`, `num_layers` or `patch_size` below 1.
    """

    def __init__(self, dim: int, num_layers: int, config: ReinConfig | None = None, *, patch_size: int = 16) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_layers", num_layers), ("patch_size", patch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        config = config or ReinConfig()
        self.dim, self.num_layers, self.config, self.patch_size = dim, num_layers, config, patch_size
        if config.rank is None:
            self.tokens = nn.Parameter(torch.empty(num_layers, config.num_tokens, dim))
        else:
            self.tokens_a = nn.Parameter(torch.empty(num_layers, config.num_tokens, config.rank))
            self.tokens_b = nn.Parameter(torch.empty(num_layers, config.rank, dim))
        self.token_mlp = self._per_layer(dim)  # W_t, b_t
        self.delta_mlp = self._per_layer(dim)  # W_f, b_f
        if config.query_dim is not None:
            self.query_proj = self._per_layer(config.query_dim)  # W_q, b_q
            self.query_merge = Affine(3 * config.query_dim, config.query_dim)  # W_m, b_m
        learns_scale = config.share and not config.zero_init
        self.scale = nn.Parameter(torch.empty(())) if learns_scale else None
        self.initialize()

    def _per_layer(self, out_features: int) -> Affine | nn.ModuleList:
        if self.config.share:
            return Affine(self.dim, out_features)
        return nn.ModuleList(Affine(self.dim, out_features) for _ in range(self.num_layers))

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw every parameter anew: tokens uniform by patch size and width, linear layers as `nn.Linear` does.

        Not called `reset_parameters`, which timm's `init_weights` would call after `wrap`.
        """
        config, dim = self.config, self.dim
        for linear in self.modules():
            if isinstance(linear, Affine):
                linear.initialize()
        fan = dim if config.rank is None else math.sqrt(dim * config.rank)
        bound = math.sqrt(6 / (3 * self.patch_size**2 + fan))
        for tokens in self._tokens():
            nn.init.uniform_(tokens, -bound, bound)
        if self.scale is not None:
            nn.init.constant_(self.scale, config.scale_init)
        else:
            start = 0.0 if config.zero_init else config.scale_init
            for parameter in self.delta_mlp.parameters():
                parameter.mul_(start)

    def _tokens(self) -> tuple[nn.Parameter, ...]:
        return (self.tokens,) if self.config.rank is None else (self.tokens_a, self.tokens_b)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every layer, (L,)."""
        return (self.dim,) * self.num_layers

    def stage_of(self, layer: int) -> int:
        """The number of the stage of a layer: there is one."""
        return 0

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The parameters that the authors' recipe does not decay: the tokens and s."""
        return [*self._tokens(), *([] if self.scale is None else [self.scale])]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_layers={self.num_layers}, patch_size={self.patch_size}, {self.config}"

    def forward(self, x: Tensor, layer: int | None = None, num_prefix_tokens: int = 0, one_pass: OnePass | None = None) -> Tensor:
        """Refine the patch tokens of one layer.

        Args:
            x: tokens f, (..., N, C), in any floating dtype.
            layer: l, from 0. Without it `x` comes back as it is: models that run all their children in turn, as `nn.Sequential`
                and some of timm's `features_only` do, run past an adapter among them.
            num_prefix_tokens: so many of the N rows, the first ones, are no patches and pass through. To leave them in costs less
                than to take them out and to put them back, which copies the sequence twice.
            one_pass: where the layers are called one after the other without gradients, what they share: everything that does not
                depend on `x` is then computed once for all layers.

        Returns:
            f', (..., N, C), in the dtype of `x`. Under autocast the products run in autocast's dtype and are added to `x` in
            the dtype of `x`.

        Raises:
            InputError: the last axis is not C wide, there is no such layer, or the count of prefix rows is negative.
        """
        if layer is None:
            return x
        if not 0 <= layer < self.num_layers or num_prefix_tokens < 0:
            raise InputError(
                f"layer is {layer} and num_prefix_tokens {num_prefix_tokens}; this adapter has layers 0 to {self.num_layers - 1}, "
                "and a count of rows is not negative."
            )
        if x.shape[-1] != self.dim:
            raise InputError(
                f"patch tokens are {x.shape[-1]} wide, shape {tuple(x.shape)}; this adapter was built for {self.dim}."
            )
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):  # the folded matrices stay float32 until they are complete
                return self._refine(x, layer, dtype, num_prefix_tokens, one_pass)
        return self._refine(x, layer, x.dtype, num_prefix_tokens, one_pass)

    def _refine(self, x: Tensor, layer: int, dtype: torch.dtype, prefix: int, one_pass: OnePass | None) -> Tensor:
        mapped, compiled = torch._C._are_functorch_transforms_active(), torch.compiler.is_compiling()
        exported = compiled and not torch.compiler.is_dynamo_compiling()
        if one_pass is not None and not (torch.is_grad_enabled() or mapped or exported):
            weight, *thin = one_pass.matrices(self, layer, dtype, x.device)
            return refined(x, dtype, prefix, None, weight, *thin, in_place=not compiled)
        thin, scale, weight = self._folded(layer)
        thin = [factor.to(dtype) for factor in thin]
        if mapped or compiled:
            return refined(x, dtype, prefix, scale, weight, *thin)  # what transforms programs wants plain ones
        if torch.is_grad_enabled() and any(each.requires_grad for each in (x, weight, *thin)):
            return cast(Tensor, Refinement.apply(x, dtype, prefix, scale, weight, *thin))
        return refined(x, dtype, prefix, scale, weight, *thin, in_place=True)

    def matrices(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """For each layer s W_f and the thin factors in `dtype`: everything that does not depend on the features."""
        if self.config.share and self.config.use_softmax:  # all layers at once, in few large products
            thin, scale, weight = self._folded_softmax(slice(None))
            weight, thin = scaled(weight, scale, dtype), [factor.to(dtype) for factor in thin]
            return [[weight, *factors] for factors in zip(*thin, strict=True)]
        layers = []
        for layer in range(self.num_layers):
            thin, scale, weight = self._folded(layer)
            layers.append([scaled(weight, scale, dtype), *(factor.to(dtype) for factor in thin)])
        return layers

    def _folded(self, layer: int) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """The thin factors of one layer, s, and the wide matrix: everything that does not depend on the features."""
        return self._folded_softmax(layer) if self.config.use_softmax else self._folded_linear(layer)

    def _folded_softmax(self, layer: int | slice) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """The matrices of s D = softmax(f T^T / sqrt(C)) mix values + f (s W_f)^T: the thin ones, then s, and W_f.

        With low-rank tokens the thin ones are B^T / sqrt(C), (C, r), A^T, (r, m), mix, (m, r + 2), and the values, (r + 2, C); with
        full tokens T^T / sqrt(C), (C, m), and the values, (m, C). For a slice of layers, which share their MLPs, they are stacked.
        """
        token_mlp, delta_mlp = _at(self.token_mlp, layer), _at(self.delta_mlp, layer)
        weight = delta_mlp.weight
        not_null = _null_mask(self._tokens()[0][layer])  # (..., m, 1): 0 for the first token, else 1
        inner = 1 / math.sqrt(self.dim)
        if self.config.rank is None:
            tokens = self.tokens[layer]
            values = (not_null * (tokens @ token_mlp.weight.mT + token_mlp.bias)) @ weight.mT + delta_mlp.bias
            thin = [tokens.mT * inner]
        else:
            a, b = self.tokens_a[layer], self.tokens_b[layer]
            mix = torch.cat((not_null * a, not_null, torch.ones_like(not_null)), -1)  # S mix = [S A0, 1 - S_1, 1]
            row = (*b.shape[:-2], 1, self.dim)
            values = torch.cat((b @ token_mlp.weight.mT, token_mlp.bias.expand(row)), -2) @ weight.mT
            values = torch.cat((values, delta_mlp.bias.expand(row)), -2)
            thin = [b.mT * inner, a.mT, mix]
        return [*thin, values if self.scale is None else self.scale * values], self.scale, weight

    def _folded_linear(self, layer: int) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """The same for the raw similarity S = f T^T, of which all is one affine map: the bias (C,), then s, and the weight (C, C)."""
        token_mlp, delta_mlp = _at(self.token_mlp, layer), _at(self.delta_mlp, layer)
        not_null = _null_mask(self._tokens()[0][layer])
        if self.config.rank is None:
            keys = self.tokens[layer]
            values = not_null * (keys @ token_mlp.weight.mT + token_mlp.bias)
        else:
            a, keys = self.tokens_a[layer], self.tokens_b[layer]
            mixed = a.mT @ torch.cat((not_null * a, not_null), 1)
            values = mixed @ torch.cat((keys @ token_mlp.weight.mT, token_mlp.bias[None]))
        weight = delta_mlp.weight
        bias = delta_mlp.bias if self.scale is None else self.scale * delta_mlp.bias
        return [bias], self.scale, weight + (weight @ values.mT) @ keys

    def queries(self) -> Tensor:
        """The queries linked to the tokens, (m, q), the same for every image (Eq. 8-10).

        Raises:
            InputError: the adapter was built with `query_dim=None`.
        """
        if self.config.query_dim is None:
            raise InputError(
                "this adapter has no queries (query_dim=None); build it with ReinConfig(query_dim=256) to have them."
            )
        projections = [_at(self.query_proj, layer) for layer in range(1 if self.config.share else self.num_layers)]
        weight = torch.stack([projection.weight.mT for projection in projections])  # (1 or L, C, q)
        bias = torch.stack([projection.bias for projection in projections])[:, None]
        tokens = self._tokens()
        z = tokens[-1] @ weight  # (L, m, q), or with low-rank tokens B's (L, r, q)
        if len(tokens) == 2:
            z = tokens[0] @ z
        z = z + bias
        merged = torch.stack((z.amax(0), z.mean(0), z[-1]), -1)  # interleaved: [max_1, mean_1, last_1, max_2, ...]
        return self.query_merge(rearrange(merged, "m q three -> m (q three)"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReinAdapter:
        # `model.half()` and `.to(bfloat16)` convert the backbone; adapter parameters stay float32, or training loses small steps
        def in_full_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(in_full_precision, recurse)


class StagewiseAdapter(nn.Module):
    """One `ReinAdapter` per stage, for backbones whose width changes: layers are numbered through, queries are summed.

    Args:
        widths: C of every layer in order; neighbours of equal width form a stage.
        config: what to build in every stage.
        patch_size: as in `ReinAdapter`.
    """

    def __init__(self, widths: Sequence[int], config: ReinConfig | None = None, *, patch_size: int = 16) -> None:
        super().__init__()
        self.config, self.widths = config or ReinConfig(), tuple(widths)
        stages = [(width, len(list(group))) for width, group in groupby(self.widths)]
        self.stages = nn.ModuleList(ReinAdapter(width, depth, self.config, patch_size=patch_size) for width, depth in stages)
        self._place = [(stage, layer) for stage, (_, depth) in enumerate(stages) for layer in range(depth)]

    def _stages(self) -> list[ReinAdapter]:
        return [stage for stage in self.stages if isinstance(stage, ReinAdapter)]

    @property
    def num_layers(self) -> int:
        """L, over all stages."""
        return len(self.widths)

    def stage_of(self, layer: int) -> int:
        """The number of the stage of a layer, both from 0."""
        return self._place[layer][0]

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The parameters that the authors' recipe does not decay: the tokens and s of every stage."""
        return [parameter for stage in self._stages() for parameter in stage.no_decay_parameters()]

    def forward(self, x: Tensor, layer: int | None = None, num_prefix_tokens: int = 0, one_pass: OnePass | None = None) -> Tensor:
        """As `ReinAdapter`, for tokens (..., N, C_stage) of layer `layer`, counted through all stages from 0."""
        if layer is None:
            return x
        stage, layer = self._place[layer]
        return self.stages[stage](x, layer, num_prefix_tokens, one_pass)  # through __call__, for hooks

    def queries(self) -> Tensor:
        """The sum of the stages' queries, (m, q)."""
        return torch.stack([stage.queries() for stage in self._stages()]).sum(0)


def build_adapter(widths: Sequence[int], config: ReinConfig, *, patch_size: int) -> ReinAdapter | StagewiseAdapter:
    """The adapter for layers of these widths: a plain `ReinAdapter` where they are all equal."""
    if len(set(widths)) == 1:
        return ReinAdapter(widths[0], len(widths), config, patch_size=patch_size)
    return StagewiseAdapter(widths, config, patch_size=patch_size)


class OnePass:
    """What the layers of one `ReinAdapter` share in one pass without gradients: their matrices, prepared once.

    A model's pass never uses old ones. They serve only the layer that follows the last one served, so each pass, which begins at
    the first layer, prepares them anew: also a change that torch does not count (`parameter.data.fill_(1)`) is seen by the next pass.
    What torch does count (an optimizer's step, `load`, other parameters in their place) is seen by the next layer. After the last
    layer they are let go; a pass that stops early leaves them to the next.
    """

    def __init__(self) -> None:
        self._prepared: tuple[Any, int, list[list[Tensor]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_prepared": None}

    def matrices(self, adapter: ReinAdapter, layer: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """S W_f and the thin factors of `layer`."""
        state = None  # a compiled program runs as a whole, and begins with the parameters that it finds
        if not torch.compiler.is_compiling():
            state = [(id(parameter), parameter.is_inference() or parameter._version) for parameter in adapter.parameters()]
        made_for = (dtype, device, state)
        known = self._prepared if layer else None  # read once: another thread may run a pass of its own
        prepared = known[2] if known is not None and known[:2] == (made_for, layer) else adapter.matrices(dtype)
        self._prepared = None if layer + 1 == adapter.num_layers else (made_for, layer + 1, prepared)
        return prepared[layer]


def _at(mlp: Affine | nn.ModuleList, layer: int | slice) -> Affine:
    """The linear layer that layer `layer` uses: the shared one, or its own."""
    linear = mlp[layer] if isinstance(mlp, nn.ModuleList) else mlp
    return cast(Affine, linear)


def _null_mask(tokens: Tensor) -> Tensor:
    mask = torch.ones(*tokens.shape[:-1], 1, dtype=tokens.dtype, device=tokens.device)
    mask[..., 0, :] = 0
    return mask
