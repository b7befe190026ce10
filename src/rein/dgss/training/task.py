"""LightningModule for training and evaluating a segmenter.

A training step depends on the weights, the optimizer's state, the batch and the step's index, and on nothing else. With `RunLoader`,
whose batches depend on their index alone, a run that was killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rein.dgss.data.pairs import Sample
from rein.dgss.data.sampling import derived_seed
from rein.dgss.evaluation.metrics import ConfusionMatrix
from rein.dgss.methods import tuned_names
from rein.dgss.training.optimization import Optimization, anneal_weight_decay, make_optimizer, update_average
from rein.errors import CheckpointError, DivergedError, InputError, one_line
from rein.injection import ADAPTER
from rein.segmenter import Segmenter

HEADER = "rein"  # key of a checkpoint under which the task keeps its own entries


class SegmentationTask(lightning.LightningModule):
    """Train a segmenter on source pairs; evaluate it on source validation pairs and on targets.

    A checkpoint holds what trains and a digest of what is frozen, not the frozen backbone.

    Args:
        segmenter: the model to train. Parameters with `requires_grad=False` stay frozen.
        normalize: applied to uint8 images.
        optimization: learning rates and decays; None means the authors'.
        seed: seed of what a step draws at random: dropout, the sampled points of the paper's loss.
        window: side of the sliding windows in evaluation, in pixels; None predicts whole images.
        stride: distance between windows in pixels; None means two thirds of the window.
        backbone_parameters: names of the parameters that get the backbone's learning rate; None means all but the Rein adapter's.

    Attributes:
        confusions: confusion matrix of each domain from the most recent evaluation, by domain index.
        settings: plain values by name that must be equal when a run resumes from a checkpoint.
        loaded_step: optimizer step of the loaded checkpoint, if any.
        loaded_source_miou: mean IoU on the source validation pairs that the loaded checkpoint states, if any.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        normalize: nn.Module,
        optimization: Optimization | None = None,
        *,
        seed: int = 0,
        window: int | None = 512,
        stride: int | None = None,
        backbone_parameters: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.segmenter, self.normalize, self.optimization = segmenter, normalize, optimization or Optimization()
        self.seed, self.window, self.stride = seed, window, stride
        names = [name for name, _ in segmenter.backbone.named_parameters() if not name.startswith(f"{ADAPTER}.")]
        self._backbone_parameters = frozenset(names if backbone_parameters is None else backbone_parameters)
        self.confusions: dict[int, ConfusionMatrix] = {}
        self.settings: dict[str, Any] = {}
        self.loaded_step: int | None = None
        self.loaded_source_miou: float | None = None
        self._source_miou: float | None = None  # source mIoU of the current weights; None after an optimizer step
        self._average: dict[str, Tensor] = {}
        self._digest: str | None = None

    # -- training

    def on_train_batch_start(self, batch: Sample, index: int) -> None:
        """Seed the random generators from the step's index and the rank."""
        torch.manual_seed(derived_seed(self.seed, index, self.global_rank))

    def training_step(self, batch: Sample, index: int) -> Tensor:
        """The segmenter's loss on one batch."""
        images, labels = batch
        loss = self.segmenter(self.normalize(images), labels.long())
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()} at step {self.global_step}. Train with a smaller learning rate.")
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule over the trainer's steps."""
        # max_steps: the trainer's estimate would open the loaders before the checkpoint restores their position
        return make_optimizer(self.segmenter, self.optimization, self._backbone_parameters, self.trainer.max_steps)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *arguments: Any, **settings: Any) -> None:
        """Step with the weight decay of this step, then update the moving average."""
        anneal_weight_decay(optimizer, self.optimization, self.trainer.global_step, self.trainer.max_steps)
        super().optimizer_step(epoch, batch_idx, optimizer, *arguments, **settings)
        self._source_miou = None
        # global_step counts this step only when this method has returned
        update_average(self._average, self._trainable(), self.optimization, self.trainer.global_step + 1)

    def on_fit_start(self) -> None:
        """Start the moving average from that of a checkpoint, or from the weights if it does not start later."""
        if self.optimization.ema is None:
            return
        found, self._average = self._average, {}
        update_average(
            self._average, self._trainable(), replace(self.optimization, ema_from=0) if found else self.optimization, 0
        )
        for name in self._average.keys() & found.keys():
            self._average[name].copy_(found[name])

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.segmenter.named_parameters() if p.requires_grad}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average, if one is kept."""
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

    # -- evaluation

    def predict_logits(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (B, K, H, W) of uint8 images by sliding windows, resized to `size` if given."""
        with self.averaged():
            logits = self.segmenter.predict(self.normalize(images), self.window, self.stride)
        if size is not None and tuple(size) != tuple(logits.shape[-2:]):
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits

    def _evaluate(self, batch: Sequence[Any], domain: int) -> Tensor:
        """Count one batch (images, labels, ...) of a domain; returns the predicted classes (B, H, W)."""
        images, labels = batch[:2]
        predictions = self.predict_logits(images, (labels.shape[-2], labels.shape[-1])).argmax(1)
        self.confusions.setdefault(domain, ConfusionMatrix(self.segmenter.head.num_classes)).update(predictions, labels)
        return predictions

    def _sum_over_devices(self) -> None:
        if self.trainer.world_size > 1:
            for confusion in self.confusions.values():
                counts = confusion.counts.to(self.device)
                confusion.counts = self.trainer.strategy.reduce(counts, reduce_op="sum").cpu()

    def on_validation_epoch_start(self) -> None:
        """Reset the counts."""
        self.confusions = {}

    def validation_step(self, batch: Sequence[Any], index: int) -> Tensor:
        """Count one batch of the source validation pairs; returns the predicted classes (B, H, W)."""
        return self._evaluate(batch, 0)

    def on_validation_epoch_end(self) -> None:
        """Log the mean IoU of the source validation pairs."""
        self._sum_over_devices()
        source_miou = self.confusions[0].mean_iou() if self.confusions else float("nan")
        if isnan(source_miou):
            raise InputError(
                "fewer than two classes are labelled in the source validation pairs; expected two or more, by which the best state "
                "is chosen. Set data.validation, or change data.held_out."
            )
        self._source_miou = source_miou
        self.log("source_miou", self._source_miou, prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Reset the counts."""
        self.confusions = {}

    def test_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Tensor:
        """Count one pair of a target; returns the predicted classes (1, H, W)."""
        return self._evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Sum the counts of the devices."""
        self._sum_over_devices()

    def predict_step(self, batch: Any, index: int) -> Tensor | None:
        """Predicted classes (1, H, W) of one image at its own size; None for an image that cannot be read."""
        image, size, _, error = batch
        return None if error[0] else self.predict_logits(image, (int(size[0]), int(size[1]))).argmax(1)

    # -- checkpoints

    @property
    def strict_loading(self) -> bool:
        """Lightning's flag for expecting every tensor; checkpoints here leave out frozen ones and are checked below."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        """Ignored; Lightning assigns the flag after loading."""

    def frozen_digest(self) -> str:
        """SHA-256 of all frozen weights and their names."""
        if self._digest is None:
            digest, tuned = hashlib.sha256(), set(tuned_names(self.segmenter))
            for name, tensor in self.segmenter.state_dict().items():
                if name not in tuned:
                    digest.update(name.encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._digest = digest.hexdigest()
        return self._digest

    def source_scores(self, classes: Sequence[str]) -> dict[str, Any]:
        """Mean IoU of the current weights on the source validation pairs and, if they were evaluated last, the IoU of each class.

        Empty if the weights have changed since the last validation.
        """
        if self._source_miou is None:
            return {}
        scores: dict[str, Any] = {"mIoU": round(self._source_miou, 4)}
        if 0 in self.confusions:
            iou = zip(classes, self.confusions[0].iou().tolist(), strict=True)
            scores["IoU"] = {name: round(value, 4) for name, value in iou if not isnan(value)}
        return scores

    def setup(self, stage: str) -> None:
        """Take the digest before weights are sharded over devices."""
        self.frozen_digest()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the frozen tensors, and add their digest."""
        kept = {f"segmenter.{name}" for name in tuned_names(self.segmenter)}
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in kept}
        checkpoint[HEADER] = {
            "frozen": self.frozen_digest(),
            "average": dict(self._average),
            "settings": self._resume_settings(),
            "source_miou": self._source_miou,
            **self.identity(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another segmenter or run before anything is changed.

        Raises:
            CheckpointError: other tensors or shapes, another backbone or method, not a checkpoint of this task; or other settings,
                for a run that resumes.
        """
        header = checkpoint.get(HEADER)
        if not isinstance(header, dict) or not all(isinstance(header.get(key), dict) for key in ("average", "settings")):
            raise CheckpointError("the checkpoint was not written by rein fit. Pass one from the checkpoints folder of a run.")
        for key, value in self.identity().items():
            if header.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's {key} is {header.get(key)!r}, this run's is {value!r}; expected equal values. Use the "
                    "configuration of the checkpoint's run."
                )
        if self.trainer.state.fn == "fit" and self.settings:
            now, then = self._resume_settings(), header["settings"]
            changed = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in then | now if then.get(key) != now.get(key)]
            if changed:
                raise CheckpointError(
                    f"a run resumes only with its own settings, but {'; '.join(changed)}. Pass the old settings, or start another "
                    "run with another --out."
                )
        self._check_tensors(checkpoint.get("state_dict"), header["average"])
        if header.get("frozen") != self.frozen_digest():
            raise CheckpointError(
                "the frozen weights differ from those that the checkpoint was trained with. Load the same backbone weights; for "
                "random weights, use the same seed."
            )
        self._average = {name: tensor.to(self.device) for name, tensor in header["average"].items()}
        self.loaded_step, self.loaded_source_miou = checkpoint.get("global_step"), header.get("source_miou")

    def _check_tensors(self, state: Mapping[str, Tensor] | None, average: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless the tensors are those that train. FSDP2's strategy checks them itself and gives None."""
        if state is None:
            return
        if not isinstance(state, Mapping):
            raise CheckpointError("the checkpoint has no state_dict. Pass one from the checkpoints folder of a run.")
        own = self.segmenter.state_dict()
        expected = {f"segmenter.{name}": own[name] for name in tuned_names(self.segmenter)}
        wrong = [*(expected.keys() ^ state.keys()), *(f"average of {name}" for name in average.keys() - own.keys())]
        wrong += [name for name in expected.keys() & state.keys() if not _are_alike(expected[name], state[name])]
        wrong += [f"average of {name}" for name in average.keys() & own.keys() if not _are_alike(own[name], average[name])]
        if wrong:
            names = one_line(", ".join(sorted(map(str, wrong))[:8]))
            raise CheckpointError(
                f"the checkpoint's tensors are not those of this segmenter: {names} are missing, unexpected or have another shape. "
                "Use the backbone, method and head of the checkpoint's run."
            )
        for name, tensor in (*state.items(), *average.items()):
            if not tensor.isfinite().all():
                raise CheckpointError(f"the checkpoint has values that are not finite in {name}: training has diverged.")

    def _resume_settings(self) -> dict[str, Any]:
        return {**self.settings, "devices": self.trainer.world_size}

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the weights of a checkpoint that this run has written."""
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        self._average = {name: tensor.to(self.device) for name, tensor in checkpoint[HEADER]["average"].items()}
        self._source_miou, self.confusions = checkpoint[HEADER]["source_miou"], {}

    def identity(self) -> dict[str, Any]:
        """Plain values by name, besides tensors, that must equal those of a checkpoint."""
        return {"classes": self.segmenter.head.num_classes}


def _are_alike(first: Tensor, second: Any) -> bool:
    """Whether both are tensors of one shape, and both or neither hold floating point numbers."""
    return isinstance(second, Tensor) and first.shape == second.shape and first.is_floating_point() == second.is_floating_point()
