"""`LinearHead`: a norm and one 1 x 1 convolution, to probe what the features contain."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rein.heads.base import ChannelNorm, Head, concatenate
from rein.heads.losses import CROSS_ENTROPY, LossSetting


class LinearHead(Head):
    """Layer norm of each map, concatenation at the size of the first map, channel dropout and a 1 x 1 convolution.

    Args:
        in_channels: channels of each map; an integer for a single map.
        num_classes: number of classes K.
        dropout: probability of dropping a channel before the convolution, in training.
        class_weights, loss: as in `Head`.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        dropout: float = 0.0,
        *,
        class_weights: Sequence[float] | None = None,
        loss: LossSetting = CROSS_ENTROPY,
    ) -> None:
        super().__init__(in_channels, num_classes, class_weights=class_weights, loss=loss, dropout=dropout)
        self.norms = nn.ModuleList(ChannelNorm(channels) for channels in self.in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(sum(self.in_channels), num_classes, 1)

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> logits (B, K, h_0, w_0); ignores `queries`."""
        self.check_maps(maps)
        features = concatenate([norm(feature_map) for norm, feature_map in zip(self.norms, maps, strict=True)])
        return self.classifier(self.dropout(features))
