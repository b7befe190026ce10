from types import SimpleNamespace

import pytest
import timm
import torch

import rein
from rein.dgss import methods
from rein.dgss.data.transforms import Normalize
from rein.dgss.training.optimization import Optimization
from rein.dgss.training.task import SegmentationTask
from rein.errors import InputError


def segmenter(wrap=True):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True, patch_size=8)
    if wrap:
        rein.wrap(vit, rein.ReinConfig(query_dim=None, zero_init=True))
    return rein.Segmenter(vit, rein.heads.LinearHead(64, 2))


NORMALIZE = Normalize((0.5,) * 3, (0.25,) * 3)


def test_the_optimizer_has_the_authors_groups_and_the_poly_schedule():
    model = segmenter(wrap=False)
    task = SegmentationTask(model, NORMALIZE, Optimization(lr=1e-3))
    task.trainer = SimpleNamespace(max_steps=100)
    setup = task.configure_optimizers()
    optimizer, poly = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(1e-4) for p in model.backbone.parameters())
    assert all(rates[id(p)] == pytest.approx(1e-3) for p in model.head.parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.backbone.blocks[0].norm1.weight)] == 0
    assert decays[id(model.backbone.blocks[0].attn.qkv.weight)] == 0.05
    for _ in range(50):
        optimizer.step()
        poly.step()
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(1e-3 * 0.5**0.9)


def test_what_a_method_adds_can_have_a_rate_of_its_own():
    model = segmenter(wrap=True)
    task = SegmentationTask(model, NORMALIZE, Optimization(lr=1e-3, adapter_factor=0.3))
    task.trainer = SimpleNamespace(max_steps=100)
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(3e-4) for p in model.backbone.rein.parameters())
    assert all(rates[id(p)] == pytest.approx(1e-3) for p in model.head.parameters())
    with pytest.raises(InputError, match="rates must be above 0"):
        Optimization(adapter_factor=0.0)


def test_prompts_are_not_decayed_as_tokens_are_not():
    vit = methods.apply("vpt", timm.create_model("test_vit", num_classes=0, dynamic_img_size=True))
    task = SegmentationTask(rein.Segmenter(vit, rein.heads.LinearHead(64, 2)), NORMALIZE)
    task.trainer = SimpleNamespace(max_steps=10)
    groups = task.configure_optimizers()["optimizer"].param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(vit.vpt.prompts)] == 0
