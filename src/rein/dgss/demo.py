"""The main job: fit on one source domain, judge on every other, for the frozen backbone, for Rein, and for full fine-tuning.

Targets are never looked at before the last state is chosen: the best state is the one with the highest mIoU on held-out SOURCE
images.
"""

from __future__ import annotations

import copy
import io
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import lightning
import numpy as np
import timm
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

import rein
from rein import backbones, heads
from rein.checkpoint import replace_file
from rein.dgss import panel, scenes
from rein.dgss.data import CITYSCAPES, Folder, LabelSpace, Sample, Scenes, find_domains
from rein.dgss.training import BestState, Normalize, Schedule, fit, judge
from rein.errors import InputError
from rein.segmenter import Segmenter, default_indices

FROZEN, REIN, FULL = "frozen", "rein", "full"
HEAD_CHANNELS = 64


@dataclass(frozen=True)
class Domains:
    """Data for one comparison.

    Attributes:
        source: name of the source domain.
        space: what the labels mean.
        train: source pairs to fit on.
        validation: source pairs to choose the best state by.
        tests: domain -> pairs to judge on; never used before the end.
    """

    source: str
    space: LabelSpace
    train: Dataset[Sample]
    validation: Dataset[Sample]
    tests: dict[str, Dataset[Sample]]


@dataclass(frozen=True)
class Options:
    """What `rein demo` was asked for; see its help for each."""

    out: Path
    backbone: str
    pretrained: bool = False
    patch_size: int | None = None
    full: bool = False
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=200))
    # The head here uses no queries. The paper's zero-initialised W_f learns within a short run; s = 0.001 needs thousands of steps.
    config: rein.ReinConfig = field(default_factory=lambda: rein.ReinConfig(query_dim=None, zero_init=True))


@dataclass(frozen=True)
class Result:
    """How one method did.

    Attributes:
        method: `frozen`, `rein` or `full`.
        backbone_parameters: of the bare backbone.
        tuned_parameters: that train besides the head: those of the adapter, or of the whole backbone.
        head_parameters: of the head, the same for every method.
        seconds: of training.
        best_step: the step whose state was judged.
        source_validation_miou: by which that state was chosen, 0 to 1.
        miou: domain -> mean IoU, 0 to 1.
        iou: domain -> class -> IoU, 0 to 1, NaN where the class does not occur (null in results.json).
    """

    method: str
    backbone_parameters: int
    tuned_parameters: int
    head_parameters: int
    seconds: float
    best_step: int
    source_validation_miou: float
    miou: dict[str, float]
    iou: dict[str, dict[str, float]]


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C: `str()` says what was saved and where."""


def generated_domains(size: tuple[int, int], seed: int = 0, count: int = 160) -> Domains:
    """Street scenes: clear day to fit on, every other domain to be judged on.

    Args:
        size: (height, width) in pixels.
        seed: of the streets; other seeds share none of them.
        count: scenes to fit on. An eighth as many choose the best state, and three twentieths, the same streets in every domain, are
            judged on.
    """
    first = 3_000_000 * seed

    def make(domain: str, start: int, count: int) -> Scenes:
        seeds = range(first + start, first + start + count)
        return Scenes(domain, seeds, size, partial(_bar, desc=f"render {domain}"))

    source = scenes.DOMAINS[0]
    return Domains(
        source=source,
        space=CITYSCAPES,
        train=make(source, 0, count),
        validation=make(source, 1_000_000, max(1, count // 8)),
        tests={domain: make(domain, 2_000_000, max(1, count * 3 // 20)) for domain in scenes.DOMAINS},
    )


def folder_domains(root: Path, source: str, space: LabelSpace, limit: int | None = None) -> Domains:
    """A folder of domains: the last tenth of `source` is held out to choose the best state, all others are judged on.

    Args:
        root: holds `<domain>/images/*` and `<domain>/labels/*.png`.
        source: the domain to fit on.
        space: what the labels mean.
        limit: judge on at most so many images of a domain, evenly spaced.

    Raises:
        InputError: there is no such source, nothing to judge on, or too little to fit on; or as `Folder`.
    """
    names = find_domains(root)
    if source not in names:
        raise InputError(f"{root} has no domain {source!r}; it has {', '.join(names)}.")
    if len(names) < 2:
        raise InputError(f"{root} has only {source!r}; at least one other domain is needed to judge on.")
    folders = {name: Folder(root / name, space) for name in _bar(names, desc="check images and labels")}
    count = len(folders[source])
    if count < 2:
        raise InputError(
            f"{root / source} has {count} image; at least 2 are needed, one to fit on and one to choose the best state."
        )
    held_out = max(1, count // 10)  # the last ones, not random ones: neighbouring frames of a drive are nearly equal
    return Domains(
        source=source,
        space=space,
        train=Subset(folders[source], range(count - held_out)),
        validation=Subset(folders[source], range(count - held_out, count)),
        tests={name: _spaced(folder, limit) for name, folder in folders.items() if name != source},
    )


def _spaced(dataset: Dataset[Sample], limit: int | None) -> Dataset[Sample]:
    count = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= count:
        return dataset
    return Subset(dataset, [round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)])


def make_backbone(
    name: str, pretrained: bool, patch_size: int | None, say: Callable[[str], None] = print
) -> tuple[nn.Module, bool]:
    """A timm model without classifier that takes images of any size where its class can, and whether its weights are pretrained.

    Where the pretrained weights cannot be had, one line says so and the weights are random, from torch's random state.

    Raises:
        InputError: timm has no such model, or no pretrained weights for it.
        UnsupportedBackboneError: rein does not know its blocks.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        raise InputError(
            f"timm has no model {name!r}; " + (f"near it are {', '.join(near)}." if near else "see timm.list_models().")
        )
    settings: dict[str, Any] = {"num_classes": 0} | ({"patch_size": patch_size} if patch_size else {})

    def create(pretrained: bool) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **settings)
        except TypeError:  # a class without that setting
            return timm.create_model(name, pretrained=pretrained, **settings)

    loaded = False
    try:
        if pretrained:
            try:
                with _hub_asked_once():
                    model = create(True)
                loaded = True
            except Exception as error:  # each kind of hub failure has its own class
                if "pretrained" in str(error):  # timm's own words for a tag or weights that do not exist
                    raise
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].partition(". ")[0]
                say(f"The weights of {name} cannot be downloaded ({reason}); using RANDOM weights instead.")
        if not loaded:
            model = create(False)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f"timm cannot build {name!r} with {settings}: {error}") from error
    backbones.find_sites(model)
    return model, loaded


@contextmanager
def _hub_asked_once() -> Iterator[None]:
    """Where the hub does not answer at once, use what was downloaded before; its client would try for most of a minute."""
    from huggingface_hub import constants

    found = constants.HF_HUB_OFFLINE
    try:
        if not found and not getproxies():
            address = urlsplit(constants.ENDPOINT)
            socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = found


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
    _write_results(domains, options, results, loaded)
    picture = io.BytesIO()
    _draw_panel(domains, results, examples).save(picture, "PNG")
    replace_file(options.out / "panel.png", picture.getvalue())
    if not loaded:
        say(
            "The backbone has RANDOM weights: what follows shows how the comparison works, not what Rein does for a foundation model."
        )
    return results


def _run_method(
    method: str, backbone: nn.Module, domains: Domains, options: Options, best: BestState
) -> tuple[Result, dict[str, np.ndarray]]:
    schedule = options.schedule
    widths = backbones.widths(backbone)
    in_channels = [widths[block] for block in default_indices(len(widths), 4)]
    torch.manual_seed(schedule.seed + 1)  # every method starts from the same head
    head = heads.FPNHead(in_channels, len(domains.space.names), channels=HEAD_CHANNELS, tower_channels=HEAD_CHANNELS)
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
        confusions[name] = judge(segmenter, dataset, normalize, partial(_bar, desc=f"judge {method}: {name}"))
    device = next(segmenter.parameters()).device
    predictions = {
        name: segmenter.predict(normalize(dataset[_example(dataset)][0][None].to(device))).argmax(1)[0].cpu().numpy()
        for name, dataset in domains.tests.items()
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


def _bar(things: Any, desc: str) -> Any:
    """A progress bar with the time left, on a terminal; nothing in a log."""
    return tqdm(things, desc=desc, leave=False, disable=None)


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


def _example(dataset: Dataset[Sample]) -> int:
    return len(dataset) // 2  # type: ignore[arg-type]


def _targets(domains: Domains) -> list[str]:
    return [name for name in domains.tests if name != domains.source]


def mean_over_targets(result: Result, domains: Domains) -> float:
    """The number that matters: mean mIoU over the domains that were never shown, 0 to 1."""
    known = [result.miou[name] for name in _targets(domains) if not isnan(result.miou[name])]
    return float(np.mean(known)) if known else float("nan")


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:.1f}"


def table(domains: Domains, results: Sequence[Result]) -> str:
    """The comparison as text: parameters that train, mIoU in per cent. A star marks the source, a dash that nothing was labelled."""
    names = [f"{name}*" if name == domains.source else name for name in domains.tests]
    header = ["method", "head", "tuned in backbone", "%", *names, "mean of unseen"]
    rows = [
        [
            result.method,
            f"{result.head_parameters:,}",
            f"{result.tuned_parameters:,}",
            f"{100 * result.tuned_parameters / result.backbone_parameters:.1f}",
            *(_percent(result.miou[name]) for name in domains.tests),
            _percent(mean_over_targets(result, domains)),
        ]
        for result in results
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def _write_results(domains: Domains, options: Options, results: Sequence[Result], loaded: bool) -> None:
    versions = {
        "rein": rein.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lightning": lightning.__version__,
    }
    content = {
        "backbone": options.backbone,
        "weights": "pretrained" if loaded else "random",
        "source": domains.source,
        "targets": _targets(domains),
        "schedule": asdict(options.schedule),
        "versions": versions,
        "results": [asdict(r) | {"mean_miou_of_unseen": mean_over_targets(r, domains)} for r in results],
    }
    replace_file(options.out / "results.json", (json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n").encode())


def _without_nan(value: Any) -> Any:
    """NaN, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and isnan(value) else value


def _draw_panel(domains: Domains, results: Sequence[Result], examples: dict[str, dict[str, np.ndarray]]) -> Any:
    rows = []
    for name, dataset in domains.tests.items():
        image, label = dataset[_example(dataset)]
        rows.append(
            panel.Row(
                name=f"{name} (source)" if name == domains.source else name,
                image=image.permute(1, 2, 0).numpy(),
                label=label.numpy(),
                predictions={method: predictions[name] for method, predictions in examples.items()},
                miou={result.method: result.miou[name] for result in results},
            )
        )
    return panel.draw(rows, domains.space, f"Fitted on {domains.source}; no other domain was shown in training (mIoU, %)")
