"""Options that every benchmark takes: device, precision and amount of work."""

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
