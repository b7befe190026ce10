"""Growth of the adapter's cost with patch tokens (up to 2048 x 2048 pixels), layers, tokens m, rank r and images.

Only the adapter runs, layer by layer, on random features. In theory its time is linear in each of these. The report gives R² of a
straight line; R² is low where the time hardly varies, as with m. The last rows give adapter swaps per second, from memory and from
files, among several adapters.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import rein
from benchmarks import forms, summary, timing
from benchmarks.options import Options, Parts

BASE = {"tokens": 1024, "layers": 12, "m": 100, "r": 16, "images": 1}
PIXELS = (256, 512, 768, 1024, 1536, 2048)  # sides of square images, patch 16


def settings(options: Options) -> Iterator[tuple[str, list[int]]]:
    """The quantities that are varied, and their values."""
    sides = options.choose((32, 64), (256, 512, 1024, 2048), PIXELS)
    yield "tokens", [(side // 16) ** 2 for side in sides]
    yield "layers", options.choose([1, 2], [6, 12, 24], [4, 8, 12, 16, 24, 32, 40])
    yield "m", options.choose([5, 10], [50, 100, 200], [25, 50, 75, 100, 150, 200, 300, 400])
    yield "r", options.choose([2, 4], [8, 16, 64], [4, 8, 16, 32, 64, 128])
    yield "images", options.choose([1, 2], [1, 2, 4], [1, 2, 4, 8, 16])


def passes(width: int, setting: dict, options: Options) -> dict:
    """Inference and training step over all layers."""
    config = rein.ReinConfig(num_tokens=setting["m"], rank=setting["r"])
    adapter = rein.ReinAdapter(width, setting["layers"], config).to(options.device)
    x = torch.randn(setting["images"], setting["tokens"], width, device=options.device, dtype=options.dtype)

    def refine(features):
        for layer in range(setting["layers"]):
            features = adapter(features, layer)
        return features

    def inference():
        with torch.no_grad():
            refine(x)

    def training():
        adapter.zero_grad()
        refine(x.detach().requires_grad_()).backward(x)

    return {"inference": inference, "training": training}


def parts(options: Options) -> Parts:
    for varied, values in settings(options):
        yield varied, varied_rows(options, varied, values)
    yield "swaps", swaps(options)


def varied_rows(options: Options, varied: str, values: list[int]) -> Iterator[dict]:
    """Times for every value of one quantity."""
    width, repeats = options.choose((16, 2), (384, 5), (768, 5))
    cases = [{**BASE, **options.choose({"tokens": 16, "layers": 2}, {}, {}), varied: value} for value in values]
    runs = {}
    for case in cases:
        for step, run in passes(width, case, options).items():
            runs[step, case[varied]] = run
    times = timing.interleaved(runs, repeats, options.device)
    for (step, value), elapsed in times.items():
        fixed = {key: amount for key, amount in cases[0].items() if key != varied}
        row = {"varied": varied, "value": value, "step": step, "width": width, **fixed, "repeats": repeats}
        yield {**row, "seconds": summary.median(elapsed), "seconds_quartiles": summary.quartiles(elapsed, 6)}


def swaps(options: Options) -> Iterator[dict]:
    """Swaps of the adapter of a wrapped backbone, in turn among several adapters."""
    name = options.choose("test_vit", "vit_small_patch16_224", "vit_large_patch16_224")
    bare = forms.backbone(name, options.choose(32, 224, 512)).to(options.device, options.dtype)
    model, repeats = rein.wrap(bare), options.choose(2, 20, 50)
    for held in options.choose([2], [2, 8], [2, 8, 32]):
        with tempfile.TemporaryDirectory() as folder:
            states, files = [], []
            for number in range(held):
                model.rein.initialize()
                states.append(copy.deepcopy(model.rein.state_dict()))
                files.append(Path(folder) / f"{number}.safetensors")
                rein.save(model, files[-1])
            turn = iter(range(10**9))
            runs = {
                "memory": lambda: model.rein.load_state_dict(states[next(turn) % held]),  # noqa: B023
                "file": lambda: rein.load(model, files[next(turn) % held]),  # noqa: B023
            }
            for source, elapsed in timing.interleaved(runs, repeats, options.device).items():
                row = {"varied": "adapters held", "value": held, "from": source, "model": name, "repeats": repeats}
                yield {**row, "seconds": summary.median(elapsed), "swaps_per_second": round(1 / summary.median(elapsed), 1)}
