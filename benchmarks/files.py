"""An adapter's file: how large it is, and how long it takes to save it, to load it, and to swap adapters over one backbone.

Files are written to the system's folder of temporary files, synced as `rein.save` does, and read again while the system still has
them in memory. Last comes what imports cost: torch's, and then in fresh processes that have imported torch that of rein, of the
two packages that it imports, and of timm, which it does not import until a timm model is used. The processes take turns.
"""

import statistics
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
from benchmarks import forms
from benchmarks.options import Options

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
IMPORTS = ("torch", "rein", "einops", "safetensors.torch", "timm")


def rows(options: Options) -> Iterator[dict]:
    """Sizes and times for each backbone, then the imports."""
    repeats, adapters = options.choose(2, 10, 50), options.choose(2, 4, 10)
    for name in options.choose(("test_vit",), MODELS[:2], MODELS):
        bare = forms.backbone(name, 224).to(options.device, options.dtype)
        yield from ({"model": name, **row} for row in of_adapters(bare, repeats, adapters))
    yield from of_imports(options.choose(IMPORTS[1:2], IMPORTS, IMPORTS), options.choose(1, 3, 30))


def of_adapters(model: nn.Module, repeats: int, adapters: int) -> Iterator[dict]:
    """Size, save, load into a bare model, and swap in a wrapped one."""
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
    """Median and range of the seconds that `action` takes, after one to warm up; `before` it, something that is not timed."""
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
    return spread(seconds[1:])


def spread(seconds: Sequence[float]) -> dict:
    """As the keys of a row."""
    numbers = {"seconds": statistics.median(seconds), "seconds_least": min(seconds), "seconds_most": max(seconds)}
    return {key: round(value, 6) for key, value in numbers.items()} | {"repeats": len(seconds)}


def of_imports(packages: Sequence[str], repeats: int) -> Iterator[dict]:
    """Each import by itself, beyond that of torch."""
    seconds: dict[str, list[float]] = {package: [] for package in packages}
    for _ in range(1 + repeats):  # the first fills the system's memory
        for package, taken in seconds.items():
            first = "import time" if package == "torch" else "import time, torch"
            program = f"{first}; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
            taken.append(float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout))
    for package, taken in seconds.items():
        yield {"measure": "import", "import": package, "after": None if package == "torch" else "torch", **spread(taken[1:])}
