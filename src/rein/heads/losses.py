"""`PixelLoss`: cross-entropy, Dice and focal loss over labelled pixels, with class weights.

Dice and focal loss come from segmentation_models_pytorch. Sources: Milletari et al., "V-Net", 3DV 2016, arXiv 1606.04797 (Dice);
Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein.errors import InputError
from rein.extras import require

IGNORE_LABEL = 255
CROSS_ENTROPY = "cross_entropy"
_FROM_LIBRARY = {"dice": "DiceLoss", "focal": "FocalLoss"}  # classes of segmentation_models_pytorch.losses
LossSetting = str | Mapping[str, float]


class PixelLoss(nn.Module):
    """Weighted sum of losses over the labelled pixels. It has no parameters and stores nothing in a state dict.

    * `cross_entropy`: mean over the labelled pixels; with class weights, the weighted mean, as in `nn.CrossEntropyLoss`.
    * `dice`: 1 - Dice coefficient of the softmax probabilities, per class over the whole batch; a class without a labelled pixel in
      the batch counts as 0. With class weights, the weighted mean over the classes.
    * `focal`: binary focal loss of every class with gamma 2, mean over classes and labelled pixels; the logits are those of one
      sigmoid per class. With class weights, the weighted mean over the classes.

    Args:
        num_classes: number of classes K.
        loss: name of a loss, or a weight for each of several: `{"cross_entropy": 1.0, "dice": 0.5}`.
        class_weights: K weights from 0 to 1,000,000, not all 0; None weights all classes equally.

    Raises:
        InputError: an unknown loss, or invalid weights.
        MissingExtraError: segmentation_models_pytorch is not installed (extra `heads`); cross-entropy does not need it.
    """

    class_weights: Tensor | None

    def __init__(self, num_classes: int, loss: LossSetting = CROSS_ENTROPY, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weights = _check_loss(loss)
        weights = None if class_weights is None else torch.tensor(check_class_weights(class_weights, num_classes))
        self.register_buffer("class_weights", weights, persistent=False)  # a segmenter file has the weights as an argument
        self.terms = nn.ModuleDict()
        for name in self.weights.keys() & _FROM_LIBRARY.keys():
            library: Any = require("segmentation_models_pytorch.losses", "heads")
            loss_class = getattr(library, _FROM_LIBRARY[name])
            self.terms[name] = loss_class("multiclass", ignore_index=IGNORE_LABEL, class_weights=weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            logits: (B, K, H, W), float32 or float64.
            labels: (B, H, W), int64 below K; 255 marks ignored pixels.

        Returns:
            A scalar; zero, with zero gradients, if every label is 255.
        """
        total = None
        for name, weight in self.weights.items():
            term = self._cross_entropy(logits, labels) if name == CROSS_ENTROPY else self._from_library(name, logits, labels)
            term = term if weight == 1 else weight * term
            total = term if total is None else total + term
        assert total is not None
        return total

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        labelled = labels != IGNORE_LABEL
        if self.class_weights is None:
            count = labelled.sum().clamp(min=1)
            return F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="sum") / count
        weights = self.class_weights.to(logits.dtype)
        total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE_LABEL, reduction="sum")
        of_pixels = weights[labels.clamp(max=len(weights) - 1)] * labelled
        return total / of_pixels.sum().clamp(min=torch.finfo(logits.dtype).tiny)

    def _from_library(self, name: str, logits: Tensor, labels: Tensor) -> Tensor:
        if name == "focal" and not (labels != IGNORE_LABEL).any():  # the library takes the mean of no pixels, NaN
            return logits.flatten()[:0].sum()
        loss: Tensor = self.terms[name](logits, labels)
        return loss

    def extra_repr(self) -> str:
        return f"{dict(self.weights)}"


def check_class_weights(class_weights: Sequence[float], num_classes: int) -> list[float]:
    """Return the weights as a list of floats.

    Raises:
        InputError: not a list of K numbers from 0 to 1,000,000, or all are 0.
    """
    try:
        listed = not isinstance(class_weights, str | bytes | Mapping | Set)
        weights = [float(weight) for weight in class_weights] if listed else []
    except (TypeError, ValueError):
        weights = []
    if len(weights) != num_classes or not all(0 <= weight <= 1e6 for weight in weights) or not any(weights):
        raise InputError(
            f"class_weights is {class_weights!r}; expected a list of {num_classes} numbers from 0 to 1,000,000, one for each class "
            "and not all 0. Pass None to weight all classes equally."
        )
    return weights


def _check_loss(loss: LossSetting) -> dict[str, float]:
    """The weight of each loss, by name."""
    known = (CROSS_ENTROPY, *_FROM_LIBRARY)
    weights = {loss: 1.0} if isinstance(loss, str) else dict(loss) if isinstance(loss, Mapping) else {}
    numbers = [w for w in weights.values() if isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < math.inf]
    if not weights or len(numbers) < len(weights) or not weights.keys() <= set(known):
        raise InputError(
            f"loss is {loss!r}; expected one of {', '.join(known)}, or a dictionary of some of these names with weights above 0, "
            "such as {'cross_entropy': 1.0, 'dice': 1.0}."
        )
    return {name: float(weight) for name, weight in weights.items()}
