"""The detector of docs/other-tasks.md, which is FCOS of torchvision over the refined features of a ViT, learns to find squares."""

import pytest
import torch
from torchvision.ops import box_iou

import rein
from squares import run_block, squares


@pytest.fixture
def detector(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return run_block("FCOS")["detector"]


@pytest.mark.slow
def test_a_detector_over_refined_features_learns_to_find_squares(detector):
    vit = detector.backbone.vit
    frozen = {key: value.clone() for key, value in vit.state_dict().items() if not key.startswith("rein.")}
    adapter = {key: value.clone() for key, value in vit.rein.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(rein.param_groups(detector, lr=2e-3))
    detector.train()
    losses = []
    for _ in range(60):
        loss = sum(detector(*squares(4, generator)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in frozen.items())
    assert not all(torch.equal(vit.rein.state_dict()[key], value) for key, value in adapter.items())

    detector.eval()
    images, targets = squares(8, torch.Generator().manual_seed(1))  # other squares
    with torch.no_grad():
        found = detector(images)
    hits = [
        len(boxes["scores"]) > 0
        and boxes["labels"][0] == target["labels"][0]
        and box_iou(boxes["boxes"][:1], target["boxes"])[0, 0] > 0.6
        for boxes, target in zip(found, targets, strict=True)
    ]
    assert sum(map(bool, hits)) >= 7


def test_a_detector_loads_from_the_adapter_and_the_rest(detector, tmp_path):
    with torch.no_grad():
        detector.backbone.vit.rein.scale.fill_(0.5)
    rein.save(detector.backbone.vit, tmp_path / "mine.safetensors")
    rest = {name: value for name, value in detector.state_dict().items() if not name.startswith("backbone.vit.")}
    images = [torch.rand(3, 64, 64)]
    detector.eval()
    with torch.no_grad():
        expected = detector.backbone(images[0][None])
        with rein.disabled(detector.backbone.vit):
            assert not torch.allclose(detector.backbone(images[0][None])["0"], expected["0"])

    torch.manual_seed(1)
    again = run_block("FCOS")["detector"].eval()
    rein.load(again.backbone.vit, tmp_path / "mine.safetensors")
    assert not again.load_state_dict(rest, strict=False).unexpected_keys
    with torch.no_grad():
        assert all(torch.equal(value, expected[name]) for name, value in again.backbone(images[0][None]).items())


def test_what_trains_in_a_detector_is_the_adapter_and_everything_outside_the_vit(detector):
    trained = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("backbone.vit.")} == {
        f"backbone.vit.rein.{name}" for name, _ in detector.backbone.vit.rein.named_parameters()
    }
    assert {name for name, _ in detector.named_parameters() if not name.startswith("backbone.vit.")} <= trained
