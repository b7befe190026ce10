"""Adapters for backbones with several widths."""

import torch

import rein
from rein.stagewise import StagewiseAdapter, build_adapter

CONFIG = rein.ReinConfig(num_tokens=5, rank=2, query_dim=6)


def test_each_stage_has_its_own_adapter_and_the_queries_are_summed():
    torch.manual_seed(0)
    adapter = StagewiseAdapter([8, 8, 12, 16, 16], CONFIG)
    assert [stage.num_layers for stage in adapter.stages] == [2, 1, 2]
    assert adapter.num_layers == 5
    assert [adapter.stage_of(layer) for layer in range(5)] == [0, 0, 1, 2, 2]
    x = torch.randn(2, 3, 16)
    assert torch.equal(adapter(x, 4), adapter.stages[2](x, 1))
    assert adapter(x) is x
    assert torch.allclose(adapter.queries(), sum(stage.queries() for stage in adapter.stages))


def test_layers_of_equal_width_get_an_adapter_without_stages():
    assert type(build_adapter([8, 8], CONFIG, patch_size=16)) is rein.ReinAdapter
    assert type(build_adapter([8, 12], CONFIG, patch_size=16)) is StagewiseAdapter
