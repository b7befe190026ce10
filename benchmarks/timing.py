"""Time things side by side: interleaved, so that what slows the machine for a while slows all of them, and compared pair by pair."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(run: Callable[[], object], device: str) -> float:
    """One run, on a GPU by its own clock."""
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
    """Seconds of every run in every repeat. In each repeat all run, in another order each time."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warmup, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            took = seconds(runs[name], device)
            if repeat >= 0:
                times[name].append(took)
    return times


def middle(values: list[float], digits: int = 6) -> float:
    """The median."""
    return round(statistics.median(values), digits)


def quartiles(values: list[float], digits: int = 2) -> list[float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return [round(values[0], digits)] * 3
    return [round(value, digits) for value in statistics.quantiles(values, n=4, method="inclusive")]


def interval(values: list[float], digits: int = 2) -> list[float]:
    """Where the true median lies with a probability of 95 %, from the order of the values alone; all of them where they are few."""
    ordered = sorted(values)
    low = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))) - 1)
    return [round(ordered[low], digits), round(ordered[-1 - low], digits)]


def cost_percent(values: list[float], bare: list[float]) -> list[float]:
    """By how much each run took longer than the bare one of its repeat."""
    return [100 * (mine / other - 1) for mine, other in zip(values, bare, strict=True)]
