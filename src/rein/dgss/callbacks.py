"""What a run says and leaves on the way: its configuration, the state to resume from, pictures, figures, predictions."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from rein.dgss import panel, report, runs
from rein.dgss.domain_data import DomainData
from rein.dgss.report import Result

SHOWN = 3


class SaveConfig(SaveConfigCallback):
    """Keep the configuration of a fit beside it, so that `rein test --config <out>/config.yaml` judges that run."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused must not change what lies there."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write it, on the first device."""
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config.pop("ckpt_path", None)
            config.pop("config", None)
            self.parser.save(
                config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False, skip_validation=True
            )


class LastState(Checkpoint):
    """Every so many steps and at the end, the state from which a run goes on. Where a validation is due, it is taken after it.

    (A state from before the validation would be resumed without it, and the knowledge of the best state would be lost.)

    Args:
        path: of the file, which is replaced as a whole: a crash leaves the old one.
        every: steps from one to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._saved, self._before, self._stepped = 0, 0, False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What a run resumes from is saved already."""
        self._saved = trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps gradients are being gathered, which no file holds: only a batch that steps is saved after."""
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows."""
        self._stepped = trainer.global_step != self._before
        due = trainer.val_check_batch
        if not due or (batch_idx + 1) % due:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what was put off."""
        self._save_if_due(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the end."""
        self._save(trainer)

    def _save_if_due(self, trainer: lightning.Trainer) -> None:
        if self._stepped and trainer.global_step % self.every == 0:
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        partial = self.path.with_name(f"partial-{self.path.name}")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if self.path.is_dir():  # one file for each device, in a folder
                shutil.rmtree(self.path)
            os.replace(partial, self.path)
        trainer.strategy.barrier()


class Pictures(Callback):
    """After each validation, a picture of the first pairs, their truth and their prediction: a file, and in TensorBoard.

    Args:
        folder: of the files, `<step>.png`.
        space: of the classes.
    """

    def __init__(self, folder: Path, space: Any) -> None:
        self.folder, self.space = folder, space
        self._rows: list[panel.Row] = []

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first ones."""
        if batch_idx < SHOWN and trainer.is_global_zero and not trainer.sanity_checking:
            image, label, prediction = _arrays(batch, outputs)
            self._rows.append(panel.Row("", image, label, {"prediction": prediction}, {"prediction": float("nan")}))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw them."""
        if not self._rows:
            return
        picture = panel.draw(self._rows, self.space, f"source validation, step {trainer.global_step}", errors=True)
        self._rows = []
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"{trainer.global_step:06}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("source validation", np.array(picture), trainer.global_step, dataformats="HWC")


class Judgement(Callback):
    """What `rein test` and `rein validate` say, and what the first leaves.

    Args:
        out: the run's folder.
        data: what is judged.
        settings: what `results.json` says of the run besides.
    """

    def __init__(self, out: Path, data: DomainData, settings: dict[str, Any]) -> None:
        self.out, self.data, self.settings = out, data, settings
        self._examples: dict[str, list[runs.Example]] = {}

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a few pairs of each domain, evenly spaced, to be shown."""
        loader: Any = trainer.test_dataloaders[dataloader_idx]  # type: ignore[index]
        count = len(loader)
        wanted = {round((k + 0.5) * count / SHOWN - 0.5) for k in range(SHOWN)} if count > SHOWN else set(range(count))
        if batch_idx in wanted and trainer.is_global_zero:
            name = loader.dataset.dataset.name_of(int(batch[2]))
            shown = runs.Example(name, *_arrays(batch, outputs))
            self._examples.setdefault(self.data.targets[dataloader_idx].name, []).append(shown)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the table of the source validation pairs."""
        if trainer.is_global_zero:
            print(report.class_table(self._result(pl_module, ["source validation"])))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the tables, write the JSON and the examples."""
        if not trainer.is_global_zero:
            return
        model: Any = pl_module
        result = self._result(model, [domain.name for domain in self.data.targets])
        sources = [domain.name for domain in self.data.sources]
        settings = {"backbone": model.backbone_name, "seed": model.seed, **self.settings, "sources": sources}
        runs.write(self.out, {**settings, "judged": self._judged(model)}, result, self.data.space, self._examples, sources)
        print(report.class_table(result))
        print()
        print(report.table([result], sources))
        aim = self.settings["published"]
        if aim and (aim["miou"] or aim["mean"] is not None):
            said = [f"{name} {value}" for name, value in aim["miou"].items()]
            said += [f"mean {aim['mean']}"] if aim["mean"] is not None else []
            print(f"published: {', '.join(said)} ({aim['source']}){'; ' + aim['note'] if aim['note'] else ''}")
        print(f"results.json and examples are in {self.out / 'test'}")

    def _result(self, model: Any, names: list[str]) -> Result:
        confusions = {name: model.confusions[number] for number, name in enumerate(names)}
        return Result(
            method=model.method,
            backbone_parameters=model.backbone_parameters,
            tuned_parameters=model.tuned_parameters,
            head_parameters=sum(parameter.numel() for parameter in model.segmenter.head.parameters()),
            miou={name: confusion.mean_iou() for name, confusion in confusions.items()},
            iou={
                name: dict(zip(self.data.space.names, confusion.iou().tolist(), strict=True))
                for name, confusion in confusions.items()
            },
        )

    def _judged(self, model: Any) -> dict[str, Any]:
        """What must be equal in runs that are compared."""
        targets = [{**asdict(domain), "path": str(domain.folder(self.data.root))} for domain in self.data.targets]
        return {"targets": targets, "judged_edge": self.data.judged_edge, "limit": self.data.limit, "window": model.window}


class Predictions(BasePredictionWriter):
    """Write each prediction as it comes: `<name>.png`, in folders as the images', with class numbers in the classes' colours.

    Args:
        folder: where to.
        data: whose images they are.
    """

    def __init__(self, folder: Path, data: DomainData) -> None:
        super().__init__("batch")
        self.folder, self.data = folder, data

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one image's classes."""
        classes, number = prediction
        loader: Any = trainer.predict_dataloaders
        images: Any = loader.dataset.dataset
        picture = Image.fromarray(classes[0].to(torch.uint8).cpu().numpy(), "P")
        picture.putpalette(panel.colour_table(self.data.space).tobytes())
        path = self.folder / f"{images.name_of(number)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def _arrays(batch: Any, prediction: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first image (H, W, 3), label (H, W) and prediction (H, W) of a batch, uint8."""
    image, label = batch[0][0].permute(1, 2, 0), batch[1][0]
    return image.cpu().numpy(), label.cpu().numpy(), prediction[0].to(torch.uint8).cpu().numpy()
