"""What one training run does at each step, on Lightning: the loss, the optimizer by SPEC.md's groups, judging, and its checkpoints.

A step depends on the weights, the optimizer's state, the batch and the step's number, and on nothing else: it seeds torch by its
number. With `RunLoader`, whose batches depend on their number alone, a killed run that resumes ends with the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein import param_groups
from rein.dgss.data import Sample
from rein.dgss.metrics import ConfusionMatrix
from rein.dgss.sampling import derived_seed
from rein.errors import CheckpointError, InputError
from rein.segmenter import Segmenter

OURS = "rein"  # the key under which a checkpoint says what it belongs to
_ADAPTER = "rein."  # of an adapter's names


class DivergedError(InputError):
    """The loss is not a number any more, or infinite."""


@dataclass(frozen=True)
class Optimization:
    """How the weights are found: by default the authors' recipe.

    Attributes:
        lr: learning rate of head and adapter, of the head alone where `adapter_factor` is not 1.
        weight_decay: of AdamW; tokens, scale, norms and embeddings are not decayed.
        power: of the polynomial decay of the learning rate to zero over the run.
        backbone_factor: the learning rate of the backbone's own weights, where they train, is so many times `lr`.
        adapter_factor: the learning rate of what a method added to the backbone is so many times `lr`.
        ema: decay of an exponential moving average of the weights, which is then what is judged and kept; None keeps none.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    power: float = 0.9
    backbone_factor: float = 0.1
    ema: float | None = None
    adapter_factor: float = 1.0

    def __post_init__(self) -> None:
        rates = (self.lr, self.backbone_factor, self.adapter_factor)
        if not (min(rates) > 0 and self.weight_decay >= 0 and self.power >= 0):
            raise InputError(f"rates must be above 0, weight_decay and power at least 0; got {asdict(self)}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema {self.ema} must lie between 0 and 1: 0.999 averages over some thousand steps.")


class SegmentationTask(lightning.LightningModule):
    """Fit a segmenter on source pairs; judge it on source validation pairs and on targets.

    A checkpoint holds what trains, not the frozen backbone, and a digest of what is frozen.

    Args:
        segmenter: what to train: whatever in it requires gradients.
        normalize: applied to uint8 images.
        optimization: rates and decays.
        seed: of whatever a step draws at random: dropout, the points of the paper's loss.
        window: side of the sliding windows in pixels when judging; None predicts whole images.
        stride: from window to window; None means two thirds of the window.
        own: names of the backbone's own parameters, beside what a method added; None means all but an adapter's.

    Attributes:
        confusions: one for each domain that was judged last, by its number.
        settings: plain values by name that must be the same when a run goes on from a checkpoint.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        normalize: nn.Module,
        optimization: Optimization = Optimization(),
        *,
        seed: int = 0,
        window: int | None = 512,
        stride: int | None = None,
        own: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.segmenter, self.normalize, self.optimization = segmenter, normalize, optimization
        self.seed, self.window, self.stride = seed, window, stride
        names = [name for name, _ in segmenter.backbone.named_parameters() if not name.startswith(_ADAPTER)]
        self._own = frozenset(names if own is None else own)
        self.confusions: dict[int, ConfusionMatrix] = {}
        self.settings: dict[str, Any] = {}
        self._average: dict[str, Tensor] = {}
        self._frozen: str | None = None

    # -- training

    def on_train_batch_start(self, batch: Sample, index: int) -> None:
        """Seed the step by its number and its device."""
        torch.manual_seed(derived_seed(self.seed, index, self.global_rank))

    def training_step(self, batch: Sample, index: int) -> Tensor:
        """The segmenter's loss on one batch."""
        images, labels = batch
        loss = self.segmenter.loss(self.normalize(images), labels.long())
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()} at step {self.global_step}; train with a smaller learning rate.")
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, what is in the backbone at rates of its own, and the poly schedule over the trainer's steps."""
        how = self.optimization
        factors = {
            id(parameter): how.backbone_factor if name in self._own else how.adapter_factor
            for name, parameter in self.segmenter.backbone.named_parameters()
        }
        groups = []
        for group in param_groups(self.segmenter, how.lr, how.weight_decay):
            apart: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                apart.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
            groups += [{**group, "params": apart[factor], "lr": how.lr * factor} for factor in sorted(apart, reverse=True)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        # not the trainer's estimate, which opens the loaders before a checkpoint says where they were
        steps = self.trainer.max_steps
        poly = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=how.power)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": poly, "interval": "step"}}

    def optimizer_step(self, *arguments: Any, **settings: Any) -> None:
        """Step, and let the average follow."""
        super().optimizer_step(*arguments, **settings)
        if self.optimization.ema is not None:
            with torch.no_grad():
                for name, parameter in self._trainable().items():
                    self._average[name].lerp_(parameter, 1 - self.optimization.ema)

    def on_fit_start(self) -> None:
        """Start the average from the weights, unless a checkpoint brought one."""
        if self.optimization.ema is not None:
            found, self._average = self._average, {}
            for name, parameter in self._trainable().items():
                self._average[name] = parameter.detach().clone()
                if name in found:
                    self._average[name].copy_(found[name])

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.segmenter.named_parameters() if p.requires_grad}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their average, where one is kept."""
        found = {name: p.detach().clone() for name, p in self._trainable().items() if name in self._average}
        try:
            self._copy(self._average)
            yield
        finally:
            self._copy(found)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trainable().items():
            if name in tensors:
                parameter.copy_(tensors[name])

    # -- judging

    def predict_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (B, K, H, W) of uint8 images by sliding windows, at `size` or the images' own."""
        with self.averaged():
            logits = self.segmenter.predict(self.normalize(images), self.window, self.stride)
        if size is not None and tuple(size) != tuple(logits.shape[-2:]):
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits

    def _start_counting(self) -> None:
        self.confusions = {}

    def _count(self, batch: Sequence[Any], domain: int) -> Tensor:
        images, labels = batch[:2]
        predictions = self.predict_logits(images, (labels.shape[-2], labels.shape[-1])).argmax(1)
        self.confusions.setdefault(domain, ConfusionMatrix(self.segmenter.head.num_classes)).update(predictions, labels)
        return predictions

    def _sum_over_devices(self) -> None:
        if self.trainer.world_size > 1:
            for number in range(len(self.confusions) if self.confusions else 0):
                counts = self.confusions[number].counts.to(self.device)
                self.confusions[number].counts = self.trainer.strategy.reduce(counts, reduce_op="sum").cpu()

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._start_counting()

    def validation_step(self, batch: Sequence[Any], index: int) -> Tensor:
        """Count one batch (images, labels, ...) of the source validation pairs; returns the predicted classes (B, H, W)."""
        return self._count(batch, 0)

    def on_validation_epoch_end(self) -> None:
        """Log the mean IoU of the source validation images."""
        self._sum_over_devices()
        if not any(confusion.counts.any() for confusion in self.confusions.values()):
            raise InputError(
                "no pixel of the source validation images is labelled; there is nothing to choose the best state by."
            )
        self.log("source_miou", self.confusions[0].mean_iou(), prog_bar=True)

    # -- checkpoints

    @property
    def strict_loading(self) -> bool:
        """Lightning's word for asking a checkpoint for every tensor; ours leave out what is frozen, and are checked here."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        """Lightning sets it to what it had found."""

    def frozen_digest(self) -> str:
        """SHA-256 of every weight that does not train, by name; 'none' where all do."""
        if self._frozen is None:
            digest, kept = hashlib.sha256(), set(self._kept())
            for name, tensor in self.segmenter.state_dict().items():
                if name not in kept:
                    digest.update(name.encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._frozen = digest.hexdigest()
        return self._frozen

    def _kept(self) -> list[str]:
        """Names, in the segmenter's state dict, of what a checkpoint holds: what trains, the head, the adapter, and their buffers."""
        trainable, names = self._trainable(), list(self.segmenter.state_dict())
        if any(f"backbone.{name}" in trainable for name in self._own):
            return names
        return [n for n in names if n in trainable or not n.startswith("backbone.") or n.startswith(f"backbone.{_ADAPTER}")]

    def setup(self, stage: str) -> None:
        """Take the digest before weights are spread over devices."""
        self.frozen_digest()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen, and say what it was."""
        kept = {f"segmenter.{name}" for name in self._kept()}
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in kept}
        settings = {**self.settings, "devices": self.trainer.world_size}
        checkpoint[OURS] = {
            "frozen": self.frozen_digest(),
            "average": dict(self._average),
            "settings": settings,
            **self.identity(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not belong to this segmenter, before anything is changed.

        Raises:
            CheckpointError: other tensors or shapes, another backbone or method, no checkpoint of this task, or for a run that goes
            on other settings.
        """
        said = checkpoint.get(OURS)
        if not isinstance(said, dict):
            raise CheckpointError("the checkpoint was not written by this task; resume from one of its own.")
        for key, value in self.identity().items():
            if said.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's {key} is {said.get(key)!r}, this run's is {value!r}; they must be equal."
                )
        if self.trainer.state.fn == "fit" and self.settings:
            now, then = {**self.settings, "devices": self.trainer.world_size}, said["settings"]
            changed = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in then | now if then.get(key) != now.get(key)]
            if changed:
                raise CheckpointError(
                    f"a run goes on as it began, but {'; '.join(changed)}. Give the old settings, or start another run."
                )
        own = self.segmenter.state_dict()
        wanted = {f"segmenter.{name}": own[name].shape for name in self._kept()}
        state = checkpoint.get("state_dict", wanted)  # FSDP2's strategy has taken it out by now, and checked it
        wrong = list(wanted.keys() ^ state.keys())
        if state is not wanted:
            wrong += [name for name in wanted.keys() & state.keys() if wanted[name] != state[name].shape]
        if wrong:
            raise CheckpointError(
                f"the checkpoint's tensors are not those of this segmenter: {', '.join(sorted(wrong)[:8])} are missing, left over "
                "or of another shape; build backbone, method and head as they were."
            )
        if said.get("frozen") != self.frozen_digest():
            raise CheckpointError(
                "the frozen weights are not those that the checkpoint was trained over; load the same backbone weights, or with "
                "random ones the same seed."
            )
        self._average = {name: tensor.to(self.device) for name, tensor in said["average"].items()}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with, besides tensors; plain values by name."""
        return {"classes": self.segmenter.head.num_classes}
