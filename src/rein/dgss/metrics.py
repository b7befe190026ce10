"""Intersection over union, counted as the paper counts it: one confusion matrix over a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

from rein.dgss.classes import IGNORE_LABEL
from rein.errors import InputError


class ConfusionMatrix:
    """Counts of (true class, predicted class) pixels; labels of 255 are ignored.

    Args:
        num_classes: K.

    Attributes:
        counts: (K, K) int64 on the CPU, rows true, columns predicted.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add pixels.

        Args:
            predictions: classes 0 to K - 1, any integer shape.
            labels: the true classes, of the same shape, 255 where nothing counts.

        Raises:
            InputError: shapes that differ, or a class outside 0 to K - 1.
        """
        if predictions.shape != labels.shape:
            raise InputError(f"predictions have shape {tuple(predictions.shape)}, labels {tuple(labels.shape)}.")
        counted = labels != IGNORE_LABEL
        true, predicted = labels[counted].long(), predictions[counted].long()
        for name, values in (("labels", true), ("predictions", predicted)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise InputError(
                    f"{name} reach from {int(values.min())} to {int(values.max())}; wanted 0 to {self.num_classes - 1}."
                )
        pairs = torch.bincount(true * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.reshape(self.num_classes, self.num_classes).cpu()

    def iou(self) -> Tensor:
        """Intersection over union per class, (K,) float64 from 0 to 1; NaN for a class neither true nor predicted anywhere."""
        hit = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hit
        return hit.double() / union

    def mean_iou(self) -> float:
        """Mean over the classes that occur, 0 to 1; NaN where nothing was counted."""
        return float(self.iou().nanmean())
