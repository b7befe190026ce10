"""Adapters for backbones with several widths, and the choice of the adapter for given widths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from rein.adapter import ReinAdapter
from rein.config import ReinConfig
from rein.refinement import PassCache


class StagewiseAdapter(nn.Module):
    """One `ReinAdapter` per stage, for backbones whose width changes. Layers are numbered through all stages.

    Args:
        widths: C of every layer in order. Consecutive layers of equal width form a stage.
        config: configuration of every stage.
        patch_size: as in `ReinAdapter`.
    """

    def __init__(self, widths: Sequence[int], config: ReinConfig | None = None, *, patch_size: int = 16) -> None:
        super().__init__()
        self.config, self.widths = config or ReinConfig(), tuple(widths)
        stages = [(width, len(list(group))) for width, group in groupby(self.widths)]
        self.stages = nn.ModuleList(ReinAdapter(width, depth, self.config, patch_size=patch_size) for width, depth in stages)
        self._index = [(stage, layer) for stage, (_, depth) in enumerate(stages) for layer in range(depth)]

    @property
    def num_layers(self) -> int:
        """L, over all stages."""
        return len(self.widths)

    def _stages(self) -> list[ReinAdapter]:
        return [cast(ReinAdapter, stage) for stage in self.stages]

    def stage_of(self, layer: int) -> int:
        """Index of the stage that contains `layer`, both from 0."""
        return self._index[layer][0]

    def locate(self, layer: int) -> tuple[ReinAdapter, int]:
        """The stage's adapter that refines `layer`, and the index of the layer in it."""
        stage, layer = self._index[layer]
        return self._stages()[stage], layer

    def no_decay_parameters(self) -> list[nn.Parameter]:
        """The parameters without weight decay in the authors' recipe: the tokens and s of every stage."""
        return [parameter for stage in self._stages() for parameter in stage.no_decay_parameters()]

    def forward(
        self, x: Tensor, layer: int | None = None, num_prefix_tokens: int = 0, pass_cache: PassCache | None = None
    ) -> Tensor:
        """As `ReinAdapter.forward`, with `layer` counted through all stages and x (..., N, C_stage)."""
        if layer is None:
            return x
        stage, layer = self._index[layer]
        return self.stages[stage](x, layer, num_prefix_tokens, pass_cache)  # through __call__, for hooks

    def queries(self) -> Tensor:
        """The sum of the stages' queries, (m, q)."""
        return torch.stack([stage.queries() for stage in self._stages()]).sum(0)


def build_adapter(widths: Sequence[int], config: ReinConfig, *, patch_size: int) -> ReinAdapter | StagewiseAdapter:
    """A `ReinAdapter` if all layers have the same width, else a `StagewiseAdapter`."""
    if len(set(widths)) == 1:
        return ReinAdapter(widths[0], len(widths), config, patch_size=patch_size)
    return StagewiseAdapter(widths, config, patch_size=patch_size)
