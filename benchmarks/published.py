"""The published form of the refinement, as a baseline: the paper's equations, one after the other (`ReinAdapter.reference_forward`).

It gives the same numbers as rein, more slowly.
"""

import torch
from torch import Tensor, nn

import rein


class Hook:
    """Forward hook that refines the patch tokens in the output of one block."""

    def __init__(self, adapter: rein.ReinAdapter, layer: int, prefix: int) -> None:
        self.adapter, self.layer, self.prefix = adapter, layer, prefix

    def __call__(self, block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        refined = self.adapter.reference_forward(output[:, self.prefix :], self.layer)
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
    dtype = next(vit.blocks.parameters()).dtype
    for parameter in vit.rein.parameters():
        parameter.data = parameter.data.to(dtype)
