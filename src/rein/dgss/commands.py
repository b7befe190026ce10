"""`rein fit / validate / test / predict`: Lightning's command line around `Experiment` and `DomainData`.

Every setting is a key of a YAML file and an option of the same name; later ones override earlier ones, and unknown keys are errors.
A run has one folder, `--out`: its configuration, logs, checkpoints, results and pictures.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from rein.dgss import panel, recipes, report, runs
from rein.dgss.domain_data import DomainData
from rein.dgss.experiment import Experiment
from rein.dgss.report import Result
from rein.errors import InputError

SHOWN = 3


@dataclass(frozen=True)
class Published:
    """The figure that a recipe aims at.

    Attributes:
        miou: domain -> mIoU in per cent.
        mean: of the domains, in per cent.
        source: where it was published: the paper and its table.
        note: what else must be known to compare.
    """

    miou: dict[str, float] = field(default_factory=dict)
    mean: float | None = None
    source: str = ""
    note: str = ""


class ReinCLI(LightningCLI):
    """The four commands, with one folder for each run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings beside those of model, data and trainer."""
        parser.add_argument("--out", type=str, default="runs/fit", help="the run's folder")
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="steps from one checkpoint, checkpoints/last.ckpt, to the next"
        )
        parser.add_argument("--published", type=Published | None, default=None, help="the figure that this aims at")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self._get(self.config, "out"))

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The trainer, with logs and checkpoints in the run's folder."""
        config = self._get(self.config_init, "trainer")
        every = self._get(self.config, "checkpoint_every")
        if every < 1:
            raise InputError(f"checkpoint_every {every} must be at least 1.")
        if config["max_steps"] < 1:
            raise InputError(
                f"trainer.max_steps is {config['max_steps']}; it must be at least 1: the learning rate decays over it."
            )
        fitting = self.subcommand == "fit" and not config.get("fast_dev_run")
        if config.get("logger") is None:
            kwargs["logger"] = _loggers(self.out) if fitting else False
        callbacks: list[Callback] = []
        if fitting:
            checkpoints = self.out / "checkpoints"
            callbacks = [
                Pictures(self.out / "pictures", self.datamodule.space),
                ModelCheckpoint(
                    checkpoints,
                    filename="best",
                    monitor="source_miou",
                    mode="max",
                    save_weights_only=True,
                    enable_version_counter=False,
                    save_on_train_epoch_end=False,
                ),
                LastState(checkpoints / "last.ckpt", every),
            ]
            if kwargs.get("logger", config.get("logger")) is not False:
                callbacks.append(LearningRateMonitor("step"))
        elif self.subcommand == "predict":
            callbacks = [Predictions(self.out / "predictions", self.datamodule)]
        elif self.subcommand == "test":
            callbacks = [Examples(self)]
        if not fitting:
            kwargs["enable_checkpointing"] = False
        trainer = {**config, **kwargs}
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), *callbacks]
        trainer["default_root_dir"] = str(self.out)
        made = self._instantiate_trainer(trainer, [])
        if getattr(made.strategy, "_save_distributed_checkpoint", False):
            raise InputError(
                "ModelParallelStrategy saves a folder that wants every frozen weight again; give it save_distributed_checkpoint: false."
            )
        return made

    # -- around the commands

    def before_fit(self) -> None:
        """Lose no earlier run."""
        last, asked = self.out / "checkpoints" / "last.ckpt", self._get(self.config, "ckpt_path")
        if asked == "last":  # on with the run if there is one: the same command may be given again and again
            self._set_checkpoint(last if last.exists() else None)
        elif asked is None and (self.out / "checkpoints").exists() and any((self.out / "checkpoints").iterdir()):
            raise InputError(f"{self.out} holds a run already; add --ckpt_path last to go on with it, or choose another --out.")

    def after_fit(self) -> None:
        """Write what others load: adapter and head in one small file."""
        if self._get(self.config, "trainer").get("fast_dev_run"):
            return
        path = self.out / "segmenter.safetensors"
        model: Any = self.model
        if model.method == "freeze" or model.method.startswith("rein"):
            with model.averaged():
                model.segmenter.save(path)
            rank_zero_info(f"adapter and head are in {path}")
        rank_zero_info(f"now judge it: rein test --config {self.out / 'config.yaml'}")

    def before_validate(self) -> None:
        """Judge the run's last state unless another is asked for."""
        self._last_state()

    def before_test(self) -> None:
        """As for validate."""
        self._last_state()

    def before_predict(self) -> None:
        """As for validate; predictions are written as they come and not kept."""
        self._last_state()
        self.config_init[self.subcommand]["return_predictions"] = False

    def _last_state(self) -> None:
        asked = self._get(self.config, "ckpt_path")
        if asked in (None, "last", "best"):
            path = self.out / "checkpoints" / f"{asked or 'last'}.ckpt"
            if not path.exists():
                raise InputError(f"{path} does not exist; fit first, or name a checkpoint with --ckpt_path.")
            self._set_checkpoint(path)
        elif not Path(asked).exists():
            raise InputError(f"the checkpoint {asked} does not exist.")

    def _set_checkpoint(self, path: Path | None) -> None:
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


def _loggers(out: Path) -> list[Logger]:
    """A table and TensorBoard's file, in a new folder `logs/version_N` for each start."""
    table = CSVLogger(out, name="logs")
    return [TensorBoardLogger(out, name="logs", version=table.version), table]


class SaveConfig(SaveConfigCallback):
    """Keep the configuration of a fit beside it, so that `rein test --config <out>/config.yaml` judges that run."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write it once, on the first device."""
        if stage == "fit" and trainer.is_global_zero and not self.already_saved:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config.pop("ckpt_path", None)
            config.pop("config", None)
            self.parser.save(
                config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False, skip_validation=True
            )
            self.already_saved = True


class LastState(Checkpoint):
    """Every so many steps and at the end, the state from which a run goes on. Where a validation is due, it is taken after it.

    (A state from before the validation would be resumed without it, and the knowledge of the best state would be lost.)

    Args:
        path: of the file, which is replaced as a whole: a crash leaves the old one.
        every: steps from one to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._saved = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows."""
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
        if trainer.global_step and trainer.global_step % self.every == 0:
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


class Examples(Callback):
    """Gather what `rein test` says and leaves.

    Args:
        cli: whose run it is.
    """

    def __init__(self, cli: ReinCLI) -> None:
        self.cli = cli
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
            domain = self.cli.datamodule.targets[dataloader_idx].name
            name = loader.dataset.dataset.name_of(int(batch[2]))
            self._examples.setdefault(domain, []).append(runs.Example(name, *_arrays(batch, outputs)))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the tables, write the JSON and the examples."""
        if not trainer.is_global_zero:
            return
        model: Any = self.cli.model
        data, config = self.cli.datamodule, self.cli.config[self.cli.subcommand]
        names = [domain.name for domain in data.targets]
        confusions = [model.confusions[number] for number in range(len(names))]
        result = Result(
            method=model.method,
            backbone_parameters=model.backbone_parameters,
            tuned_parameters=model.tuned_parameters,
            head_parameters=sum(parameter.numel() for parameter in model.segmenter.head.parameters()),
            miou={name: confusion.mean_iou() for name, confusion in zip(names, confusions, strict=True)},
            iou={
                name: dict(zip(data.space.names, confusion.iou().tolist(), strict=True))
                for name, confusion in zip(names, confusions, strict=True)
            },
        )
        published = config.get("published")
        settings = {
            "backbone": model.backbone_name,
            "seed": model.seed,
            "checkpoint": str(self.cli.config_init[self.cli.subcommand]["ckpt_path"]),
            "published": None if published is None else published.as_dict(),
        }
        runs.write(self.cli.out, settings, result, data.space, self._examples)
        print(report.class_table(result))
        print()
        print(report.table([result]))
        if published is not None and (published.miou or published.mean):
            said = [f"{name} {value}" for name, value in published.miou.items()]
            said += [f"mean {published.mean}"] if published.mean is not None else []
            print(f"published: {', '.join(said)} ({published.source}){'; ' + published.note if published.note else ''}")
        print(f"results.json and examples are in {self.cli.out / 'test'}")


class Predictions(BasePredictionWriter):
    """Write each prediction as it comes: `<name>.png` with class numbers in the classes' colours.

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
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(classes[0].to(torch.uint8).cpu().numpy(), "P")
        picture.putpalette(panel.colour_table(self.data.space).tobytes())
        picture.save(self.folder / f"{runs.slug(images.name_of(number))}.png")


def _arrays(batch: Any, prediction: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first image (H, W, 3), label (H, W) and prediction (H, W) of a batch, uint8."""
    image, label = batch[0][0].permute(1, 2, 0), batch[1][0]
    return image.cpu().numpy(), label.cpu().numpy(), prediction[0].to(torch.uint8).cpu().numpy()


@contextmanager
def _unasked_advice_ignored() -> Iterator[None]:
    """Keep back what Lightning says of things that are meant as they are."""
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    said.addFilter(_is_asked)
    with warnings.catch_warnings():
        for message in (
            ".*LightningCLI's args parameter is intended",
            ".*Experiment logs directory",
            ".*callbacks used to create the checkpoint need to be provided",
            ".*module\\(s\\) in eval mode",
            ".*does not have many workers",
            ".*LeafSpec.*is deprecated",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            said.removeFilter(_is_asked)


def _is_asked(record: logging.LogRecord) -> bool:
    """Whether a line is about this run, and not about products."""
    return "💡" not in record.getMessage()


def run(arguments: Sequence[str]) -> None:
    """One of the four commands, with its options.

    Raises:
        InputError: and the library's other errors, for what cannot be.
        SystemExit: 2 for options that the parser does not know.
    """
    with _unasked_advice_ignored():
        ReinCLI(
            Experiment,
            DomainData,
            save_config_callback=SaveConfig,
            trainer_defaults={
                "max_steps": 40_000,
                "max_epochs": 1,  # the loader's, which has all steps
                "val_check_interval": 4_000,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 50,
                "use_distributed_sampler": False,
                "accelerator": "auto",
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=recipes.resolved(arguments),
        )
