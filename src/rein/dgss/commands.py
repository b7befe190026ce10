"""`rein fit`, `validate`, `test` and `predict`: Lightning's command line around `Experiment` and `DomainData`.

Every setting is a key of a YAML file and an option of the same name; later ones override earlier ones, and unknown keys are errors. A
run has one folder, `--out`: configuration, logs, checkpoints, results and pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning
import safetensors.torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

import rein
from rein import pytorch_files
from rein.checkpoint import replace_file
from rein.dgss import methods, recipes
from rein.dgss.data.datamodule import DomainData
from rein.dgss.data.datasets.encodings import load_photograph
from rein.dgss.data.submissions import check_space, write_zip
from rein.dgss.evaluation.callbacks import EvaluationReport, PredictionWriter, ValidationPictures
from rein.dgss.evaluation.results import Published
from rein.dgss.prediction import Predicted, write_page
from rein.dgss.training.checkpoints import CheckpointFiles, LastCheckpoint, SaveConfig
from rein.dgss.training.experiment import Experiment
from rein.dgss.training.progress import ProgressLines
from rein.errors import CheckpointError, InputError, ReinError, one_line
from rein.injection import is_wrapped

BACKBONE_FILE = "backbone.safetensors"  # in a run's folder: the backbone into which the method's part is merged
TRAINER_DEFAULTS = {
    "max_steps": 40_000,
    "max_epochs": 1,  # the loader serves all steps in one epoch
    "val_check_interval": 4_000,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 50,
    "use_distributed_sampler": False,
    "accelerator": "auto",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the text says what the run's folder holds."""


def run(arguments: Sequence[str], *, quiet: bool = False) -> ReinCLI:
    """Run one of the four commands.

    Args:
        arguments: as on the command line: the command, then its options. `--config` takes a file, a recipe's name or YAML.
        quiet: print progress only, without tables and without Lightning's messages.

    Returns:
        The finished command, whose `trainer`, `model` and `datamodule` can be read.

    Raises:
        ReinError: bad input; an InputError or a CheckpointError, for example.
        Interrupted: Ctrl-C during the run.
        SystemExit: after the help.
    """
    cls: type[ReinCLI] = _QuietCLI if quiet else ReinCLI
    cls = type(cls.__name__, (cls,), {"command": _as_command(arguments)})
    command, arguments = arguments[0], recipes.resolved(arguments)
    if command == "predict":
        arguments, out = _take_out(arguments)
        cls = type(cls.__name__, (cls,), {"predictions": out})
    with _hide_advice(quiet), _one_line_errors(command):
        return _make_cli(cls, arguments)


def _as_command(arguments: Sequence[str]) -> str:
    """The command line for a file that is shared: paths are cut to their last part, since folders may name a person or a customer."""
    if any("\n" in argument for argument in arguments):
        return ""  # a program passed a configuration as text, and no command line

    def shared(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return f"{option}{equals}{Path(value).name}" if os.sep in value else argument

    return one_line(shlex.join(["rein", *map(shared, arguments)]), 1000)


def _take_out(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Take `--out` out of the arguments of `predict`: it is the folder of the predictions; the configuration names the run's."""
    kept, out = list[str](), None
    following = iter(arguments)
    for argument in following:
        option, equals, value = argument.partition("=")
        if option != "--out":
            kept.append(argument)
        elif (value := value if equals else next(following, "")) == "":
            raise InputError("--out has no value; expected a folder for the predictions.")
        else:
            out = Path(value)
    return kept, out


def _make_cli(cls: type[ReinCLI], arguments: list[str]) -> ReinCLI:
    parsers: dict[str, Any] = {name: {"exit_on_error": False} for name in LightningCLI.subcommands()}
    return cls(
        Experiment,
        DomainData,
        save_config_callback=SaveConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "rein", "exit_on_error": False, **parsers},
        args=arguments,
    )


class ReinCLI(LightningCLI):
    """The four commands, with one folder per run."""

    quiet = False
    exit_code = 0
    predictions: Path | None = None  # folder for those of `predict`; None means the run's
    command = ""  # as typed, without the folders of its paths

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--overwrite", action="store_true", help="replace predictions that exist already")
            parser.add_argument(
                "--format",
                type=Literal["classes", "cityscapes", "acdc"],
                default="classes",
                help="what is written: classes, or label ids in a zip file for the test server of a data set, whose test images are "
                "predicted if data.predict is not set",
            )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings beside those of model, data and trainer."""
        parser.add_argument(
            "--out", type=str, default="runs/fit", help="folder of the run; for a recipe or a file with bases, runs/ and its name"
        )
        parser.add_argument(
            "--state",
            type=Literal["last", "best"],
            default="last",
            help="state that is exported, tested and used to predict: the last one, or the best on the source validation pairs",
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="number of steps between two checkpoints, checkpoints/last.ckpt"
        )
        parser.add_argument("--published", type=Published | None, default=None, help="published figure to compare with")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self._get(self.config, "out"))

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.out / "checkpoints"

    def instantiate_classes(self) -> None:
        """Build data, model and trainer.

        Raises:
            InputError: and the library's other errors, if they cannot be built.
        """
        try:
            super().instantiate_classes()
        except (ReinError, ArgumentError):
            raise
        except Exception as error:  # what the libraries raise for settings that they do not accept
            raise InputError(
                f"the configuration cannot be used: {type(error).__name__}: {one_line(error)}. Correct the setting (see rein "
                f"{self.subcommand} --help-all)."
            ) from error

    # -- trainer

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The trainer, with logs and checkpoints in the run's folder."""
        config = self._get(self.config_init, "trainer")
        every = self._get(self.config, "checkpoint_every")
        if every < 1:
            raise InputError(f"checkpoint_every is {every}; it must be at least 1.")
        if config["max_steps"] < 1:
            raise InputError(
                f"trainer.max_steps is {config['max_steps']}; it must be at least 1: the learning rate decays over it."
            )
        for name in ("max_epochs", "accumulate_grad_batches"):
            if config[name] == 0:
                raise InputError(f"trainer.{name} is 0, so that nothing would be trained; it must be at least 1.")
        fitting = self.subcommand == "fit" and not config.get("fast_dev_run")
        if config.get("logger") is None:
            kwargs["logger"] = _loggers(self.out) if fitting else False
        callbacks = self._fit_callbacks(every) if fitting else self._evaluation_callbacks()
        if fitting and kwargs.get("logger", config.get("logger")) is not False:
            callbacks.append(LearningRateMonitor("step"))
        if not fitting:
            kwargs["enable_checkpointing"] = False
        if config.get("enable_progress_bar") is not False and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
            callbacks.append(ProgressLines(self.out.name))
        # a run shorter than the default intervals is validated at its end, and logs ten times
        batches = config["max_steps"] * config["accumulate_grad_batches"]
        if type(config.get("val_check_interval")) is int:
            kwargs["val_check_interval"] = min(config["val_check_interval"], batches)
        kwargs["log_every_n_steps"] = min(config.get("log_every_n_steps") or 50, max(1, config["max_steps"] // 10))
        self.model.settings = self._resume_settings()
        settings = {**config, **kwargs, "default_root_dir": str(self.out)}
        settings["callbacks"] = [*(settings.get("callbacks") or []), *callbacks]
        plugins = settings.get("plugins") or []
        settings["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), CheckpointFiles()]
        trainer = self._instantiate_trainer(settings, [])
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise InputError(
                "ModelParallelStrategy saves sharded checkpoints, but checkpoints of rein leave out frozen weights. Set its "
                "save_distributed_checkpoint: false."
            )
        return trainer

    def _fit_callbacks(self, every: int) -> list[Callback]:
        best = ModelCheckpoint(
            self.checkpoints,
            filename="best",
            monitor="source_miou",
            mode="max",
            save_weights_only=True,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        pictures = ValidationPictures(self.out / "pictures", self.datamodule.space)
        return [pictures, best, LastCheckpoint(self.checkpoints / "last.ckpt", every)]

    def _evaluation_callbacks(self) -> list[Callback]:
        if self.subcommand == "predict":
            chosen = self._get(self.config, "format")
            if chosen != "classes":
                check_space(self.datamodule.space, chosen)
                self.datamodule.submission = chosen
            self._writer = PredictionWriter((self.predictions or self.out) / "predictions", self.datamodule)
            return [self._writer]
        if self.subcommand in ("test", "validate"):
            found = self._get(self.config, "published")
            published = None if found is None else Published(**found.as_dict())
            checkpoint = self._get(self.config, "ckpt_path") or self._get(self.config, "state")
            return [EvaluationReport(self.out, self.datamodule, published, checkpoint, self._say)]
        return []

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text)

    def _resume_settings(self) -> dict[str, Any]:
        """Settings, by name, that a run must keep when it resumes."""
        config = self._get(self.config, "model").as_dict().items()
        settings = {f"model.{name}": value for name, value in config if name not in ("weights", "window", "stride")}
        data = self._get(self.config, "data")
        for name in ("held_out", "batch_size", "crop", "scales", "max_share", "photometric", "seed"):
            settings[f"data.{name}"] = data[name]
        for role in ("sources", "validation"):
            domains = getattr(self.datamodule, role)
            settings[f"data.{role}"] = [[domain.dataset, domain.path, domain.split, domain.options] for domain in domains]
        for name in ("max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val"):
            settings[f"trainer.{name}"] = self._get(self.config, "trainer")[name]
        return json.loads(json.dumps(settings, default=str))  # the types that a checkpoint gives back

    # -- before and after the commands

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (ReinError, KeyboardInterrupt):
            raise
        except Exception as error:
            if not _is_restoring(error):
                raise
            raise CheckpointError(
                f"the checkpoint is complete, but its state cannot be restored ({type(error).__name__}: {one_line(error)}). Pass "
                "another one of its folder with --ckpt_path."
            ) from error
        except SystemExit:  # how Lightning passes on Ctrl-C
            if not self.trainer.interrupted:
                raise
            raise Interrupted(self._interruption()) from None

    def _interruption(self) -> str:
        if self.subcommand != "fit":
            return f"{self.subcommand} was interrupted."
        kept = [name for name in ("last.ckpt", "best.ckpt") if (self.checkpoints / name).exists()]
        holds = f"holds {' and '.join(kept)}" if kept else "holds no checkpoint yet"
        return (
            f"{self.out} was interrupted at step {self.trainer.global_step} of {self.trainer.max_steps}; {self.checkpoints} {holds}. "
            f"To resume, run the same command{' again' if self.quiet else ' with --ckpt_path last'}."
        )

    def before_fit(self) -> None:
        """Protect an earlier run in the same folder, and refuse a best state of a run that is not validated."""
        if self._get(self.config, "state") == "best" and not self.datamodule.validates:
            raise InputError(
                "state is best, but data.held_out is 0 and data.validation is empty, so that no state can be chosen. Set "
                "state: last, or hold out pairs."
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {self.out} cannot be made: {error.strerror}. Choose another --out.") from error
        last, checkpoint = self.checkpoints / "last.ckpt", self._get(self.config, "ckpt_path")
        if checkpoint == "best":
            raise InputError("best.ckpt holds weights only. To resume, use --ckpt_path last.")
        if checkpoint == "last":  # without last.ckpt, start anew: one command starts and resumes
            self._set_checkpoint(last if last.exists() else None)
        elif checkpoint is not None:
            self._set_checkpoint(Path(checkpoint))
        elif self.checkpoints.exists() and any(self.checkpoints.iterdir()):
            raise InputError(f"{self.out} holds a run already. Resume it with --ckpt_path last, or choose another --out.")

    def after_fit(self) -> None:
        """Export adapter and head as small files, and a backbone into which the method's part is merged."""
        if self._get(self.config, "trainer").get("fast_dev_run"):
            return
        model: Any = self.model
        if self._get(self.config, "state") == "best":
            best = self.checkpoints / "best.ckpt"
            if not best.exists():
                raise InputError(
                    f"{best} does not exist, since the run was not validated. Export the last state with --state last --ckpt_path "
                    "last, or validate: see trainer.limit_val_batches and trainer.val_check_interval."
                )
            model.restore(pytorch_files.load(best))
        segmenter, backbone = model.segmenter, model.segmenter.backbone
        sharded = any(hasattr(parameter, "full_tensor") for parameter in backbone.parameters())
        merges = methods.find(model.method).merge is not None and not sharded
        if model.method == "freeze" or is_wrapped(backbone) or merges:
            with model.averaged():
                if merges:
                    backbone = methods.merge(copy.deepcopy(backbone))
                    segmenter = rein.Segmenter(backbone, segmenter.head, segmenter.indices)
                    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
                    if self.trainer.is_global_zero:
                        replace_file(self.out / BACKBONE_FILE, safetensors.torch.save(state))
                self._state_facts(segmenter, BACKBONE_FILE if merges else None)
                segmenter.save(self.out / "segmenter.safetensors")
                if is_wrapped(backbone):
                    rein.save(backbone, self.out / "adapter.safetensors")
            if not self.quiet:
                rank_zero_info(f"the segmenter is in {self.out / 'segmenter.safetensors'}")
        if not self.quiet:
            rank_zero_info(f"To evaluate it: rein test --config {self.out / 'config.yaml'}")

    def _state_facts(self, segmenter: rein.Segmenter, weights: str | None) -> None:
        """Set what a user of the segmenter file needs to know: classes, normalisation, and notes on the training.

        Args:
            segmenter: what is saved.
            weights: name of the file with the backbone's weights, if the method changed them.
        """
        model, data = self.model, self.datamodule
        names = data.space.names
        segmenter.classes, segmenter.palette = list(names), [*data.space.palette[: len(names)]]
        mean, std = (
            [round(value, 6) for value in each.flatten().tolist()] for each in (model.normalize.mean, model.normalize.std)
        )
        segmenter.normalization = mean, std
        scores = model.source_scores(names)
        segmenter.notes = {
            "method": model.method,
            "weights_file": weights,
            "sources": [domain.name for domain in data.sources],
            "steps": self.trainer.global_step,
            "state": self._get(self.config, "state"),
            "scores": {"source validation": scores} if scores else {},
            "protocol": data.protocol.describe(),
            "window": model.window,
            "stride": model.stride,
            "eval_edge": data.eval_edge,
            "command": self.command,
        }

    def before_validate(self) -> None:
        """Load the run's state."""
        self._select_checkpoint()
        self.config_init[self.subcommand]["verbose"] = False

    def before_test(self) -> None:
        """Load the run's state."""
        self._select_checkpoint()
        self.config_init[self.subcommand]["verbose"] = False

    def before_predict(self) -> None:
        """Load the run's state, and protect earlier predictions. Predictions are written one by one and not collected."""
        images = self.datamodule.open_images()
        paths = self._predicted = [self._writer.path_of(images.name_of(index)) for index in range(len(images))]
        replaced = {path.resolve() for path in paths} & {path.resolve() for path in images.paths}
        if replaced:
            raise InputError(f"the prediction of an image would replace the image {min(replaced)}. Choose another --out.")
        if len(set(paths)) < len(paths):
            raise InputError(
                f"several images are named {Path(Counter(paths).most_common(1)[0][0]).stem}; expected different names, because the "
                "files for a test server are in one folder. Pass the images of one split."
            )
        existing = [path for path in paths if path.exists()]
        if existing and not self._get(self.config, "overwrite"):
            raise InputError(
                f"{len(existing)} of {len(paths)} predictions exist already, the first: {existing[0]}. Replace them with "
                "--overwrite, or choose another --out."
            )
        self._select_checkpoint()
        self.config_init[self.subcommand]["return_predictions"] = False

    def after_predict(self) -> None:
        """Report what was written and what was not."""
        writer = self._writer
        if self.trainer.is_global_zero:
            page = self._write_page()
            seen = "" if page is None else f"; to see them, open {page}"
            self._say(f"{writer.written} of {writer.written + len(writer.errors)} predictions are in {writer.folder}{seen}")
            for error in writer.errors:
                print(f"rein: no prediction: {one_line(error, 1000)}", file=sys.stderr)
            if self.datamodule.submission is not None and not writer.errors:
                path = writer.folder.parent / f"{self.datamodule.submission}.zip"
                write_zip(path, self._predicted)
                self._say(f"label ids of all images for the test server are in {path}")
        self.exit_code = 1 if writer.errors else 0

    def _write_page(self) -> Path | None:
        """Write a page of the predictions; none for a test server, whose label ids have no colours."""
        if self.datamodule.submission is not None:
            return None
        images, page = self.datamodule.open_images(), self._writer.folder.parent / "index.html"
        predicted = [
            Predicted(images.name_of(index), partial(load_photograph, path), mask)
            for index, (path, mask) in enumerate(zip(images.paths, self._predicted, strict=True))
            if mask.exists()
        ]
        stated = {"run": str(self.out), "method": self.model.method}
        write_page(page, "Predictions", stated, self.datamodule.space, predicted, self._writer.errors)
        return page

    def _select_checkpoint(self) -> None:
        name = self._get(self.config, "ckpt_path") or self._get(self.config, "state")
        if name not in ("last", "best"):
            self._set_checkpoint(Path(name))
            return
        path = self.checkpoints / f"{name}.ckpt"
        if not path.exists():
            raise InputError(f"{path} does not exist. Run rein fit first, or name a checkpoint with --ckpt_path.")
        self._set_checkpoint(path)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: checkpoints hold no settings for the command line."""

    def _set_checkpoint(self, path: Path | None) -> None:
        if path is not None:
            if not path.is_file():
                raise InputError(f"the checkpoint {path} does not exist or is not a file. Pass a file with --ckpt_path.")
            try:
                pytorch_files.load(path)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{path} is not a complete checkpoint: {error} Pass another one of its folder with --ckpt_path, such as "
                    "best.ckpt for evaluation."
                ) from error
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}


class _QuietCLI(ReinCLI):
    quiet = True


def _loggers(out: Path) -> list[Logger]:
    """A CSV table and TensorBoard's file, in a new folder `logs/version_N` for each start."""
    table = CSVLogger(out, name="logs")
    return [TensorBoardLogger(out, name="logs", version=table.version), table]


# -- help


def print_help(command: str, description: str, options: Sequence[str]) -> NoReturn:
    """Print the help of a command with some of its options, and exit with 0.

    Args:
        command: fit, validate, test or predict.
        description: what the command does and where it writes.
        options: names of the options, such as `model.lr`, in order.
    """

    class HelpCLI(ReinCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            print(_help_text(self._subcommand_parsers[command], command, description, options), end="")
            raise SystemExit(0)

    _make_cli(HelpCLI, [command])
    raise AssertionError("the parser exits")


def _help_text(parser: LightningArgumentParser, command: str, description: str, options: Sequence[str]) -> str:
    actions = {action.dest: action for action in parser._actions}
    shown = argparse.ArgumentParser(f"rein {command}", usage=f"rein {command} [OPTIONS]", description=description, add_help=False)
    for name in options:
        default = None if name == "config" else parser.get_default(name)
        text = _HELP.get(name) or (actions[name].help or "").rstrip(".").replace("%", "%%")
        text = text if default is None else f"{text} (default: {default})"
        if actions[name].nargs == 0:
            shown.add_argument(f"--{name}", action="store_true", help=text.partition(" (default")[0])
            continue
        shown.add_argument(f"--{name}", metavar=name.rpartition(".")[2].upper(), help=text)
    shown.add_argument("--help-all", action="store_true", help="show every option, those of Lightning's trainer included")
    return shown.format_help()


_HELP = {  # of options that are not ours
    "config": "recipe (see rein recipes) or YAML file; may be given several times, later ones override earlier ones",
    "ckpt_path": "checkpoint to load: a file, or the word last or best; with fit, last resumes the run in --out, if there is one",
    "seed_everything": "seed of weights, order, transforms and steps",
    "trainer.max_steps": "number of optimizer steps",
    "trainer.devices": "number of devices",
    "trainer.precision": "numeric precision, such as 32-true or bf16-mixed",
}


# -- messages


@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """Turn the parser's errors into InputError."""
    try:
        yield
    except ArgumentError as error:
        raise InputError(f"{one_line(error.message, 1000)} (see rein {command} --help-all)") from error


def _is_restoring(error: Exception) -> bool:
    """Whether Lightning raised the error while it restored the state of a checkpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        frame.filename.endswith("checkpoint_connector.py") and frame.name.startswith(("restore", "resume_start"))
        for frame in frames
    )


@contextmanager
def _hide_advice(quiet: bool) -> Iterator[None]:
    """Hide Lightning's advice on things that are intended here; if quiet, all of its messages below errors."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addFilter(_concerns_this_run)
        if quiet:
            logger.setLevel(logging.ERROR)
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
        if quiet:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
                logger.removeFilter(_concerns_this_run)


def _concerns_this_run(record: logging.LogRecord) -> bool:
    """False for advertisements and for devices that the run does not use."""
    return not any(part in record.getMessage() for part in ("💡", "TPU available", "`weights_only` was not set"))
