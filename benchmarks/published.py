"""The published form of the refinement, equations (1) to (7) one after the other, to compare with. Not part of the package.

Transcribed from the paper (arXiv 2312.04265); it shares the parameters of a `ReinAdapter`, and gives the same numbers slower.
"""

import math

import torch
from torch import Tensor, nn

import rein


def refine(adapter: rein.ReinAdapter, x: Tensor, layer: int) -> Tensor:
    """F' of patch tokens (B, N, C)."""
    tokens = adapter.tokens_a[layer] @ adapter.tokens_b[layer]  # T = A B
    similarity = (x @ tokens.mT / math.sqrt(x.shape[-1])).softmax(-1)  # (3), (4)
    values = adapter.token_mlp(tokens[1:])
    delta = similarity[..., 1:] @ values  # (5)
    return x + adapter.scale * adapter.delta_mlp(delta + x)  # (6), (7)


class Hook:
    """Refines the patch rows of one block's output."""

    def __init__(self, adapter: rein.ReinAdapter, layer: int, prefix: int) -> None:
        self.adapter, self.layer, self.prefix = adapter, layer, prefix

    def __call__(self, block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        refined = refine(self.adapter, output[:, self.prefix :], self.layer)
        return torch.cat((output[:, : self.prefix], refined), 1)


def wrap(vit: nn.Module) -> nn.Module:
    """A frozen ViT with the published form behind each block, in place."""
    vit.requires_grad_(False)
    vit.rein = rein.ReinAdapter(vit.embed_dim, len(vit.blocks))
    in_one_precision(vit)
    for layer, block in enumerate(vit.blocks):
        block.register_forward_hook(Hook(vit.rein, layer, vit.num_prefix_tokens))
    return vit


def in_one_precision(vit: nn.Module) -> None:
    """Bring the adapter to the backbone's precision: the equations as they stand do not mix precisions, as rein does."""
    for parameter in vit.rein.parameters():
        parameter.data = parameter.data.to(vit.pos_embed.dtype)
