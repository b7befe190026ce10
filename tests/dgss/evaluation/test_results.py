"""Tables and files of results: what a mean covers, and why there is none."""

import json

import pytest
import torch

from rein.dgss.evaluation.comparison import compare
from rein.dgss.evaluation.metrics import ConfusionMatrix
from rein.dgss.evaluation.results import Result, class_table, read_run, result_table, write_run
from rein.dgss.labels import LabelSpace
from rein.errors import InputError

NAN = float("nan")
SPACE = LabelSpace(("sky", "ground", "thing"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))
ROLES = {"day": "source", "day val": "held-out source", "fog": "unseen", "night": "unseen", "void": "unseen"}
MIOU = {"day": 0.9, "day val": 0.8, "fog": 0.3, "night": 0.5, "void": NAN}


def result(method="rein", **ious):
    """A result in the domains of `ROLES`; `ious` sets the IoU of the classes in single domains."""
    iou = {name: dict.fromkeys(SPACE.names, NAN if name == "void" else MIOU[name]) for name in ROLES}
    iou |= {name: dict(zip(SPACE.names, values, strict=True)) for name, values in ious.items()}
    return Result(method, 1000, 10, 5, dict(MIOU), iou)


def evaluated(folder, roles=ROLES, sources=("day",), **changes):
    """The folder of a run that was evaluated."""
    kept = ("backbone", "pretrained", "method_settings", "seed", "steps", "checkpoint")
    settings = {**dict.fromkeys(kept), "method": "rein", "evaluation": {"limit": None}}
    write_run(folder, settings | changes, result(), SPACE, {}, sources, roles)
    return folder


def test_the_mean_of_unseen_leaves_out_held_out_sources_and_domains_without_a_mean():
    assert result().unseen(ROLES) == ["fog", "night"]
    assert result().mean_of_unseen(ROLES) == pytest.approx(0.4)
    assert torch.isnan(torch.tensor(result().mean_of_unseen(dict.fromkeys(ROLES, "source"))))


def test_the_table_says_which_domains_the_mean_covers_and_why_there_is_a_dash():
    lines = result_table([result("freeze"), result("rein")], ROLES).splitlines()
    assert lines[0].split()[-9:] == ["day*", "day", "val*", "fog", "night", "void", "mean", "of", "unseen"]
    assert lines[2].split()[-6:] == ["90.0", "80.0", "30.0", "50.0", "-", "40.0"]
    assert lines[4:] == [
        "",
        "* day: source",
        "* day val: held-out source",
        "mean of unseen: fog, night",
        "void: no mean IoU, because fewer than two classes are labelled",
    ]
    assert result_table([result()], dict.fromkeys(ROLES, "source")).splitlines()[-2] == "mean of unseen: no domain"


def test_the_table_of_classes_says_over_how_many_classes_a_mean_is():
    lines = class_table(result(fog=(0.6, 0.0, NAN))).splitlines()
    assert lines[4].split() == ["thing", "90.0", "80.0", "-", "50.0", "-"]
    assert lines[6:] == ["", "fog: mean over 2 of 3 classes", "void: no mean IoU, because fewer than two classes are labelled"]


def test_one_labelled_class_has_no_mean_iou_even_if_it_is_predicted_everywhere():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 255]))
    assert matrix.iou()[1] == 1
    assert torch.isnan(torch.tensor(matrix.mean_iou()))
    matrix.update(torch.tensor([1]), torch.tensor([0]))
    assert matrix.mean_iou() == pytest.approx((2 / 3 + 0) / 2)


def test_the_file_states_the_roles_and_what_the_mean_covers(tmp_path):
    stored = json.loads((evaluated(tmp_path) / "test" / "results.json").read_text())
    assert stored["roles"] == ROLES
    assert stored["unseen"] == ["fog", "night"]
    assert stored["results"][0]["mean_miou_of_unseen"] == pytest.approx(0.4)
    assert stored["results"][0]["miou"]["void"] is None
    assert read_run(tmp_path).roles == ROLES


def test_a_file_without_roles_is_not_read_as_if_every_target_were_unseen(tmp_path):
    path = evaluated(tmp_path) / "test" / "results.json"
    content = json.loads(path.read_text())
    del content["roles"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"results.json cannot be read as results of rein test .*'roles'.*Run rein test again"):
        read_run(tmp_path)


def test_runs_of_different_sources_are_compared_on_the_domains_that_no_run_has_seen(tmp_path):
    first = evaluated(tmp_path / "a")
    second = evaluated(tmp_path / "b", ROLES | {"day": "unseen", "fog": "source"}, ["fog"])
    table = compare([first, second], tmp_path / "out")
    assert table.splitlines()[-5:] == [
        "* day: source",
        "* day val: held-out source",
        "* fog: source",
        "mean of unseen: night",
        "void: no mean IoU, because fewer than two classes are labelled",
    ]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["unseen"] == ["night"]
    assert stored["targets"] == ["night", "void"]
    assert stored["sources"] == ["day", "fog"]
    assert [each["mean_miou_of_unseen"] for each in stored["results"]] == [0.5, 0.5]
