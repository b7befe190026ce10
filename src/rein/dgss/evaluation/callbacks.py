"""Lightning callbacks that write what evaluation finds: pictures during training, tables and results of a test, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from rein.dgss import panels
from rein.dgss.data.datamodule import DomainData
from rein.dgss.data.protocols import RESAMPLING
from rein.dgss.data.submissions import label_ids
from rein.dgss.evaluation.results import Example, Published, Result, class_table, result_table, write_run
from rein.dgss.labels import LabelSpace
from rein.resizing import resize_image

EXAMPLES = 3  # pairs of each domain whose pictures are kept


class ValidationPictures(Callback):
    """After each validation, write a picture of the first pairs with label and prediction; also to TensorBoard.

    Args:
        folder: folder of the files, `<step>.png`.
        space: names and colours of the classes.
    """

    def __init__(self, folder: Path, space: LabelSpace) -> None:
        self.folder, self.space = folder, space
        self._examples: list[panels.Example] = []

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pairs."""
        if batch_idx < EXAMPLES and trainer.is_global_zero and not trainer.sanity_checking:
            image, label, prediction = _to_arrays(batch, outputs)
            self._examples.append(panels.Example("", image, label, {"prediction": prediction}, {"prediction": float("nan")}))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw them."""
        if not self._examples:
            return
        title = f"source validation, step {trainer.global_step}"
        picture = panels.comparison(self._examples, self.space, title, errors=True)
        self._examples = []
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"{trainer.global_step:06}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("source validation", np.array(picture), trainer.global_step, dataformats="HWC")


class EvaluationReport(Callback):
    """Print the tables of `rein validate` and `rein test`; write the results and examples of `rein test`.

    Args:
        out: the run's folder.
        data: the data that is evaluated.
        published: the figure that the recipe aims at.
        checkpoint: which state is evaluated, for `results.json`.
        say: prints a text.
    """

    def __init__(
        self, out: Path, data: DomainData, published: Published | None, checkpoint: str, say: Callable[[str], object] = print
    ) -> None:
        self.out, self.data, self.published, self.checkpoint, self.say = out, data, published, checkpoint, say
        self._examples: dict[str, list[Example]] = {}

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a few evenly spaced pairs of each domain."""
        loader: Any = trainer.test_dataloaders[dataloader_idx]  # type: ignore[index]
        if trainer.is_global_zero and batch_idx in _shown(len(loader)):
            name = loader.dataset.dataset.name_of(int(batch[2]))
            example = Example(name, *_to_arrays(batch, outputs))
            self._examples.setdefault(self.data.targets[dataloader_idx].name, []).append(example)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the table of the source validation pairs."""
        if trainer.is_global_zero:
            self.say(class_table(self._result(pl_module, ["source validation"])))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the tables; write the JSON and the examples."""
        if not trainer.is_global_zero:
            return
        model: Any = pl_module
        result = self._result(model, [domain.name for domain in self.data.targets])
        sources = [domain.name for domain in self.data.sources]
        settings = {
            **model.describe(),
            "published": None if self.published is None else asdict(self.published),
            "steps": trainer.max_steps,
            "checkpoint": self.checkpoint,
            "evaluation": self._evaluation(model),
        }
        roles = self.data.roles()
        write_run(self.out, settings, result, self.data.space, self._examples, sources, roles)
        self.say(f"{self._describe_protocol(model)}\n\n{class_table(result)}\n\n{result_table([result], roles)}")
        if self.published is not None and (self.published.miou or self.published.mean is not None):
            self.say(f"published, for the settings of the recipe: {self.published}")
        self.say(f"results.json and examples are in {self.out / 'test'}; to see them, open {self.out / 'test' / 'index.html'}")

    def _result(self, model: Any, names: list[str]) -> Result:
        confusions = {name: model.confusions[index] for index, name in enumerate(names)}
        classes = self.data.space.names
        return Result(
            method=model.method,
            backbone_parameters=model.backbone_parameters,
            tuned_parameters=model.tuned_parameters,
            head_parameters=sum(parameter.numel() for parameter in model.segmenter.head.parameters()),
            miou={name: confusion.mean_iou() for name, confusion in confusions.items()},
            iou={name: dict(zip(classes, matrix.iou().tolist(), strict=True)) for name, matrix in confusions.items()},
            step=model.loaded_step,
            source_miou=model.loaded_source_miou,
        )

    def _evaluation(self, model: Any) -> Mapping[str, Any]:
        """What must be equal in runs that are compared."""
        targets = [{**asdict(domain), "path": str(domain.folder(self.data.root))} for domain in self.data.targets]
        return {
            "targets": targets,
            "protocol": self.data.protocol.describe(),
            "eval_edge": self.data.eval_edge,
            "limit": self.data.limit,
            "window": model.window,
            "stride": None if model.window is None else model.stride or model.window * 2 // 3,
        }

    def _describe_protocol(self, model: Any) -> str:
        """The protocol, one line for each data set among the targets."""
        protocol = self.data.protocol
        lines = [f"protocol {protocol.name}: {protocol.summary}"]
        for domain in {domain.dataset: domain for domain in self.data.targets}.values():
            options = {**protocol.options(domain.dataset), **domain.options}
            mapped = f", classes mapped as in {options['class_map']}" if "class_map" in options else ""
            lines.append(f"  {domain.dataset}: {self.data.preparation(domain)}{mapped}")
        settings = self._evaluation(model)
        windows = "whole images" if model.window is None else f"windows of {model.window}, stride {settings['stride']}"
        return "\n".join([*lines, f"  resized {RESAMPLING}; predicted in {windows}; counted at the size of the label"])


class PredictionWriter(BasePredictionWriter):
    """Write each prediction as `<name>.png`: class numbers, in the colours of the classes, in the folders of the images.

    For the test server of a data set (`data.submission`): label ids without colours, all in one folder.

    Args:
        folder: folder of the predictions.
        data: the data module that serves the images.

    Attributes:
        written: number of predictions that were written.
        errors: why an image has no prediction, one text per image.
    """

    def __init__(self, folder: Path, data: DomainData) -> None:
        super().__init__("batch")
        self.folder, self.data = folder, data
        self.written = 0
        self.errors: list[str] = []

    def path_of(self, name: str) -> Path:
        """The file of the prediction for an image."""
        return self.folder / f"{name if self.data.submission is None else Path(name).name}.png"

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
        """Write the classes of one image, or note why there are none."""
        _, _, index, error = batch
        if error[0]:
            self.errors.append(error[0])
            return
        loader: Any = trainer.predict_dataloaders
        classes = prediction[0].to(torch.uint8).cpu().numpy()
        if self.data.submission is None:
            picture = Image.fromarray(classes, "P")
            picture.putpalette(panels.colour_table(self.data.space).tobytes())
        else:
            picture = Image.fromarray(label_ids(classes))
        path = self.path_of(loader.dataset.dataset.name_of(int(index)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        except OSError as failure:
            self.errors.append(f"{path} cannot be written: {failure.strerror or failure}.")
        else:
            self.written += 1

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Collect the counts and errors of all devices."""
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, (self.written, self.errors))
            self.written = sum(written for written, _ in gathered)
            self.errors = [error for _, errors in gathered for error in errors]


def _shown(count: int) -> set[int]:
    """Indices of the batches that are kept as examples: the middle of each of `EXAMPLES` equal parts."""
    if count <= EXAMPLES:
        return set(range(count))
    return {round((part + 0.5) * count / EXAMPLES - 0.5) for part in range(EXAMPLES)}


def _to_arrays(batch: Any, prediction: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first image (H, W, 3), at the size of its label, label (H, W) and prediction (H, W) of a batch, uint8."""
    label = batch[1][0].cpu()
    image = resize_image(batch[0][0].cpu(), (label.shape[0], label.shape[1])).permute(1, 2, 0)
    return image.numpy(), label.numpy(), prediction[0].to(torch.uint8).cpu().numpy()
