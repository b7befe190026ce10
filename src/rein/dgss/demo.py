"""The main job: fit on one source domain, judge on every other, for the frozen backbone, for Rein, and for full fine-tuning.

Targets are never looked at before the last state is chosen: the best state is the one with the highest mIoU on held-out SOURCE
images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import rein
from rein import backbones, heads
from rein.checkpoint import replace_file
from rein.dgss.domains import Domains
from rein.dgss.progress import bar
from rein.dgss.report import Result, write_json, write_panel
from rein.dgss.training import BestState, Schedule, fit, judge
from rein.dgss.transforms import Normalize
from rein.dgss.weights import POCKET, make_backbone
from rein.errors import InputError
from rein.segmenter import Segmenter, default_indices

FROZEN, REIN, FULL = "frozen", "rein", "full"


@dataclass(frozen=True)
class Options:
    """What `rein demo` was asked for; see its help for each."""

    out: Path
    backbone: str
    schedule: Schedule
    config: rein.ReinConfig
    pretrained: bool = False
    patch_size: int | None = None
    full: bool = False


def suited(backbone: str) -> tuple[rein.ReinConfig, dict[str, Any]]:
    """The adapter that a backbone gets, and settings of `Schedule`: the head's learning rate, and its parts for what is tuned below.

    The head uses no queries, and W_f starts at zero, as in the paper's text. Rates and form of `pocket_vit`'s were chosen by day
    (`benchmarks/generalisation`): a narrow backbone gains more from MLPs of its own in every layer. Others get Rein's default and the
    paper's rates, 1e-4 and 1e-5, below a new head.
    """
    if backbone == POCKET:
        core = replace(rein.ReinConfig.preset("core"), zero_init=True)
        return core, {"lr": 0.03, "adapter_factor": 0.01, "backbone_factor": 1 / 30}
    return rein.ReinConfig(query_dim=None, zero_init=True), {"lr": 1e-3, "adapter_factor": 0.1, "backbone_factor": 0.01}


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C: `str()` says what was saved and where."""


def run(domains: Domains, options: Options, say: Callable[[str], None] = print) -> list[Result]:
    """Fit and judge every method, and write `results.json`, `adapter.safetensors`, `panel.png` and the best states to `out`.

    Raises:
        Interrupted: Ctrl-C; what was saved until then stays.
        InputError: `out` cannot be made.
    """
    states = options.out / "states"
    try:
        states.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {states}: {error.strerror}.") from error
    methods = [FROZEN, REIN, *([FULL] if options.full else [])]
    files = [options.out / name for name in ("results.json", "adapter.safetensors", "panel.png")]
    for file in [*files, *(states / f"{method}.safetensors" for method in methods)]:
        if file.is_dir():  # said now and not after the work
            raise InputError(f"{file} is a folder; choose another --out.")
    torch.manual_seed(options.schedule.seed)
    backbone, loaded = make_backbone(options.backbone, options.pretrained, options.patch_size, say)
    results: list[Result] = []
    examples: dict[str, dict[str, np.ndarray]] = {}
    for method in methods:
        best = BestState(states / f"{method}.safetensors", _save_full if method == FULL else _save)
        try:
            result, predictions = _run_method(method, copy.deepcopy(backbone), domains, options, best)
        except KeyboardInterrupt:
            raise Interrupted(_what_is_saved(method, best, results)) from None
        results.append(result)
        examples[method] = predictions
    settings = {
        "backbone": options.backbone,
        "patch_size": options.patch_size,
        "weights": "pretrained" if loaded else "random",
        "adapter": options.config.to_dict(),
        "schedule": asdict(options.schedule),
    }
    write_json(options.out / "results.json", settings, domains, results)
    write_panel(options.out / "panel.png", domains, {result.method: result.miou for result in results}, examples)
    if not loaded:
        say(
            "The backbone has RANDOM weights: what follows shows how the comparison works, not what Rein does for a foundation model."
        )
    return results


def _run_method(
    method: str, backbone: nn.Module, domains: Domains, options: Options, best: BestState
) -> tuple[Result, dict[str, np.ndarray]]:
    schedule = options.schedule
    widths = backbones.map_channels(backbone)
    in_channels = [widths[index] for index in default_indices(len(widths), 4)]
    torch.manual_seed(schedule.seed + 1)  # every method starts from the same head
    head = heads.LinearHead(in_channels, len(domains.space.names))  # what it gets right, the features knew
    if method == REIN:
        rein.wrap(backbone, options.config)
    elif method == FROZEN:
        backbone.requires_grad_(False)
    segmenter = Segmenter(backbone, head)
    normalize = Normalize(*backbones.normalization(backbone))
    started = time.monotonic()
    fit(segmenter, domains.train, domains.validation, normalize=normalize, schedule=schedule, best=best, name=method)
    seconds = time.monotonic() - started
    if method == FULL:
        segmenter.load_state_dict(load_file(best.path))
    else:
        segmenter = Segmenter.load(best.path, backbone)
        if method == REIN:
            rein.save(backbone, options.out / "adapter.safetensors")
    confusions = {}
    for name, dataset in domains.tests.items():
        confusions[name] = judge(segmenter, dataset, normalize, partial(bar, desc=f"judge {method}: {name}"))
    device = next(segmenter.parameters()).device
    predictions = {
        name: segmenter.predict(normalize(domains.example(name)[0][None].to(device))).argmax(1)[0].cpu().numpy()
        for name in domains.tests
    }
    result = Result(
        method=method,
        backbone_parameters=sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith("rein.")),
        tuned_parameters=sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        head_parameters=sum(p.numel() for p in head.parameters()),
        seconds=seconds,
        best_step=best.step,
        source_validation_miou=best.miou or 0.0,
        miou={name: confusion.mean_iou() for name, confusion in confusions.items()},
        iou={
            name: dict(zip(domains.space.names, confusion.iou().tolist(), strict=True)) for name, confusion in confusions.items()
        },
    )
    return result, predictions


def _save(segmenter: Segmenter, path: Path) -> None:
    segmenter.save(path)


def _save_full(segmenter: Segmenter, path: Path) -> None:
    replace_file(path, to_bytes({name: tensor.cpu().contiguous() for name, tensor in segmenter.state_dict().items()}))


def _what_is_saved(method: str, best: BestState, results: Sequence[Result]) -> str:
    if best.miou is not None:
        saved = f"the best state of {method} (step {best.step}, source mIoU {100 * best.miou:.1f}) is in {best.path}"
    else:
        saved = f"{method} had no state worth saving yet"
    done = "; ".join(f"{r.method} is finished" for r in results)
    return f"interrupted: {saved}" + (f"; {done}, its state beside it." if done else ".")
