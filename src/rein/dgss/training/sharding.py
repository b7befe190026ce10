"""Spread a segmenter over devices by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rein import backbones
from rein.segmenter import Segmenter


def shard(segmenter: Segmenter, mesh: Any) -> None:
    """Shard in place: one unit per block, and one for everything else, adapter and head included.

    Args:
        segmenter: the model.
        mesh: one-dimensional `DeviceMesh`.
    """
    from torch.distributed.fsdp import fully_shard

    for block in backbones.find_blocks(segmenter.backbone):
        fully_shard(segmenter.backbone.get_submodule(block.path), mesh=mesh)
    scalars = {parameter for parameter in segmenter.parameters() if parameter.ndim == 0}  # FSDP2 refuses the adapter's scale
    fully_shard(segmenter, mesh=mesh, ignored_params=scalars)
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_MeanOverDevices(mesh))


class _MeanOverDevices:
    """Average a gradient over the devices of a mesh, as FSDP2 does for the parameters that it shards."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, group=self.mesh.get_group())
            parameter.grad /= self.mesh.size()
