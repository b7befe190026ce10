"""Depth on the generated streets: pocket_vit under a linear `DepthHead`, trained by day, evaluated on day, fog, night, rain and snow.

The frozen backbone, Rein and full fine-tuning have the learning rates of the demo's recipes, which were chosen for segmentation. The
last state is evaluated: nothing is selected. Every seed has training streets of its own, and all share the test streets. The sky has
no depth. AbsRel and RMSE (metres) should be small, delta 1.25 (share of pixels) large.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

import rein
from benchmarks.options import Options, Parts
from rein import backbones
from rein.dgss import methods, recipes, scenes
from rein.dgss.data.datasets.generated import scene_seeds
from rein.dgss.evaluation.depth import DepthErrors

METHODS = ("frozen", "rein", "full")  # of the demo's recipes streets-...
SIZE, CROP, BATCH = (128, 256), 96, 4
DEPTH_RANGE = (2.0, 80.0)  # metres


def parts(options: Options) -> Parts:
    """A part for each seed and method."""
    train, test = options.choose(2, 32, 100), options.choose(1, 8, 24)
    for seed in range(options.choose(1, 1, 3)):
        for name in METHODS:
            yield f"seed {seed}, {name}", rows(name, seed, options.choose(1, 40, 400), train, test, options)


def rows(name: str, seed: int, steps: int, train: int, test: int, options: Options) -> Iterator[dict]:
    """Train one method and yield its errors in each domain."""
    segmenter, optimizer = build(name, seed)
    segmenter.to(options.device)
    segmenter.backbone.to(options.dtype)
    images, depth = streets("day", scene_seeds("train", train, seed))
    losses = fit(segmenter, optimizer, images, depth, steps, torch.Generator().manual_seed(seed))
    trained = sum(p.numel() for p in segmenter.backbone.parameters() if p.requires_grad)
    facts = {"method": name, "seed": seed, "steps": steps, "streets": train, "tuned_parameters": trained}
    for domain in scenes.DOMAINS:
        errors = evaluate(segmenter, *streets(domain, scene_seeds("test", test)))
        yield {**facts, "loss": round(losses[-1], 4), "domain": domain} | {key: round(value, 4) for key, value in errors.items()}


def build(name: str, seed: int) -> tuple[rein.Segmenter, torch.optim.Optimizer]:
    """The segmenter of one method with its optimizer, as in the recipe streets-NAME with another head."""
    settings = recipes.resolve(f"streets-{name}")["model"]
    torch.manual_seed(seed)
    unused = {"query_dim": None} if name == "rein" else {}  # the head takes no queries
    vit = methods.apply(settings["method"], rein.testing.pocket_vit(), **unused)
    head = rein.heads.DepthHead([vit.embed_dim] * 4, depth_range=DEPTH_RANGE)
    factor = settings.get("adapter_factor", 1.0) if name == "rein" else settings.get("backbone_factor", 1.0)
    tuned = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    groups = [{"params": list(head.parameters()), "lr": settings["lr"]}, {"params": tuned, "lr": factor * settings["lr"]}]
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
    """The errors on whole images."""
    device, errors = next(segmenter.head.parameters()).device, DepthErrors(DEPTH_RANGE)
    for image, true in zip(images.split(1), depth.split(1), strict=True):
        errors.update(segmenter.predict(image.to(device))[:, 0].cpu(), true)
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
