"""What the adapter costs beside a bare backbone: paired, interleaved runs of the bare model, the published form and rein.

python -m benchmarks.throughput --out benchmarks/results/<machine>/throughput.json

A training step of the bare model is a forward pass and the gradient of its input, as an adapter's needs it too.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from benchmarks import published

import rein


def forms(name: str, size: int) -> dict:
    """The same frozen weights, bare and refined."""
    torch.manual_seed(0)
    bare = timm.create_model(name, img_size=size, num_classes=0).requires_grad_(False).eval()
    return {"bare": bare, "published": published.wrap(copy.deepcopy(bare)), "rein": rein.wrap(copy.deepcopy(bare))}


def run(model, images, training: bool) -> float:
    """Seconds of one pass."""
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if training:
        model.zero_grad()
        model(images.detach().requires_grad_()).square().mean().backward()
    else:
        with torch.no_grad():
            model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, size: int, batch: int, training: bool, repeats: int, device: str, dtype: torch.dtype) -> dict:
    """Median seconds of each form, and the median and quartiles of its cost over the bare model's neighbouring run, in per cent."""
    models = {form: model.to(device, dtype) for form, model in forms(name, size).items()}
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    for model in models.values():
        run(model, images, training)
    times = {form: [] for form in models}
    for repeat in range(repeats):
        order = list(models)
        for form in order[repeat % len(order) :] + order[: repeat % len(order)]:
            times[form].append(run(models[form], images, training))
    row = {"model": name, "size": size, "batch": batch, "step": "training" if training else "inference"}
    row |= {"device": device, "dtype": str(dtype).removeprefix("torch."), "repeats": repeats}
    for form, seconds in times.items():
        costs = [100 * (mine / bare - 1) for mine, bare in zip(seconds, times["bare"], strict=True)]
        low, middle, high = statistics.quantiles(costs, n=4)
        row[form] = {"seconds": round(statistics.median(seconds), 5), "cost_percent": [round(c, 2) for c in (low, middle, high)]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224"])
    parser.add_argument("--sizes", nargs="+", default=["224x4", "512x1"], help="side x batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for name in options.models:
        for text in options.sizes:
            size, batch = map(int, text.split("x"))
            for training in (False, True):
                dtype = getattr(torch, options.dtype)
                results.append(measure(name, size, batch, training, options.repeats, options.device, dtype))
                print(results[-1], flush=True)
    if options.out:
        content = {"torch": torch.__version__, "timm": timm.__version__, "threads": torch.get_num_threads(), "results": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
