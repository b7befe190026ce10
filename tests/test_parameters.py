"""Parameter groups."""

import pytest
import torch
from torch import nn

import rein
from models import build
from rein.errors import InputError

SMALL = rein.ReinConfig(num_tokens=6, rank=2, query_dim=8)


def segmenter():
    return rein.Segmenter(rein.wrap(build("vit"), SMALL), rein.heads.FPNHead([32] * 4, 3, channels=8, tower_channels=8))


def by_parameter(groups, key):
    return {id(p): group[key] for group in groups for p in group["params"]}


@pytest.mark.parametrize("adapter_lr", [1e-4, 0.3])
def test_the_adapter_has_a_learning_rate_of_its_own(adapter_lr):
    model = segmenter()
    plain, groups = rein.param_groups(model, 1e-2), rein.param_groups(model, 1e-2, adapter_lr=adapter_lr)
    rates, adapter = by_parameter(groups, "lr"), {id(p) for p in model.backbone.rein.parameters()}
    assert all(rate == (adapter_lr if key in adapter else 1e-2) for key, rate in rates.items())
    assert by_parameter(groups, "weight_decay") == by_parameter(plain, "weight_decay")
    assert len(groups) == 4
    assert set(rates) == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.AdamW(groups).step()


@pytest.mark.parametrize("module", [lambda m: m.backbone, lambda m: m.backbone.rein, lambda m: nn.ModuleList([m])])
def test_the_adapter_is_found_in_any_module_that_contains_it(module):
    model = segmenter()
    rates = by_parameter(rein.param_groups(module(model), 1e-2, adapter_lr=1e-3), "lr")
    assert all(rates[id(p)] == 1e-3 for p in model.backbone.rein.parameters())


def test_the_adapters_of_all_stages_have_the_same_rate():
    import timm

    model = rein.wrap(timm.create_model("test_convnext", num_classes=0), SMALL)
    assert {group["lr"] for group in rein.param_groups(model, 1e-2, adapter_lr=1e-3)} == {1e-3}


def test_without_a_rate_of_its_own_the_groups_are_those_of_the_authors():
    model = segmenter()
    groups = rein.param_groups(model, 1e-2)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.05), (1e-2, 0.0)]
    same = rein.param_groups(model, 1e-2, adapter_lr=1e-2)
    assert [[id(p) for p in group["params"]] for group in same] == [[id(p) for p in group["params"]] for group in groups]


def test_a_rate_for_an_adapter_that_is_not_there_is_an_error():
    with pytest.raises(
        InputError, match=r"adapter_lr is 0.001, but this VisionTransformer has no adapter; expected a wrapped model"
    ):
        rein.param_groups(build("vit"), adapter_lr=1e-3)


@pytest.mark.parametrize(
    "rates", [{"lr": -1.0}, {"lr": float("nan")}, {"lr": "x"}, {"adapter_lr": -1e-3}, {"weight_decay": -1.0}]
)
def test_a_rate_that_is_not_a_number_of_at_least_0_is_refused(rates):
    (name,) = rates
    with pytest.raises(rein.InputError, match=f"{name} is .*; expected a finite number of at least 0"):
        rein.param_groups(rein.wrap(build("vit")), **rates)
