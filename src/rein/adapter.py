"""The Rein adapter: parameters and equations. Read this file first.

Method: Wei et al., "Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized Semantic
Segmentation", CVPR 2024, arXiv 2312.04265. Written from the paper, without the authors' code.

An adapter refines the patch tokens (B, N, C) of each layer and computes queries from its own tokens. It knows no backbone.
`ReinAdapter.reference_forward` has the equations as the paper writes them; `refinement.py` evaluates them at lower cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from rein import refinement
from rein.config import ReinConfig
from rein.errors import InputError
from rein.refinement import PassCache


class AdapterLinear(nn.Module):
    """Linear layer x W^T + b with the initial values of `nn.Linear`.

    Deliberately not a subclass of `nn.Linear`: tools that replace or initialise every `nn.Linear` of a backbone (LoRA,
    quantisation, timm's `init_weights`) must leave the adapter alone.
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
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ReinAdapter(nn.Module):
    """Rein for L layers of one width C (arXiv 2312.04265, Eq. 3-10): refined patch tokens and queries.

    Args:
        dim: C, width of the patch tokens.
        num_layers: L, number of adapted layers.
        config: configuration; by default the authors'.
        patch_size: P of the backbone in pixels. It only sets the range of the tokens' initial values.

    Attributes:
        scale: the learnable scalar s, or None if s is the constant 1 (`zero_init=True` or `share=False`).

    Raises:
        InputError: `dim`, `num_layers` or `patch_size` is below 1.
    """

    def __init__(self, dim: int, num_layers: int, config: ReinConfig | None = None, *, patch_size: int = 16) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_layers", num_layers), ("patch_size", patch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        config = config or ReinConfig()
        self.dim, self.num_layers, self.config, self.patch_size = dim, num_layers, config, patch_size
        if config.rank is None:
            self.tokens = nn.Parameter(torch.empty(num_layers, config.num_tokens, dim))  # T
        else:
            self.tokens_a = nn.Parameter(torch.empty(num_layers, config.num_tokens, config.rank))  # A
            self.tokens_b = nn.Parameter(torch.empty(num_layers, config.rank, dim))  # B
        self.token_mlp = self._linear(dim)  # W_t, b_t
        self.delta_mlp = self._linear(dim)  # W_f, b_f
        if config.query_dim is not None:
            self.query_proj = self._linear(config.query_dim)  # W_q, b_q
            self.query_merge = AdapterLinear(3 * config.query_dim, config.query_dim)  # W_m, b_m
        self.scale = nn.Parameter(torch.empty(())) if config.share and not config.zero_init else None  # s
        self.initialize()

    def _linear(self, out_features: int) -> AdapterLinear | nn.ModuleList:
        """One linear layer for all layers, or one per layer if `share=False`."""
        if self.config.share:
            return AdapterLinear(self.dim, out_features)
        return nn.ModuleList(AdapterLinear(self.dim, out_features) for _ in range(self.num_layers))

    def reference_forward(self, f: Tensor, layer: int) -> Tensor:
        """The equations as the paper writes them, for the patch tokens f (..., N, C) of one layer.

        `forward` uses this form for the function transforms of `torch.func`, else the equal, cheaper form of `refinement.py`.
        """
        token_mlp, delta_mlp = self.layer_mlps(layer)
        tokens = self.tokens[layer] if self.config.rank is None else self.tokens_a[layer] @ self.tokens_b[layer]  # T = A B
        tokens = tokens.to(f.dtype)
        similarity = f @ tokens.mT  # S = f T^T with use_softmax=False
        if self.config.use_softmax:
            similarity = (similarity / math.sqrt(self.dim)).softmax(-1)  # S = softmax(f T^T / sqrt(C)) (Eq. 3-4)
        values = token_mlp(tokens[1:])  # V = T[1:] W_t^T + b_t: the first token is a null slot without a value
        delta = delta_mlp(similarity[..., 1:] @ values + f)  # D = (S[:, 1:] V + f) W_f^T + b_f (Eq. 5-7)
        return f + (delta if self.scale is None else self.scale * delta)  # f' = f + s D

    def queries(self) -> Tensor:
        """The queries of the decode head, (m, q). They depend on the tokens only and are the same for every image (Eq. 8-10).

        Raises:
            InputError: the adapter has `query_dim=None`.
        """
        if self.config.query_dim is None:
            raise InputError("This adapter has no queries (query_dim=None). Build it with ReinConfig(query_dim=256).")
        projections = [_select(self.query_proj, layer) for layer in range(1 if self.config.share else self.num_layers)]
        weight = torch.stack([projection.weight.T for projection in projections])  # (1 or L, C, q)
        bias = torch.stack([projection.bias for projection in projections])[:, None]
        z = self.tokens @ weight if self.config.rank is None else self.tokens_a @ (self.tokens_b @ weight)  # (L, m, q)
        z = z + bias  # Z_l = T_l W_q^T + b_q (Eq. 8)
        pooled = torch.stack((z.amax(0), z.mean(0), z[-1]), -1)  # maximum, mean and last over the layers (Eq. 9)
        merged = rearrange(pooled, "m q three -> m (q three)")  # interleaved: [max_1, mean_1, last_1, max_2, ...]
        return self.query_merge(merged)  # (Eq. 10)

    def forward(
        self, x: Tensor, layer: int | None = None, num_prefix_tokens: int = 0, pass_cache: PassCache | None = None
    ) -> Tensor:
        """Refine the patch tokens of one layer.

        Args:
            x: tokens, (..., N, C), in any floating dtype.
            layer: index of the layer, from 0. None returns `x` unchanged, because models that call all their children in turn
                (`nn.Sequential`, some of timm's `features_only`) call the adapter as a child, without a layer.
            num_prefix_tokens: number of leading rows (class token, registers) that are not patches; they pass through unchanged.
                Passing them here is cheaper than slicing and concatenating, which copies the sequence twice.
            pass_cache: folded matrices that all layers share during one pass without gradients.

        Returns:
            f', (..., N, C), in the dtype of `x`. Under autocast the products run in the autocast dtype, and the residual keeps
            the dtype of `x`.

        Raises:
            InputError: `layer` or `num_prefix_tokens` is out of range, or the last axis of `x` is not C wide.
        """
        if layer is None:
            return x
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer is {layer}; this adapter has layers 0 to {self.num_layers - 1}.")
        if num_prefix_tokens < 0:
            raise InputError(f"num_prefix_tokens is {num_prefix_tokens}; it must be at least 0.")
        if x.shape[-1] != self.dim:
            raise InputError(
                f"x has shape {tuple(x.shape)}; expected (..., N, {self.dim}). Build the adapter with dim={x.shape[-1]} for this x."
            )
        return refinement.refine(self, x, layer, num_prefix_tokens, pass_cache)

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise every parameter: tokens uniform by patch size and width, linear layers as `nn.Linear`.

        Not named `reset_parameters`, because timm's `init_weights` would call it after `wrap`.
        """
        config, dim = self.config, self.dim
        for module in self.modules():
            if isinstance(module, AdapterLinear):
                module.initialize()
        fan = dim if config.rank is None else math.sqrt(dim * config.rank)
        bound = math.sqrt(6 / (3 * self.patch_size**2 + fan))
        for tokens in self.token_parameters():
            nn.init.uniform_(tokens, -bound, bound)
        if self.scale is not None:
            nn.init.constant_(self.scale, config.scale_init)
        else:  # s is 1, so W_f and b_f start smaller instead
            for parameter in self.delta_mlp.parameters():
                parameter.mul_(0.0 if config.zero_init else config.scale_init)

    def layer_mlps(self, layer: int | slice) -> tuple[AdapterLinear, AdapterLinear]:
        """The linear layers (W_t, b_t) and (W_f, b_f) of a layer: shared by all layers, or one pair per layer if `share=False`."""
        return _select(self.token_mlp, layer), _select(self.delta_mlp, layer)

    def token_parameters(self) -> tuple[nn.Parameter, ...]:
        """The full tokens (T,), (L, m, C), or the low-rank factors (A, B), (L, m, r) and (L, r, C)."""
        return (self.tokens,) if self.config.rank is None else (self.tokens_a, self.tokens_b)

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The parameters without weight decay in the authors' recipe: the tokens and s."""
        return [*self.token_parameters(), *([] if self.scale is None else [self.scale])]

    def matrices(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """For each layer the matrices that do not depend on the features, in `dtype`: s W_f and the factors of `refinement.py`."""
        return [[folded.weight, *folded.factors] for folded in refinement.fold_layers(self, dtype)]

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of every layer, (L,)."""
        return (self.dim,) * self.num_layers

    def stage_of(self, layer: int) -> int:
        """Index of the stage that contains `layer`: always 0, as there is one stage."""
        return 0

    def locate(self, layer: int) -> tuple[ReinAdapter, int]:
        """The adapter that refines `layer`, and the index of the layer in it: itself, as there is one stage."""
        return self, layer

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_layers={self.num_layers}, patch_size={self.patch_size}, {self.config}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReinAdapter:
        # `model.half()` and `.to(bfloat16)` convert the backbone only: adapter parameters stay float32, or small steps are lost
        def in_full_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(in_full_precision, recurse)


def _select(mlp: AdapterLinear | nn.ModuleList, layer: int | slice) -> AdapterLinear:
    """The linear layer that `layer` uses: the shared one, or its own."""
    return cast(AdapterLinear, mlp[layer] if isinstance(mlp, nn.ModuleList) else mlp)
