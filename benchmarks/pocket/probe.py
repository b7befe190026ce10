"""Linear probe of the features of `pocket_vit` or another encoder, pretrained and random: fitted by day, evaluated in every domain.

python -m benchmarks.pocket.probe --out benchmarks/pocket/probe.json
python -m benchmarks.pocket.probe --weights FILE --out FILE        # of another encoder that the pretraining exported
python -m benchmarks.pocket.probe --checkpoints FOLDER --out benchmarks/pocket/curve.json     # of a pretraining run

The probe is ridge regression in closed form, to the share of every class in a patch, from the patch tokens of three blocks: half-way,
at three quarters and at the end. It has no schedule and no random state. Repeats differ in the streets of the fit and, for the random
backbone, in its weights.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.options import check_device
from benchmarks.pocket import encoders
from benchmarks.summary import spread
from rein.backbones import normalization
from rein.dgss.evaluation.metrics import ConfusionMatrix
from rein.dgss.evaluation.results import text_table
from rein.dgss.labels import CITYSCAPES_CLASSES
from rein.dgss.scenes import DOMAINS, render
from rein.errors import ReinError
from rein.testing.models import POCKET_WEIGHTS

RIDGE = 10.0
CLASSES = len(CITYSCAPES_CLASSES)
STREETS = 100  # for each fit
EVALUATED = range(2000, 2060)  # seeds of streets on which no design choice was based
CHOOSING = range(1000, 1100), range(500, 540)  # fitted on and evaluated on while the pretraining was designed, by day


@functools.cache
def scenes(seeds: range, domain: str) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 128, 256) from 0 to 1, and labels (B, 128, 256)."""
    drawn = [render(seed, domain) for seed in seeds]
    images = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(np.stack([scene.label for scene in drawn])).long()


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens of the blocks as one feature map, (B, 3 C, H / P, W / P), on the CPU."""
    device = next(model.parameters()).device
    depth = len(model.blocks)
    blocks = [depth // 2 - 1, 3 * depth // 4 - 1, depth - 1]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalization(model))
    parts = [
        model.forward_intermediates(((part - mean) / std).to(device), indices=blocks, intermediates_only=True)
        for part in images.split(20)
    ]
    return torch.cat([torch.cat(maps, 1).cpu() for maps in parts])


def flatten(maps: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B H W, C), in double precision."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double()


class Probe:
    """Ridge regression from features (B, C, h, w) to the share of each class in the patch."""

    def __init__(self, maps: Tensor, labels: Tensor):
        one_hot = F.one_hot(torch.where(labels < CLASSES, labels, CLASSES), CLASSES + 1)[..., :CLASSES]
        shares = flatten(F.avg_pool2d(one_hot.permute(0, 3, 1, 2).float(), labels.shape[-1] // maps.shape[-1]))
        tokens = flatten(maps)
        self.mean, self.std, self.bias = tokens.mean(0), tokens.std(0) + 1e-6, shares.mean(0)
        tokens = (tokens - self.mean) / self.std
        penalty = RIDGE * torch.eye(tokens.shape[1], dtype=tokens.dtype)
        self.weight = torch.linalg.solve(tokens.T @ tokens + penalty, tokens.T @ (shares - self.bias))

    def __call__(self, maps: Tensor, size: torch.Size) -> Tensor:
        """Predict the class of every pixel, (B, H, W)."""
        shares = (flatten(maps) - self.mean) / self.std @ self.weight + self.bias
        shares = shares.view(len(maps), *maps.shape[2:], CLASSES).permute(0, 3, 1, 2).float()
        return F.interpolate(shares, size=size, mode="bilinear").argmax(1)


def evaluate(model: nn.Module, fit_on: range, evaluate_on: range) -> dict[str, float]:
    """Fit a probe by day and return its mIoU in every domain, in per cent; ranges are seeds of streets."""
    images, labels = scenes(fit_on, "day")
    probe = Probe(features(model.eval(), images), labels)
    found = {}
    for domain in DOMAINS:
        images, labels = scenes(evaluate_on, domain)
        confusion = ConfusionMatrix(CLASSES)
        confusion.update(probe(features(model, images), labels.shape[1:]), labels)
        found[domain] = 100 * confusion.mean_iou()
    return found


def curve(folder: Path) -> list[dict[str, float]]:
    """Probes of all checkpoints that a pretraining run kept, on the streets by which the pretraining was designed."""
    rows = []
    for path in folder.glob("step-*.pt"):
        found = torch.load(path, weights_only=True)
        model = encoders.build(found["facts"]["encoder"])
        model.load_state_dict(found["encoder"])
        miou = evaluate(model, *CHOOSING)
        day = miou.pop(DOMAINS[0])
        unseen = sum(miou.values()) / len(miou)
        rows.append({"images": found["facts"]["images"], "step": found["step"], "day": round(day, 1), "unseen": round(unseen, 1)})
    return sorted(rows, key=lambda row: row["step"])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="write the results to this JSON file")
    parser.add_argument(
        "--repeats", type=int, default=3, help="set the number of fits, on disjoint streets and with other random backbones"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="probe this exported file; default: pocket_vit")
    parser.add_argument("--tiny", action="store_true", help="only try the code, with three streets and one fit")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="probe the checkpoints of a pretraining run instead")
    parser.add_argument("--device", default="cpu", help="compute the features on cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    if options.checkpoints and (options.weights or options.tiny or options.device != "cpu"):
        parser.error("--checkpoints takes neither --weights, --tiny nor --device")
    check_device(parser, options.device)
    torch.set_num_threads(1)
    if options.checkpoints:
        rows = curve(options.checkpoints)
        if not rows:
            parser.error(f"--checkpoints {options.checkpoints}; expected a folder with step-*.pt, as pretrain --keep writes")
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(text_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
        return
    weights = options.weights or POCKET_WEIGHTS
    try:
        encoder = encoders.about(weights)["encoder"]
    except ReinError as error:
        parser.error(f"--weights: {error}")
    results: dict[str, dict] = {}
    for name in ("random", "pretrained"):
        runs = []
        for repeat in range(1 if options.tiny else options.repeats):
            torch.manual_seed(repeat)
            model = encoders.load(weights) if name == "pretrained" else encoders.build(encoder)
            first = 1000 + STREETS * repeat
            fit_on, evaluate_on = (
                (range(first, first + 3), EVALUATED[:3]) if options.tiny else (range(first, first + STREETS), EVALUATED)
            )
            runs.append(evaluate(model.to(options.device), fit_on, evaluate_on))
        results[name] = {
            domain: {
                "mean": round(spread(run[domain] for run in runs).mean, 1),
                "runs": [round(run[domain], 1) for run in runs],
            }
            for domain in DOMAINS
        }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    means = [[name, *(str(of_domain[domain]["mean"]) for domain in DOMAINS)] for name, of_domain in results.items()]
    print(text_table(["mIoU", *DOMAINS], means))


if __name__ == "__main__":
    main()
