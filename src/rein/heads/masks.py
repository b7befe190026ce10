"""What a set of classified masks says: a class for each pixel, instances, or segments.

Source: Cheng et al., "Per-Pixel Classification is Not All You Need for Semantic Segmentation", NeurIPS 2021, arXiv 2107.06278, and
Mask2Former, arXiv 2112.01527. Masks are resized chunk by chunk, so that no (B, m, H, W) tensor is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rein.errors import InputError
from rein.heads.base import Size

_CHUNK = 16  # queries that are resized at a time


@dataclass(frozen=True)
class Instances:
    """Instances of one image, best first.

    Attributes:
        masks: (n, H, W), bool.
        labels: (n,), the classes.
        scores: (n,), class probability times the mean probability inside the mask.
    """

    masks: Tensor
    labels: Tensor
    scores: Tensor

    def cropped(self, size: Sequence[int]) -> Instances:
        """What lies in the first (height, width) pixels."""
        return replace(self, masks=self.masks[:, : size[0], : size[1]])


@dataclass(frozen=True)
class Panoptic:
    """Segments of one image.

    Attributes:
        segments: (H, W), the segment's number from 1, or 0 where there is none.
        labels: (n,), the class of each segment.
        scores: (n,), its class probability.
    """

    segments: Tensor
    labels: Tensor
    scores: Tensor

    def cropped(self, size: Sequence[int]) -> Panoptic:
        """What lies in the first (height, width) pixels."""
        return replace(self, segments=self.segments[: size[0], : size[1]])


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _resized(masks: Tensor, size: Size) -> Tensor:
    """Mask probabilities (B, m, h, w) -> (B, m, H, W), resized as logits."""
    if (masks.shape[-2], masks.shape[-1]) != size:
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    return masks.sigmoid()


def semantic_of(classes: Tensor, masks: Tensor, size: Size) -> Tensor:
    """Class logits (B, m, K + 1) and mask logits (B, m, h, w) -> scores (B, K, H, W)."""
    probabilities = _full(classes).softmax(-1)[..., :-1]
    total = torch.zeros((), device=masks.device, dtype=probabilities.dtype)
    for start in range(0, masks.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        total = total + torch.einsum("bmk,bmhw->bkhw", probabilities[:, chunk], _resized(_full(masks[:, chunk]), size))
    return total


def instances_of(classes: Tensor, masks: Tensor, size: Size, limit: int = 100) -> list[Instances]:
    """The best `limit` (query, class) pairs of each image; arguments as in `semantic_of`.

    Raises:
        InputError: `limit` below 1.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1.")
    found = []
    for probabilities, logits in zip(_full(classes).softmax(-1)[..., :-1], _full(masks), strict=True):
        scores, order = probabilities.flatten().topk(min(limit, probabilities.numel()))
        queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
        inside = _resized(logits[None], size)[0][queries]
        chosen = inside > 0.5
        quality = (inside * chosen).flatten(1).sum(1) / chosen.flatten(1).sum(1).clamp(min=1)
        scores, again = (scores * quality).sort(descending=True)
        found.append(Instances(chosen[again], labels[again], scores))
    return found


def panoptic_of(
    classes: Tensor,
    masks: Tensor,
    size: Size,
    things: Sequence[int] | None = None,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> list[Panoptic]:
    """Segments that do not overlap; arguments as in `semantic_of`.

    Args:
        classes: class logits.
        masks: mask logits.
        size: (H, W).
        things: classes whose segments stay apart; those of other classes are joined. None: all are things.
        score_threshold: queries below this class probability are left out.
        overlap_threshold: segments that keep less than this share of their mask are left out.
    """
    found = []
    for probabilities, logits in zip(_full(classes).softmax(-1), _full(masks), strict=True):
        scores, labels = probabilities.max(-1)
        keep = (labels != probabilities.shape[1] - 1) & (scores > score_threshold)
        segments = torch.zeros(size, dtype=torch.long, device=masks.device)
        kept: list[tuple[Tensor, Tensor]] = []
        joined: dict[int, int] = {}
        if keep.any():
            inside = _resized(logits[keep][None], size)[0]
            owner = (scores[keep][:, None, None] * inside).argmax(0)
            for place, (score, label) in enumerate(zip(scores[keep], labels[keep], strict=True)):
                mask = (owner == place) & (inside[place] > 0.5)
                whole = (inside[place] > 0.5).sum()
                if mask.sum() == 0 or mask.sum() < overlap_threshold * whole:
                    continue
                number = joined.get(int(label), len(kept) + 1)
                if number > len(kept):
                    kept.append((label, score))
                if things is not None and int(label) not in things:
                    joined[int(label)] = number
                segments[mask] = number
        chosen_labels, chosen_scores = zip(*kept, strict=True) if kept else ((), ())
        found.append(
            Panoptic(
                segments,
                torch.stack(chosen_labels) if kept else labels.new_zeros(0),
                torch.stack(chosen_scores) if kept else scores.new_zeros(0),
            )
        )
    return found
