"""The `rein` command. Bad input gets one line on standard error and exit code 2; Ctrl-C gets 130."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rein import catalogue, checkpoint
from rein._version import __version__
from rein.errors import InputError, ReinError
from rein.extras import require


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # `rein backbones | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ReinError as error:
        print(f"rein: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rein: interrupted.", file=sys.stderr)
        return 130


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
    demo = commands.add_parser(
        "demo",
        help="fit on one domain, judge on others that were never shown",
        description="Fit a head and an adapter on ONE source domain and report the mIoU on every other, for the frozen backbone with "
        "a head only, for Rein, and with --full for full fine-tuning. Without --data, street scenes are generated: clear day is the "
        "source, fog, night, rain and snow are never shown in training. Writes results.json, adapter.safetensors and panel.png.",
        formatter_class=_Defaults,
    )
    _add_demo_options(demo)
    demo.set_defaults(run=_demo)
    return parser


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where the results go")
    demo.add_argument(
        "--backbone",
        default="vit_tiny_patch16_224",
        metavar="NAME",
        help="a columnar transformer of timm: ViT, DINOv2, EVA02, ...",
    )
    demo.add_argument("--pretrained", action="store_true", help="use timm's weights, where the hub can be reached")
    demo.add_argument("--patch-size", type=_positive, metavar="P", help="build the backbone with this patch size, in pixels")
    demo.add_argument("--full", action="store_true", help="also fine-tune the whole backbone, at a tenth of the rate")
    demo.add_argument("--steps", type=_positive, default=250, metavar="N", help="optimizer steps per method")
    demo.add_argument("--batch-size", type=_batch, default=4, metavar="N", help="images per step")
    demo.add_argument("--lr", type=_rate, default=1e-3, metavar="RATE", help="learning rate of head and adapter")
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


def _demo(options: argparse.Namespace) -> int:
    require("lightning", "train")
    from rein.dgss import data, demo, domains, report
    from rein.dgss.training import Schedule

    if options.data is None:
        given = [name for name in ("source", "classes", "ignore_label", "crop", "limit") if getattr(options, name) is not None]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} belongs to --data FOLDER, which was not given.")
        chosen, crop = domains.generated_domains((128, 256), options.seed, options.scenes or 160), None
    else:
        if options.scenes is not None:
            raise InputError("--scenes belongs to the generated streets; with --data it means nothing.")
        if options.source is None:
            raise InputError(f"--source is missing: which of {', '.join(data.find_domains(options.data))} shall it fit on?")
        data.find_domains(options.data)
        space = data.label_space(options.data, options.classes, options.ignore_label or ())
        chosen = domains.folder_domains(options.data, options.source, space, options.limit)
        crop = options.crop or 256
    schedule = Schedule(options.steps, options.batch_size, options.lr, crop=crop, seed=options.seed)
    settings = demo.Options(options.out, options.backbone, options.pretrained, options.patch_size, options.full, schedule)
    try:
        results = demo.run(chosen, settings)
    except demo.Interrupted as interrupted:
        print(f"rein: {interrupted}", file=sys.stderr)
        return 130
    print(report.table(chosen, results))
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
