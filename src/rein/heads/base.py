"""What every head is: built as `Head(in_channels, num_classes, ...)`, called with maps, asked for a loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein.errors import InputError

IGNORE_LABEL = 255
Size = tuple[int, int]


class Head(nn.Module):
    """Base of the heads.

    Args:
        in_channels: channels of each map; one number stands for a single map.
        num_classes: K.
        settings: whatever else the head was built with, JSON-safe, so that it can be built again from a file.

    Raises:
        InputError: no map, a count below 1, or more classes than labels of one byte can tell from 255.
    """

    @property
    def uses_queries(self) -> bool:
        """Whether `forward` wants the adapter's queries."""
        return False

    @property
    def query_dim(self) -> int | None:
        """Width of the queries that the head wants, or None where any will do or none are used."""
        return None

    def learn_queries(self, num_queries: int = 100) -> None:
        """For a head that uses queries, called where there is no adapter to give them: learn some."""
        raise InputError(f"{type(self).__name__} uses an adapter's queries and cannot learn its own.")

    def __init__(self, in_channels: int | Sequence[int], num_classes: int, **settings: Any) -> None:
        super().__init__()
        try:
            channels = in_channels if isinstance(in_channels, Iterable) else [in_channels]
            self.in_channels, self.num_classes = tuple(map(index, channels)), index(num_classes)
        except TypeError as error:
            raise InputError(f"in_channels {in_channels!r} and num_classes {num_classes!r} must be whole numbers.") from error
        self.settings = settings
        if not self.in_channels or min(self.in_channels) < 1 or not 1 <= num_classes <= IGNORE_LABEL:
            raise InputError(
                f"in_channels {in_channels} must be at least 1, for at least one map, and num_classes {num_classes} must be "
                f"1 to {IGNORE_LABEL}."
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that build this head again."""
        return {"in_channels": list(self.in_channels), "num_classes": self.num_classes, **self.settings}

    def check_maps(self, maps: Sequence[Tensor]) -> None:
        """Raise InputError unless there is one (B, C, h, w) map for each of `in_channels`."""
        got = [tuple(feature_map.shape) for feature_map in maps]
        if [shape[1] if len(shape) == 4 else None for shape in got] != list(self.in_channels):
            raise InputError(
                f"{type(self).__name__} wants maps (B, C, h, w) with C = {list(self.in_channels)}; got shapes {got}."
            )

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Logits at the head's own resolution.

        Args:
            maps: one (B, C, h, w) for each of `in_channels`.
            queries: (m, q), for heads with `uses_queries`.

        Returns:
            (B, K, h', w').
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def predict(self, maps: Sequence[Tensor], size: Size, queries: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W) at `size`; by default those of `forward`, resized bilinearly, in at least float32."""
        logits = self(maps, queries)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def loss(self, maps: Sequence[Tensor], labels: Tensor, queries: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the labelled pixels, at the labels' resolution.

        Args:
            maps: as in `forward`.
            labels: (B, H, W), integers below K, or 255 where nothing counts.
            queries: as in `forward`.

        Returns:
            A scalar; zero, with zero gradients, where every label is 255.
        """
        logits = F.interpolate(self(maps, queries).float(), labels.shape[-2:], mode="bilinear", align_corners=False)
        counted = (labels != IGNORE_LABEL).sum().clamp(min=1)
        return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_LABEL, reduction="sum") / counted


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, h, w), pixel by pixel; no statistics of a domain are kept."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, h_i, w_i) -> (B, sum C_i, h, w) at the size of the first, resized bilinearly."""
    size = maps[0].shape[-2:]
    return torch.cat([maps[0], *(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])], 1)


def group_count(channels: int) -> int:
    """Groups of a group norm: 32, or the most below that divide the channels and hold two, so that one pixel can be normalised."""
    return next(groups for groups in range(min(32, max(1, channels // 2)), 0, -1) if channels % groups == 0)
