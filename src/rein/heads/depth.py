"""`DepthHead`: feature maps to depth in metres, trained with the scale-invariant error.

The depth of a pixel is a weighted mean over fixed depths, and a decode head gives the weights: Cao et al., "Estimating Depth from
Monocular Images as Classification", arXiv 1605.02305. Loss: Eigen et al., "Depth Map Prediction from a Single Image using a
Multi-Scale Deep Network", NeurIPS 2014, arXiv 1406.2283.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rein.errors import InputError
from rein.heads.base import Head, Size
from rein.heads.decoder import DecoderHead
from rein.heads.fpn import FPNHead
from rein.heads.linear import LinearHead

_DECODERS: dict[str, type[Head]] = {"LinearHead": LinearHead, "FPNHead": FPNHead, "DecoderHead": DecoderHead}


class DepthHead(Head):
    """Maps -> depth: log d = sum_k p_k log c_k, where p is the softmax of the decoder's K outputs and the depths c_k are constant.

    The depths c_k are evenly spaced on a logarithmic scale over `depth_range`, so every predicted depth is inside this range.
    `Segmenter(backbone, head)(images)` is the depth (B, 1, H, W) in metres, and `segmenter(images, depth)` the loss for a depth
    (B, H, W) in metres. Pixels whose depth is outside `depth_range` are ignored: 0, NaN and infinity, which stand for an unknown
    depth, and a sky that is farther away.

    Args:
        in_channels: channels of each map.
        num_bins: number K of the depths c_k, 2 to 255.
        depth_range: the smallest and the largest depth, in metres (or any other unit).
        scale_invariance: lambda of the loss, from 0 (mean squared error of log d) to 1 (a common factor of all depths of an image
            costs nothing).
        decoder: head that gives the K outputs: `"LinearHead"`, `"FPNHead"` or `"DecoderHead"`.
        decoder_settings: other arguments of the decoder.

    Raises:
        InputError: an invalid number, range or decoder, or settings that the decoder does not have.
        MissingExtraError: segmentation_models_pytorch is not installed (extra `heads`), for `"DecoderHead"`.
    """

    unlabelled = 0.0

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_bins: int = 64,
        depth_range: Sequence[float] = (1.0, 100.0),
        scale_invariance: float = 0.5,
        decoder: str = "LinearHead",
        decoder_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._check_settings(num_bins, depth_range, scale_invariance, decoder, decoder_settings)
        super().__init__(
            in_channels,
            num_bins,
            depth_range=[float(depth) for depth in depth_range],
            scale_invariance=float(scale_invariance),
            decoder=decoder,
            decoder_settings=dict(decoder_settings or {}),
        )
        try:
            self.decoder = _DECODERS[decoder](in_channels, num_bins, **self.settings["decoder_settings"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"decoder_settings is {decoder_settings}; expected arguments of {decoder} without in_channels and "
                f"num_classes. {error}"
            ) from error

    @staticmethod
    def _check_settings(num_bins: Any, depth_range: Any, scale_invariance: Any, decoder: Any, settings: Any) -> None:
        if type(num_bins) is not int or not 2 <= num_bins <= 255:
            raise InputError(f"num_bins is {num_bins!r}; it must be an integer from 2 to 255.")
        check_depth_range(depth_range)
        if not _is_number(scale_invariance) or not 0 <= scale_invariance <= 1:
            raise InputError(f"scale_invariance is {scale_invariance!r}; it must be a number from 0 to 1.")
        if not isinstance(decoder, str) or decoder not in _DECODERS:
            raise InputError(f"decoder is {decoder!r}; expected one of {', '.join(_DECODERS)}.")
        if settings is not None and not isinstance(settings, Mapping):
            raise InputError(f"decoder_settings is {settings!r}; expected a dictionary of arguments of {decoder}.")
        if useless := sorted({"loss", "class_weights"} & set(settings or ())):
            raise InputError(f"decoder_settings has {', '.join(useless)}; a DepthHead has a loss of its own. Leave them out.")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that build an identical head."""
        return {"in_channels": list(self.in_channels), "num_bins": self.num_classes, **self.settings}

    def check_labels(self, images: Tensor, labels: Tensor) -> None:
        """Raise InputError unless `labels` is a depth (B, H, W), floating point, of the size of `images`."""
        expected = (len(images), *images.shape[-2:])
        if not isinstance(labels, Tensor) or not labels.is_floating_point() or tuple(labels.shape) != expected:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise InputError(
                f"the labels of a DepthHead are {got}; expected the depth of every pixel as floating point numbers of shape "
                f"{expected}, as the images, with 0 for an unknown depth."
            )

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Maps -> logarithm of the depth (B, 1, h, w), at the resolution of the decoder; ignores `queries`."""
        logits = self.decoder(maps)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        nearest, farthest = map(math.log, self.settings["depth_range"])
        log_depths = torch.linspace(nearest, farthest, self.num_classes, device=logits.device, dtype=logits.dtype)
        return torch.einsum("bkhw,k->bhw", logits.softmax(1), log_depths)[:, None]

    def predict(self, maps: Sequence[Tensor], size: Size, queries: Tensor | None = None) -> Tensor:
        """Compute the depth (B, 1, H, W) at `size` = (H, W); its logarithm is resized bilinearly."""
        return super().predict(maps, size, queries).exp()

    def loss(self, maps: Sequence[Tensor], labels: Tensor, queries: Tensor | None = None) -> Tensor:
        """Compute the scale-invariant error (equation 4 of Eigen et al.) over the pixels of known depth.

        With g = log d - log d* and the means over the n known pixels of an image, it is mean(g^2) - lambda mean(g)^2, averaged over
        the images that have known pixels.

        Args:
            maps: as in `forward`.
            labels: depth d* (B, H, W).
            queries: as in `forward`.

        Returns:
            A scalar; zero, with zero gradients, if no pixel has a known depth.
        """
        nearest, farthest = self.settings["depth_range"]
        log_depth = super().predict(maps, (labels.shape[-2], labels.shape[-1]), queries)[:, 0]
        known = (labels >= nearest) & (labels <= farthest)  # False for NaN
        target = torch.where(known, labels, nearest).to(log_depth.dtype).log()
        error = (log_depth - target).mul(known).flatten(1)
        count = known.flatten(1).sum(1)
        square, mean = (each.sum(1) / count.clamp(min=1) for each in (error**2, error))
        loss: Tensor = (square - self.settings["scale_invariance"] * mean**2).sum() / (count > 0).sum().clamp(min=1)
        return loss


def check_depth_range(depth_range: Any) -> None:
    """Raise InputError unless `depth_range` is two finite numbers above 0, the smaller one first."""
    numbers = list(depth_range) if isinstance(depth_range, Sequence) and not isinstance(depth_range, str) else []
    if len(numbers) != 2 or not all(map(_is_number, numbers)) or not 0 < numbers[0] < numbers[1] < math.inf:
        raise InputError(f"depth_range is {depth_range!r}; it must be two finite numbers above 0, the smaller one first.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
