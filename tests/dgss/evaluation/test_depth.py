"""Errors of predicted depth, compared with torchmetrics and with numbers that are worked out by hand."""

import math

import pytest
import torch
import torchmetrics

from rein.dgss.evaluation.depth import DepthErrors
from rein.errors import InputError


def test_the_errors_of_two_pixels_are_those_worked_out_by_hand():
    errors = DepthErrors()
    errors.update(torch.tensor([[[12.0, 30.0]]]), torch.tensor([[[10.0, 20.0]]]))
    assert errors.means() == pytest.approx({"abs_rel": 0.35, "rmse": math.sqrt(52), "delta_1.25": 0.5})


@pytest.mark.parametrize(("factor", "share"), [(1.249, 1.0), (1.251, 0.0), (1 / 1.249, 1.0), (1 / 1.251, 0.0)])
def test_delta_counts_pixels_whose_ratio_is_below_its_bound_in_both_directions(factor, share):
    errors, depth = DepthErrors(), torch.full((1, 2, 2), 8.0)
    errors.update(factor * depth, depth)
    assert errors.means()["delta_1.25"] == share


def test_for_one_image_the_errors_are_those_of_torchmetrics():
    true, predicted = torch.rand(2, 1, 8, 9, generator=torch.Generator().manual_seed(0)).mul(40).add(1)
    errors = DepthErrors()
    errors.update(predicted, true)
    relative = torchmetrics.functional.mean_absolute_percentage_error(predicted, true)
    rmse = torchmetrics.functional.mean_squared_error(predicted, true, squared=False)
    assert errors.means()["abs_rel"] == pytest.approx(relative.item(), rel=1e-5)
    assert errors.means()["rmse"] == pytest.approx(rmse.item(), rel=1e-5)


def test_every_image_counts_the_same_and_batches_do_not_matter():
    true = torch.full((3, 1, 2), 10.0)
    true[0, 0, 1] = 0.0  # one known pixel
    true[2] = math.nan  # none
    predicted = torch.tensor([11.0, 12.0, 13.0])[:, None, None].expand(3, 1, 2)
    together, apart = DepthErrors(), DepthErrors()
    together.update(predicted[:, None], true[:, None])
    for one, other in zip(predicted.split(1), true.split(1), strict=True):
        apart.update(one, other)
    assert together.means() == apart.means()
    assert together.images == 2
    assert together.means()["abs_rel"] == pytest.approx((0.1 + 0.2) / 2)


def test_pixels_outside_the_range_and_the_mask_are_not_counted():
    true = torch.tensor([[[0.0, -1.0, math.nan, math.inf, 81.0, 10.0, 10.0]]])
    predicted = torch.tensor([[[5.0, 5.0, 5.0, 5.0, 5.0, 10.0, 99.0]]])
    mask = torch.tensor([[[True] * 6 + [False]]])
    errors = DepthErrors()
    errors.update(predicted, true, mask)
    assert errors.means() == {"abs_rel": 0.0, "rmse": 0.0, "delta_1.25": 1.0}


def test_without_a_known_pixel_the_errors_are_not_numbers():
    errors = DepthErrors()
    errors.update(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
    assert all(math.isnan(value) for value in errors.means().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 1, 4, 4), torch.ones(2, 4, 4)), r"have shapes \[\(2, 1, 4, 4\), \(2, 4, 4\)\]; expected one shape"),
        ((torch.ones(4, 4), torch.ones(4, 4)), "expected one shape"),
        ((torch.ones(1, 4, 4), torch.ones(1, 4, 4), torch.ones(1, 4, 4)), "mask is torch.float32; expected torch.bool"),
        ((torch.zeros(1, 4, 4), torch.ones(1, 4, 4)), "not finite or not above 0"),
        ((torch.full((1, 4, 4), math.nan), torch.ones(1, 4, 4)), "not finite or not above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        DepthErrors().update(*arguments)


@pytest.mark.parametrize("depth_range", [(0, 80), (80, 1), (1, math.inf), 80, ("1", "80")])
def test_a_wrong_range_is_refused(depth_range):
    with pytest.raises(InputError, match="it must be two finite numbers above 0"):
        DepthErrors(depth_range)
