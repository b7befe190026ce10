"""A backbone that no library provides: a small vision transformer with a class token."""

import torch
from torch import nn


class MyBackbone(nn.Module):
    """Images (B, 3, H, W), whose sides are multiples of 8, -> tokens (B, 1 + H / 8 * W / 8, width)."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(depth)
        )

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens
