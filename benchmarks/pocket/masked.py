"""The objective: a masked autoencoder (He et al., arXiv 2111.06377) that sees a street in any look and predicts it by clear day.

The encoder is the timm `VisionTransformer`, applied to the visible patches of a relit crop. A linear layer predicts each visible
patch from its token; a small decoder predicts some of the masked patches. There are four targets, all of the same crop by day: pixels
normalised by patch; histograms of oriented gradients (MaskFeat, arXiv 2112.09133); the patch's colours at low resolution; and the
tokens of a teacher, a moving average of the encoder that sees the whole crop (data2vec, arXiv 2202.03555). Neither labels nor depth
are used.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from rein.backbones import normalization

VISIBLE = 0.4  # share of the patches that the encoder sees; the decoder reconstructs an equal share of the masked ones
BINS, CELL = 9, 4  # orientations and cell side in pixels of the histograms; the colours have cells of the same size
HOG_SCALE = 8.0  # gives the histograms the variance of the pixels
TEACHER_WEIGHT, TEACHER_BLOCKS = 2.0, 4  # weight of its loss; its target is the mean over the last blocks


class MaskedAutoencoder(nn.Module):
    """An encoder, and a decoder that is needed for pretraining only.

    Args:
        encoder: a plain timm ViT with one class token.
        width: embedding dimension of the decoder, which has one block.
    """

    def __init__(self, encoder: VisionTransformer, width: int = 96):
        super().__init__()
        self.encoder, self.patch = encoder, encoder.patch_embed.patch_size[0]
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.block = Block(width, num_heads=3)
        self.norm = nn.LayerNorm(width)
        self.sizes = [3 * self.patch**2, BINS * (self.patch // CELL) ** 2, 3 * (self.patch // CELL) ** 2]
        self.masked_head = nn.Linear(width, sum(self.sizes))
        self.visible_head = nn.Linear(encoder.embed_dim, sum(self.sizes))
        self.masked_token_head = nn.Linear(width, encoder.embed_dim)
        self.visible_token_head = nn.Linear(encoder.embed_dim, encoder.embed_dim)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        for name, values in zip(("mean", "std"), normalization(encoder), strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, relit: Tensor, day: Tensor, generator: torch.Generator) -> Tensor:
        """The loss, a scalar.

        Args:
            relit: (B, 3, H, W) from 0 to 1, the images whose visible patches the encoder sees.
            day: (B, 3, H, W) from 0 to 1, the same crops by clear day.
            generator: source of the random mask, on the CPU.
        """
        batch, _, height, width = relit.shape
        grid = [height // self.patch, width // self.patch]
        order = torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(1).to(relit.device)
        count = int(order.shape[1] * VISIBLE)
        visible, masked = order[:, :count], order[:, count : 2 * count]
        with torch.autocast(relit.device.type, torch.bfloat16):
            tokens = self._encode((relit - self.mean) / self.std, visible)
            of_visible, tokens_of_visible = self.visible_head(tokens), self.visible_token_head(tokens)
            tokens = self.embed(tokens)
            positions = build_sincos2d_pos_embed(grid, tokens.shape[-1]).to(tokens)
            tokens = torch.cat([tokens + positions[visible], self.mask_token.to(tokens.dtype) + positions[masked]], 1)
            tokens = self.norm(self.block(tokens)[:, count:])
            of_masked, tokens_of_masked = self.masked_head(tokens), self.masked_token_head(tokens)
        targets, features = self._targets(day), self._teach(day)
        reconstruction = self._loss(of_visible, _gather(targets, visible)) + self._loss(of_masked, _gather(targets, masked))
        distillation = F.smooth_l1_loss(tokens_of_visible.float(), _gather(features, visible))
        distillation = distillation + F.smooth_l1_loss(tokens_of_masked.float(), _gather(features, masked))
        return reconstruction + TEACHER_WEIGHT * distillation

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's weights towards the encoder's."""
        for old, new in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)

    @torch.no_grad()
    def _teach(self, day: Tensor) -> Tensor:
        """The teacher's tokens, (B, N, C): mean over its last blocks, each normalised by channel over the image, then by token."""
        outputs = []
        with torch.autocast(day.device.type, torch.bfloat16):
            tokens = self.teacher._pos_embed(self.teacher.patch_embed((day - self.mean) / self.std))
            for block in self.teacher.blocks:
                tokens = block(tokens)
                outputs.append(tokens[:, 1:].float())
        width = outputs[0].shape[-1:]
        normalised = [F.layer_norm(F.instance_norm(output.mT).mT, width) for output in outputs[-TEACHER_BLOCKS:]]
        return F.layer_norm(torch.stack(normalised).mean(0), width)

    def _loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Sum of the mean squared errors of the three kinds of target."""
        kinds = zip(predictions.float().split(self.sizes, -1), targets.split(self.sizes, -1), strict=True)
        return torch.stack([F.mse_loss(*kind) for kind in kinds]).sum()

    def _targets(self, day: Tensor) -> Tensor:
        """Targets of every patch, (B, N, K): pixels of mean 0 and variance 1, histograms, colours at low resolution."""
        pixels = patchify(day, self.patch)
        pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-4).sqrt()
        gradients = patchify(histograms(day), self.patch // CELL)
        gradients = HOG_SCALE * gradients / (gradients.norm(dim=-1, keepdim=True) + 0.02)
        colours = patchify(F.avg_pool2d((day - self.mean) / self.std, CELL), self.patch // CELL)
        return torch.cat([pixels, gradients, colours], -1)

    def _encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Tokens (B, n, C) of the visible patches, whose indices are (B, n)."""
        tokens = self.encoder._pos_embed(self.encoder.patch_embed(images))
        tokens = torch.cat([tokens[:, :1], _gather(tokens[:, 1:], visible)], 1)
        return self.encoder.norm(self.encoder.blocks(tokens))[:, 1:]


def _gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """Select (B, n, C) of the tokens (B, N, C) by indices (B, n)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def patchify(maps: Tensor, patch: int) -> Tensor:
    """Reshape (B, C, H, W) to (B, N, P P C), one entry per patch."""
    batch, channels, height, width = maps.shape
    parts = maps.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def histograms(images: Tensor) -> Tensor:
    """Histograms of oriented gradients of the grey images, averaged over cells: (B, 9, H / 4, W / 4)."""
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
