"""`rein demo`: train the frozen backbone, full fine-tuning and Rein on one domain, and compare them on the others.

A loop over recipes: each method is fitted and tested as `rein fit` and `rein test` do, in a run folder of its own, and the runs are
compared as `rein compare` does. Targets are never read in training; the best state on held-out SOURCE pairs is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rein.dgss import commands, recipes
from rein.dgss.data.check import check
from rein.dgss.evaluation.comparison import compare
from rein.errors import InputError
from rein.files import describe_missing
from rein.testing.models import POCKET

RECIPES = {"frozen": "streets-frozen", "full": "streets-full", "rein": "streets-rein"}  # name of the run -> recipe
_RESULTS = ("results.json", "table.txt", "panel.png")


@dataclass(frozen=True, kw_only=True)
class FolderData:
    """A user's own images.

    Attributes:
        root: holds `<domain>/images/*` and `<domain>/labels/*.png`.
        source: the domain to train on; all others are targets.
        classes: class names, if the folder has no `index.json`.
        ignored: label values that are ignored, besides 255.
        crop: side of the training crops in pixels.
        limit: evaluate at most this many pairs of each domain.
        allow_absent_classes: train although a class never occurs in the source.
    """

    root: Path
    source: str
    classes: list[str] | None = None
    ignored: tuple[int, ...] = ()
    crop: int = 256
    limit: int | None = None
    allow_absent_classes: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `rein demo`; its help describes them."""

    out: Path
    backbone: str = POCKET
    pretrained: bool = True
    patch_size: int | None = None
    full: bool = True
    steps: int = 400
    batch_size: int = 4
    lr: float | None = None
    seed: int = 0
    scenes: int = 160
    data: FolderData | None = None


def run(options: Options, say: Callable[[str], object] = print) -> str:
    """Fit, test and compare every method. Finished runs in the same folder are kept, interrupted ones resume.

    Writes to `options.out`: a run folder for each method, `table.txt`, `results.json`, `panel.png` and a picture of each domain.

    Returns:
        The table, as text.

    Raises:
        InputError: bad data or settings, or a run with other settings in the same folder.
        Interrupted: Ctrl-C; the text says what was kept.
    """
    configs = configurations(options)
    for name in _RESULTS:
        if (options.out / name).is_dir():  # found before hours of training
            raise InputError(f"{options.out / name} is a folder, but a file is to be written there. Choose another --out.")
    folders = []
    for name, config in configs.items():
        folder = options.out / name
        say(f"{name}: fit and test, in {folder}")
        text = recipes.to_yaml({**config, "out": str(folder)}, f"rein demo: {name}")
        commands.run(["fit", "--config", text, "--ckpt_path", "last"], quiet=True)
        commands.run(["test", "--config", text], quiet=True)  # not the saved configuration, whose targets may differ
        folders.append(folder)
    table = compare(folders, options.out, list(configs))
    if not options.pretrained:
        say(
            "The backbone has RANDOM weights: the table shows how the comparison works, not what Rein does for a foundation model."
        )
    return table


def configurations(options: Options) -> dict[str, dict[str, Any]]:
    """The configuration of each run, by its name: the recipes for generated streets, with what the options change.

    Raises:
        InputError: a folder, a file or a domain of the user's own data is missing or cannot be read.
    """
    data = _street_data(options) if options.data is None else _folder_data(options.data)
    configs = {}
    for name, recipe in RECIPES.items():
        if name == "full" and not options.full:
            continue
        config = recipes.resolve(recipe)
        config["seed_everything"] = options.seed
        config["model"] |= {"backbone": options.backbone, "pretrained": options.pretrained, "patch_size": options.patch_size}
        if options.backbone != POCKET:
            config["model"] |= _PAPER_RATES
        if options.lr is not None:
            config["model"]["lr"] = options.lr
        config["data"] |= data | {"batch_size": options.batch_size}
        interval = max(1, options.steps // 5)
        config["trainer"] |= {"max_steps": options.steps, "val_check_interval": interval}
        config["checkpoint_every"] = interval
        configs[name] = config
    return configs


# The paper's rates, 1e-4 for an adapter and 1e-5 for the backbone, and 1e-3 for a new linear head. The recipes' rates were chosen
# for pocket_vit.
_PAPER_RATES = {"lr": 1e-3, "adapter_factor": 0.1, "backbone_factor": 0.01}


def _street_data(options: Options) -> dict[str, Any]:
    """Generated streets: `scenes` to train on, 1/8 of that number for validation, 3/20 of it in each target domain."""
    data = recipes.resolve(RECIPES["rein"])["data"]
    counts = {
        "sources": options.scenes,
        "validation": max(1, options.scenes // 8),
        "targets": max(1, options.scenes * 3 // 20),
    }
    for role, count in counts.items():
        for domain in data[role]:
            domain["options"] |= {"count": count, "seed": options.seed}
    return {role: data[role] for role in counts}


def _folder_data(data: FolderData) -> dict[str, Any]:
    """A folder of domains. The last tenth of the source pairs is held out for validation."""
    names = find_domains(data.root)
    if data.source not in names:
        raise InputError(f"{data.root} has no domain {data.source!r}; expected one of {', '.join(names)}.")
    if len(names) < 2:
        raise InputError(f"{data.root} has only {data.source!r}; expected at least one other domain to evaluate on.")
    options = {key: value for key, value in (("classes", data.classes), ("ignored", list(data.ignored))) if value}
    counts = {}
    for name in names:  # read every file once, so that a bad one is found before training
        report = check("folder", data.root, name, options)
        if report.problems:
            raise InputError(report.problems[0])
        if report.absent and name == data.source and not data.allow_absent_classes:
            raise InputError(report.absent)
        counts[name] = report.read
    if counts[data.source] < 2:
        raise InputError(
            f"{data.root / data.source} has {counts[data.source]} image; expected at least 2, one to train on and one for "
            "validation."
        )
    domains = {
        name: {"dataset": "folder", "path": str(data.root), "split": name, "title": name, "options": options} for name in names
    }
    return {
        "sources": [domains[data.source]],
        "validation": [],
        "held_out": max(1, counts[data.source] // 10),  # the last ones: neighbouring frames of a drive are nearly equal
        "targets": [domain for name, domain in domains.items() if name != data.source],
        "crop": data.crop,
        "limit": data.limit,
        "allow_absent_classes": data.allow_absent_classes,
    }


def find_domains(root: Path) -> list[str]:
    """The domains below a folder, sorted: folders with an `images` folder inside.

    Raises:
        InputError: `root` is not a folder, or has no domains.
    """
    if not root.is_dir():
        raise InputError(
            f"{describe_missing(root)}; expected a folder that holds <domain>/images/* and <domain>/labels/*.png. Pass one with "
            "--data."
        )
    domains = sorted(entry.name for entry in root.iterdir() if (entry / "images").is_dir() and not entry.name.startswith("."))
    if not domains:
        raise InputError(f"{root} has no domains; expected <domain>/images/* and <domain>/labels/*.png in it.")
    return domains
