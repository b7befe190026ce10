"""`Head`, the interface of every decode head, and helpers that heads share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein.errors import InputError
from rein.heads.losses import CROSS_ENTROPY, LossSetting, PixelLoss, check_class_weights
from rein.heads.losses import IGNORE_LABEL as IGNORE_LABEL

Size = tuple[int, int]


class Head(nn.Module):
    """Base class of the heads. A subclass implements `forward`.

    Args:
        in_channels: channels of each feature map; an integer for a single map.
        num_classes: number of classes K, 2 to 255.
        class_weights: weight of each class in the loss; None weights all classes equally.
        loss: the loss of `loss`: `"cross_entropy"`, `"dice"` or `"focal"`, or a weight for each of several, such as
            `{"cross_entropy": 1.0, "dice": 1.0}`. `heads.losses.PixelLoss` defines them.
        settings: the other arguments of the subclass. They must be JSON-serialisable, because a segmenter file stores them.

    Raises:
        InputError: `in_channels` is empty, a number is not an integer or out of range, or an invalid loss or class weight.
        MissingExtraError: segmentation_models_pytorch is not installed (extra `heads`), for the losses besides cross-entropy.
    """

    unlabelled: float = IGNORE_LABEL  # `Segmenter` labels the pixels with which it pads an image so

    @property
    def uses_queries(self) -> bool:
        """Whether `forward` requires the adapter's queries."""
        return False

    @property
    def query_dim(self) -> int | None:
        """Required width q of the queries; None if any width is accepted or no queries are used."""
        return None

    def learn_queries(self, num_queries: int = 100) -> None:
        """Replace the adapter's queries by learned ones. `Segmenter` calls this if the backbone has no queries.

        Raises:
            InputError: the head cannot learn queries.
        """
        raise InputError(
            f"{type(self).__name__} requires an adapter's queries and cannot learn queries; wrap the backbone with query_dim set."
        )

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        *,
        class_weights: Sequence[float] | None = None,
        loss: LossSetting = CROSS_ENTROPY,
        **settings: Any,
    ) -> None:
        super().__init__()
        try:
            channels = in_channels if isinstance(in_channels, Iterable) else [in_channels]
            self.in_channels, self.num_classes = tuple(map(index, channels)), index(num_classes)
        except TypeError as error:
            raise InputError(f"in_channels {in_channels!r} and num_classes {num_classes!r} must be integers.") from error
        if not self.in_channels or min(self.in_channels) < 1:
            raise InputError(f"in_channels is {in_channels}; it must be one integer or more, each at least 1.")
        check_num_classes(self.num_classes)
        self.pixel_loss = PixelLoss(self.num_classes, loss, class_weights)
        if class_weights is not None:  # defaults are left out, so that older versions read the files of a head without them
            settings["class_weights"] = check_class_weights(class_weights, self.num_classes)
        if loss != CROSS_ENTROPY:
            settings["loss"] = loss if isinstance(loss, str) else self.pixel_loss.weights
        self.settings = settings

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that build an identical head."""
        return {"in_channels": list(self.in_channels), "num_classes": self.num_classes, **self.settings}

    def check_maps(self, maps: Sequence[Tensor]) -> None:
        """Raise InputError unless `maps` has one (B, C, h, w) map for each entry of `in_channels`."""
        got = [tuple(feature_map.shape) for feature_map in maps]
        if [shape[1] if len(shape) == 4 else None for shape in got] != list(self.in_channels):
            raise InputError(
                f"{type(self).__name__} expects maps (B, C, h, w) with C = {list(self.in_channels)}, got shapes {got}."
            )

    def check_labels(self, images: Tensor, labels: Tensor) -> None:
        """Raise InputError unless `labels` are integers (B, H, W) of the size of `images`, each below K or 255."""
        expected = (len(images), *images.shape[-2:])
        if not isinstance(labels, Tensor):
            raise InputError(
                f"labels is a {type(labels).__name__}; expected a tensor of integers of shape {expected}, as the images."
            )
        if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != expected:
            raise InputError(
                f"labels must be integers of shape {expected}, as the images, got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU the check would synchronise
            labels = labels.long()
            invalid = labels[(labels != IGNORE_LABEL) & ((labels < 0) | (labels >= self.num_classes))]
            if len(invalid):
                got = invalid.unique().tolist()[:8]
                raise InputError(f"labels must be 0 to {self.num_classes - 1}, or {IGNORE_LABEL} for ignored pixels, got {got}.")

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Compute logits at the resolution of the head.

        Args:
            maps: one feature map (B, C, h, w) for each entry of `in_channels`.
            queries: (m, q), for heads with `uses_queries`.

        Returns:
            (B, K, h', w').
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def predict(self, maps: Sequence[Tensor], size: Size, queries: Tensor | None = None) -> Tensor:
        """Compute logits (B, K, H, W) at `size` = (H, W), in at least float32; by default `forward` with bilinear resizing."""
        logits = self(maps, queries)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes from the output of `forward` or `predict`, (B, K, H, W); their sum over the classes is 1."""
        return logits.softmax(1)

    def loss(self, maps: Sequence[Tensor], labels: Tensor, queries: Tensor | None = None) -> Tensor:
        """Compute the loss over the labelled pixels, at the resolution of the labels; by default the mean cross-entropy.

        Args:
            maps: as in `forward`.
            labels: (B, H, W), integers below K; 255 marks ignored pixels.
            queries: as in `forward`.

        Returns:
            A scalar; zero, with zero gradients, if every label is 255 (`Mask2FormerHead`: then its queries are "no object").
        """
        logits = F.interpolate(self(maps, queries).float(), labels.shape[-2:], mode="bilinear", align_corners=False)
        loss: Tensor = self.pixel_loss(logits, labels.long())
        return loss


def check_num_classes(num_classes: int) -> None:
    """Raise InputError unless `num_classes` is from 2 to 255."""
    if not 2 <= num_classes <= IGNORE_LABEL:
        raise InputError(
            f"num_classes is {num_classes}; it must be 2 to {IGNORE_LABEL}. For a binary segmentation, count two classes: background "
            "and object."
        )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of a map (B, C, h, w); it keeps no statistics of the source domain."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (B, C_i, h_i, w_i) to (B, sum C_i, h_0, w_0); the others are resized bilinearly to the first."""
    size = maps[0].shape[-2:]
    return torch.cat([maps[0], *(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:])], 1)


def have_one_size(maps: Sequence[Tensor]) -> bool:
    """Whether all maps have the same height and width."""
    # not a set of sizes: sizes are symbols in torch.export, which have no hash, and tensors in torch.jit.trace, which are all unequal
    return all(feature_map.shape[-2:] == maps[0].shape[-2:] for feature_map in maps)


def known_equal(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes are equal. False if one is a symbol of `torch.export`, where the answer could differ between inputs."""
    return not any(isinstance(side, torch.SymInt) for side in (*size, *other)) and tuple(size) == tuple(other)


def resize(feature_map: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map (B, C, h, w) to `size` = (height, width), bilinearly. A map of this size is returned as it is."""
    if known_equal(feature_map.shape[-2:], size):
        return feature_map
    return F.interpolate(feature_map, tuple(size), mode="bilinear", align_corners=False)


def group_count(channels: int) -> int:
    """Return the number of groups for a group norm: the largest divisor of `channels` up to 32 and up to channels / 2.

    A group of one channel could not normalise a map of one pixel.
    """
    return next(groups for groups in range(min(32, max(1, channels // 2)), 0, -1) if channels % groups == 0)
