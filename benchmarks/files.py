"""The file of an adapter: its size, and the time to save it, to load it and to swap adapters in one backbone; the time of imports.

Files are written to the system's temporary folder, synced as `rein.save` does, and read while the system still caches them.

Imports are timed in fresh processes, in turn: torch, and, in processes that have imported torch, rein, the two packages that rein
imports, and timm, which rein imports only when a timm model is used.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

import rein
from benchmarks import forms, summary
from benchmarks.options import Options

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
IMPORTS = ("torch", "rein", "einops", "safetensors.torch", "timm")


def rows(options: Options) -> Iterator[dict]:
    """Sizes and times for each backbone, then the imports."""
    repeats, adapters = options.choose(2, 10, 50), options.choose(2, 4, 10)
    for name in options.choose(("test_vit",), MODELS[:2], MODELS):
        bare = forms.backbone(name, 224).to(options.device, options.dtype)
        yield from ({"model": name, **row} for row in adapter_rows(bare, repeats, adapters))
    yield from import_rows(options.choose(IMPORTS[1:2], IMPORTS, IMPORTS), options.choose(1, 3, 30))


def adapter_rows(model: nn.Module, repeats: int, adapters: int) -> Iterator[dict]:
    """Size of a file, and times to save it, load it into a bare model and swap it into a wrapped one."""
    backbone_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    rein.wrap(model)
    with tempfile.TemporaryDirectory() as folder:
        saved, *files = [Path(folder) / f"{number}.safetensors" for number in range(1 + adapters)]
        for file in files:
            model.rein.initialize()
            rein.save(model, file)
        file_bytes = files[0].stat().st_size
        parameters = sum(parameter.numel() for parameter in model.rein.parameters())
        sizes = {"parameters": parameters, "file_bytes": file_bytes, "backbone_bytes": backbone_bytes}
        yield {"measure": "size", **sizes, "fraction": round(file_bytes / backbone_bytes, 6)}
        yield {"measure": "save", **timed(lambda: rein.save(model, saved), repeats)}
        yield {"measure": "load into bare", **timed(lambda: rein.load(model, files[0]), repeats, lambda: rein.unwrap(model))}
        following = cycle(files)
        swap = timed(lambda: rein.load(model, next(following)), repeats)
        yield {"measure": "swap", "adapters": adapters, **swap, "swaps_per_second": round(1 / swap["seconds"], 1)}


def timed(action: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> dict:
    """Median and range of the seconds of `action`, after one warm-up. `before` runs before each action and is not timed."""
    seconds = []
    for _ in range(1 + repeats):
        before()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return times(seconds[1:])


def times(seconds: Sequence[float]) -> dict:
    """Median and range as entries of a row."""
    names = ("seconds", "seconds_least", "seconds_most")
    return dict(zip(names, summary.median_and_range(seconds, 6), strict=True)) | {"repeats": len(seconds)}


def import_rows(packages: Sequence[str], repeats: int) -> Iterator[dict]:
    """Time of each import, after that of torch."""
    seconds: dict[str, list[float]] = {package: [] for package in packages}
    for _ in range(1 + repeats):  # the first repeat fills the file cache
        for package, elapsed in seconds.items():
            first = "import time" if package == "torch" else "import time, torch"
            program = f"{first}; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
            elapsed.append(float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout))
    for package, elapsed in seconds.items():
        yield {"measure": "import", "import": package, "after": None if package == "torch" else "torch", **times(elapsed[1:])}
