"""The published form of the refinement, as a baseline: equations (1) to (7), one after the other.

Transcribed from the paper (arXiv 2312.04265). It uses the parameters of a `ReinAdapter` and gives the same numbers, more slowly.
"""

import math

import torch
from torch import Tensor, nn

import rein


def refine(adapter: rein.ReinAdapter, x: Tensor, layer: int) -> Tensor:
    """Refined patch tokens F', (B, N, C), of patch tokens `x`, (B, N, C)."""
    tokens = adapter.tokens_a[layer] @ adapter.tokens_b[layer]  # T = A B
    similarity = (x @ tokens.mT / math.sqrt(x.shape[-1])).softmax(-1)  # (3), (4)
    values = adapter.token_mlp(tokens[1:])
    delta = similarity[..., 1:] @ values  # (5)
    return x + adapter.scale * adapter.delta_mlp(delta + x)  # (6), (7)


class Hook:
    """Forward hook that refines the patch tokens in the output of one block."""

    def __init__(self, adapter: rein.ReinAdapter, layer: int, prefix: int) -> None:
        self.adapter, self.layer, self.prefix = adapter, layer, prefix

    def __call__(self, block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        refined = refine(self.adapter, output[:, self.prefix :], self.layer)
        return torch.cat((output[:, : self.prefix], refined), 1)


def wrap(vit: nn.Module) -> nn.Module:
    """Freeze a ViT and add the published refinement after each block, in place."""
    vit.requires_grad_(False)
    vit.rein = rein.ReinAdapter(vit.embed_dim, len(vit.blocks))
    match_dtype(vit)
    for layer, block in enumerate(vit.blocks):
        block.register_forward_hook(Hook(vit.rein, layer, vit.num_prefix_tokens))
    return vit


def match_dtype(vit: nn.Module) -> None:
    """Convert the adapter to the dtype of the backbone: the published equations, unlike rein, do not mix dtypes."""
    for parameter in vit.rein.parameters():
        parameter.data = parameter.data.to(vit.pos_embed.dtype)
