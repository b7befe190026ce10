"""`PixelLoss`: values of the losses, class weights and invalid settings."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rein
from rein.errors import InputError
from rein.heads.losses import PixelLoss

WEIGHTS = [1.0, 0.5, 4.0]


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 6, 8), generator=generator)
    labels[0, :2] = 255
    return torch.randn(2, 3, 6, 8, generator=generator, dtype=dtype), labels


def flat(logits, labels):
    """Logits (N, K) and one-hot labels (N, K) of the labelled pixels."""
    labelled = labels != 255
    return logits.movedim(1, -1)[labelled], F.one_hot(labels[labelled], 3).double()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_cross_entropy_is_the_one_of_torch(weights):
    logits, labels = example()
    expected = nn.CrossEntropyLoss(None if weights is None else torch.tensor(weights).double(), ignore_index=255)(logits, labels)
    assert PixelLoss(3, class_weights=weights)(logits, labels).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_dice_is_one_minus_the_coefficient_of_each_class(weights):
    logits, labels = example()
    logits_of, truth = flat(logits, labels)
    p = logits_of.softmax(-1)
    dice = 1 - 2 * (p * truth).sum(0) / (p + truth).sum(0)
    w = torch.tensor(weights or [1.0] * 3).double()
    assert PixelLoss(3, "dice", weights)(logits, labels).item() == pytest.approx(((dice * w).sum() / w.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_is_the_binary_focal_loss_of_each_class(weights):
    logits, labels = example()
    logits_of, truth = flat(logits, labels)
    p = logits_of.sigmoid()
    pt = torch.where(truth == 1, p, 1 - p)
    focal = (-((1 - pt) ** 2) * pt.log()).mean(0)
    w = torch.tensor(weights or [1.0] * 3).double()
    assert PixelLoss(3, "focal", weights)(logits, labels).item() == pytest.approx(((focal * w).sum() / w.sum()).item(), rel=1e-6)


def test_several_losses_are_summed_with_their_weights():
    logits, labels = example()
    parts = [PixelLoss(3, name, WEIGHTS)(logits, labels).item() for name in ("cross_entropy", "dice", "focal")]
    several = PixelLoss(3, {"cross_entropy": 1, "dice": 0.5, "focal": 10.0}, WEIGHTS)(logits, labels).item()
    assert several == pytest.approx(parts[0] + 0.5 * parts[1] + 10 * parts[2], rel=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "focal"])
def test_pixels_that_are_ignored_or_of_weight_zero_have_no_gradient(loss):
    logits, labels = example()
    logits.requires_grad_()
    PixelLoss(3, loss, WEIGHTS)(logits, labels).backward()
    assert (logits.grad.movedim(1, -1)[labels == 255] == 0).all()
    assert logits.grad.abs().max() > 0
    value = PixelLoss(3, "cross_entropy", [0.0, 0.0, 1.0])(logits, torch.zeros_like(labels))
    assert value.item() == 0


def test_a_loss_adds_nothing_to_a_state_dict_and_moves_with_its_module():
    loss = PixelLoss(3, {"dice": 1.0, "cross_entropy": 1.0}, WEIGHTS)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.parametrize(
    "loss", ["nosuch", {}, {"dice": 0.0}, {"dice": -1.0}, {"dice": float("nan")}, {"dice": True}, 3, {"x": 1.0}]
)
def test_an_unknown_loss_is_an_error(loss):
    with pytest.raises(InputError, match=r"loss is .*; expected one of cross_entropy, dice, focal, or a dictionary of some"):
        PixelLoss(3, loss)


@pytest.mark.parametrize(
    "weights", [[1.0, 2.0], [1.0] * 4, [0.0] * 3, [1.0, -1.0, 1.0], [1.0, 1e308, 1.0], "abc", "159", 5, {}, {0: 1, 1: 5, 2: 9}]
)
def test_invalid_class_weights_are_an_error(weights):
    with pytest.raises(InputError, match=r"class_weights is .*; expected a list of 3 numbers from 0 to 1,000,000, one for each"):
        PixelLoss(3, class_weights=weights)


def test_a_missing_library_is_an_error_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch.losses", None)
    assert PixelLoss(3, class_weights=WEIGHTS).weights == {"cross_entropy": 1.0}
    with pytest.raises(rein.MissingExtraError, match=r"pip install 'rein-adapter\[heads\]'"):
        PixelLoss(3, "dice")
