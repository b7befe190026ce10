"""The `rein` command. Bad input gets one line on standard error and exit code 2; Ctrl-C gets 130."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rein import catalogue, checkpoint
from rein._version import __version__
from rein.errors import InputError, ReinError
from rein.extras import require


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given and given[0] in EXPERIMENT:
            return _experiment(given)
        options = _parser().parse_args(given)
        return options.run(options)
    except BrokenPipeError:  # `rein backbones | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ReinError as error:
        print(f"rein: {' '.join(_said(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rein: interrupted.", file=sys.stderr)
        return 130


# commands whose options are those of Lightning's command line, beside the model's and the data's
EXPERIMENT = {
    "fit": "train on the source domains of a recipe or a configuration",
    "validate": "judge a run on its held-out source pairs",
    "test": "judge a run on its targets: mIoU by domain and class, JSON, examples",
    "predict": "predict a folder of images",
}


def _said(error: ReinError) -> str:
    """What an error says, without the traceback that torch puts before what a loading process said."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2] if "Original Traceback" in text else text


class _Parser(argparse.ArgumentParser):
    """One line for a bad option, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rein",
        description="Turn a frozen vision transformer into a domain-general dense predictor by training about 1 % of it.",
    )
    parser.add_argument("--version", action="version", version=f"rein {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info", help="what a file is and what it fits", description="Print what a file is and what it fits."
    )
    info.add_argument("file", type=Path)
    info.set_defaults(run=_info)
    backbones = commands.add_parser(
        "backbones",
        help="what rein makes of timm's models: blocks, widths, prefix rows, parameters, or why not",
        description="List, for every model of timm that PATTERN names, the blocks that an adapter refines, their widths, the "
        "prefix rows that pass through, the adapter's parameters and their fraction; or why not. Nothing is downloaded.",
    )
    backbones.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="shell-style, as in '*dinov2*' (default: all)"
    )
    backbones.set_defaults(run=_backbones)
    convert = commands.add_parser(
        "convert",
        help="the authors' checkpoints to rein's files, and back",
        description="Convert an official checkpoint (.pth) into a file that rein.load or rein.Segmenter.load reads, for a "
        "backbone of timm. Where it carries the backbone's weights, they are written beside as OUT.backbone.safetensors.",
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--backbone", metavar="NAME", help="timm's name of the backbone, as in vit_large_patch14_dinov2")
    convert.add_argument(
        "--no-softmax", action="store_true", help="the adapter was trained without softmax, which files do not say"
    )
    convert.add_argument("--zero-init", action="store_true", help="the adapter started at zero and has no scale")
    convert.add_argument("--to-official", action="store_true", help="the other way: from rein's file to the authors' layout")
    convert.set_defaults(run=_convert)
    for name, text in EXPERIMENT.items():
        commands.add_parser(name, help=text, add_help=False)
    recipes = commands.add_parser(
        "recipes",
        help="the paper's experiments, as configurations for rein fit",
        description="List the recipes, or print one: rein recipes NAME > mine.yaml gives a file to change.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    recipes.set_defaults(run=_recipes)
    compare = commands.add_parser(
        "compare",
        help="several judged runs side by side: a table, and a panel for each domain",
        description="Print a table of runs that rein test has judged, and draw one panel for each domain: image, truth, what every "
        "run predicts, and its errors in red.",
    )
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, in the order of the columns")
    compare.add_argument("--names", type=_names, metavar="A,B,...", help="what the runs are called (default: their methods)")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="where the panels go")
    compare.set_defaults(run=_compare)
    _add_data_commands(commands)
    demo = commands.add_parser(
        "demo",
        help="fit on one domain, judge on others that were never shown",
        description="Fit a head and an adapter on ONE source domain and report the mIoU on every other, for the frozen backbone with "
        "a head only, for Rein, and with --full for full fine-tuning. Without --data, street scenes are generated: clear day is the "
        "source; fog, night, rain and snow are never shown in fitting (pocket_vit was pretrained on such images, without labels). "
        "Writes results.json, adapter.safetensors and panel.png.",
        formatter_class=_Defaults,
    )
    _add_demo_options(demo)
    demo.set_defaults(run=_demo)
    return parser


def _add_data_commands(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="which data sets can be opened, and whether one that lies here is whole",
        description="Data sets in their publishers' own folder layouts.",
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every data set: where its files lie, how its labels encode, where it is offered")
    listing.set_defaults(run=_data_list)
    check = actions.add_parser(
        "check",
        help="read a data set from end to end: counts, the first broken or missing pair, classes, a picture",
        description="Read every image and label of a data set and print counts, sizes, the first broken or missing pair and how much "
        "of it each class fills. The exit code is 2 where anything is wrong.",
        formatter_class=_Defaults,
    )
    check.add_argument("name", metavar="NAME", help="a name of `rein data list`")
    check.add_argument("path", nargs="?", type=Path, metavar="PATH", help="its folder, as its publisher packs it")
    check.add_argument("--split", default="train", help="which part of it")
    check.add_argument("--limit", type=_positive, metavar="N", help="read at most so many pairs, evenly spaced")
    check.add_argument("--out", type=Path, metavar="FILE.png", help="write a picture of some pairs there")
    check.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="what the data set offers, as condition=night"
    )
    check.set_defaults(run=_data_check)


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where the results go")
    demo.add_argument(
        "--backbone",
        default="pocket_vit",
        metavar="NAME",
        help="pocket_vit, whose weights come with rein, or a columnar transformer of timm: ViT, DINOv2, EVA02, ...; Rein's form and "
        "the learning rates follow from it",
    )
    demo.add_argument("--pretrained", action="store_true", help="use timm's weights, where the hub can be reached")
    demo.add_argument("--patch-size", type=_positive, metavar="P", help="build the backbone with this patch size, in pixels")
    demo.add_argument("--full", action="store_true", help="also fine-tune the whole backbone")
    demo.add_argument("--steps", type=_positive, default=800, metavar="N", help="optimizer steps per method")
    demo.add_argument("--batch-size", type=_batch, default=4, metavar="N", help="images per step")
    demo.add_argument(
        "--lr",
        type=_rate,
        metavar="RATE",
        help="learning rate of the head (default: 0.03 for pocket_vit, 0.001 for others); those of the adapter (0.0003, 0.0001) and "
        "of the backbone (0.001, 0.00001) follow in proportion",
    )
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the weights, the scenes and the data order")
    demo.add_argument("--scenes", type=_positive, metavar="N", help="generated scenes to fit on (default: 160)")
    real = demo.add_argument_group(
        "your own images",
        'FOLDER/index.json may hold {"classes": ["road", ...], "palette": [[128, 64, 128], ...], "ignore_label_on_disk": 11}; '
        "label 255 never counts.",
    )
    real.add_argument("--data", type=Path, metavar="FOLDER", help="holds <domain>/images/* and <domain>/labels/*.png")
    real.add_argument("--source", metavar="NAME", help="the domain to fit on; the others are judged on")
    real.add_argument("--classes", type=_names, metavar="A,B,...", help="class names, where FOLDER has no index.json")
    real.add_argument(
        "--ignore-label", type=_natural, action="append", metavar="N", help="a label that counts for nothing, besides 255"
    )
    real.add_argument("--crop", type=_crop, metavar="PIXELS", help="side of the training crops (default: 256)")
    real.add_argument("--limit", type=_positive, metavar="N", help="judge on at most so many images of each domain")


def _info(options: argparse.Namespace) -> int:
    print(checkpoint.describe_file(options.file))
    return 0


def _backbones(options: argparse.Namespace) -> int:
    if options.pattern == "pocket_vit":  # no model of timm's
        from rein.testing import pocket_vit

        print(catalogue.entry_of(pocket_vit(pretrained=False), options.pattern))
        return 0
    refused = 0
    names = catalogue.names(options.pattern)
    for name in names:
        entry = catalogue.describe(name)
        refused += entry.refusal is not None
        print(entry, flush=True)
    print(f"{len(names) - refused} adapted, {refused} not, of {len(names)}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from rein import official  # and with it the heads

    if options.to_official:
        official.to_official(options.checkpoint, options.out)
        print(f"wrote {options.out}")
        return 0
    if options.backbone is None:
        raise InputError("--backbone NAME is wanted: which model of timm the checkpoint is for, as in vit_large_patch14_dinov2.")
    backbone = catalogue.build_on_meta(options.backbone)
    for path in official.convert_file(
        options.checkpoint, options.out, backbone, use_softmax=not options.no_softmax, zero_init=options.zero_init
    ):
        print(f"wrote {path}")
    return 0


def _experiment(arguments: Sequence[str]) -> int:
    for module in ("lightning", "jsonargparse", "tensorboard"):
        require(module, "train")
    from rein.dgss import commands

    commands.run(arguments)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    require("yaml", "train")
    from rein.dgss import recipes

    if options.name is not None:
        print(recipes.find(options.name).path.read_text(encoding="utf-8"), end="")
        return 0
    found = recipes.listed()
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:{width}}  {recipe.title}{f' -- published: {recipe.aim}' if recipe.aim else ''}")
    print(f"{len(found)} recipes; rein fit --config NAME --data.root FOLDER runs one")
    return 0


def _compare(options: argparse.Namespace) -> int:
    require("lightning", "train")
    from rein.dgss import runs

    print(runs.compare(options.runs, options.out, options.names))
    print(f"panels and table.txt are in {options.out}")
    return 0


def _data_list(options: argparse.Namespace) -> int:
    require("PIL", "train")
    from rein.dgss import check

    print(check.table())
    return 0


def _data_check(options: argparse.Namespace) -> int:
    require("PIL", "train")
    from rein.dgss import check, datasets
    from rein.dgss.progress import bar

    asked = datasets.parse_options(options.name, options.option)
    report = check.check(
        options.name,
        options.path,
        options.split,
        asked,
        limit=options.limit,
        out=options.out,
        progress=lambda indices: bar(indices, "read"),
    )
    print(report.text())
    if options.out is not None and report.read:
        print(f"wrote {options.out}")
    if report.problems:
        raise InputError(f"{len(report.problems)} of {report.images} pairs are not good; the first: {report.problems[0]}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    require("lightning", "train")
    from rein.dgss import demo, domains, labels, report, weights
    from rein.dgss.training import Schedule

    if options.data is None:
        given = [name for name in ("source", "classes", "ignore_label", "crop", "limit") if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} belongs to --data FOLDER, which was not given.")
        chosen, crop = domains.generated_domains((128, 256), options.seed, options.scenes or 160), 96
    else:
        if options.scenes is not None:
            raise InputError("--scenes belongs to the generated streets; with --data it means nothing.")
        if options.source is None:
            raise InputError(f"--source is missing: which of {', '.join(domains.find_domains(options.data))} shall it fit on?")
        domains.find_domains(options.data)
        space = labels.label_space(options.data, options.classes, options.ignore_label or ())
        chosen = domains.folder_domains(options.data, options.source, space, options.limit)
        crop = options.crop or 256
        if options.backbone == weights.POCKET:
            print("pocket_vit has never seen a photograph: for figures that mean something, give --backbone NAME --pretrained.")
    config, rates = demo.suited(options.backbone)
    if options.lr is not None:
        rates["lr"] = options.lr
    settings = demo.Options(
        options.out,
        options.backbone,
        Schedule(steps=options.steps, batch_size=options.batch_size, crop=crop, seed=options.seed, **rates),
        config,
        pretrained=options.pretrained or options.backbone == weights.POCKET,
        patch_size=options.patch_size,
        full=options.full,
    )
    try:
        results = demo.run(chosen, settings)
    except demo.Interrupted as interrupted:
        print(f"rein: {interrupted}", file=sys.stderr)
        return 130
    print(report.table(results, [chosen.source]))
    print(f"rein: {config}")
    print(
        f"mIoU in per cent; fitted on {chosen.source!r} only. results.json, adapter.safetensors and panel.png are in {options.out}"
    )
    return 0


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
