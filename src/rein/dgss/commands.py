"""`rein fit / validate / test / predict`: Lightning's command line around `Experiment` and `DomainData`.

Every setting is a key of a YAML file and an option of the same name; later ones override earlier ones, and unknown keys are errors.
A run has one folder, `--out`: its configuration, logs, checkpoints, results and pictures.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from rein.dgss import recipes
from rein.dgss.callbacks import Judgement, LastState, Pictures, Predictions, SaveConfig
from rein.dgss.domain_data import DomainData
from rein.dgss.experiment import Experiment
from rein.errors import CheckpointError, InputError


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
        elif self.subcommand in ("test", "validate"):
            aim = self._get(self.config, "published")
            said = {
                "published": None if aim is None else aim.as_dict(),
                "checkpoint": self._get(self.config, "ckpt_path") or "last",
            }
            callbacks = [Judgement(self.out, self.datamodule, said)]
        if not fitting:
            kwargs["enable_checkpointing"] = False
        # a run that is shorter than the usual intervals is judged at its end, and logs ten times
        batches = config["max_steps"] * config["accumulate_grad_batches"]
        if type(config.get("val_check_interval")) is int:
            kwargs["val_check_interval"] = min(config["val_check_interval"], batches)
        kwargs["log_every_n_steps"] = min(config.get("log_every_n_steps") or 50, max(1, config["max_steps"] // 10))
        self.model.settings = self._training_settings()
        trainer = {**config, **kwargs}
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), *callbacks]
        trainer["default_root_dir"] = str(self.out)
        made = self._instantiate_trainer(trainer, [])
        if getattr(made.strategy, "_save_distributed_checkpoint", False):
            raise InputError(
                "ModelParallelStrategy saves a folder that wants every frozen weight again; give it "
                "save_distributed_checkpoint: false."
            )
        return made

    # -- around the commands

    def _training_settings(self) -> dict[str, Any]:
        """What a run that resumes must have in common with what it was, by name."""
        config = self._get(self.config, "model").as_dict().items()
        settings = {f"model.{name}": value for name, value in config if name not in ("weights", "window", "stride")}
        data = self._get(self.config, "data")
        for name in ("held_out", "batch_size", "crop", "scales", "max_share", "photometric", "seed"):
            settings[f"data.{name}"] = data[name]
        settings["data.sources"] = [[source.dataset, source.split, source.options] for source in self.datamodule.sources]
        for name in ("max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val"):
            settings[f"trainer.{name}"] = self._get(self.config, "trainer")[name]
        return json.loads(json.dumps(settings, default=str))  # as a checkpoint gives it back

    def before_fit(self) -> None:
        """Lose no earlier run."""
        last, asked = self.out / "checkpoints" / "last.ckpt", self._get(self.config, "ckpt_path")
        if asked == "best":
            raise InputError("best.ckpt holds weights alone; a run goes on from --ckpt_path last.")
        if asked == "last":  # on with the run if there is one: the same command may be given again and again
            self._set_checkpoint(last if last.exists() else None)
        elif asked is not None:
            self._set_checkpoint(Path(asked))
        elif (self.out / "checkpoints").exists() and any((self.out / "checkpoints").iterdir()):
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
        self.config_init[self.subcommand]["verbose"] = False

    def before_test(self) -> None:
        """As for validate."""
        self._last_state()
        self.config_init[self.subcommand]["verbose"] = False

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
        else:
            self._set_checkpoint(Path(asked))

    def _parse_ckpt_path(self) -> None:
        """Checkpoints here hold no settings for the command line."""

    def _set_checkpoint(self, path: Path | None) -> None:
        if path is not None:
            if not path.is_file():
                raise InputError(f"the checkpoint {path} does not exist, or is no file.")
            try:
                torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            except Exception as error:  # zip, pickle and system have errors of their own
                raise CheckpointError(
                    f"{path} is not a whole checkpoint ({type(error).__name__}); take another one of its folder, as best.ckpt for "
                    "judging."
                ) from error
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


def _loggers(out: Path) -> list[Logger]:
    """A table and TensorBoard's file, in a new folder `logs/version_N` for each start."""
    table = CSVLogger(out, name="logs")
    return [TensorBoardLogger(out, name="logs", version=table.version), table]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """The parser's errors as ours."""
    try:
        yield
    except ArgumentError as error:
        raise InputError(f"{error.message} (see rein fit --help)") from error


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
    """Whether a line is about this run, and not about products or about what it does not use."""
    return not any(part in record.getMessage() for part in ("💡", "TPU available", "`weights_only` was not set"))


def run(arguments: Sequence[str]) -> None:
    """One of the four commands, with its options.

    Raises:
        InputError: and the library's other errors, for what cannot be.
        SystemExit: 0 after the help.
    """
    parsers: dict[str, Any] = {name: {"exit_on_error": False} for name in LightningCLI.subcommands()}
    with _unasked_advice_ignored(), _one_line_errors():
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
                "enable_model_summary": False,
                "log_every_n_steps": 50,
                "use_distributed_sampler": False,
                "accelerator": "auto",
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "rein", "exit_on_error": False, **parsers},
            args=recipes.resolved(arguments),
        )
