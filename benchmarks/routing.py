"""Cost of one batch with several adapters (`rein.routed`) over the same batch with one adapter, for inference.

The images of the batch use the adapters in turn. Beside it, the same work without routing: one pass per adapter, with its images.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

import rein
from benchmarks import forms, summary, timing
from benchmarks.options import Options, Parts

ADAPTERS = (1, 2, 8, 32)

# backbone, side in pixels, images, numbers of adapters, repeats
TINY = [("test_vit", 32, 4, (1, 2), 2)]
SAMPLE = [("vit_small_patch16_224", 224, 32, ADAPTERS, 3)]
FULL_CPU = [("vit_small_patch16_224", 224, 32, ADAPTERS, 15)]
FULL_GPU = [
    ("vit_small_patch14_dinov2", 512, 32, ADAPTERS, 50),
    ("vit_base_patch14_dinov2", 512, 32, ADAPTERS, 50),
    ("vit_large_patch14_dinov2", 512, 32, ADAPTERS, 50),
]


def adapted(name: str, size: int, count: int, options: Options) -> nn.Module:
    """A backbone with `count` named adapters."""
    model = forms.backbone(name, size).to(options.device, options.dtype)
    for number in range(count):
        rein.wrap(model, name=str(number))
    return model.eval()


@torch.no_grad()
def one(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """One pass with the active adapter."""
    return model(images)


@torch.no_grad()
def routed(model: nn.Module, images: torch.Tensor, count: int) -> torch.Tensor:
    """One pass in which the images use `count` adapters in turn."""
    with rein.routed(model, [str(number % count) for number in range(len(images))]):
        return model(images)


@torch.no_grad()
def split(model: nn.Module, images: torch.Tensor, count: int) -> list[torch.Tensor]:
    """One pass for each of `count` adapters, with its images."""
    outputs = []
    for number in range(count):
        with model.rein.active(str(number)):
            outputs.append(model(images[number::count]))
    return outputs


def measure(name: str, size: int, batch: int, counts: tuple[int, ...], repeats: int, options: Options) -> Iterator[dict]:
    """A row for the bare backbone, one for one adapter, and two for each number of adapters."""
    bare, model = forms.backbone(name, size).to(options.device, options.dtype), adapted(name, size, max(counts), options)
    images = torch.randn(batch, 3, size, size, device=options.device, dtype=options.dtype)
    runs: dict[tuple[str, int], Callable[[], object]] = {("bare", 0): lambda: one(bare, images)}
    runs["one", 1] = lambda: one(model, images)
    for count in counts:
        runs["routed", count] = lambda count=count: routed(model, images, count)
        if count > 1:
            runs["split", count] = lambda count=count: split(model, images, count)
    keys = {str(key): key for key in runs}
    times = timing.interleaved({text: runs[key] for text, key in keys.items()}, repeats, options.device)
    for text, (form, count) in keys.items():
        costs = timing.cost_percent(times[text], times[str(("one", 1))])
        row = {"model": name, "size": size, "batch": batch, "form": form, "adapters": count, "repeats": repeats}
        row |= {"seconds": summary.median(times[text]), "compared_with": "one"}
        yield {
            **row,
            "cost_percent_quartiles": summary.quartiles(costs),
            "cost_percent_median_between": summary.median_interval(costs),
        }


def parts(options: Options) -> Parts:
    for name, size, batch, counts, repeats in options.choose(TINY, SAMPLE, FULL_CPU if options.device == "cpu" else FULL_GPU):
        yield f"{name}, {size} pixels, {batch} images", measure(name, size, batch, counts, repeats, options)
