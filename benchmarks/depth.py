"""Depth on the generated streets: pocket_vit under a linear `DepthHead`, trained by day, evaluated on day, fog, night, rain and snow.

The frozen backbone, Rein and full fine-tuning have the same head at the same learning rate. The rate of what trains in the backbone
is the one of `RATES` with the lowest AbsRel on held-out streets by day, with a seed of its own. The last state is evaluated, in
windows of the size of the training crops. Every seed has training streets of its own, and all share the test streets. The sky has
no depth. AbsRel and RMSE (metres) should be small, delta 1.25 (share of pixels) large.
"""

import statistics
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

import rein
from benchmarks.options import Options, Parts
from rein import backbones
from rein.dgss import methods, scenes
from rein.dgss.data.datasets.generated import scene_seeds
from rein.dgss.evaluation.depth import DepthErrors

METHODS = {"frozen": "freeze", "rein": "rein", "full": "full"}  # name in the table -> method of `rein.dgss.methods`
HEAD_RATE, RATES, SEARCH_SEED = 3e-3, (3e-3, 3e-4), 100
SIZE, CROP, BATCH = (128, 256), 96, 4
DEPTH_RANGE = (2.0, 80.0)  # metres


def parts(options: Options) -> Parts:
    """A part for each seed and method."""
    for seed in range(options.choose(1, 1, 3)):
        for name in METHODS:
            yield f"seed {seed}, {name}", rows(name, seed, options)


def rows(name: str, seed: int, options: Options) -> Iterator[dict]:
    """Train one method and yield its errors in each domain."""
    rate = choose_rate(name, options)
    segmenter, loss = train(name, seed, rate, options)
    tuned = sum(p.numel() for p in segmenter.backbone.parameters() if p.requires_grad)
    facts = {"method": name, "seed": seed, "steps": _steps(options), "streets": _streets(options), "tuned_parameters": tuned}
    facts |= {"head_rate": HEAD_RATE, "rate": rate, "loss": round(loss, 4)}
    for domain in scenes.DOMAINS:
        errors = evaluate(segmenter, *streets(domain, scene_seeds("test", options.choose(1, 4, 8))))
        yield {**facts, "domain": domain} | {key: round(value, 4) for key, value in errors.items()}


@lru_cache
def choose_rate(name: str, options: Options) -> float:
    """The learning rate of what trains in the backbone; that of the head, if nothing does."""
    if name == "frozen":
        return HEAD_RATE
    held_out = streets("day", scene_seeds("val", options.choose(1, 4, 6)))

    def error(rate: float) -> float:
        return evaluate(train(name, SEARCH_SEED, rate, options)[0], *held_out)["abs_rel"]

    return min(RATES, key=error)


def train(name: str, seed: int, rate: float, options: Options) -> tuple[rein.Segmenter, float]:
    """Train one method by day. Returns the segmenter and the mean loss of the last tenth of the steps."""
    segmenter, optimizer = build(name, seed, rate)
    segmenter.to(options.device)
    segmenter.backbone.to(options.dtype)
    images, depth = streets("day", scene_seeds("train", _streets(options), seed))
    losses = fit(segmenter, optimizer, images, depth, _steps(options), torch.Generator().manual_seed(seed))
    return segmenter, statistics.fmean(losses[-max(1, len(losses) // 10) :])


def _steps(options: Options) -> int:
    return options.choose(1, 40, 100)


def _streets(options: Options) -> int:
    return options.choose(2, 32, 60)


def build(name: str, seed: int, rate: float) -> tuple[rein.Segmenter, torch.optim.Optimizer]:
    """The segmenter of one method, with its optimizer."""
    torch.manual_seed(seed)
    settings = {"query_dim": None} if name == "rein" else {}  # the head takes no queries
    vit = methods.apply(METHODS[name], rein.testing.pocket_vit(), **settings)
    head = rein.heads.DepthHead([vit.embed_dim] * 4, depth_range=DEPTH_RANGE)
    tuned = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    groups = [{"params": list(head.parameters()), "lr": HEAD_RATE}, {"params": tuned, "lr": rate}]
    return rein.Segmenter(vit, head), torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.05)


def fit(
    segmenter: rein.Segmenter,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    depth: Tensor,
    steps: int,
    random: torch.Generator,
) -> list[float]:
    """Train on random crops and mirror images; the learning rate falls linearly to zero. Returns the losses."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    segmenter.train()
    losses = []
    for _ in range(steps):
        crops = [crop(images, depth, random) for _ in range(BATCH)]
        x, d = (torch.stack(each).to(next(segmenter.head.parameters()).device) for each in zip(*crops, strict=True))
        loss = segmenter(x, d)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def crop(images: Tensor, depth: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random crop of a random street, mirrored in one of two cases."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=random))

    number, top, left = draw(len(images)), draw(SIZE[0] - CROP + 1), draw(SIZE[1] - CROP + 1)
    mirrored = [-1] if draw(2) else []
    x, d = (each[number, ..., top : top + CROP, left : left + CROP].flip(mirrored) for each in (images, depth))
    return x, d


def evaluate(segmenter: rein.Segmenter, images: Tensor, depth: Tensor) -> dict[str, float]:
    """The errors on whole images, which are predicted in windows of the size of the training crops."""
    device, errors = next(segmenter.head.parameters()).device, DepthErrors(DEPTH_RANGE)
    for image, true in zip(images.split(1), depth.split(1), strict=True):
        errors.update(segmenter.predict(image.to(device), window=CROP, window_batch=8)[:, 0].cpu(), true)
    return errors.means()


@lru_cache(maxsize=16)
def streets(domain: str, seeds: range) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, H, W) and depth (N, H, W) of the streets with these seeds."""
    rendered = [scenes.render(seed, domain, SIZE) for seed in seeds]
    images = torch.stack([torch.from_numpy(scene.image) for scene in rendered]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in backbones.normalization(_reference()))
    return (images - mean) / std, torch.stack([torch.from_numpy(scene.depth) for scene in rendered])


@lru_cache(maxsize=1)
def _reference() -> nn.Module:
    return rein.testing.pocket_vit(pretrained=False)
