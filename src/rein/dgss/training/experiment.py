"""`Experiment`: one row of the paper's tables as a LightningModule, built from the plain settings of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rein import backbones, heads
from rein.backbones.creation import make_backbone
from rein.dgss import methods
from rein.dgss.data.transforms import Normalize
from rein.dgss.training.optimization import Optimization
from rein.dgss.training.sharding import shard
from rein.dgss.training.task import SegmentationTask
from rein.errors import InputError
from rein.heads.base import check_num_classes
from rein.segmenter import Segmenter, default_indices

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation


class Experiment(SegmentationTask):
    """Build backbone, method and head by name, and train them as `SegmentationTask` does.

    Args:
        num_classes: K, 2 to 255; the command line takes it from the data.
        backbone: timm's name, or pocket_vit.
        pretrained: load timm's weights of that name; otherwise draw random ones from the seed.
        weights: file with the backbone's weights under timm's names, .safetensors or .pth (read without pickle).
        patch_size: side of the patches in pixels; null means the backbone's own. Pretrained ViTs with a class token (DINOv2) are
            resampled the authors' way, by plain bicubic interpolation; others timm's way.
        img_size: side in pixels of the images for which the backbone is built; null means timm's own, and any size where its class
            allows it.
        method: full, freeze, rein, rein-core, rein-link, rein-share, rein-lowrank, lora (DoRA with `dora: true`), soma, vpt or
            adaptformer.
        method_settings: settings of the method, such as `num_tokens: 50` for rein.
        head: class of `rein.heads`.
        head_settings: arguments of the head besides feature maps and classes, such as `loss: dice` or `class_weights: [1, 5]`.
        num_maps: number of feature maps for the head; null means 1 for LinearHead and 4 for others.
        lr: learning rate of head and adapter; of the head alone if adapter_factor is not 1.
        adapter_factor: learning rate of what the method adds to the backbone, as a multiple of lr.
        weight_decay: weight decay of AdamW.
        final_weight_decay: weight decay at the end of the run, to which it is annealed by a cosine; null keeps it constant.
        power: exponent of the polynomial decay of the learning rate.
        warmup_steps: number of steps over which the learning rates rise linearly before they decay.
        warmup_factor: learning rates of the first of these steps, as a multiple of the full ones.
        ema: decay of a moving average of the weights, which is then evaluated and kept; 0.9998 is OpenMMLab's (momentum 2e-4).
        ema_from: number of steps after which the average starts, from the weights of that step.
        window: side of the sliding windows in evaluation, in pixels; null predicts whole images.
        stride: distance between windows in pixels; null means two thirds of the window, 341 for 512.
        imagenet_normalization: use ImageNet's mean and deviation, as the authors do, instead of the backbone's own.
        gradient_checkpointing: recompute the backbone's blocks in the backward pass, which saves memory and costs time.
        seed: seed of random weights and of what a step draws.
        backbone_factor: learning rate of the backbone's own weights where they train, as a multiple of lr; null means the method's,
            0.1 for full.
        token_factor: learning rate of Rein's tokens, as a multiple of that of the rest of the adapter.

    Raises:
        InputError: a name or setting that does not exist; the message lists those that do.
        UnsupportedBackboneError: the method does not support the backbone's blocks.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_large_patch14_dinov2.lvd142m",
        pretrained: bool = True,
        weights: str | None = None,
        patch_size: int | None = None,
        img_size: int | None = None,
        method: str = "rein",
        method_settings: dict[str, Any] | None = None,
        head: str = "Mask2FormerHead",
        head_settings: dict[str, Any] | None = None,
        num_maps: int | None = None,
        lr: float = 1e-4,
        adapter_factor: float = 1.0,
        weight_decay: float = 0.05,
        power: float = 0.9,
        warmup_steps: int = 0,
        warmup_factor: float = 1e-6,
        ema: float | None = None,
        window: int | None = 512,
        stride: int | None = None,
        imagenet_normalization: bool = True,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        backbone_factor: float | None = None,
        final_weight_decay: float | None = None,
        ema_from: int = 0,
        token_factor: float = 1.0,
    ) -> None:
        check_num_classes(num_classes)  # before the weights are loaded
        chosen = methods.find(method)
        optimization = Optimization(
            lr=lr,
            weight_decay=weight_decay,
            power=power,
            backbone_factor=chosen.backbone_factor if backbone_factor is None else backbone_factor,
            ema=ema,
            adapter_factor=adapter_factor,
            warmup_steps=warmup_steps,
            warmup_factor=warmup_factor,
            final_weight_decay=final_weight_decay,
            ema_from=ema_from,
            token_factor=token_factor,
        )
        torch.manual_seed(seed)
        model = make_backbone(
            backbone,
            pretrained and weights is None,
            patch_size,
            img_size=img_size,
            weights=None if weights is None else Path(weights),
        )
        own = {name: parameter.numel() for name, parameter in model.named_parameters()}
        methods.apply(method, model, **(method_settings or {}))
        if gradient_checkpointing:
            _enable_checkpointing(model)
        torch.manual_seed(seed + 1)  # every method starts from the same head
        segmenter = Segmenter(model, make_head(head, model, num_classes, head_settings or {}, num_maps))
        if chosen.backbone_factor != 1:  # the backbone's own weights train
            for name in methods.find_unused_parameters(model, segmenter.indices):
                model.get_parameter(name).requires_grad_(False)
        normalize = Normalize(*(IMAGENET if imagenet_normalization else backbones.normalization(model)))
        super().__init__(segmenter, normalize, optimization, seed=seed, window=window, stride=stride, backbone_parameters=own)
        self.backbone_name, self.method = backbone, method
        self.backbone_parameters = sum(own.values())
        self._description = {
            "backbone": backbone,
            "pretrained": pretrained or weights is not None,
            "weights": weights,
            "patch_size": patch_size,
            "method": method,
            "method_settings": method_settings or {},
            "head": head,
            "seed": seed,
        }

    def describe(self) -> dict[str, Any]:
        """What was built, as plain values for `results.json`."""
        return self._description

    def identity(self) -> dict[str, Any]:
        """Backbone, method and head, besides the classes."""
        head = self.segmenter.head
        return {**super().identity(), "backbone": self.backbone_name, "method": self.method, "head": type(head).__name__}

    @property
    def tuned_parameters(self) -> int:
        """Number of trainable parameters besides the head's."""
        return sum(parameter.numel() for parameter in self.segmenter.backbone.parameters() if parameter.requires_grad)

    def configure_model(self) -> None:
        """Under FSDP2 (Lightning's ModelParallelStrategy), shard the segmenter."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            shard(self.segmenter, mesh["data_parallel"])


def make_head(
    name: str, backbone: nn.Module, num_classes: int, settings: dict[str, Any], num_maps: int | None = None
) -> heads.Head:
    """Build a head of `rein.heads` over the default feature maps of a backbone.

    Args:
        name: class of `rein.heads`.
        backbone: the backbone, which states the widths of its maps.
        num_classes: K.
        settings: other arguments of the class.
        num_maps: number of feature maps; None means 1 for LinearHead and 4 for others.

    Raises:
        InputError: the head or one of the settings does not exist.
    """
    classes = {key: getattr(heads, key) for key in heads.__all__ if isinstance(getattr(heads, key), type)}
    known = {key: cls for key, cls in classes.items() if issubclass(cls, heads.Head) and cls not in (heads.Head, heads.DepthHead)}
    if name not in known:
        raise InputError(f"the head {name!r} does not exist; expected one of {', '.join(known)}.")
    widths = backbones.map_channels(backbone)
    if num_maps is None:
        num_maps = 1 if name == "LinearHead" else 4
    if num_maps < 1:
        raise InputError(f"num_maps is {num_maps}; it must be at least 1, or null for the head's usual number.")
    indices = default_indices(len(widths), num_maps)
    try:
        head: heads.Head = known[name]([widths[index] for index in indices], num_classes, **settings)
    except (TypeError, IndexError) as error:
        raise InputError(f"{name} cannot be built with {len(indices)} maps and {settings}: {error}") from error
    return head


def _enable_checkpointing(model: nn.Module) -> None:
    enable: Any = getattr(model, "set_grad_checkpointing", None)
    if enable is None:
        raise InputError(f"{type(model).__name__} has no gradient checkpointing. Set model.gradient_checkpointing to false.")
    enable(True)
