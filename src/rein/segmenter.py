"""`Segmenter`: a backbone, bare or wrapped, and a head, from images of any size to logits of that size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein import backbones, checkpoint, heads
from rein.errors import CheckpointError, InputError
from rein.heads import Head
from rein.heads.base import IGNORE_LABEL
from rein.injection import ADAPTER, is_wrapped
from rein.modes import evaluating

Size = tuple[int, int]


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K, H, W).

    Args:
        backbone: a timm model, wrapped or bare; held as `backbone`, not copied.
        head: one of `rein.heads`, built for `len(head.in_channels)` maps. One that uses queries learns its own where the backbone has
            none, so that baselines without an adapter use the same head.
        indices: the blocks whose outputs become maps, from 0. Default: the last block for one map, the paper's depth x
            {1/3, 1/2, 2/3, 1} for four, evenly spaced ones ending with the last otherwise.

    Raises:
        InputError: the indices do not exist, or are not as many as the head's maps.
        UnsupportedBackboneError: the backbone's blocks are not known.
    """

    def __init__(self, backbone: nn.Module, head: Head, indices: Sequence[int] | None = None) -> None:
        super().__init__()
        channels = backbones.map_channels(backbone)
        self.indices = check_indices(len(channels), len(head.in_channels), indices)
        if list(head.in_channels) != (given := [channels[index] for index in self.indices]):
            raise InputError(
                f"{type(head).__name__} was built for maps of {list(head.in_channels)} channels, the backbone's at "
                f"{list(self.indices)} have {given}."
            )
        if head.uses_queries and not _has_queries(backbone):
            head.learn_queries()
        elif head.query_dim is not None and head.query_dim != getattr(backbone, ADAPTER).config.query_dim:
            raise InputError(
                f"{type(head).__name__} wants queries {head.query_dim} wide, the adapter's are "
                f"{getattr(backbone, ADAPTER).config.query_dim}; build one of them like the other."
            )
        self.backbone, self.head = backbone, head

    def train(self, mode: bool = True) -> Segmenter:
        """As `nn.Module.train`, but a backbone in which nothing trains stays in eval mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the images' size.

        Images are padded at the right and at the bottom to what the backbone takes. Where they exceed the fixed size of a backbone,
        windows of that size cover them, by a third overlapping.

        Args:
            images: (B, 3, H, W), normalised as the backbone wants it; cast to the backbone's dtype.

        Returns:
            (B, K, H, W), float32 unless the head runs in float64.

        Raises:
            InputError: not (B, C, H, W) with the backbone's channels, or empty.
        """
        fixed = self._check(images).covered
        if fixed is not None and _exceeds(images, fixed):
            return self._slide(images, fixed, _two_thirds(fixed))
        return self._whole(images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The head's loss, a scalar.

        Args:
            images: as in `forward`; where the backbone's size is fixed, no larger than that.
            labels: (B, H, W), integers below K, or 255 where nothing counts.

        Raises:
            InputError: sizes that differ, labels that are no integers or out of range, images that exceed a fixed size.
        """
        fixed = self._check(images).covered
        _check_labels(images, labels, self.head.num_classes)
        if fixed is not None and _exceeds(images, fixed):
            raise InputError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, the backbone takes {fixed[0]} x {fixed[1]}: train on crops of "
                "that size, or create the backbone with dynamic_img_size=True or another img_size."
            )
        maps, queries, (height, width) = self._features(images)
        labels = F.pad(labels.long(), (0, width - labels.shape[-1], 0, height - labels.shape[-2]), value=IGNORE_LABEL)
        loss = self.head.loss(maps, labels, queries)
        if queries is None and _has_queries(self.backbone):
            # a zero, so that the parameters of queries that this head does not use have gradients, as DDP wants of all
            loss = loss + 0 * getattr(self.backbone, ADAPTER).queries().sum()
        return loss

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        window: int | tuple[int, int] | None = 512,
        stride: int | tuple[int, int] | None = None,
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        window_batch: int = 1,
    ) -> Tensor:
        """Logits for judging: eval mode, no gradients, sliding windows whose logits are averaged where they overlap.

        Beside the result, memory goes by the window and not by the image.

        Args:
            images: as in `forward`.
            window: side of the windows in pixels, or (height, width); None predicts the whole image at once. An image
                smaller than the window is one window.
            stride: from one window to the next in pixels, or (vertical, horizontal); None means two thirds of the window, 341 for
                512.
            flip: average with the prediction of the mirrored images.
            scales: sizes of the images, as factors, whose logits are averaged.
            window_batch: how many windows of each image run at once.

        Returns:
            (B, K, H, W). Every module's mode is again what it was.

        Raises:
            InputError: as `forward`; or a window, stride, scale or batch that cannot be, or a stride that exceeds the window and
                leaves gaps.
        """
        self._check(images)
        size = None if window is None else _pair(window)
        step = size and (_two_thirds(size) if stride is None else _pair(stride))
        if size and step and (min(size + step) < 1 or step[0] > size[0] or step[1] > size[1]):
            raise InputError(
                f"window {size} and stride {step} must be at least 1 pixel, and the stride no larger than the window."
            )
        if (
            not isinstance(scales, Sequence)
            or not scales
            or not all(0 < scale < float("inf") for scale in scales)
            or type(window_batch) is not int
            or window_batch < 1
        ):
            raise InputError(f"scales {scales!r} must be above 0, at least one, and window_batch {window_batch!r} at least 1.")
        total: Tensor | None = None
        with evaluating(self):
            for scale, mirrored in product(scales, (False, True) if flip else (False,)):
                seen = images.flip(-1) if mirrored else images
                if scale != 1:
                    scaled = [max(1, round(side * scale)) for side in images.shape[-2:]]
                    seen = F.interpolate(seen, scaled, mode="bilinear", align_corners=False)
                logits = self(seen) if size is None or step is None else self._slide(seen, size, step, window_batch)
                if scale != 1:
                    logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
                logits = logits.flip(-1) if mirrored else logits
                total = logits if total is None else total.add_(logits)
        assert total is not None
        turns = len(scales) * (1 + flip)
        return total if turns == 1 else total.div_(turns)

    @torch.no_grad()
    def instances(self, images: Tensor, limit: int = 100) -> list[heads.Instances]:
        """The `limit` best instances of each image, for a head that tells them apart; the whole image at once, in eval mode.

        Raises:
            InputError: as `forward`; or the head has no instances, or the images exceed the backbone's fixed size.
        """
        return self._segments(images, "instances", limit=limit)

    @torch.no_grad()
    def panoptic(
        self, images: Tensor, things: Sequence[int] | None = None, score_threshold: float = 0.8, overlap_threshold: float = 0.8
    ) -> list[heads.Panoptic]:
        """Segments of each image that do not overlap, as `instances`; the settings are those of `heads.masks.panoptic_of`."""
        return self._segments(
            images, "panoptic", things=things, score_threshold=score_threshold, overlap_threshold=overlap_threshold
        )

    def _segments(self, images: Tensor, kind: str, **settings: Any) -> list[Any]:
        fixed = self._check(images).covered
        segments_of = getattr(self.head, kind, None)
        if segments_of is None:
            raise InputError(f"{type(self.head).__name__} gives a class for each pixel, no {kind}; use heads.Mask2FormerHead.")
        if fixed is not None and _exceeds(images, fixed):
            raise InputError(f"images are {tuple(images.shape[-2:])}, the backbone takes {fixed}; instances cannot slide.")
        with evaluating(self):
            maps, queries, target = self._features(images)
            return [each.cropped(images.shape[-2:]) for each in segments_of(maps, target, queries, **settings)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write adapter and head to one file; the backbone's own weights are not in it.

        Raises:
            CheckpointError: the file cannot be written.
            InputError: the head is not one of `rein.heads`, and so could not be built again; or the backbone itself trains, whose
                weights would be lost.
        """
        if not is_wrapped(self.backbone) and any(parameter.requires_grad for parameter in self.backbone.parameters()):
            raise InputError(
                "the backbone is bare and trains, and a segmenter's file leaves its weights out: save segmenter.state_dict() "
                "instead, or freeze the backbone with backbone.requires_grad_(False) if it was not trained."
            )
        name = type(self.head).__name__
        if getattr(heads, name, None) is not type(self.head):
            raise InputError(f"{name} is not one of rein.heads; save its state_dict beside rein.save(model.backbone, path).")
        adapter = getattr(self.backbone, ADAPTER) if is_wrapped(self.backbone) else None
        tensors = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        if adapter is not None:
            tensors |= {f"{ADAPTER}.{key}": value for key, value in adapter.state_dict().items()}
        header = checkpoint.Header(
            kind="segmenter",
            config=None if adapter is None else adapter.config,
            backbone=checkpoint.describe(self.backbone),
            head={"name": name, "arguments": self.head.arguments, "indices": list(self.indices)},
        )
        checkpoint.write(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: nn.Module, *, strict: bool = True) -> Segmenter:
        """Build a segmenter from a file that `save` wrote; the backbone is wrapped if the file has an adapter and it is bare.

        Args:
            path: the file.
            backbone: the backbone that it was trained over.
            strict: as in `rein.load`.

        Raises:
            CheckpointError: as `rein.load`; the backbone is left as it was.
        """
        tensors, header = checkpoint.read(path)
        if header.kind != "segmenter" or header.head is None:
            raise CheckpointError(f"{path} holds an adapter alone; read it with rein.load.")
        head = _build_head(header.head, path)
        try:
            indices = check_indices(len(backbones.map_channels(backbone)), len(head.in_channels), header.head["indices"])
        except InputError as error:
            raise CheckpointError(f"{path} does not fit this {backbones.architecture(backbone)}: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {"head": {}, ADAPTER: {}}
        for key, value in tensors.items():
            prefix, _, name = key.partition(".")
            if prefix not in parts:
                raise CheckpointError(f"{path} has a tensor {key!r} that belongs neither to a head nor to an adapter.")
            parts[prefix][name] = value
        if head.uses_queries and (header.config is None or header.config.query_dim is None):
            raise CheckpointError(f"{path} has a head that is linked to an adapter's queries, but no adapter that has them.")
        checkpoint.match_tensors(head, parts["head"], path)
        head.load_state_dict(parts["head"])
        reference = next(backbone.parameters())
        head.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
        if header.config is not None:
            checkpoint.load_adapter(backbone, parts[ADAPTER], header, path, strict=strict)
        elif is_wrapped(backbone):
            raise CheckpointError(
                f"{path} has a head over a bare backbone, this one is wrapped; call rein.unwrap(backbone) first."
            )
        elif strict:
            checkpoint.check_architecture(backbone, header, path)
        return cls(backbone, head, indices)

    def _check(self, images: Tensor) -> backbones.InputSpec:
        spec = backbones.input_spec(self.backbone)
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a tensor (B, {spec.channels}, H, W); got {type(images).__name__}.")
        if images.ndim != 4 or images.shape[1] != spec.channels or 0 in images.shape or not images.is_floating_point():
            raise InputError(
                f"images must be floating point (B, {spec.channels}, H, W); got {images.dtype} of shape {tuple(images.shape)}."
            )
        return spec

    def _features(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Size]:
        """Maps and queries in the head's dtype, and the (height, width) of the padded image that the maps cover."""
        spec = backbones.input_spec(self.backbone)
        height, width = images.shape[-2:]
        padded = spec.fixed_size or (_round_up(height, spec.multiple[0]), _round_up(width, spec.multiple[1]))
        images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height)).to(_dtype(self.backbone))
        maps = [m.to(_dtype(self.head)) for m in backbones.feature_maps(self.backbone, images, self.indices)]
        queries = getattr(self.backbone, ADAPTER).queries().to(_dtype(self.head)) if self.head.uses_queries else None
        return maps, queries, spec.covered or padded

    def _whole(self, images: Tensor) -> Tensor:
        maps, queries, target = self._features(images)
        logits = self.head.predict(maps, target, queries)
        return logits[..., : images.shape[-2], : images.shape[-1]]

    def _slide(self, images: Tensor, window: Size, stride: Size, window_batch: int = 1) -> Tensor:
        height, width = images.shape[-2:]
        rows, columns = _windows(height, window[0], stride[0]), _windows(width, window[1], stride[1])
        places = list(product(rows, columns))  # all of one size
        if len(places) == 1:
            return self(images)
        total = count = images.new_zeros(())
        for start in range(0, len(places), window_batch):
            chosen = places[start : start + window_batch]
            batch = self(torch.cat([images[..., row, column] for row, column in chosen]))
            for (row, column), logits in zip(chosen, batch.split(len(images)), strict=True):
                if total.ndim == 0:
                    total = logits.new_zeros(len(images), logits.shape[1], height, width)
                    count = logits.new_zeros(height, width)
                total[..., row, column] += logits
                count[row, column] += 1
        return total.div_(count) if not total.requires_grad else total / count


def default_indices(depth: int, num_maps: int) -> list[int]:
    """The blocks, from 0, whose outputs become maps; for four maps the paper's depth x {1/3, 1/2, 2/3, 1}."""
    fractions = (1 / 3, 1 / 2, 2 / 3, 1) if num_maps == 4 else [(i + 1) / num_maps for i in range(num_maps)]
    chosen: list[int] = []
    for fraction in fractions:
        chosen.append(max(round(depth * fraction) - 1, chosen[-1] + 1 if chosen else 0))
    return chosen


def check_indices(depth: int, num_maps: int, indices: Sequence[int] | None) -> tuple[int, ...]:
    """The indices, or the default ones; InputError unless they are `num_maps` different blocks below `depth`, in order."""
    if indices is None:
        if depth < num_maps:
            raise InputError(f"the head wants {num_maps} maps, the backbone has {depth} blocks; use a head for fewer maps.")
        indices = default_indices(depth, num_maps)
    wanted = f"{num_maps} different blocks below {depth}, in order"
    if not isinstance(indices, Sequence) or any(type(index) is not int for index in indices):
        raise InputError(f"indices {indices!r} must be a list of whole numbers: {wanted}.")
    ordered = list(indices) == sorted(set(indices))
    if len(indices) != num_maps or not ordered or not 0 <= indices[0] <= indices[-1] < depth:
        raise InputError(f"indices {list(indices)} must be {wanted}.")
    return tuple(indices)


def _has_queries(backbone: nn.Module) -> bool:
    return is_wrapped(backbone) and getattr(backbone, ADAPTER).config.query_dim is not None


def _dtype(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():  # a loop, not next(...): older compilers follow it
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _windows(length: int, window: int, stride: int) -> list[slice]:
    """Windows that cover `length` pixels; the last one is shifted back to end at the border."""
    last = max(0, length - window)
    starts = [*range(0, last, stride), last]
    return [slice(start, min(start + window, length)) for start in starts]


def _exceeds(images: Tensor, size: Size) -> bool:
    return images.shape[-2] > size[0] or images.shape[-1] > size[1]


def _two_thirds(size: Size) -> Size:
    return max(1, size[0] * 2 // 3), max(1, size[1] * 2 // 3)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _pair(value: int | Size) -> Size:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or len(pair) != 2 or any(type(side) is not int for side in pair):
        raise InputError(f"window and stride are whole numbers of pixels, or (height, width); got {value!r}.")
    return pair[0], pair[1]


def _check_labels(images: Tensor, labels: Tensor, num_classes: int) -> None:
    wanted = (len(images), *images.shape[-2:])
    if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != wanted:
        raise InputError(
            f"labels must be integers of shape {wanted}, as the images; got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU looking would wait for the device
        labels = labels.long()
        wrong = labels[(labels != IGNORE_LABEL) & ((labels < 0) | (labels >= num_classes))]
        if len(wrong):
            got = wrong.unique().tolist()[:8]
            raise InputError(f"labels must be 0 to {num_classes - 1}, or {IGNORE_LABEL} where nothing counts; got {got}.")


def _build_head(description: dict[str, Any], path: str | os.PathLike[str]) -> Head:
    head_class = getattr(heads, str(description.get("name")), None)
    if not (isinstance(head_class, type) and issubclass(head_class, Head)):
        raise CheckpointError(f"{path} wants a head {description.get('name')!r}, which this rein does not have.")
    try:
        return head_class(**description["arguments"])
    except (KeyError, TypeError, InputError) as error:
        raise CheckpointError(f"{path} describes its head in a way that {head_class.__name__} does not know: {error}") from error
