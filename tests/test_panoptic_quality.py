"""Panoptic results of `Mask2FormerHead`, measured with PanopticQuality of torchmetrics as docs/other-tasks.md shows."""

import pytest
import torch
from torchmetrics.detection import PanopticQuality

import rein
from rein.heads import Panoptic
from squares import run_block, squares

NOTHING = 3


def make_metric():
    """As on the page: the classes 1, 2 and 0, and pixels without a segment."""
    return PanopticQuality(things={1, 2}, stuffs={0, NOTHING}, return_per_class=True)


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    return run_block("PanopticQuality")


def test_the_quality_of_two_segments_and_a_gap_is_the_one_worked_out_by_hand(page):
    segments = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2]])
    found = page["class_and_segment"](Panoptic(segments, torch.tensor([0, 1]), torch.ones(2)))
    classes = torch.tensor([[0, 0, 0, 0, 0, 2], [0, 0, 0, 1, 1, 1]])
    truth = torch.stack((classes, torch.zeros_like(classes)), -1)[None]
    quality = make_metric()
    quality.update(found, truth)
    # class 1 is found exactly, class 2 is missed, and of class 0 7 of 8 pixels are found
    assert quality.compute().flatten()[:-1].tolist() == pytest.approx([1.0, 0.0, 7 / 8])


def test_a_model_that_finds_nothing_has_quality_0(page):
    nothing = Panoptic(torch.zeros(2, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    quality, classes = make_metric(), torch.tensor([[0, 0, 0], [1, 2, 2]])
    quality.update(page["class_and_segment"](nothing), torch.stack((classes, torch.zeros_like(classes)), -1)[None])
    assert quality.compute().flatten().tolist() == [0.0] * 4
    assert page["NOTHING"] == NOTHING


def normalised(images, vit):
    mean, std = (torch.tensor(each)[:, None, None] for each in rein.backbones.normalization(vit))
    return torch.stack([(image - mean) / std for image in images])


def semantic(targets):
    labels = torch.zeros(len(targets), 64, 64, dtype=torch.long)
    for label, target in zip(labels, targets, strict=True):
        left, top, right, bottom = target["boxes"][0].int().tolist()
        label[top:bottom, left:right] = target["labels"][0]
    return labels


def quality_of(model, page):
    images, targets = squares(8, torch.Generator().manual_seed(1))  # other squares than in training
    labels = semantic(targets)
    quality = make_metric()
    for panoptic, true in zip(
        model.panoptic(normalised(images, model.backbone), things=[1, 2]),
        torch.stack((labels, torch.zeros_like(labels)), -1),
        strict=True,
    ):
        quality.update(page["class_and_segment"](panoptic), true[None])
    return quality.compute().flatten()[:-1].mean().item()


@pytest.mark.slow
def test_panoptic_quality_rises_in_training(page):
    model = page["model"]
    assert quality_of(model, page) < 0.2
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(rein.param_groups(model, lr=1e-3))
    model.train()
    torch.manual_seed(0)  # points of the loss
    for _ in range(80):
        images, targets = squares(4, generator)
        loss = model(normalised(images, model.backbone), semantic(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert quality_of(model, page) > 0.7
    instances = model.instances(normalised(squares(2, torch.Generator().manual_seed(1))[0], model.backbone), limit=3)
    assert [int(each.labels[each.labels > 0][0]) for each in instances] == [1, 2]  # the best object has the class of the square
