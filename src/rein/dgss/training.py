"""One training run on Lightning: a `Segmenter`, a source domain, and the best state by source validation kept on disk."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask
from tqdm.auto import tqdm

from rein import param_groups
from rein.dgss.classes import IGNORE_LABEL
from rein.dgss.data import Sample
from rein.dgss.metrics import ConfusionMatrix
from rein.errors import InputError
from rein.segmenter import Segmenter


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        lr: learning rate of adapter and head; a backbone that trains gets `backbone_factor` times that.
        weight_decay: of AdamW.
        power: of the polynomial decay of the learning rate to zero.
        backbone_factor: the paper's full fine-tuning uses 0.1.
        validations: how often in the run the source validation images are judged.
        crop: side of the square training crops in pixels; None trains on whole images.
        seed: of the data order and the transforms.
    """

    steps: int
    batch_size: int = 4
    lr: float = 1e-4
    weight_decay: float = 0.05
    power: float = 0.9
    backbone_factor: float = 0.1
    validations: int = 5
    crop: int | None = None
    seed: int = 0


class Normalize(nn.Module):
    """uint8 (..., 3, H, W) -> float32, scaled to 0..1, minus mean, over deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise a batch of images."""
        return (images.float() / 255 - self.mean) / self.std


class Transformed(Dataset[Sample]):
    """A data set whose pairs go through joint random transforms: scale and crop, flip, photometric distortion."""

    def __init__(self, dataset: Dataset[Sample], crop: int | None) -> None:
        self.dataset = dataset
        steps: list[nn.Module] = []
        if crop is not None:
            steps = [
                v2.RandomShortestSize([crop * quarters // 4 for quarters in range(4, 9)], antialias=True),
                v2.RandomCrop(crop, pad_if_needed=True, fill={Image: 0, Mask: IGNORE_LABEL}),
            ]
        self.transform = v2.Compose([*steps, v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, label = self.transform(Image(self.dataset[index][0]), Mask(self.dataset[index][1]))
        return image.as_subclass(Tensor), label.as_subclass(Tensor)


class SegmentationTask(lightning.LightningModule):
    """AdamW with the authors' groups, poly schedule, mIoU on validation.

    Args:
        segmenter: what to train: whatever in it requires gradients.
        normalize: applied to the uint8 images.
        schedule: how long and how fast.
    """

    def __init__(self, segmenter: Segmenter, normalize: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.segmenter, self.normalize, self.schedule = segmenter, normalize, schedule
        self.confusion = ConfusionMatrix(segmenter.head.num_classes)

    def training_step(self, batch: Sample, index: int) -> Tensor:
        """The segmenter's loss on one batch."""
        images, labels = batch
        loss = self.segmenter.loss(self.normalize(images), labels.long())
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} at step {self.global_step}; train with a smaller learning rate.")
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self.confusion = ConfusionMatrix(self.segmenter.head.num_classes)

    def validation_step(self, batch: Sample, index: int) -> None:
        """Count one batch."""
        images, labels = batch
        self.confusion.update(self.segmenter.predict(self.normalize(images)).argmax(1), labels)

    def on_validation_epoch_end(self) -> None:
        """Log the mean IoU of the source validation images."""
        if not self.confusion.counts.any():
            raise InputError(
                "no pixel of the source validation images is labelled; there is nothing to choose the best state by."
            )
        self.log("source_miou", self.confusion.mean_iou(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW, the backbone's own weights at their reduced rate, and the poly schedule."""
        schedule, backbone = self.schedule, self.segmenter.backbone
        slow = {id(p) for name, p in backbone.named_parameters() if not name.startswith("rein.")}
        groups = []
        for group in param_groups(self.segmenter, schedule.lr, schedule.weight_decay):
            for factor, chosen in ((1.0, False), (schedule.backbone_factor, True)):
                parameters = [p for p in group["params"] if (id(p) in slow) == chosen]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": schedule.lr * factor})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        poly = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=schedule.steps, power=schedule.power)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": poly, "interval": "step"}}


class BestState(Callback):
    """Save whenever the source validation improves; the file always holds the best state so far.

    Args:
        path: where to.
        save: writes the segmenter to a path.

    Attributes:
        miou: of the saved state on the source validation images, 0 to 1; None before the first.
        step: when it was reached.
    """

    def __init__(self, path: Path, save: Callable[[Segmenter, Path], None]) -> None:
        self.path, self.save = path, save
        self.miou: float | None = None
        self.step = 0

    def on_validation_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        """Compare, and save if better."""
        assert isinstance(task, SegmentationTask)
        miou = task.confusion.mean_iou()
        if self.miou is None or miou > self.miou:
            self.save(task.segmenter, self.path)
            self.miou, self.step = miou, trainer.global_step


class _Bar(TQDMProgressBar):
    """Lightning's bar, with the time left, under the method's name; one for the whole run."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=1)
        self.name = name

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"fit {self.name}")

    def init_validation_tqdm(self) -> tqdm:
        return tqdm(disable=True)


class _Lines(Callback):
    """What the bar says, as lines, where the output is a file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        """Say how far it is, how good, and how long it will take."""
        done, steps = trainer.global_step, trainer.max_steps
        left = (time.monotonic() - self.started) / max(1, done) * (steps - done)
        miou = 100 * float(trainer.callback_metrics["source_miou"])
        print(f"fit {self.name}: step {done} of {steps}, source mIoU {miou:.1f}, {left:.0f} s left", flush=True)


def fit(
    segmenter: Segmenter,
    source: Dataset[Sample],
    validation: Dataset[Sample],
    *,
    normalize: nn.Module,
    schedule: Schedule,
    best: BestState,
    name: str = "",
) -> None:
    """Train `segmenter` in place, judging the source validation images as it goes; `best` keeps the best state on disk.

    Args:
        segmenter: what to train.
        source: training pairs.
        validation: other pairs of the same domain; targets never come near training.
        normalize: applied to uint8 images.
        schedule: how long and how fast.
        best: told after every validation.
        name: shown beside the progress bar.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; `best` has what was saved until then.
        InputError: the loss is not finite, or no validation pixel is labelled.
    """
    lightning.seed_everything(schedule.seed, verbose=False)
    sampler = RandomSampler(
        source,  # type: ignore[arg-type]
        replacement=False,
        num_samples=schedule.steps * schedule.batch_size,
        generator=torch.Generator().manual_seed(schedule.seed),
    )
    with _quiet():
        trainer = lightning.Trainer(
            max_steps=schedule.steps,
            max_epochs=1,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=max(1, schedule.steps // schedule.validations),
            enable_progress_bar=sys.stdout.isatty(),
            callbacks=[best, _Bar(name) if sys.stdout.isatty() else _Lines(name)],
        )
        try:
            trainer.fit(
                SegmentationTask(segmenter, normalize, schedule),
                DataLoader(Transformed(source, schedule.crop), schedule.batch_size, sampler=sampler),
                DataLoader(validation, 1),
            )
        except SystemExit:  # Lightning's way of passing on Ctrl-C
            raise KeyboardInterrupt from None
        if trainer.interrupted:
            raise KeyboardInterrupt


@torch.no_grad()
def judge(
    segmenter: Segmenter, dataset: Dataset[Sample], normalize: nn.Module, progress: Callable[[Any], Any]
) -> ConfusionMatrix:
    """Predict every image of a domain and count.

    Args:
        segmenter: what to judge.
        dataset: pairs of one domain.
        normalize: applied to uint8 images.
        progress: wraps the loader, as `tqdm` does.
    """
    confusion = ConfusionMatrix(segmenter.head.num_classes)
    device = next(segmenter.parameters()).device
    normalize = normalize.to(device)
    for images, labels in progress(DataLoader(dataset, 1)):
        confusion.update(segmenter.predict(normalize(images.to(device))).argmax(1).cpu(), labels)
    return confusion


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's hints about workers and loggers out of a run whose output is a table."""
    import logging

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
