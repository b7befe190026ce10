"""What every benchmark is told: on what to run, in which precision, and how much."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """How a benchmark runs.

    Attributes:
        full: everything, for hours where it must be; without it a sample of some minutes.
        device: as torch names it.
        dtype: of backbone and images; adapters stay float32.
        tiny: models and counts so small that only the code is tried, in seconds.
    """

    full: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tiny: bool = False

    def choose(self, tiny, sample, full):
        """The setting for this amount of work."""
        return tiny if self.tiny else full if self.full else sample
