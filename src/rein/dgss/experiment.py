"""A row of the paper's tables as one Lightning module: a backbone by name, a method, a head, and how they are fitted and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rein import backbones, heads
from rein.dgss import methods
from rein.dgss.task import Optimization, SegmentationTask
from rein.dgss.transforms import Normalize
from rein.dgss.weights import make_backbone
from rein.errors import InputError
from rein.segmenter import Segmenter, default_indices

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Experiment(SegmentationTask):
    """Build backbone, method and head, and train them as `SegmentationTask` does.

    Args:
        num_classes: K; on the command line, what the data say.
        backbone: timm's name.
        pretrained: load timm's weights for it; without them, random ones are drawn from the seed.
        weights: a file with the backbone's weights instead, `.safetensors` or `.pth` (read without pickle), under timm's names.
        patch_size: side of the patches in pixels; None means the backbone's own. Pretrained ViTs with a class token (DINOv2) are
            brought to another one the authors' way, by plain bicubic interpolation; others timm's way.
        img_size: side in pixels of the images for which the backbone is built; None means timm's own, and any size where its class
            can.
        method: one of full, freeze, rein, rein-core, rein-link, rein-share, rein-lowrank, lora, vpt, adaptformer.
        method_settings: of the method, as `num_tokens: 50` for rein.
        head: a class of `rein.heads`.
        head_settings: what it takes besides maps and classes.
        lr: learning rate of head and adapter, of the head alone where `adapter_factor` is not 1; full fine-tuning trains the backbone
            at a tenth.
        adapter_factor: the learning rate of what the method adds to the backbone is so many times `lr`.
        weight_decay: of AdamW.
        power: of the polynomial decay of the learning rate.
        ema: decay of a moving average of the weights, which is then judged and kept.
        window: side of the sliding windows in pixels when judging; null predicts whole images.
        stride: from window to window; null means two thirds of the window, 341 for 512.
        imagenet_normalization: the authors' mean and deviation, ImageNet's, instead of the backbone's own.
        gradient_checkpointing: recompute the backbone's blocks in backward: slower, and less memory.
        seed: of random weights, and of what a step draws.

    Raises:
        InputError: a name or setting that does not exist; the message lists what does.
        UnsupportedBackboneError: the method does not know the backbone's blocks.
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
        lr: float = 1e-4,
        adapter_factor: float = 1.0,
        weight_decay: float = 0.05,
        power: float = 0.9,
        ema: float | None = None,
        window: int | None = 512,
        stride: int | None = None,
        imagenet_normalization: bool = True,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        row = methods.find(method)
        torch.manual_seed(seed)
        model = make_backbone(
            backbone,
            pretrained and weights is None,
            patch_size,
            img_size=img_size,
            weights=None if weights is None else Path(weights),
            required=True,
        )[0]
        own = {name: parameter.numel() for name, parameter in model.named_parameters()}
        methods.apply(method, model, **(method_settings or {}))
        if gradient_checkpointing:
            _checkpoint(model)
        torch.manual_seed(seed + 1)  # every method starts from the same head
        segmenter = Segmenter(model, make_head(head, model, num_classes, head_settings or {}))
        if row.backbone_factor != 1:  # its own weights train
            for name in methods.unused_by_maps(model, segmenter.indices):
                model.get_parameter(name).requires_grad_(False)
        normalize = Normalize(*(IMAGENET if imagenet_normalization else backbones.normalization(model)))
        how = Optimization(lr, weight_decay, power, row.backbone_factor, ema, adapter_factor)
        super().__init__(segmenter, normalize, how, seed=seed, window=window, stride=stride, own=own)
        self.backbone_name, self.method = backbone, method
        self.backbone_parameters = sum(own.values())

    def identity(self) -> dict[str, Any]:
        """Backbone, method and head, besides the classes."""
        head = self.segmenter.head
        return {**super().identity(), "backbone": self.backbone_name, "method": self.method, "head": type(head).__name__}

    @property
    def tuned_parameters(self) -> int:
        """How many parameters train besides the head's."""
        return sum(parameter.numel() for parameter in self.segmenter.backbone.parameters() if parameter.requires_grad)

    # -- judging

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self._start_counting()

    def test_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Tensor:
        """Count one pair of a target; returns the predicted classes (1, H, W)."""
        return self._count(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Sum what the devices counted."""
        self._sum_over_devices()

    def predict_step(self, batch: Any, index: int) -> tuple[Tensor, int]:
        """The classes (1, H, W) of one image at its own size, and its number."""
        image, size, number = batch
        return self.predict_logits(image, (int(size[0]), int(size[1]))).argmax(1), int(number)

    # -- many devices

    def configure_model(self) -> None:
        """Under FSDP2 (Lightning's ModelParallelStrategy), spread every block and then the rest over the devices."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            shard(self.segmenter, mesh["data_parallel"])


def make_head(name: str, backbone: nn.Module, num_classes: int, settings: dict[str, Any]) -> heads.Head:
    """A head of `rein.heads` over the maps of a backbone: the last for LinearHead, the paper's four for others.

    Raises:
        InputError: there is no such head, or it has no such setting.
    """
    known = [
        key for key in heads.__all__ if isinstance(getattr(heads, key), type) and issubclass(getattr(heads, key), heads.Head)
    ]
    if name not in known or name == "Head":
        raise InputError(f"there is no head {name!r}; there are {', '.join(key for key in known if key != 'Head')}.")
    widths = backbones.map_channels(backbone)
    indices = default_indices(len(widths), 1 if name == "LinearHead" else 4)
    try:
        head: heads.Head = getattr(heads, name)([widths[index] for index in indices], num_classes, **settings)
    except TypeError as error:
        raise InputError(f"{name} cannot be built with {settings}: {error}") from error
    return head


def shard(segmenter: Segmenter, mesh: Any) -> None:
    """Spread a segmenter over devices by FSDP2: a unit for each block, one for the rest, the adapter and the head among it."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for site in backbones.find_sites(segmenter.backbone):
        fully_shard(segmenter.backbone.get_submodule(site.path), mesh=mesh)
    scalars = {
        parameter for parameter in segmenter.parameters() if parameter.ndim == 0
    }  # the adapter's scale, which FSDP2 refuses
    fully_shard(segmenter, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_Mean(mesh))
    for method in ("loss", "predict"):
        register_fsdp_forward_method(segmenter, method)


class _Mean:
    """The mean of a gradient over the devices of a mesh, as FSDP2 takes it of what it spreads."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, group=self.mesh.get_group())
            parameter.grad /= self.mesh.size()


def _checkpoint(model: nn.Module) -> None:
    change: Any = getattr(model, "set_grad_checkpointing", None)
    if change is None:
        raise InputError(f"{type(model).__name__} has no gradient checkpointing.")
    change(True)
