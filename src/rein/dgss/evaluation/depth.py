"""Errors of predicted depth: AbsRel, RMSE and delta < 1.25, as in Eigen et al., NeurIPS 2014, arXiv 1406.2283, section 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rein.errors import InputError
from rein.heads.depth import check_depth_range


class DepthErrors:
    """Mean errors over the images of a data set. Each image counts the same; an image without a known pixel is left out.

    Args:
        depth_range: smallest and largest true depth that is counted. Other pixels are ignored, such as 0 and NaN for unknown depths.

    Attributes:
        images: number of images that were counted.

    Raises:
        InputError: `depth_range` is not two finite numbers above 0, the smaller one first.
    """

    def __init__(self, depth_range: Sequence[float] = (1e-3, 80.0)) -> None:
        check_depth_range(depth_range)
        self.nearest, self.farthest = depth_range
        self.images = 0
        self._totals = torch.zeros(3, dtype=torch.float64)

    def update(self, predictions: Tensor, depth: Tensor, mask: Tensor | None = None) -> None:
        """Count images.

        Args:
            predictions: predicted depth (B, H, W) or (B, 1, H, W), in the unit of `depth`.
            depth: true depth, of the same shape.
            mask: pixels that are counted, of the same shape, bool; None counts all whose true depth is in the range.

        Raises:
            InputError: the shapes differ, `mask` is not bool, or a prediction that is counted is not finite and above 0.
        """
        for name, given in (("predictions", predictions), ("depth", depth), ("mask", mask)):
            if not isinstance(given, torch.Tensor) and (given is not None or name != "mask"):
                raise InputError(
                    f"{name} is a {type(given).__name__}; expected a torch.Tensor. Convert it with torch.from_numpy."
                )
        shapes = [tuple(each.shape) for each in (predictions, depth, mask) if each is not None]
        if len(set(shapes)) != 1 or len(shapes[0]) < 3:
            raise InputError(f"predictions, depth and mask have shapes {shapes}; expected one shape, (B, H, W) or (B, 1, H, W).")
        if mask is not None and mask.dtype != torch.bool:
            raise InputError(f"mask is {mask.dtype}; expected torch.bool, True for pixels that are counted.")
        counted = (depth >= self.nearest) & (depth <= self.farthest)
        counted = counted if mask is None else counted & mask
        if not (predictions[counted].isfinite() & (predictions[counted] > 0)).all():  # before anything is counted
            raise InputError("predictions contain values that are not finite or not above 0; expected depths. Check the model.")
        for predicted, true, pixels in zip(predictions, depth, counted, strict=True):
            if not pixels.any():
                continue
            d, t = predicted[pixels].double(), true[pixels].double()
            ratio = torch.maximum(d / t, t / d)
            errors = ((d - t).abs() / t).mean(), (d - t).square().mean().sqrt(), (ratio < 1.25).double().mean()
            self._totals += torch.stack(errors).cpu()
            self.images += 1

    def means(self) -> dict[str, float]:
        """The errors, NaN if no image was counted.

        Returns:
            For a prediction p and the true depth d, `abs_rel`: mean of abs(p - d) / d. `rmse`: root of the mean of (p - d)^2, in the
            unit of the depth. `delta_1.25`: share of pixels with max(p / d, d / p) < 1.25.
        """
        means = self._totals / self.images if self.images else torch.full_like(self._totals, torch.nan)
        return dict(zip(("abs_rel", "rmse", "delta_1.25"), means.tolist(), strict=True))
