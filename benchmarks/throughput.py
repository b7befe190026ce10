"""Cost of each form over the bare backbone, for inference and for a training step, from paired and interleaved runs.

A training step of the bare backbone is a forward pass and the gradient of its input, which an adapter needs too.

The ceiling is the largest share of the bare throughput that the published equations allow. It counts one product of every token with
a C x C matrix per layer, and two more in the backward pass, at the average rate of the bare backbone, and nothing else.
"""

import gc
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forms, summary, timing
from benchmarks.options import Options, Parts

EAGER = ("bare", "published", "rein", "lora", "lora merged", "full")
ALL = ("bare", "published", "rein", "bare compiled", "rein compiled", "lora", "lora merged", "vpt", "adaptformer", "full")
ON_GPU = ("bare", "one product", *ALL[1:])
WITHOUT_COMPILED = tuple(form for form in ON_GPU if not form.endswith(" compiled"))
HEADLINE = ("bare", "published", "rein")

# backbone, side in pixels, images, forms, repeats
TINY = [("test_vit", 32, 2, ("bare", "published", "rein", "lora", "lora merged", "full"), 2)]
SAMPLE = [("vit_small_patch16_224", 224, 4, EAGER, 9)]
FULL_CPU = [
    ("vit_base_patch16_224", 224, 4, HEADLINE, 31),
    ("vit_base_patch16_224", 512, 1, HEADLINE, 21),
    ("vit_small_patch16_224", 224, 4, ALL, 21),
    ("vit_large_patch16_224", 512, 1, (*HEADLINE, "full"), 15),
]
# The largest backbones first, since the time on a GPU may be limited. Compilation takes longer than the runs: one size of each.
FULL_GPU = [
    (pattern.format(name), size, batch, ON_GPU if (size, batch) == (512, 8) else WITHOUT_COMPILED, 50)
    for name in ("large", "base", "small")
    for pattern in ("vit_{}_patch14_dinov2", "vit_{}_patch16_dinov3", "eva02_{}_patch14_224")
    for size, batch in ((512, 8), (1024, 4), (512, 1), (1024, 1))
]


def run(model: nn.Module, images: torch.Tensor, training: bool) -> None:
    """Run one forward pass, or one training step without an optimizer."""
    if not training:
        with torch.no_grad():
            model(images)
        return
    model.zero_grad()
    model(images.detach().requires_grad_()).square().mean().backward()


def ceiling(name: str, size: int, training: bool) -> float:
    """Share of the bare throughput that remains if only the products of the equations are added."""
    with torch.device("meta"):
        bare = forms.backbone(name, size)
        images = torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tokens = bare.forward_features(images)
    total = counter.get_total_flops()
    extra = len(bare.blocks) * 2 * tokens.shape[1] * tokens.shape[2] ** 2
    return 2 * total / (2 * total + 3 * extra) if training else total / (total + extra)


def measure(
    name: str, size: int, batch: int, chosen: tuple[str, ...], repeats: int, training: bool, options: Options
) -> Iterator[dict]:
    """A row for each form."""
    bare = forms.backbone(name, size).to(options.device, options.dtype)
    names = [form for form in chosen if not (training and form in forms.DEPLOYED)]
    models = {form: forms.build(form, bare) for form in names}
    images = torch.randn(batch, 3, size, size, device=options.device, dtype=options.dtype)
    runs = {form: lambda model=model: run(model, images, training) for form, model in models.items()}
    times = timing.interleaved(runs, repeats, options.device, warmup=3 if options.device != "cpu" else 1)
    best = ceiling(name, size, training)
    for form in names:
        compared = "bare compiled" if form.endswith(" compiled") else "bare"
        costs = timing.cost_percent(times[form], times[compared])
        row = {"model": name, "size": size, "batch": batch, "step": "training" if training else "inference", "form": form}
        seconds = summary.median(times[form])
        row |= {"repeats": repeats, "seconds": seconds, "compared_with": compared}
        row |= {"images_per_second": round(batch / seconds, 3), "cost_percent_quartiles": summary.quartiles(costs)}
        row |= {"cost_percent_median_between": summary.median_interval(costs)}
        if form in ("rein", "rein compiled"):
            ratio = summary.median([bare / own for own, bare in zip(times[form], times[compared], strict=True)])
            row |= {"ceiling": round(best, 4), "share_of_ceiling": round(ratio / best, 4)}
        if options.device != "cpu":
            row["peak_bytes"] = peak(runs[form], options.device)
        yield row
    del models, runs
    gc.collect()
    torch.compiler.reset()


def peak(run, device: str) -> int:
    """Peak bytes that one run allocates on the GPU, without those that were allocated before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def parts(options: Options) -> Parts:
    for name, size, batch, chosen, repeats in options.choose(TINY, SAMPLE, FULL_CPU if options.device == "cpu" else FULL_GPU):
        for training in (False, True):
            title = f"{name}, {size} pixels, {batch} images, {'training' if training else 'inference'}"
            yield title, measure(name, size, batch, chosen, repeats, training, options)
