"""What keeps a run's files: its configuration, its most recent state, and how Lightning reads and writes checkpoints."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback

from rein import pytorch_files
from rein.checkpoint import replace_file


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's files with two guarantees: writing replaces a file in one step, and reading runs no code of a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: the file cannot be written; an existing file stays unchanged.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU.

        Raises:
            CheckpointError: as `pytorch_files.load`.
        """
        content: dict[str, Any] = pytorch_files.load(path)
        return content


class SaveConfig(SaveConfigCallback):
    """Write the configuration of a fit to `<out>/config.yaml`, so that `rein test --config <out>/config.yaml` evaluates that run."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write nothing yet: a run that is refused must not change the folder."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write it, on the first device."""
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config.pop("ckpt_path", None)
            config.pop("config", None)
            text = self.parser.dump(config, skip_none=False, skip_validation=True)
            replace_file(folder / "config.yaml", text.encode())


class LastCheckpoint(Checkpoint):
    """Save the state from which a run resumes, at regular steps and at the end.

    A state at whose step a validation is due is saved after it: resumed from an earlier one, the run would skip the validation and
    lose track of the best state.

    Args:
        path: the file; it is replaced as a whole, so that a crash leaves the old one.
        every: number of steps between two checkpoints.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._saved_step, self._step_before_batch, self._batch_stepped = 0, 0, False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The state from which a run resumes is saved already."""
        self._saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step. Between two steps gradients accumulate, which no file holds, so only batches that step are saved after."""
        self._step_before_batch = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows."""
        self._batch_stepped = trainer.global_step != self._step_before_batch
        interval = trainer.val_check_batch
        if not interval or (batch_idx + 1) % interval:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what the validation deferred."""
        self._save_if_due(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the final state."""
        self._save(trainer)

    def _save_if_due(self, trainer: lightning.Trainer) -> None:
        if self._batch_stepped and trainer.global_step % self.every == 0:
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        partial = self.path.with_name(f"partial-{self.path.name}")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if self.path.is_dir():  # a sharded checkpoint, one file per device
                shutil.rmtree(self.path)
            os.replace(partial, self.path)
        trainer.strategy.barrier()
