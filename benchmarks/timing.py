"""Time several functions side by side.

Runs are interleaved, so that a slow phase of the machine affects all of them, and are compared with each other within a repeat.
"""

import time
from collections.abc import Callable, Mapping

import torch


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one run; on a GPU, between two CUDA events."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run in every repeat. Each repeat executes all runs, in a different order."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warmup, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            elapsed = seconds(runs[name], device)
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def cost_percent(values: list[float], bare: list[float]) -> list[float]:
    """Extra time of each run over the bare run of the same repeat, in per cent."""
    return [100 * (value / other - 1) for value, other in zip(values, bare, strict=True)]
