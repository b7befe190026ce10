"""Progress of a run as lines of text, where the output is a file and not a terminal."""

from __future__ import annotations

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

INTERVAL = 10  # seconds between two lines, at most


class ProgressLines(Callback):
    """Print the step, the source mIoU and the remaining time after each validation, and at least every ten seconds.

    Args:
        name: of the run, at the start of each line.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._started = self._printed = time.monotonic()
        self._first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._started = self._printed = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        """Print a line if the last one is older than the interval."""
        if time.monotonic() - self._printed >= INTERVAL:
            self._print(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **more: Any) -> None:
        """As in training."""
        if trainer.state.fn == "fit":
            self.on_train_batch_end(trainer)
        else:
            self._print_evaluation(trainer, "validate", arguments)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print a line with the new source mIoU."""
        if trainer.state.fn == "fit":
            self._print(trainer)

    def on_test_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **more: Any) -> None:
        """As in training."""
        self._print_evaluation(trainer, "test", arguments)

    def on_predict_batch_end(self, trainer: lightning.Trainer, *arguments: Any, **more: Any) -> None:
        """As in training."""
        self._print_evaluation(trainer, "predict", arguments)

    def _print(self, trainer: lightning.Trainer) -> None:
        self._printed = time.monotonic()
        step, steps = trainer.global_step, trainer.max_steps
        seconds = (self._printed - self._started) / max(1, step - self._first_step) * (steps - step)
        figures = [
            f"{name} {scale * float(trainer.callback_metrics[key]):{form}}"
            for key, name, scale, form in (("loss", "loss", 1, ".3f"), ("source_miou", "source mIoU", 100, ".1f"))
            if key in trainer.callback_metrics
        ]
        print(", ".join([f"{self.name}: step {step} of {steps}", *figures, f"{seconds:.0f} s left"]), flush=True)

    def _print_evaluation(self, trainer: lightning.Trainer, command: str, arguments: tuple[Any, ...]) -> None:
        if time.monotonic() - self._printed >= INTERVAL and trainer.is_global_zero:
            self._printed = time.monotonic()
            print(f"{self.name}: {command}, image {arguments[3] + 1}", flush=True)
