"""`FPNHead`: the Semantic FPN, the second decoder that the Rein paper evaluates.

Source: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv 1901.02446.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rein.heads.base import Head, group_count, known_equal, resize
from rein.heads.losses import CROSS_ENTROPY, LossSetting
from rein.heads.pyramid import FeaturePyramid


class FPNHead(Head):
    """Lateral 1 x 1 convolutions, a top-down path, one upsampling tower per level, and a classifier on the sum of the towers.

    `FeaturePyramid` first resizes maps of equal size, as a plain ViT gives, to a pyramid.

    Args:
        in_channels: channels of each map, finest first; usually four.
        num_classes: number of classes K.
        channels: channels of the top-down path.
        tower_channels: channels of the towers, which upsample each level to the finest.
        dropout: probability of dropping a channel before the classifier, in training.
        class_weights, loss: as in `Head`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        tower_channels: int = 128,
        dropout: float = 0.1,
        *,
        class_weights: Sequence[float] | None = None,
        loss: LossSetting = CROSS_ENTROPY,
    ) -> None:
        settings = {"channels": channels, "tower_channels": tower_channels, "dropout": dropout}
        super().__init__(in_channels, num_classes, class_weights=class_weights, loss=loss, **settings)
        levels = range(len(self.in_channels))
        self.pyramid = FeaturePyramid([4 / 2**level for level in levels])
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in self.in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in levels)
        self.towers = nn.ModuleList(
            nn.Sequential(*(_block(channels if step == 0 else tower_channels, tower_channels) for step in range(max(1, level))))
            for level in levels
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(tower_channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> logits (B, K, h, w) at the size of the finest level; ignores `queries`."""
        self.check_maps(maps)
        levels = [lateral(m) for lateral, m in zip(self.laterals, self.pyramid(maps), strict=True)]
        for level in range(len(levels) - 1, 0, -1):
            finer = levels[level - 1]
            levels[level - 1] = finer + F.interpolate(levels[level], finer.shape[-2:], mode="nearest")
        total = None
        for level, (smooth, tower, x) in enumerate(zip(self.smooth, self.towers, levels, strict=True)):
            x = smooth(x)
            for block in tower.children():
                x = block(x)
                if level and not known_equal(x.shape[-2:], levels[0].shape[-2:]):
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = resize(x, levels[0].shape[-2:])  # odd sizes
            total = x if total is None else total + x
        return self.classifier(self.dropout(total))


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.GroupNorm(group_count(out_channels), out_channels),
        nn.ReLU(),
    )
