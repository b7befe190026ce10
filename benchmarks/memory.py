"""Memory of a training step of each form, and the largest batch and crop that fit into a memory budget.

A step is the forward and backward pass of the backbone, without a head. Nothing trains in the bare backbone; its step computes the
gradient of the images.

Rows by `measure`:
    step: `kept_bytes` counts the tensors that autograd saves for the backward pass: each storage once, without parameters, buffers
        and images. `peak_bytes` is the peak of the step without the weights and images that are allocated before it; `peak_of` names
        its source: the allocator on a GPU, the resident memory of a fresh process on a CPU. `optimizer_bytes` are the two float32
        moments of AdamW, which the step itself does not allocate.
    adapter: the bytes that one layer of an adapter adds to the kept bytes, also as a multiple of N patch tokens with C channels.
    largest batch, largest crop: how many images of one size, and how large an image, fit into `budget_bytes`; `counted` names what
        counts. On a GPU, steps are tried. On a CPU, the least that a step needs is counted on fake tensors, which have no data.
"""

import ctypes
import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import forms, published
from benchmarks.options import Options, Parts
from benchmarks.throughput import peak

CHECKPOINTED = " checkpointed"  # with gradient checkpointing, which computes the inside of the blocks again
FORMS = ("bare", "published", "rein", "rein" + CHECKPOINTED, "lora", "vpt", "adaptformer", "full")
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
GIB = 2**30
BESIDES = "weights, images, AdamW's moments"
COUNTED = {
    "cuda": f"{BESIDES}, measured peak",
    "cpu": f"{BESIDES}, the larger of kept bytes (checkpointed: and a block's) and gradients",
}


def parts(options: Options) -> Parts:
    """Rows of the steps, of the adapters and of the budgets for each backbone."""
    models = options.choose(("test_vit",), MODELS[:1], MODELS if on_gpu(options) else MODELS[:2])
    chosen = options.choose(("published", "rein", "full"), FORMS, FORMS)
    for model in models:
        for size, batch in options.choose([(64, 16)], [(512, 1)], [(512, 1), (512, 4)]):  # side in pixels
            yield f"{model}, {size} pixels, {batch} images", step_rows(options, chosen, model, size, batch)
        yield f"{model}, budgets", all_budget_rows(options, chosen, model)


def step_rows(options: Options, chosen: Sequence[str], model: str, size: int, batch: int) -> Iterator[dict]:
    """Memory of a training step in every form, and of the adapter's layers."""
    case = {"model": model, "size": size, "batch": batch}
    for form in chosen:
        yield {"measure": "step", **case, "form": form, **measure_in_fresh_process(options, form, model, size, batch)}
    yield from ({"measure": "adapter", **case, **row} for row in adapter_rows(options, model, size, batch))


def all_budget_rows(options: Options, chosen: Sequence[str], model: str) -> Iterator[dict]:
    """The largest batch and crop of every form in every budget."""
    side, budgets = options.choose((64, [GIB // 64]), (512, [8 * GIB]), (512, [8 * GIB, 24 * GIB, 48 * GIB]))
    for form in chosen:
        for budget in budgets:
            yield from budget_rows(options, form, model, side, budget)


def build(options: Options, form: str, name: str, size: int, fake_mode: FakeTensorMode | None = None) -> nn.Module:
    """A backbone in one of `FORMS`, in training mode; its tensors are fake if a mode is given."""
    plain = form.removesuffix(CHECKPOINTED)
    with torch.device("meta" if fake_mode else options.device):
        model = forms.build(plain, forms.backbone(name, size).to(options.dtype)).train()
    with fake_mode or nullcontext():
        if fake_mode:
            model.to_empty(device=options.device)
        if plain == "published":  # to_empty restores the adapter's own dtype
            published.match_dtype(model)
    if form != plain:
        model.set_grad_checkpointing()
    return model


def images(options: Options, size: int, batch: int) -> Tensor:
    """Random images, (B, 3, H, W)."""
    return torch.randn(batch, 3, size, size, dtype=options.dtype, device=options.device)


def step(model: nn.Module, x: Tensor) -> None:
    """Run one forward and backward pass."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    model(x.requires_grad_(not trains)).float().square().mean().backward()


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves in one forward pass for the backward pass."""
    excluded = {tensor.untyped_storage()._cdata for tensor in chain(model.parameters(), model.buffers(), [x])}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in storages.values())


def static_bytes(model: nn.Module) -> dict:
    """The figures that do not depend on the images."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trains),
        "weights_bytes": sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())),
        "gradient_bytes": sum(parameter.nbytes for parameter in trains),
        "optimizer_bytes": sum(2 * 4 * parameter.numel() for parameter in trains),
    }


# steps


def measure(options: Options, form: str, name: str, size: int, batch: int) -> dict:
    """The figures of one step."""
    gc.collect()  # earlier models are reference cycles, because of their hooks
    step(build(options, form, "test_vit", 64), images(options, 64, 1))  # load libraries that are loaded on first use
    model, x = build(options, form, name, size), images(options, size, batch)
    gc.collect()

    def run() -> None:
        step(model, x)

    if on_gpu(options):
        row = {"peak_bytes": peak(run, options.device), "peak_of": "torch.cuda.max_memory_allocated"}
    else:
        row = peak_of_process(run)
    return {**static_bytes(model), **row, "kept_bytes": kept_bytes(model, x)}


def measure_in_fresh_process(options: Options, *arguments) -> dict:
    """`measure`; on a CPU, in a new process."""
    if on_gpu(options):
        return measure(options, *arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "rein.dgss.methods"])
    with ProcessPoolExecutor(1, context, initializer=return_freed_memory) as pool:
        return pool.submit(measure, options, *arguments).result()


def on_gpu(options: Options) -> bool:
    return torch.device(options.device).type == "cuda"


def return_freed_memory() -> None:
    """Let this process return freed memory to the system at once, except small allocations."""
    with suppress(AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def peak_of_process(action: Callable[[], object]) -> dict:
    """Peak resident memory of an action, without what was resident before it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
        before = peak_resident_bytes()
    except OSError as error:
        return {"peak_bytes": None, "peak_of": f"not measured: it needs Linux's /proc ({error})"}
    action()
    return {"peak_bytes": peak_resident_bytes() - before, "peak_of": "resident memory of a fresh process"}


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


# fake tensors


@lru_cache(maxsize=2)
def fake_model(options: Options, form: str, name: str, size: int) -> tuple[nn.Module, FakeTensorMode]:
    """A model of fake tensors, and the mode in which it runs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return build(options, form, name, size, mode), mode


def count_kept_bytes(options: Options, form: str, name: str, size: int, batch: int, image_gradient: bool) -> int:
    """`kept_bytes` on fake tensors; `image_gradient` says whether the images require a gradient."""
    model, mode = fake_model(options, form, name, size)
    with mode:
        return kept_bytes(model, images(options, size, batch).requires_grad_(image_gradient))


def adapter_rows(options: Options, name: str, size: int, batch: int) -> Iterator[dict]:
    """Bytes that the published form and rein add to the bare backbone, if the images require a gradient."""
    bare, _ = fake_model(options, "bare", name, size)
    layers, tokens = len(bare.blocks), batch * bare.patch_embed.num_patches * bare.embed_dim * options.dtype.itemsize
    before = count_kept_bytes(options, "bare", name, size, batch, True)
    for form in ("published", "rein"):
        added = (count_kept_bytes(options, form, name, size, batch, True) - before) / layers
        yield {"form": form, "added_bytes_per_layer": round(added), "added_per_layer_over_nc": round(added / tokens, 4)}


# budgets


def budget_rows(options: Options, form: str, name: str, side: int, budget: int) -> Iterator[dict]:
    """Largest batch at one image size, and largest square image, multiples of the patch size, that fit into a budget."""
    patch = fake_model(options, form, name, side)[0].patch_embed.patch_size[0]
    case = {"model": name, "form": form, "budget_bytes": budget, "counted": COUNTED["cuda" if on_gpu(options) else "cpu"]}
    batch = largest(lambda count: required_bytes(options, form, name, side, count), budget, power=1)
    yield {"measure": "largest batch", **case, "size": side, "batch": batch}
    crop = patch * largest(lambda count: required_bytes(options, form, name, patch * count, 1), budget, power=2)
    yield {"measure": "largest crop", **case, "size": crop, "batch": 1}


def largest(required: Callable[[int], float], budget: float, power: int) -> int:
    """The largest count whose requirement is within the budget, or 0; requirements grow with the count.

    Few counts are tried: the next one is where a + b count^power through the two nearest requirements meets the budget.
    """
    known = {count: required(count) for count in (1, 2)}
    while True:
        low = max((count for count, value in known.items() if value <= budget), default=0)
        high = min((count for count, value in known.items() if value > budget), default=math.inf)
        if high - low == 1:
            return low
        first, second = sorted(known, key=lambda count: abs(known[count] - budget))[:2]
        slope = (known[second] - known[first]) / (second**power - first**power)
        guess = int(max(0, first**power + (budget - known[first]) / slope) ** (1 / power)) if slope > 0 else 2 * low
        guess = max(low + 1, guess if guess < high else (low + high) // 2)
        known[guess] = required(guess)


@cache
def required_bytes(options: Options, form: str, name: str, size: int, batch: int) -> float:
    """The bytes of `COUNTED`; infinity if the GPU runs out of memory."""
    image_bytes = 3 * size**2 * batch * options.dtype.itemsize
    if on_gpu(options):
        try:
            row = measure(options, form, name, size, batch)
        except torch.OutOfMemoryError:
            return math.inf
        return image_bytes + row["weights_bytes"] + row["optimizer_bytes"] + row["peak_bytes"]
    model, _ = fake_model(options, form, name, size)
    row = static_bytes(model)
    kept = count_kept_bytes(options, form, name, size, batch, form == "bare")
    if form.endswith(CHECKPOINTED):  # the backward pass restores one block at a time
        plain = count_kept_bytes(options, form.removesuffix(CHECKPOINTED), name, size, batch, False)
        kept += (plain - kept) / len(model.blocks)
    # the backward pass frees kept tensors while it allocates gradients: the budget need not hold both in full
    return image_bytes + row["weights_bytes"] + row["optimizer_bytes"] + max(kept, row["gradient_bytes"])
