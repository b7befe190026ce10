"""The objective: a masked autoencoder (He et al., arXiv 2111.06377) that sees an image in another light and rebuilds it as it was.

The encoder is the timm `VisionTransformer` itself, on the part of the patches that is shown. A linear layer rebuilds each of them
from its own token, and a small decoder guesses some of the hidden ones. Most of what is rebuilt hardly depends on light: pixels
normalised by patch, and histograms of oriented gradients (MaskFeat, arXiv 2112.09133); the rest is the patch's colours, coarsely.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from rein.testing.models import POCKET_MEAN, POCKET_STD

SHOWN = 0.4  # share of the patches that the encoder sees, and share that the decoder guesses
BINS, CELL = 9, 4  # of the histograms: orientations, and pixels along a side; the coarse colours have the same cells
HOG_SCALE = 8.0  # brings the histograms' variance to the pixels'


class MaskedAutoencoder(nn.Module):
    """An encoder that is kept, and a decoder that is not.

    Args:
        encoder: a plain timm ViT with one class token.
        width: of the decoder's only block.
    """

    def __init__(self, encoder: VisionTransformer, width: int = 96):
        super().__init__()
        self.encoder, self.patch = encoder, encoder.patch_embed.patch_size[0]
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.block = Block(width, num_heads=3)
        self.norm = nn.LayerNorm(width)
        self.sizes = [3 * self.patch**2, BINS * (self.patch // CELL) ** 2, 3 * (self.patch // CELL) ** 2]
        self.head = nn.Linear(width, sum(self.sizes))  # for hidden patches
        self.own_head = nn.Linear(encoder.embed_dim, sum(self.sizes))  # for shown ones
        for name, values in (("mean", POCKET_MEAN), ("std", POCKET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, seen: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
        """The loss, a scalar: `seen`, (B, 3, H, W) from 0 to 1, is shown in part, and `clean` is to be rebuilt."""
        batch, _, rows, columns = seen.shape
        grid = [rows // self.patch, columns // self.patch]
        order = torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(1)
        count = int(order.shape[1] * SHOWN)
        shown, hidden = order[:, :count], order[:, count : 2 * count]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self._encode((seen - self.mean) / self.std, shown)
            own = self.own_head(tokens)
            tokens = self.embed(tokens)
            places = build_sincos2d_pos_embed(grid, tokens.shape[-1]).to(tokens.dtype)
            tokens = torch.cat([tokens + places[shown], self.hidden.to(tokens.dtype) + places[hidden]], 1)
            guesses = self.head(self.norm(self.block(tokens)[:, count:]))
        wanted = self._targets(clean)
        return self._distance(own, _take(wanted, shown)) + self._distance(guesses, _take(wanted, hidden))

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error, each of the three kinds of target counting the same."""
        kinds = zip(found.float().split(self.sizes, -1), wanted.split(self.sizes, -1), strict=True)
        return torch.stack([F.mse_loss(*kind) for kind in kinds]).sum()

    def _targets(self, clean: Tensor) -> Tensor:
        """What is to be rebuilt of every patch, (B, N, K): pixels of mean 0 and variance 1, histograms, coarse colours."""
        pixels = patchify(clean, self.patch)
        pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-4).sqrt()
        gradients = patchify(histograms(clean), self.patch // CELL)
        gradients = HOG_SCALE * gradients / (gradients.norm(dim=-1, keepdim=True) + 0.02)
        colours = patchify(F.avg_pool2d((clean - self.mean) / self.std, CELL), self.patch // CELL)
        return torch.cat([pixels, gradients, colours], -1)

    def _encode(self, images: Tensor, shown: Tensor) -> Tensor:
        """The tokens of the shown patches, (B, n, C)."""
        tokens = self.encoder._pos_embed(self.encoder.patch_embed(images))
        tokens = torch.cat([tokens[:, :1], _take(tokens[:, 1:], shown)], 1)
        return self.encoder.norm(self.encoder.blocks(tokens))[:, 1:]


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    """Some of the tokens (B, N, C), by place (B, n)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def patchify(maps: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) as one row per patch, (B, N, P P C)."""
    batch, channels, rows, columns = maps.shape
    parts = maps.reshape(batch, channels, rows // patch, patch, columns // patch, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def histograms(images: Tensor) -> Tensor:
    """How strong the grey image's gradients are by orientation, averaged over cells: (B, 9, H / 4, W / 4)."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    strength = (across**2 + down**2).sqrt()
    angle = torch.atan2(down, across) * (BINS / math.pi) % BINS
    first = angle.floor()
    share, first = angle - first, first.long() % BINS
    votes = strength.new_zeros(len(grey), BINS, *strength.shape[2:])
    votes.scatter_add_(1, first, strength * (1 - share)).scatter_add_(1, (first + 1) % BINS, strength * share)
    return F.avg_pool2d(votes, CELL)
