"""Inference from mask classification: semantic scores, instances and panoptic segments.

Source: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", NeurIPS 2021, arXiv 2107.06278, and
Mask2Former, arXiv 2112.01527.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rein.errors import InputError
from rein.heads.base import Size

_CHUNK = 16  # number of queries whose masks are resized at once: limits the memory of semantic inference


@dataclass(frozen=True)
class Instances:
    """Instances of one image, highest score first.

    Attributes:
        masks: (n, H, W), bool.
        labels: (n,), class of each instance.
        scores: (n,), class probability times the mean mask probability inside the mask.
    """

    masks: Tensor
    labels: Tensor
    scores: Tensor

    def cropped(self, size: Sequence[int]) -> Instances:
        """Return the instances with masks cropped to the top left `size` = (height, width) pixels."""
        return replace(self, masks=self.masks[:, : size[0], : size[1]])


@dataclass(frozen=True)
class Panoptic:
    """Segments of one image.

    Attributes:
        segments: (H, W), number of the segment from 1 to n; 0 for pixels without a segment.
        labels: (n,), class of each segment.
        scores: (n,), class probability of each segment.
    """

    segments: Tensor
    labels: Tensor
    scores: Tensor

    def cropped(self, size: Sequence[int]) -> Panoptic:
        """Return the segments cropped to the top left `size` = (height, width) pixels."""
        return replace(self, segments=self.segments[: size[0], : size[1]])


def _to_float(x: Tensor) -> Tensor:
    """Cast half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _mask_probabilities(masks: Tensor, size: Size) -> Tensor:
    """Mask logits (B, m, h, w) -> mask probabilities (B, m, H, W); logits are resized, not probabilities."""
    if (masks.shape[-2], masks.shape[-1]) != size:
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    return masks.sigmoid()


def semantic_inference(classes: Tensor, masks: Tensor, size: Size) -> Tensor:
    """Class logits (B, m, K + 1) and mask logits (B, m, h, w) -> semantic scores (B, K, H, W) at `size` = (H, W)."""
    probabilities = _to_float(classes).softmax(-1)[..., :-1]
    total = torch.zeros((), device=masks.device, dtype=probabilities.dtype)
    for start in range(0, masks.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total = total + torch.einsum(
            "bmk,bmhw->bkhw", probabilities[:, chunk], _mask_probabilities(_to_float(masks[:, chunk]), size)
        )
    return total


def instance_inference(classes: Tensor, masks: Tensor, size: Size, limit: int = 100) -> list[Instances]:
    """Return the `limit` best (query, class) pairs of each image as instances; arguments as in `semantic_inference`.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1.")
    instances = []
    for probabilities, logits in zip(_to_float(classes).softmax(-1)[..., :-1], _to_float(masks), strict=True):
        scores, order = probabilities.flatten().topk(min(limit, probabilities.numel()))
        queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
        mask_probabilities = _mask_probabilities(logits[None], size)[0][queries]
        selected = mask_probabilities > 0.5
        quality = (mask_probabilities * selected).flatten(1).sum(1) / selected.flatten(1).sum(1).clamp(min=1)
        scores, order = (scores * quality).sort(descending=True)
        instances.append(Instances(selected[order], labels[order], scores))
    return instances


def panoptic_inference(
    classes: Tensor,
    masks: Tensor,
    size: Size,
    things: Sequence[int] | None = None,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> list[Panoptic]:
    """Return panoptic segments, which do not overlap, for each image.

    Args:
        classes: class logits (B, m, K + 1).
        masks: mask logits (B, m, h, w).
        size: (H, W) of the segments.
        things: classes with one segment per instance; each other class ("stuff") has one segment. None means all classes.
        score_threshold: minimum class probability of a query.
        overlap_threshold: minimum share of its mask that a segment must keep after overlaps are resolved.
    """
    panoptics = []
    for probabilities, logits in zip(_to_float(classes).softmax(-1), _to_float(masks), strict=True):
        scores, labels = probabilities.max(-1)
        keep = (labels != probabilities.shape[1] - 1) & (scores > score_threshold)
        segments = torch.zeros(size, dtype=torch.long, device=masks.device)
        kept: list[tuple[Tensor, Tensor]] = []
        stuff_segments: dict[int, int] = {}  # class -> segment number
        if keep.any():
            mask_probabilities = _mask_probabilities(logits[keep][None], size)[0]
            best_query = (scores[keep][:, None, None] * mask_probabilities).argmax(0)
            for query, (score, label) in enumerate(zip(scores[keep], labels[keep], strict=True)):
                full_mask = mask_probabilities[query] > 0.5
                mask = (best_query == query) & full_mask
                if mask.sum() == 0 or mask.sum() < overlap_threshold * full_mask.sum():
                    continue
                number = stuff_segments.get(int(label), len(kept) + 1)
                if number > len(kept):
                    kept.append((label, score))
                if things is not None and int(label) not in things:
                    stuff_segments[int(label)] = number
                segments[mask] = number
        kept_labels, kept_scores = zip(*kept, strict=True) if kept else ((), ())
        panoptics.append(
            Panoptic(
                segments,
                torch.stack(kept_labels) if kept else labels.new_zeros(0),
                torch.stack(kept_scores) if kept else scores.new_zeros(0),
            )
        )
    return panoptics
