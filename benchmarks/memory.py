"""What a training step of each form takes in memory, and the largest batch and crop that fit into a given amount.

A step is the forward and backward pass of the backbone alone, without a head. Of the bare backbone, in which nothing trains, it gives
the gradient of the images.

`step` rows count what autograd keeps for the backward pass, each storage once and without parameters, buffers and images
(`kept_bytes`), and measure the most that the step takes beyond the weights and images that are there before it (`peak_bytes`).
`peak_of` says how: the allocator's figure on a GPU; on a CPU the resident memory of a fresh process that gives back at once what it
frees. `optimizer_bytes` are the two float32 moments of AdamW, which no step here makes.

`adapter` rows: what one layer of an adapter adds to the kept bytes, and that as a multiple of its N patch tokens of C channels.

`largest batch` and `largest crop` rows: how many images of a side, and how large an image, fit into `budget_bytes`; `counted` says
what it holds. On a GPU steps are tried; on a CPU, where a GPU's budget cannot be, what a step cannot do without is counted on tensors
without data.
"""

import ctypes
import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import forms, published
from benchmarks.options import Options
from benchmarks.throughput import peak

CHECKPOINTED = " checkpointed"  # with gradient checkpointing: what is inside the blocks is computed again
FORMS = ("bare", "published", "rein", "rein" + CHECKPOINTED, "lora", "vpt", "adaptformer", "full")
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
GIB = 2**30
BESIDES = "weights, images, AdamW's moments"
COUNTED = {
    "cuda": f"{BESIDES}, measured peak",
    "cpu": f"{BESIDES}, the larger of kept bytes (checkpointed: and a block's) and gradients",
}


def rows(options: Options) -> Iterator[dict]:
    """For each backbone the steps, what the adapters add, and what fits."""
    models = options.choose(("test_vit",), MODELS[:1], MODELS if on_gpu(options) else MODELS[:2])
    chosen = options.choose(("published", "rein", "full"), FORMS, FORMS)
    shapes = options.choose([(64, 16)], [(512, 1)], [(512, 1), (512, 4)])  # side in pixels, batch
    side = options.choose(64, 512, 512)
    budgets = options.choose([GIB // 64], [8 * GIB], [8 * GIB, 24 * GIB, 48 * GIB])
    for model in models:
        for size, batch in shapes:
            what = {"model": model, "size": size, "batch": batch}
            for form in chosen:
                yield {"measure": "step", **what, "form": form, **step_apart(options, form, model, size, batch)}
            yield from ({"measure": "adapter", **what, **row} for row in of_adapters(options, model, size, batch))
        for form in chosen:
            for budget in budgets:
                yield from of_budget(options, form, model, side, budget)


def build(options: Options, form: str, name: str, size: int, without_data: FakeTensorMode | None = None) -> nn.Module:
    """One of `FORMS`, as it is trained."""
    plain = form.removesuffix(CHECKPOINTED)
    with torch.device("meta" if without_data else options.device):
        model = forms.build(plain, forms.backbone(name, size).to(options.dtype)).train()
    with without_data or nullcontext():
        if without_data:
            model.to_empty(device=options.device)
        if plain == "published":  # to_empty brought an adapter back to its own
            published.in_one_precision(model)
    if form != plain:
        model.set_grad_checkpointing()
    return model


def images(options: Options, size: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=options.dtype, device=options.device)


def step(model: nn.Module, x: Tensor) -> None:
    trains = any(parameter.requires_grad for parameter in model.parameters())
    model(x.requires_grad_(not trains)).float().square().mean().backward()


def kept(model: nn.Module, x: Tensor) -> int:
    """The bytes that autograd keeps for the backward pass of one forward pass."""
    known = {tensor.untyped_storage()._cdata for tensor in chain(model.parameters(), model.buffers(), [x])}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in storages.values())


def static(model: nn.Module) -> dict:
    """What does not depend on the images."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trains),
        "weights_bytes": sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())),
        "gradient_bytes": sum(parameter.nbytes for parameter in trains),
        "optimizer_bytes": sum(2 * 4 * parameter.numel() for parameter in trains),
    }


# steps


def measure(options: Options, form: str, name: str, size: int, batch: int) -> dict:
    """What is known of one step, and its peak."""
    gc.collect()  # models that were measured before: their hooks make them cycles
    step(build(options, form, "test_vit", 64), images(options, 64, 1))  # load what is loaded on first use
    model, x = build(options, form, name, size), images(options, size, batch)
    gc.collect()

    def run() -> None:
        step(model, x)

    if on_gpu(options):
        row = {"peak_bytes": peak(run, options.device), "peak_of": "torch.cuda.max_memory_allocated"}
    else:
        row = peak_of_process(run)
    return {**static(model), **row, "kept_bytes": kept(model, x)}


def step_apart(options: Options, *arguments) -> dict:
    """`measure`, on a CPU in a process of its own."""
    if on_gpu(options):
        return measure(options, *arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "rein.dgss.methods"])
    with ProcessPoolExecutor(1, context, initializer=free_at_once) as pool:
        return pool.submit(measure, options, *arguments).result()


def on_gpu(options: Options) -> bool:
    return torch.device(options.device).type == "cuda"


def free_at_once() -> None:
    """Let this process give back to the system what it frees, but for the smallest pieces."""
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def peak_of_process(action: Callable[[], object]) -> dict:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now what there is
        before = highest_resident_bytes()
    except OSError as error:
        return {"peak_bytes": None, "peak_of": f"not measured, for want of Linux's /proc: {error}"}
    action()
    return {"peak_bytes": highest_resident_bytes() - before, "peak_of": "resident memory of a fresh process"}


def highest_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


# without data


@lru_cache(maxsize=2)
def weightless(options: Options, form: str, name: str, size: int) -> tuple[nn.Module, FakeTensorMode]:
    """A model on tensors without data, and the mode in which to use it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return build(options, form, name, size, mode), mode


def kept_without_data(options: Options, form: str, name: str, size: int, batch: int, image_gradient: bool) -> int:
    """What `kept` counts; with `image_gradient`, that of the images too is asked for."""
    model, mode = weightless(options, form, name, size)
    with mode:
        return kept(model, images(options, size, batch).requires_grad_(image_gradient))


def of_adapters(options: Options, name: str, size: int, batch: int) -> Iterator[dict]:
    """What the published form and rein add to the bare backbone, when all give the gradient of the images."""
    bare, _ = weightless(options, "bare", name, size)
    layers, tokens = len(bare.blocks), batch * bare.patch_embed.num_patches * bare.embed_dim * options.dtype.itemsize
    before = kept_without_data(options, "bare", name, size, batch, True)
    for form in ("published", "rein"):
        added = (kept_without_data(options, form, name, size, batch, True) - before) / layers
        yield {"form": form, "added_bytes_per_layer": round(added), "added_per_layer_over_nc": round(added / tokens, 4)}


# what fits


def of_budget(options: Options, form: str, name: str, side: int, budget: int) -> Iterator[dict]:
    patch = weightless(options, form, name, side)[0].patch_embed.patch_size[0]
    what = {"model": name, "form": form, "budget_bytes": budget, "counted": COUNTED["cuda" if on_gpu(options) else "cpu"]}
    batch = largest(lambda count: needed(options, form, name, side, count), budget, power=1)
    yield {"measure": "largest batch", **what, "size": side, "batch": batch}
    crop = patch * largest(lambda count: needed(options, form, name, patch * count, 1), budget, power=2)
    yield {"measure": "largest crop", **what, "size": crop, "batch": 1}


def largest(needs: Callable[[int], float], budget: float, power: int) -> int:
    """The largest count whose needs, which grow, are within the budget, or 0.

    Few counts are tried: each is where the budget would be met if the needs were a + b count^power through the two nearest so far.
    """
    known = {count: needs(count) for count in (1, 2)}
    while True:
        low = max((count for count, need in known.items() if need <= budget), default=0)
        high = min((count for count, need in known.items() if need > budget), default=math.inf)
        if high - low == 1:
            return low
        first, second = sorted(known, key=lambda count: abs(known[count] - budget))[:2]
        slope = (known[second] - known[first]) / (second**power - first**power)
        guess = int(max(0, first**power + (budget - known[first]) / slope) ** (1 / power)) if slope > 0 else 2 * low
        guess = max(low + 1, guess if guess < high else (low + high) // 2)
        known[guess] = needs(guess)


@cache
def needed(options: Options, form: str, name: str, size: int, batch: int) -> float:
    """The bytes of `COUNTED`, infinitely many where a GPU does not have them."""
    given = 3 * size**2 * batch * options.dtype.itemsize
    if on_gpu(options):
        try:
            row = measure(options, form, name, size, batch)
        except torch.OutOfMemoryError:
            return math.inf
        return given + row["weights_bytes"] + row["optimizer_bytes"] + row["peak_bytes"]
    model, _ = weightless(options, form, name, size)
    row = static(model)
    keeps = kept_without_data(options, form, name, size, batch, form == "bare")
    if form.endswith(CHECKPOINTED):  # a block at a time is there again
        plain = kept_without_data(options, form.removesuffix(CHECKPOINTED), name, size, batch, False)
        keeps += (plain - keeps) / len(model.blocks)
    # the backward pass frees what was kept while it makes gradients: there need not be room for all of both
    return given + row["weights_bytes"] + row["optimizer_bytes"] + max(keeps, row["gradient_bytes"])
