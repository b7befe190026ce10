"""Mean intersection over union (mIoU) from one confusion matrix over a whole data set, as the paper counts it."""

from __future__ import annotations

import torch
from torch import Tensor

from rein.dgss.labels import IGNORE_LABEL
from rein.errors import InputError


class ConfusionMatrix:
    """Counts of pixels by true and predicted class; pixels with label 255 are ignored.

    Args:
        num_classes: K.

    Attributes:
        counts: (K, K) int64 on the CPU; rows are true classes, columns predicted ones.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count pixels.

        Args:
            predictions: classes 0 to K - 1, integers of any shape.
            labels: true classes, of the same shape; 255 is ignored.

        Raises:
            InputError: the shapes differ, or a class is outside 0 to K - 1.
        """
        if predictions.shape != labels.shape:
            raise InputError(
                f"predictions have shape {tuple(predictions.shape)}, labels {tuple(labels.shape)}; expected equal shapes."
            )
        counted = labels != IGNORE_LABEL
        true, predicted = labels[counted].long(), predictions[counted].long()
        for name, values in (("labels", true), ("predictions", predicted)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise InputError(
                    f"{name} range from {int(values.min())} to {int(values.max())}; expected 0 to {self.num_classes - 1}."
                )
        pairs = torch.bincount(true * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.reshape(self.num_classes, self.num_classes).cpu()

    def iou(self) -> Tensor:
        """Intersection over union of each class, (K,) float64, 0 to 1; NaN for a class that is neither true nor predicted."""
        intersection = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - intersection
        return intersection.double() / union

    def mean_iou(self) -> float:
        """Mean IoU over the classes that are labelled or predicted, 0 to 1; NaN if fewer than two classes are labelled.

        Whoever predicts the only class everywhere would get a mean IoU of 1.
        """
        labelled = int((self.counts.sum(1) > 0).sum())
        return float(self.iou().nanmean()) if labelled > 1 else float("nan")
