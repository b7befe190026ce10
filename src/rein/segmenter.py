"""`Segmenter`: a bare or wrapped backbone with a decode head; it maps images of any size to logits of the same size, or to a loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import chain, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein import backbones, checkpoint, heads
from rein.errors import CheckpointError, InputError, UnsupportedBackboneError, one_line
from rein.heads import Head
from rein.images import (
    Colour,
    Segmentation,
    check_classes,
    check_normalization,
    check_palette,
    default_palette,
    to_tensor,
)
from rein.injection import ADAPTER, get_adapter, get_injection, is_wrapped
from rein.modes import eval_mode
from rein.named_adapters import adapters_in_use
from rein.resizing import resize_to_edge

Size = tuple[int, int]
_WINDOW = 512  # side in pixels of sliding windows


class Segmenter(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K, H, W); images and labels (B, H, W) -> loss, a scalar.

    Train with `segmenter(images, labels)`. The call goes through DistributedDataParallel, FSDP2, `torch.compile` and accelerate.

    Args:
        backbone: a timm model, wrapped or bare, or any other model that was wrapped and is called with images; not copied. If the
            model does not return feature maps, they are the outputs of its wrapped blocks, whose patch tokens must be in the order
            of rows and columns; if the widths of the blocks differ, of the last block of each width.
        head: a head of `rein.heads` for `len(head.in_channels)` maps. A head that uses queries learns queries if the backbone has
            none, so baselines without an adapter can use the same head.
        indices: indices (from 0) of the blocks whose outputs are the feature maps. By default, four maps come from the paper's
            blocks, depth x {1/3, 1/2, 2/3, 1}; other numbers of maps come from evenly spaced blocks up to the last.
        classes: name of each class, K different ones; `class 0`, `class 1`, ... by default.
        palette: colour of each class, (red, green, blue) from 0 to 255; Pascal VOC's by default.
        normalization: mean and standard deviation of each channel, for images in [0, 1]; those of the backbone by default.

    Attributes:
        classes, palette, normalization: as given. `save` writes them, `load` reads them, and `segment` uses them.
        notes: what else a user of the file should know, in JSON's types; `save` writes it and `load` reads it. `rein fit` notes
            `sources`, `protocol`, `scores`, `method`, and `window` and `stride`, which `segment` uses.

    Raises:
        InputError: the indices, or the widths of the maps or queries, do not fit the head; or a name or colour is invalid.
        UnsupportedBackboneError: the blocks of the backbone are unknown, it cannot be called with images, or its tokens are no grid.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        indices: Sequence[int] | None = None,
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[Colour] | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self._maps = backbones.find_maps(backbone, partial(_find_blocks, backbone))
        channels = self._maps.channels
        self.indices = check_indices(len(channels), len(head.in_channels), indices)
        if list(head.in_channels) != (got := [channels[index] for index in self.indices]):
            raise InputError(
                f"{type(head).__name__} expects maps of {list(head.in_channels)} channels, got {got} from the backbone's blocks "
                f"{list(self.indices)}; build the head with in_channels={got}."
            )
        if head.uses_queries and not _has_queries(backbone):
            head.learn_queries()
        elif head.query_dim is not None and head.query_dim != getattr(backbone, ADAPTER).config.query_dim:
            raise InputError(
                f"{type(head).__name__} expects queries of width {head.query_dim}, the adapter's have width "
                f"{getattr(backbone, ADAPTER).config.query_dim}; build the adapter with ReinConfig(query_dim={head.query_dim})."
            )
        self.backbone, self.head = backbone, head
        count = _num_classes(head)
        self.classes = check_classes([f"class {number}" for number in range(count)] if classes is None else classes, count)
        self.palette = check_palette(default_palette(count) if palette is None else palette, count)
        self.normalization = check_normalization(backbones.normalization(backbone) if normalization is None else normalization)
        self.notes: dict[str, Any] = {}

    @property
    def input_spec(self) -> backbones.InputSpec:
        """The images that the backbone accepts: channels, fixed size if it has one, pixels of a patch."""
        return self._maps.input_spec(self.backbone)

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode as `nn.Module.train` does, but keep a fully frozen backbone in eval mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute logits at the size of the images or, with labels, the loss of the head.

        Images are padded on the right and at the bottom to a size that the backbone accepts. If the backbone has a fixed size and the
        images are larger, the logits come from sliding windows of that size that overlap by a third.

        Args:
            images: (B, 3, H, W), with the backbone's normalisation; cast to the backbone's dtype.
            labels: (B, H, W), integers below K; 255 marks ignored pixels. For `DepthHead`, floating point depth; 0 marks ignored
                pixels. The images must then be no larger than the backbone's fixed size, if it has one.

        Returns:
            Without labels (B, K, H, W), float32, or float64 if the head runs in float64; for `DepthHead` the depth (B, 1, H, W).
            With labels a scalar. With gradients
            enabled, it depends on every trainable parameter of the adapter: those that the head does not use, such as the queries of
            a linear head, get gradients of zero, because DistributedDataParallel expects a gradient for every parameter.

        Raises:
            InputError: `images` is not (B, C, H, W) with the backbone's channels, not floating point, or empty; `labels` differs from
                `images` in size, is not of an integer type or is out of range; or images with labels are larger than the fixed size.
        """
        if labels is not None:
            return self._with_zero_gradients(self._loss(images, labels))
        fixed = self._check(images).covered
        if fixed is not None and _exceeds(images, fixed):
            return self._slide(images, fixed, _two_thirds(fixed))
        return self._with_zero_gradients(self._predict_whole(images))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The same as `self(images, labels)`. A wrapper such as DistributedDataParallel does not see this call: call the wrapper."""
        loss: Tensor = self(images, labels)
        return loss

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        fixed = self._check(images).covered
        self.head.check_labels(images, labels)
        if fixed is not None and _exceeds(images, fixed):
            raise InputError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, the backbone accepts at most {fixed[0]} x {fixed[1]}; train on "
                "crops of that size, or create the backbone with dynamic_img_size=True or another img_size."
            )
        maps, queries, (height, width) = self._features(images)
        labels = labels if labels.is_floating_point() else labels.long()
        labels = F.pad(labels, (0, width - labels.shape[-1], 0, height - labels.shape[-2]), value=self.head.unlabelled)
        loss: Tensor = self.head.loss(maps, labels, queries)
        return loss

    def _with_zero_gradients(self, output: Tensor) -> Tensor:
        """Make `output` depend on every trainable parameter of the adapter, with gradients of zero; its values stay."""
        exported = torch.jit.is_tracing() or (  # type: ignore[attr-defined]
            torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        )
        if exported or not torch.is_grad_enabled() or not is_wrapped(self.backbone):
            return output
        # FSDP2 needs no gradient for the parameters that it shards, which have another type
        adapters = adapters_in_use(getattr(self.backbone, ADAPTER))
        every = chain.from_iterable(adapter.parameters() for adapter in adapters)
        parameters = [parameter for parameter in every if parameter.requires_grad and type(parameter) is nn.Parameter]
        if not parameters:
            return output
        empty = torch.cat([parameter.flatten()[:0] for parameter in parameters])  # the sum of no numbers is 0, also beside a NaN
        return output + empty.sum().to(output.device, output.dtype)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        window: int | tuple[int, int] | None = _WINDOW,
        stride: int | tuple[int, int] | None = None,
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        window_batch: int = 1,
    ) -> Tensor:
        """Compute logits for inference with sliding windows; logits are averaged where windows overlap.

        Runs in eval mode and without gradients, and restores the mode of every module. Apart from the result, memory grows with the
        window and not with the image.

        Args:
            images: as in `forward`.
            window: side of the square windows in pixels, or (height, width); None predicts the whole image at once. An image that
                is smaller than the window is one window.
            stride: distance between windows in pixels, or (vertical, horizontal); None means two thirds of the window (341 for 512).
            flip: average with the logits of the horizontally flipped images.
            scales: factors by which the images are resized; the logits of all scales are averaged.
            window_batch: number of windows of each image in one forward pass.

        Returns:
            (B, K, H, W), dtype as in `forward`.

        Raises:
            InputError: as `forward`, or an invalid window, stride, scale or `window_batch`. The stride must not exceed the window.
        """
        self._check(images)
        size = None if window is None else _pair(window)
        step = size and (_two_thirds(size) if stride is None else _pair(stride))
        if size and step and (min(size + step) < 1 or step[0] > size[0] or step[1] > size[1]):
            raise InputError(
                f"window is {size} and stride is {step}; both must be at least 1 pixel, and the stride no larger than the window."
            )
        if (
            not isinstance(scales, Sequence)
            or not scales
            or not all(0 < scale < float("inf") for scale in scales)
            or type(window_batch) is not int
            or window_batch < 1
        ):
            raise InputError(
                f"scales is {scales!r} and window_batch is {window_batch!r}; scales must be a list of at least one finite number "
                "above 0, and window_batch an integer of at least 1."
            )
        if window_batch > 1 and is_wrapped(self.backbone) and getattr(getattr(self.backbone, ADAPTER), "is_routed", False):
            raise InputError(
                f"window_batch is {window_batch} inside rein.routed, where every image of a pass has its own adapter; expected 1, so "
                "that each pass has one window of every image."
            )
        total: Tensor | None = None
        with eval_mode(self):
            for scale, flipped in product(scales, (False, True) if flip else (False,)):
                inputs = images.flip(-1) if flipped else images
                if scale != 1:
                    scaled = [max(1, round(side * scale)) for side in images.shape[-2:]]
                    inputs = F.interpolate(inputs, scaled, mode="bilinear", align_corners=False)
                logits = self(inputs) if size is None or step is None else self._slide(inputs, size, step, window_batch)
                if scale != 1:
                    logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
                logits = logits.flip(-1) if flipped else logits
                total = logits if total is None else total.add_(logits)
        assert total is not None
        count = len(scales) * (1 + flip)
        return total if count == 1 else total.div_(count)

    @torch.no_grad()
    def instances(self, images: Tensor, limit: int = 100) -> list[heads.Instances]:
        """Predict the `limit` best instances of each image, in eval mode, without sliding windows.

        Raises:
            InputError: as `forward`; or the head predicts no instances, or the images are larger than the backbone's fixed size.
        """
        return self._segments(images, "instances", limit=limit)

    @torch.no_grad()
    def panoptic(
        self, images: Tensor, things: Sequence[int] | None = None, score_threshold: float = 0.8, overlap_threshold: float = 0.8
    ) -> list[heads.Panoptic]:
        """Predict panoptic segments of each image; settings as in `heads.masks.panoptic_inference`, errors as in `instances`."""
        return self._segments(
            images, "panoptic", things=things, score_threshold=score_threshold, overlap_threshold=overlap_threshold
        )

    def _segments(self, images: Tensor, kind: str, **settings: Any) -> list[Any]:
        fixed = self._check(images).covered
        predict_segments = getattr(self.head, kind, None)
        if predict_segments is None:
            raise InputError(f"{type(self.head).__name__} has no method {kind!r}; use heads.Mask2FormerHead.")
        if fixed is not None and _exceeds(images, fixed):
            raise InputError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, the backbone accepts at most {fixed[0]} x {fixed[1]}, and "
                f"{kind} prediction has no sliding windows; resize the images, or create the backbone with dynamic_img_size=True."
            )
        with eval_mode(self):
            maps, queries, target = self._features(images)
            return [each.cropped(images.shape[-2:]) for each in predict_segments(maps, target, queries, **settings)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write adapter and head to one file, with the facts about backbone and classes, but without the weights of the backbone.

        Raises:
            CheckpointError: the file cannot be written.
            InputError: the class of the head is not in `rein.heads`, so `load` could not build it; the backbone is bare and not
                frozen, so its trained weights would be lost; the head uses queries that the active adapter does not have; or classes,
                palette, normalization or notes are invalid.
        """
        if not is_wrapped(self.backbone) and any(parameter.requires_grad for parameter in self.backbone.parameters()):
            raise InputError(
                "the backbone is bare and has trainable parameters, but a segmenter file does not store backbone weights; save "
                "segmenter.state_dict() instead, or call backbone.requires_grad_(False) first if the backbone was not trained."
            )
        name = type(self.head).__name__
        if getattr(heads, name, None) is not type(self.head):
            raise InputError(
                f"head is a {name}, expected a class of rein.heads; save the head's state_dict() and call rein.save for the adapter."
            )
        adapter = get_adapter(self.backbone) if is_wrapped(self.backbone) else None
        if self.head.uses_queries and (adapter is None or adapter.config.query_dim != self.head.query_dim):
            found = "there is none" if adapter is None else f"the active one has query_dim={adapter.config.query_dim}"
            raise InputError(
                f"the head uses queries of width {self.head.query_dim} of an adapter, and {found}; expected the adapter with which "
                "the segmenter was built. Activate it: segmenter.backbone.rein.activate(name)."
            )
        tensors = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        if adapter is not None:
            tensors |= {f"{ADAPTER}.{key}": value for key, value in adapter.state_dict().items()}
        header = checkpoint.Header(
            kind="segmenter",
            config=None if adapter is None else adapter.config,
            backbone=checkpoint.describe_backbone(self.backbone),
            head={"name": name, "arguments": self.head.arguments, "indices": list(self.indices)},
            about={
                "classes": check_classes(self.classes, _num_classes(self.head)),  # again: they may have been set since
                "palette": check_palette(self.palette, _num_classes(self.head)),
                "normalization": dict(zip(("mean", "std"), check_normalization(self.normalization), strict=True)),
                "ignore_label": self.head.unlabelled,
                "notes": self.notes,
            },
        )
        checkpoint.write(path, tensors, header)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backbone: nn.Module | None = None,
        *,
        weights: str | os.PathLike[str] | None = None,
        strict: bool = True,
        check_weights: bool = True,
    ) -> Segmenter:
        """Build a segmenter from a file that `save` wrote; wrap a bare backbone if the file has an adapter.

        Args:
            path: the file, or its address on the Hugging Face hub, as for `rein.load`.
            backbone: the backbone that the adapter or head was trained on. None builds the one that the file states, with timm's
                pretrained weights (downloaded once) or those of `pocket_vit`, frozen; the segmenter is then in eval mode.
            weights: file with weights for the backbone that is built, .safetensors or .pth, under timm's names.
            strict: as in `rein.load`.
            check_weights: as in `rein.load`.

        Raises:
            CheckpointError: as `rein.load`; the backbone stays unchanged. Or the file does not state how to build the backbone.
            InputError: both backbone and weights are given; `backbone` is not a module; or the weights cannot be
                downloaded, or do not fit.
        """
        tensors, header = checkpoint.read(path)
        if header.kind != "segmenter" or header.head is None:
            raise CheckpointError(f"{path} is an adapter file, expected a segmenter file; load it with rein.load.")
        if backbone is not None and weights is not None:
            raise InputError(
                "backbone and weights were both given; expected weights only for a backbone that load builds. Leave one of them out."
            )
        if backbone is not None and not isinstance(backbone, nn.Module):
            raise InputError(
                f"backbone is {one_line(repr(backbone))}; expected a torch.nn.Module, or nothing. Pass a file of "
                "weights with weights=FILE."
            )
        built = backbone is None
        if backbone is None:
            backbone = checkpoint.make_backbone(header, path, weights)
        head_class, arguments = _find_head(header.head, path), header.head["arguments"]
        name = backbones.architecture(backbone)
        try:
            channels = backbones.find_maps(backbone, partial(_find_blocks, backbone, header, strict)).channels
            indices = check_indices(len(channels), len(header.head["indices"]), header.head["indices"])
        except (InputError, UnsupportedBackboneError) as error:
            raise CheckpointError(f"{path} does not fit this {name}: {one_line(error)}") from error
        parts: dict[str, dict[str, Tensor]] = {"head": {}, ADAPTER: {}}
        for key, value in tensors.items():
            prefix, _, rest = key.partition(".")
            if prefix not in parts:
                raise CheckpointError(
                    f"{path} has a tensor {one_line(repr(key))}; expected names that begin with 'head.' or '{ADAPTER}.'."
                )
            parts[prefix][rest] = value
        load_adapter = None
        if header.config is not None:
            load_adapter = checkpoint.check_adapter(backbone, parts[ADAPTER], header, path, strict=strict)
        elif parts[ADAPTER]:
            raise CheckpointError(f"{path} has tensors of an adapter, but no configuration of one. Restore it from a copy.")
        elif is_wrapped(backbone):
            raise CheckpointError(
                f"{path} has a head for a bare backbone, but this backbone is wrapped; call rein.unwrap(backbone) first."
            )
        elif strict:
            checkpoint.check_architecture(backbone, header, path)
        expected, got = arguments.get("in_channels"), [channels[index] for index in indices]
        if expected != got and [expected] != got:
            raise CheckpointError(
                f"{path} does not fit this {name}: its head expects maps of {one_line(expected)} channels, the model's maps have "
                f"{got}."
            )
        head = checkpoint.build_head(head_class, arguments, parts["head"], path)
        query_dim = None if header.config is None else header.config.query_dim
        if head.uses_queries and (query_dim is None or head.query_dim not in (None, query_dim)):
            adapter = "no adapter with queries" if query_dim is None else f"an adapter with query_dim={query_dim}"
            raise CheckpointError(
                f"{path} has a head that requires queries of an adapter of width {head.query_dim}, but {adapter}."
            )
        facts = _read_facts(header, head, path)
        if check_weights:
            checkpoint.check_frozen_weights(backbone, header, path, built=built)
        reference = next(backbone.parameters())
        head.to(reference.device, torch.float64 if reference.dtype == torch.float64 else torch.float32)
        if load_adapter is not None:
            load_adapter()
        segmenter = cls(backbone, head, indices, **facts)
        segmenter.notes = (header.about or {}).get("notes", {})
        return segmenter.eval() if built else segmenter

    def preprocess(self, image: Any) -> Tensor:
        """Convert an image to the normalised tensor (1, 3, H, W), float32, that the segmenter expects, on its device.

        Args:
            image: a path, a PIL image, a uint8 array (H, W, 3), or a uint8 tensor (3, H, W). A path or a PIL image is turned as its
                EXIF entry says, and converted to RGB.

        Raises:
            InputError: none of these, or a file that is not an image; or the segmenter's images do not have three channels.
        """
        if self.input_spec.channels != 3:
            raise InputError(
                f"the segmenter expects images of {self.input_spec.channels} channels, but preprocess reads images of red, green "
                "and blue; normalise a tensor yourself, and use segmenter.predict."
            )
        device = next(self.backbone.parameters()).device
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in self.normalization)
        return ((to_tensor(image).to(device).float() / 255 - mean) / std)[None]

    def windows(self) -> dict[str, Any]:
        """`window` and `stride` of `predict` that `notes` state, or else `predict`'s own."""
        return {"window": self.notes.get("window", _WINDOW), "stride": self.notes.get("stride")}

    def segment(self, image: Any, *, edge: int | None = None, **settings: Any) -> Segmentation:
        """Segment an image of any size.

        Args:
            image: as for `preprocess`.
            edge: shortest edge in pixels to which the image is resized first; 0 keeps its size. None takes `eval_edge` of `notes`, at
                which `rein fit` evaluates, if it is there.
            settings: of `predict`. If `window` is not given, window and stride are those in `notes`, or else `predict`'s own.

        Returns:
            The classes at the image's own size, with `overlay()` and `save(path)`.

        Raises:
            InputError: as `preprocess` and `predict`; or the head predicts no classes.
        """
        if not self.classes:
            raise InputError(
                f"{type(self.head).__name__} predicts no classes; use segmenter.predict(segmenter.preprocess(image))."
            )
        pixels = to_tensor(image)
        if "window" not in settings:
            settings = {**self.windows(), **settings}
        edge = self.notes.get("eval_edge") if edge is None else edge
        if edge is not None and (type(edge) is not int or edge < 0):
            raise InputError(f"edge is {one_line(repr(edge))}; expected a number of pixels, or 0 for the image's own size.")
        logits = self.predict(self.preprocess(resize_to_edge(pixels, edge) if edge else pixels), **settings)
        if logits.shape[-2:] != pixels.shape[-2:]:
            logits = F.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False)
        return Segmentation(logits[0].argmax(0).to(torch.uint8).cpu(), pixels.cpu(), tuple(self.classes), tuple(self.palette))

    def _check(self, images: Tensor) -> backbones.InputSpec:
        spec = self.input_spec
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a tensor (B, {spec.channels}, H, W), got {type(images).__name__}.")
        if images.ndim != 4 or images.shape[1] != spec.channels or 0 in images.shape or not images.is_floating_point():
            raise InputError(
                f"images must be floating point (B, {spec.channels}, H, W), got {images.dtype} of shape {tuple(images.shape)}."
            )
        return spec

    def _features(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Size]:
        """Maps and queries in the head's dtype, and the size (height, width) of the image that the maps cover, with padding."""
        spec = self.input_spec
        height, width = images.shape[-2:]
        padded = spec.fixed_size or (_round_up(height, spec.multiple[0]), _round_up(width, spec.multiple[1]))
        images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height)).to(_dtype(self.backbone))
        maps = [m.to(_dtype(self.head)) for m in self._maps(self.backbone, images, self.indices)]
        queries = getattr(self.backbone, ADAPTER).queries().to(_dtype(self.head)) if self.head.uses_queries else None
        return maps, queries, spec.covered or padded

    def _predict_whole(self, images: Tensor) -> Tensor:
        maps, queries, target = self._features(images)
        logits = self.head.predict(maps, target, queries)
        return logits[..., : images.shape[-2], : images.shape[-1]]

    def _slide(self, images: Tensor, window: Size, stride: Size, window_batch: int = 1) -> Tensor:
        height, width = images.shape[-2:]
        rows, columns = _windows(height, window[0], stride[0]), _windows(width, window[1], stride[1])
        windows = list(product(rows, columns))  # all have the same size
        if len(windows) == 1:
            return self(images)
        total = count = images.new_zeros(())
        for start in range(0, len(windows), window_batch):
            batch = windows[start : start + window_batch]
            batch_logits = self(torch.cat([images[..., row, column] for row, column in batch]))
            for (row, column), logits in zip(batch, batch_logits.split(len(images)), strict=True):
                if total.ndim == 0:
                    total = logits.new_zeros(len(images), logits.shape[1], height, width)
                    count = logits.new_zeros(height, width)
                total[..., row, column] += logits
                count[row, column] += 1
        return total.div_(count) if not total.requires_grad else total / count


def default_indices(depth: int, num_maps: int) -> list[int]:
    """Return the default block indices for `num_maps` maps; for four maps the paper's depth x {1/3, 1/2, 2/3, 1}."""
    fractions = (1 / 3, 1 / 2, 2 / 3, 1) if num_maps == 4 else [(i + 1) / num_maps for i in range(num_maps)]
    indices: list[int] = []
    for fraction in fractions:
        indices.append(max(round(depth * fraction) - 1, indices[-1] + 1 if indices else 0))
    return indices


def check_indices(depth: int, num_maps: int, indices: Sequence[int] | None) -> tuple[int, ...]:
    """Return the indices, or the default ones if None.

    Raises:
        InputError: the indices are not `num_maps` increasing integers from 0 to depth - 1.
    """
    if indices is None:
        if depth < num_maps:
            raise InputError(f"the head expects {num_maps} maps, the backbone has {depth} blocks; use a head for fewer maps.")
        indices = default_indices(depth, num_maps)
    integers = isinstance(indices, Sequence) and all(type(index) is int for index in indices)
    increasing = integers and list(indices) == sorted(set(indices))
    if not increasing or len(indices) != num_maps or not 0 <= indices[0] <= indices[-1] < depth:
        raise InputError(f"indices is {indices!r}; it must be {num_maps} increasing integers from 0 to {depth - 1}.")
    return tuple(indices)


def _find_blocks(
    backbone: nn.Module, header: checkpoint.Header | None = None, strict: bool = True
) -> Sequence[backbones.BlockInfo]:
    """The blocks of a wrapped backbone, of the bare one of an adapter in a file, or of a model that contains a timm model."""
    if is_wrapped(backbone):
        return get_injection(backbone).blocks
    if header is not None and header.config is not None:
        given = header.backbone["given"].get("num_prefix_tokens")
        names = checkpoint.blocks_to_wrap(backbone, header.backbone, strict, given, None)
        return backbones.find_blocks(backbone, names, given)
    try:
        return backbones.find_blocks(backbone)
    except UnsupportedBackboneError as error:
        raise UnsupportedBackboneError(
            f"the feature maps of a {type(backbone).__name__} are the outputs of the blocks that an adapter refines, but this one is "
            "bare and rein does not know its blocks. Call rein.wrap(model, blocks=[...]) first."
        ) from error


def _has_queries(backbone: nn.Module) -> bool:
    return is_wrapped(backbone) and getattr(backbone, ADAPTER).config.query_dim is not None


def _dtype(module: nn.Module) -> torch.dtype:
    for parameter in module.parameters():  # a loop instead of next(...): older versions of torch.compile can trace it
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _windows(length: int, window: int, stride: int) -> list[slice]:
    """Windows that cover `length` pixels; the last window is shifted to end at the border."""
    last = max(0, length - window)
    starts = [*range(0, last, stride), last]
    return [slice(start, min(start + window, length)) for start in starts]


def _exceeds(images: Tensor, size: Size) -> bool:
    return images.shape[-2] > size[0] or images.shape[-1] > size[1]


def _two_thirds(size: Size) -> Size:
    return max(1, size[0] * 2 // 3), max(1, size[1] * 2 // 3)


def _round_up(length: int, multiple: int) -> int:
    return (length + multiple - 1) // multiple * multiple  # not -(-length // multiple): ONNX divides negative integers towards 0


def _pair(value: int | Size) -> Size:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or len(pair) != 2 or any(type(side) is not int for side in pair):
        raise InputError(f"window and stride must be an integer number of pixels, or (height, width), got {value!r}.")
    return pair[0], pair[1]


def _find_head(description: dict[str, Any], path: str | os.PathLike[str]) -> type[Head]:
    head_class = getattr(heads, description["name"], None)
    if not (isinstance(head_class, type) and issubclass(head_class, Head)) or head_class is Head:
        raise CheckpointError(f"{path} has a head {one_line(repr(description['name']))}, which is not a class of rein.heads.")
    return head_class


def _num_classes(head: Head) -> int:
    """Number of classes that have names; 0 for a head that predicts depth."""
    return 0 if isinstance(head, heads.DepthHead) else head.num_classes


def _read_facts(header: checkpoint.Header, head: Head, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts in a header that are arguments of `Segmenter`; a file of format version 1 has none."""
    about, count = header.about or {}, _num_classes(head)
    facts: dict[str, Any] = {}
    try:
        if "classes" in about:
            facts["classes"] = check_classes(about["classes"], count)
        if "palette" in about:
            facts["palette"] = check_palette(about["palette"], count)
        if "normalization" in about:
            stated = about["normalization"]
            facts["normalization"] = check_normalization((stated["mean"], stated["std"]))
    except (InputError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has invalid facts: {one_line(error)} Restore the file from a copy.") from error
    return facts
