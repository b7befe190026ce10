"""The `rein` command: every subcommand, its options and its help. Bad input gives one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rein import catalogue, checkpoint
from rein._version import __version__
from rein.errors import InputError, ReinError, one_line
from rein.extras import require
from rein.files import reason_of
from rein.remote import fetch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if something could not be predicted, 2 for bad input, 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given and given[0] in EXPERIMENT_COMMANDS and (given[0] != "predict" or _names_run(given)):
            return _experiment(given)
        options = _parser().parse_args(given)
        return options.run(options)
    except BrokenPipeError:  # `rein backbones | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ReinError as error:
        print(f"rein: {' '.join(_message(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if not isinstance(error.filename, str):  # not about a file that the user could name otherwise
            raise
        print(f"rein: cannot use {one_line(error.filename)}: {reason_of(error, error.filename)}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"rein: {interruption or 'interrupted.'}", file=sys.stderr)
        return 130


def _message(error: ReinError) -> str:
    """The text of an error, without the traceback that torch prepends to errors of loading processes."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2] if "Original Traceback" in text else text


# -- commands whose options are the settings of a recipe


@dataclass(frozen=True)
class ExperimentCommand:
    """A command that runs an experiment.

    Attributes:
        summary: one line for `rein --help`.
        description: what it does and where it writes.
        options: the options that its help shows; `--help-all` shows all.
    """

    summary: str
    description: str
    options: tuple[str, ...]


EXPERIMENT_COMMANDS = {
    "fit": ExperimentCommand(
        "train on the source domains of a recipe or a configuration",
        "Train a head and what the method adds to the backbone on the source domains. Writes config.yaml, logs, pictures, "
        "checkpoints and segmenter.safetensors to the folder --out. Every setting of the configuration is an option of the "
        "same name.",
        (
            *("config", "out", "ckpt_path", "seed_everything"),
            *("model.backbone", "model.weights", "model.method", "model.head", "model.lr"),
            *("data.root", "data.batch_size", "data.workers"),
            *("trainer.max_steps", "trainer.devices", "trainer.precision"),
        ),
    ),
    "validate": ExperimentCommand(
        "evaluate a run on its held-out source pairs",
        "Evaluate a run on the source validation pairs and print the IoU of every class. Pass the run's configuration: "
        "rein validate --config RUN/config.yaml.",
        ("config", "ckpt_path", "data.root", "data.workers", "model.window", "trainer.devices"),
    ),
    "test": ExperimentCommand(
        "evaluate a run on its targets: mIoU by domain and class",
        "Evaluate a run on its target domains, print mIoU by domain and class, and write test/results.json, test/index.html and "
        "example pictures to the run's folder. Pass the run's configuration: rein test --config RUN/config.yaml.",
        (
            *("config", "out", "ckpt_path", "data.root", "data.targets", "data.protocol", "data.limit", "data.workers"),
            *("model.window", "model.stride", "trainer.devices", "trainer.precision"),
        ),
    ),
    "predict": ExperimentCommand(
        "predict the classes of photographs and videos",
        "Predict the classes of every image in a folder and in the folders below it, with the state of the run that the "
        "configuration names. Writes predictions/<name>.png to the folder --out (default: the run's): class numbers, shown in "
        "the colours of the classes; and index.html, a page that shows them. An image that cannot be read is named, and the exit "
        "code is then 1. Example: rein predict --config RUN/config.yaml --data.predict PHOTOS.",
        (
            *("config", "data.predict", "out", "format", "overwrite", "ckpt_path", "data.eval_edge", "data.workers"),
            *("model.window", "model.stride", "trainer.devices", "trainer.precision"),
        ),
    ),
}


def _experiment(arguments: Sequence[str]) -> int:
    for module in ("lightning", "jsonargparse", "tensorboard"):
        require(module, "train")
    from rein.dgss import commands

    name = arguments[0]
    if {"--help", "-h"} & set(arguments):
        command = EXPERIMENT_COMMANDS[name]
        commands.print_help(name, command.description, command.options)
    if "--help-all" in arguments:
        if name == "predict":
            with suppress(SystemExit):
                _parser().parse_args([name, "--help"])
            print()
        arguments = [name, "--help"]
    return commands.run(arguments).exit_code


# -- other commands


class _Parser(argparse.ArgumentParser):
    """Reports a bad option in one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, False and True."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rein",
        description="Turn a frozen vision transformer into a domain-general dense predictor by training a small adapter.",
    )
    parser.add_argument("--version", action="version", version=f"rein {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_demo,
        _add_experiment_commands,
        _add_compare,
        _add_recipes,
        _add_data,
        _add_backbones,
        _add_info,
        _add_export,
        _add_plan,
        _add_convert,
    ):
        add(commands)
    return parser


def _add_experiment_commands(commands: Any) -> None:
    for name, command in EXPERIMENT_COMMANDS.items():
        if name == "predict":
            _add_predict(commands, command.summary)
        else:
            commands.add_parser(name, help=command.summary, add_help=False)


def _names_run(arguments: Sequence[str]) -> bool:
    """Whether the arguments of `rein predict` are those of a run: a configuration or one of its settings."""
    return any(argument.startswith(("--config", "--model.", "--data.", "--trainer.", "--help-all")) for argument in arguments)


def _add_predict(commands: Any, summary: str) -> None:
    description = (
        "Predict the classes of photographs and videos with a segmenter file, such as segmenter.safetensors of rein fit. Writes to "
        "the folder --out: predictions/<name>.png, class numbers shown in the colours of the classes; overlays/<name>.jpg; and "
        "index.html, a page that shows them. The same command again resumes where it stopped. An image that cannot be read is named, "
        "and the exit code is then 1."
    )
    predict = commands.add_parser(
        "predict",
        help=summary,
        description=description,
        epilog="With the state of a run instead of a file: rein predict --config RUN/config.yaml --data.predict PHOTOS. "
        "rein predict --help-all shows the options of both.",
        formatter_class=_HelpWithDefaults,
    )
    predict.add_argument("file", metavar="FILE", help="segmenter file, or its address on the Hugging Face hub, hf://owner/name")
    predict.add_argument(
        "photos", nargs="+", metavar="PHOTO", help="image, video (extra video), folder, or pattern such as 'photos/**/*.jpg'"
    )
    predict.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the predictions")
    predict.add_argument(
        "--probabilities", action="store_true", help="write probabilities/<name>.npy, too: (classes, height, width)"
    )
    predict.add_argument("--overwrite", action="store_true", help="replace predictions that exist already")
    predict.add_argument("--batch-size", type=_batch, default=1, metavar="N", help="images of equal size in one forward pass")
    predict.add_argument("--window", type=_positive, metavar="PIXELS", help="side of the sliding windows (default: the file's)")
    predict.add_argument(
        "--stride", type=_positive, metavar="PIXELS", help="distance between windows (default: two thirds of the window)"
    )
    predict.add_argument(
        "--eval-edge",
        type=_natural,
        metavar="PIXELS",
        help="resize images to this shortest edge, or 0 for none; masks keep the image's size (default: the file's)",
    )
    predict.add_argument("--weights", type=Path, metavar="FILE", help="weights of the backbone (default: timm's, downloaded)")
    predict.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    predict.add_argument(
        "--compile", action="store_true", help="compile the segmenter with torch.compile: pays for many images of one size"
    )
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    require("PIL", "train")
    from rein.dgss import prediction

    file = Path(fetch(options.file))
    settings = prediction.Settings(
        model=prediction.digest(file),
        window=options.window,
        stride=options.stride,
        eval_edge=options.eval_edge,
        probabilities=options.probabilities,
        weights=None if options.weights is None else prediction.digest(options.weights),
    )
    sources, skipped = prediction.find_sources(options.photos, options.out)
    folder = prediction.PredictionFolder(options.out, settings)
    folder.check(sources, overwrite=options.overwrite)
    segmenter = prediction.load(file, options.weights, options.device, compiled=options.compile)
    report = prediction.predict(segmenter, sources, folder, batch_size=options.batch_size, title=f"Predictions of {options.file}")
    for problem in report.problems:
        print(f"rein: no prediction: {one_line(problem, 1000)}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} videos in the folders are left out; name a video to predict it, such as {skipped[0]}")
    kept = f", {report.kept} of them earlier" if report.kept else ""
    print(
        f"{report.written + report.kept} predictions are in {options.out / 'predictions'}{kept}; to see them, open {folder.page}"
    )
    return 1 if report.problems else 0


def _add_info(commands: Any) -> None:
    info = commands.add_parser(
        "info",
        help="describe an adapter or segmenter file",
        description="Print what a file holds, which backbone it belongs to and how to load it.",
    )
    info.add_argument("file", metavar="FILE", help="the file, or its address on the Hugging Face hub, hf://owner/name@revision")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    print(checkpoint.describe_file(options.file))
    return 0


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a segmenter for other runtimes: torch.export or ONNX",
        description="Write a segmenter, weights of the backbone included, to OUT: a file of torch.export (.pt2) or ONNX (.onnx). "
        "The batch is dynamic, and so are height and width unless the backbone has a fixed size. The command compares the outputs "
        "of OUT with the segmenter's, prints the largest difference, and writes nothing if they differ.",
    )
    export.add_argument("file", type=Path, metavar="FILE", help="the segmenter, a file that rein fit or Segmenter.save wrote")
    export.add_argument("out", type=Path, metavar="OUT", help="the file to write: .pt2 or .onnx")
    export.add_argument("--format", choices=("pt2", "onnx"), help="format of OUT (default: its suffix)")
    export.add_argument("--weights", type=Path, metavar="PATH", help="weights of the backbone (default: timm's pretrained ones)")
    export.add_argument("--batch", type=_positive, metavar="N", help="fix the number of images")
    export.add_argument(
        "--size", type=_positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="fix the size of the images in pixels"
    )
    export.add_argument("--normalise", action="store_true", help="put the normalisation inside: OUT takes uint8 images, 0 to 255")
    export.add_argument("--argmax", action="store_true", help="put the argmax inside: OUT returns classes instead of logits")
    export.add_argument("--int8", action="store_true", help="store the weights of the frozen backbone in int8")
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from rein import export
    from rein.segmenter import Segmenter

    export.check_path(options.out, options.format, options.overwrite)
    if options.out.exists() and options.file.exists() and options.out.samefile(options.file):
        raise InputError(f"OUT is FILE, {options.file}; expected another file, because OUT would replace the segmenter.")
    if options.int8:
        require("torchao", "int8")
    segmenter = Segmenter.load(options.file, weights=options.weights)
    if options.int8:
        before = export.example_logits(segmenter)
        layers = export.quantize_backbone(segmenter)
        change = (export.example_logits(segmenter) - before).abs().max()
    done = export.export_segmenter(
        segmenter,
        options.out,
        format=options.format,
        batch=options.batch,
        size=None if options.size is None else tuple(options.size),
        normalise=options.normalise,
        argmax=options.argmax,
        overwrite=options.overwrite,
    )
    print(f"wrote {done.path}: {done.bytes / 1e6:.1f} MB")
    print(f"input images: {done.input}")
    print(f"output {done.output}")
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in done.shapes)
    if options.int8:
        print(f"int8 weights of {layers} layers change the logits by up to {change:.1e}, of up to {before.abs().max():.1f}")
    print(f"largest difference from the segmenter: {done.difference:.1e}, of logits up to {done.scale:.1f}; images {shapes}")
    return 0


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="state what memory a run needs on each device, and the largest batch, without weights or a GPU",
        description="Count the memory of a training step on tensors without values: weights, gradients, optimizer state and "
        "activations, with and without gradient checkpointing, with DDP and with FSDP2; and the largest batch that fits. The exit "
        "code is 1 if the run does not fit. Downloads nothing.",
        formatter_class=_HelpWithDefaults,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a configuration file")
    plan.add_argument("--devices", type=_positive, default=1, metavar="N", help="number of devices")
    plan.add_argument("--memory", type=float, default=80, metavar="GB", help="memory of each device, in 10^9 bytes")
    plan.add_argument("--batch-size", type=_positive, metavar="N", help="images per step and device (default: the recipe's)")
    plan.add_argument("--crop", type=_positive, metavar="PIXELS", help="side of the crops (default: the recipe's)")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    require("lightning", "train")
    from rein.dgss.planning import plan

    found = plan(options.recipe, devices=options.devices, memory=options.memory, batch=options.batch_size, crop=options.crop)
    print(found)
    return 0 if found.fits else 1


def _add_backbones(commands: Any) -> None:
    backbones = commands.add_parser(
        "backbones",
        help="list timm's models that rein supports: blocks, widths, adapter parameters",
        description="List, for every timm model that PATTERN matches, the number and widths of the adapted blocks, the prefix "
        "tokens that pass through unchanged, the adapter's parameters and their fraction; or why the model is not supported. "
        "Downloads nothing.",
    )
    backbones.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="shell-style pattern, such as '*dinov2*' (default: all)"
    )
    backbones.set_defaults(run=_backbones)


def _backbones(options: argparse.Namespace) -> int:
    from rein.testing.models import POCKET, pocket_vit

    if options.pattern == POCKET:
        print(catalogue.describe_model(pocket_vit(pretrained=False), options.pattern))
        return 0
    refused = 0
    names = catalogue.names(options.pattern)
    for name in names:
        entry = catalogue.describe(name)
        refused += entry.refusal is not None
        print(entry, flush=True)
    print(f"{len(names) - refused} of {len(names)} supported, {refused} not")
    return 0


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert the authors' checkpoints to rein's files, and back",
        description="Convert an official checkpoint (.pth) into a file for rein.load or rein.Segmenter.load. If it holds the "
        "backbone's weights, they are written to OUT.backbone.safetensors.",
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the file to convert")
    convert.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    convert.add_argument("--backbone", metavar="NAME", help="timm's name of the backbone, such as vit_large_patch14_dinov2")
    convert.add_argument(
        "--no-softmax", action="store_true", help="the adapter was trained without softmax, which the file does not state"
    )
    convert.add_argument("--zero-init", action="store_true", help="the adapter started at zero and has no scale")
    convert.add_argument("--to-official", action="store_true", help="convert rein's file to the authors' layout instead")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from rein import official  # imports the heads

    if options.to_official:
        official.to_official(options.checkpoint, options.out)
        print(f"wrote {options.out}")
        return 0
    if options.backbone is None:
        raise InputError(
            "--backbone is missing; expected timm's name of the backbone that the checkpoint belongs to, such as "
            "vit_large_patch14_dinov2."
        )
    backbone = catalogue.build_on_meta(options.backbone)
    for path in official.convert_file(
        options.checkpoint, options.out, backbone, use_softmax=not options.no_softmax, zero_init=options.zero_init
    ):
        print(f"wrote {path}")
    return 0


def _add_recipes(commands: Any) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="list the recipes: the paper's experiments as configurations for rein fit",
        description="List the recipes, or print the complete configuration of one: rein recipes NAME > mine.yaml.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="recipe, or configuration file, to print")
    recipes.set_defaults(run=_recipes)


def _recipes(options: argparse.Namespace) -> int:
    require("yaml", "train")
    from rein.dgss import recipes

    if options.name is not None:
        print(recipes.to_yaml(recipes.resolve(options.name), recipes.title_of(options.name)), end="")
        return 0
    found = recipes.listed()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:{width}}  {recipe.title}{f' -- published: {recipe.published}' if recipe.published else ''}")
    print(f"{len(found)} recipes. To run one: rein fit --config NAME --data.root FOLDER")
    return 0


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare runs that rein test has evaluated: a table, and a picture of each domain",
        description="Print a table of runs that rein test has evaluated. Writes table.txt, results.json, index.html with sortable "
        "tables and a slider between the predictions, panel.png and, for each domain, a picture with image, truth, the prediction "
        "of every run, and its errors in red.",
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, in the order of the columns")
    compare.add_argument("--names", type=_names, metavar="A,B,...", help="names of the runs (default: their methods)")
    compare.add_argument("--domains", type=_names, metavar="A,B,...", help="domains to show in panel.png (default: all)")
    compare.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="folder of the results (default: runs/compare)"
    )
    compare.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    require("lightning", "train")
    from rein.dgss.evaluation.comparison import compare

    print(compare(options.runs, options.out, options.names, options.domains))
    print(f"table.txt, results.json and the panels are in {options.out}; to see them, open {options.out / 'index.html'}")
    return 0


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data", help="list the data sets, or check one on disk", description="Data sets in their publishers' own folder layouts."
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the data sets: folders, label encoding, publisher")
    listing.set_defaults(run=_data_list)
    check = actions.add_parser(
        "check",
        help="read a data set completely: counts, bad pairs, classes, a picture",
        description="Read every image and label of a data set. Prints counts, sizes, how labels encode classes, the share of each "
        "class, bad pairs and labels without an image. The exit code is 2 if anything is wrong, also if a class never occurs in the "
        "labels of your own folder, which rein fit would refuse.",
        formatter_class=_HelpWithDefaults,
    )
    check.add_argument("name", metavar="NAME", help="a name of rein data list")
    check.add_argument("path", nargs="?", type=Path, metavar="PATH", help="folder of the data set, as its publisher packs it")
    check.add_argument("--split", default="train", help="split to read")
    check.add_argument("--limit", type=_positive, metavar="N", help="read at most N pairs, evenly spaced")
    check.add_argument("--out", type=Path, metavar="FILE.png", help="write a picture of some pairs to this file")
    check.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the data set, such as condition=night"
    )
    check.add_argument("--max-problems", type=_positive, default=20, metavar="N", help="list at most N problems of each kind")
    check.add_argument(
        "--allow-absent-classes", action="store_true", help="accept labels in which a class never occurs, as in a target domain"
    )
    check.set_defaults(run=_data_check)


def _data_list(options: argparse.Namespace) -> int:
    require("PIL", "train")
    from rein.dgss.data import check

    print(check.table())
    return 0


def _data_check(options: argparse.Namespace) -> int:
    require("PIL", "train")
    from rein.dgss.data import check, datasets

    report = check.check(
        options.name,
        options.path,
        options.split,
        datasets.parse_options(options.name, options.option),
        limit=options.limit,
        out=options.out,
    )
    print(report.text(options.max_problems))
    if options.out is not None and report.read:
        print(f"wrote {options.out}")
    if options.allow_absent_classes:
        report.absent = ""
    if report.verdict():
        raise InputError(report.verdict())
    return 0


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train on one domain, evaluate on others that training never shows",
        description="Train on ONE source domain and evaluate on every other: the frozen backbone with a head only, full "
        "fine-tuning, and Rein with its default configuration. Without --data, street scenes are generated: clear day is the "
        "source; fog, night, rain and snow are the targets (pocket_vit was pretrained on such images, without labels). Writes a "
        "run folder for each method, table.txt, results.json and panel.png. The same command again keeps finished runs and "
        "resumes interrupted ones.",
        formatter_class=_HelpWithDefaults,
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="folder of the results")
    demo.add_argument(
        "--backbone",
        default="pocket_vit",
        metavar="NAME",
        help="pocket_vit, whose weights are part of rein, or a columnar transformer of timm: ViT, DINOv2, EVA02, ...; the "
        "method's settings and learning rates depend on it",
    )
    demo.add_argument("--pretrained", action="store_true", help="download timm's weights")
    demo.add_argument("--patch-size", type=_positive, metavar="P", help="patch size of the backbone in pixels")
    demo.add_argument(
        "--full", action=argparse.BooleanOptionalAction, default=True, help="fine-tune the whole backbone, too (default: yes)"
    )
    demo.add_argument("--steps", type=_positive, default=400, metavar="N", help="optimizer steps per method")
    demo.add_argument("--batch-size", type=_batch, default=4, metavar="N", help="images per step")
    demo.add_argument(
        "--lr",
        type=_rate,
        metavar="RATE",
        help="learning rate of the head (default: 0.03 for pocket_vit, 0.001 for others); those of the adapter (0.01, "
        "0.0001) and of the backbone (0.001, 0.00001) change in proportion",
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of weights, scenes and data order")
    demo.add_argument("--scenes", type=_positive, metavar="N", help="number of generated scenes to train on (default: 160)")
    real = demo.add_argument_group(
        "your own images",
        'FOLDER/index.json may hold {"classes": ["road", ...], "palette": [[128, 64, 128], ...], "ignore_label_on_disk": 11}; '
        'label 255 is always ignored. Masks of 0 and 255 need "values": [0, 255], coloured labels "colors": {"road": [128, 64, 128], '
        "...}.",
    )
    real.add_argument("--data", type=Path, metavar="FOLDER", help="folder that holds <domain>/images/* and <domain>/labels/*.png")
    real.add_argument("--source", metavar="NAME", help="the domain to train on; all others are targets")
    real.add_argument("--classes", type=_names, metavar="A,B,...", help="class names, if FOLDER has no index.json")
    real.add_argument(
        "--ignore-label", type=_natural, action="append", metavar="N", help="a label value that is ignored, besides 255"
    )
    real.add_argument("--crop", type=_crop, metavar="PIXELS", help="side of the training crops (default: 256)")
    real.add_argument(
        "--allow-absent-classes", action="store_true", default=None, help="train although a class never occurs in the source"
    )
    real.add_argument("--limit", type=_positive, metavar="N", help="evaluate at most N images of each domain")
    demo.set_defaults(run=_demo)


_OF_DATA = ("source", "classes", "ignore_label", "crop", "allow_absent_classes", "limit")


def _demo(options: argparse.Namespace) -> int:
    require("lightning", "train")
    from rein.dgss import demo
    from rein.testing.models import POCKET

    data = None
    if options.data is None:
        given = [name for name in _OF_DATA if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} belongs to --data FOLDER, which is missing.")
    else:
        if options.scenes is not None:
            raise InputError("--scenes belongs to the generated streets; leave it out with --data.")
        if options.source is None:
            raise InputError(f"--source is missing; expected one of {', '.join(demo.find_domains(options.data))}.")
        data = demo.FolderData(
            root=options.data,
            source=options.source,
            classes=options.classes,
            ignored=tuple(options.ignore_label or ()),
            crop=options.crop or 256,
            limit=options.limit,
            allow_absent_classes=bool(options.allow_absent_classes),
        )
        if options.backbone == POCKET:
            print("pocket_vit has never seen a photograph. For meaningful figures, use --backbone NAME --pretrained.")
    settings = demo.Options(
        out=options.out,
        backbone=options.backbone,
        pretrained=options.pretrained or options.backbone == POCKET,
        patch_size=options.patch_size,
        full=options.full,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        scenes=options.scenes or 160,
        data=data,
    )
    table = demo.run(settings)
    print(table)
    source = "day" if data is None else data.source
    print(f"mIoU in per cent; trained on {source!r} only. table.txt, results.json and panel.png are in {options.out}")
    print(f"To continue: rein test --config {options.out / 'rein' / 'config.yaml'}")
    return 0


# -- types of options


def _positive(text: str) -> int:
    return _number(text, 1)


def _natural(text: str) -> int:
    return _number(text, 0)


def _batch(text: str) -> int:
    return _number(text, 1, 4096)


def _crop(text: str) -> int:
    return _number(text, 16, 8192)


def _seed(text: str) -> int:
    return _number(text, 0, 1_000_000)


def _number(text: str, least: int, most: int = 10**9) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 100")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
