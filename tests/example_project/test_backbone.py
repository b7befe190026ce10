import copy

import torch
from backbone import MyBackbone

import rein


def test_my_backbone_works_with_rein(rein_check_backbone):
    model = MyBackbone()
    checked = rein_check_backbone(model, torch.randn(2, 3, 32, 32), blocks=list(model.layers), compile=False)
    assert {"prefix rows", "gradients", "save and load"} <= set(checked)


def test_only_the_adapter_trains(rein_tiny_vit):
    before = copy.deepcopy(rein_tiny_vit.state_dict())
    model = rein.wrap(rein_tiny_vit)
    optimizer = torch.optim.AdamW(rein.param_groups(model, lr=1e-3))
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.rein.parameters())


def test_a_saved_segmenter_gives_the_same_logits(rein_pocket_vit, tmp_path):
    bare, images = copy.deepcopy(rein_pocket_vit), torch.randn(1, 3, 64, 96)
    head = rein.heads.LinearHead([rein_pocket_vit.embed_dim] * 4, num_classes=3)
    segmenter = rein.Segmenter(rein.wrap(rein_pocket_vit), head).eval()
    segmenter.save(tmp_path / "segmenter.safetensors")
    again = rein.Segmenter.load(tmp_path / "segmenter.safetensors", bare).eval()
    assert torch.equal(again(images), segmenter(images))
