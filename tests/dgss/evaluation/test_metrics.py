import math

import pytest
import torch
import torchmetrics

from rein.dgss.evaluation.metrics import ConfusionMatrix
from rein.errors import InputError


@pytest.mark.parametrize("seed", range(5))
def test_mean_iou_equals_torchmetrics(seed):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, 6, (3, 20, 30), generator=generator)
    labels = torch.randint(0, 6, (3, 20, 30), generator=generator)
    labels[labels == 4] = 255
    labels[:, :5] = predictions[:, :5]
    oracle = torchmetrics.JaccardIndex("multiclass", num_classes=6, ignore_index=255, average="none")
    ours = ConfusionMatrix(6)
    for prediction, label in zip(predictions, labels, strict=True):  # summed over a data set, not averaged over images
        ours.update(prediction, label)
    expected = oracle(predictions, labels)
    torch.testing.assert_close(ours.iou().float(), expected)
    assert ours.mean_iou() == pytest.approx(expected.mean().item())


def test_absent_classes_do_not_count_and_false_alarms_do():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert matrix.iou()[:3].tolist() == [1, 0.5, 0]
    assert math.isnan(matrix.iou()[3])
    assert matrix.mean_iou() == pytest.approx(0.5)


def test_ignored_pixels_do_not_count_and_nothing_gives_nan():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([255, 255], dtype=torch.uint8))
    assert matrix.counts.sum() == 0
    assert math.isnan(matrix.mean_iou())


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0], r"predictions have shape \(2,\), labels \(1,\)"),
        ([0, 1], [0, 2], "labels range from 0 to 2; expected 0 to 1"),
        ([0, 3], [0, 1], "predictions range from 0 to 3; expected 0 to 1"),
        ([0, 1], [0, -1], "labels range from -1"),
    ],
)
def test_what_cannot_be_counted_is_refused(predictions, labels, message):
    with pytest.raises(InputError, match=message):
        ConfusionMatrix(2).update(torch.tensor(predictions), torch.tensor(labels))
