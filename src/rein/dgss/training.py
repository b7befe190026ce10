"""One training run in a program: a `Segmenter`, a source domain, and the best state by source validation kept on disk."""

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
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from rein.dgss.data import Sample
from rein.dgss.metrics import ConfusionMatrix
from rein.dgss.sampling import Drawn, RunLoader, RunSampler
from rein.dgss.task import Optimization, SegmentationTask
from rein.dgss.transforms import TrainingTransform
from rein.segmenter import Segmenter


@dataclass(frozen=True, kw_only=True)
class Schedule(Optimization):
    """How long to train, beside how fast.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        validations: how often in the run the source validation images are judged.
        crop: side of the square training crops in pixels; None trains on whole images.
        seed: of the data order, the transforms and the steps.
    """

    steps: int
    batch_size: int = 4
    validations: int = 5
    crop: int | None = None
    seed: int = 0


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
        miou = task.confusions[0].mean_iou()
        if self.miou is None or miou > self.miou:
            with task.averaged():
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
    transform = TrainingTransform(schedule.crop, scales=(1.0, 2.0), max_share=1.0)
    drawn = Drawn(source, transform, schedule.seed)
    sampler = RunSampler(len(source), schedule.batch_size, schedule.steps, schedule.seed)  # type: ignore[arg-type]
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
                SegmentationTask(segmenter, normalize, schedule, seed=schedule.seed),
                RunLoader(drawn, sampler),
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
