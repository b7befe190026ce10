"""Options that every benchmark takes: device, precision and amount of work."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Parts = Iterator[tuple[str, Iterator[dict]]]  # title -> its rows, which are measured when they are taken


@dataclass(frozen=True)
class Options:
    """How a benchmark runs.

    Attributes:
        full: run everything, which may take hours; otherwise a sample that takes minutes.
        device: name of a torch device.
        dtype: dtype of backbone and images; adapters stay float32.
        tiny: run at toy size, which takes seconds and only tries the code.
    """

    full: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tiny: bool = False

    def choose(self, tiny, sample, full):
        """Select the setting for this amount of work."""
        return tiny if self.tiny else full if self.full else sample


def check_device(parser: argparse.ArgumentParser, name: str) -> str:
    """The kind of a torch device, `cpu` or `cuda`. If there is no such device, the program ends with an error of the parser."""
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device {name}; expected cpu, cuda or cuda:N")
    return kind
