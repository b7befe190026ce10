"""The smallest head: a norm and one 1 x 1 convolution. What it gets right, the features knew."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rein.heads.base import ChannelNorm, Head, concatenate


class LinearHead(Head):
    """Layer norm of each map, concatenation, 1 x 1 convolution.

    Maps of several sizes are resized to the first one's. Dropout is applied to whole channels before the convolution.

    Args:
        in_channels: channels of each map; one number for a single map.
        num_classes: K.
        dropout: probability of dropping a channel in training.
    """

    def __init__(self, in_channels: int | Sequence[int], num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(in_channels, num_classes, dropout=dropout)
        self.norms = nn.ModuleList(ChannelNorm(channels) for channels in self.in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(sum(self.in_channels), num_classes, 1)

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> logits (B, K, h_1, w_1); `queries` are not used."""
        self.check_maps(maps)
        features = concatenate([norm(feature_map) for norm, feature_map in zip(self.norms, maps, strict=True)])
        return self.classifier(self.dropout(features))
